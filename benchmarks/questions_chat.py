"""Five questions about one image: `VisualChat`, which keeps what it computed, against five separate calls.

At the paper's shapes: 10 views of 577 CLIP tokens merged to 145 of width 1,024, a fusion decoder of 20 layers, Llama-2
7B, m = 256 and m' = 8, questions of about 15 tokens, answers of 8. Weights are random. The towers are built with fewer
layers, the time inside the layers is multiplied by how many are missing, and everything else (embeddings, merge, head,
pictures, text) counts as it is. Compared is process time on one thread, so that other work on the machine weighs on all
alike.

Two ways to ask: a conversation, whose later turns show the image by m' tokens behind all that was said, and five first
questions, each with m tokens of its own.

    OMP_NUM_THREADS=1 python benchmarks/questions_chat.py --output benchmarks/results
"""

import argparse
import datetime
import os
import platform
import shlex
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import set_seed

from fusedvlm import FusedVLMConfig
from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration
from fusedvlm.processing import build_processor
from fusedvlm.serving import VisualChat, user_message
from fusedvlm.serving.answering import GIBIBYTE, Answerer
from fusedvlm.serving.byte_cache import ByteCache
from fusedvlm.tests import tiny

PAPER = {"vision": 24, "fusion": 20, "llm": 32}
BUILT = {"vision": 2, "fusion": 2, "llm": 2}
PHASES = ("encode", "fuse", "prefill", "decode", "other")
QUESTIONS = [
    "what is in the image, and how many objects are there?",
    "describe the sofa in detail, please. what colour is it?",
    "is there a cat in the picture? yes or no, please.",
    "which object is left of the lazy dog in the picture?",
    "how many brown foxes jump over the quick red dog?",
]
ANSWER = 8


class Clock:
    """CPU seconds of phases, as if the towers had all their layers."""

    def __init__(self, model) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.stack: list[tuple[str, float, float]] = []
        self.llm_phase = "prefill"
        core = model.model
        for part, tower in (("vision", core.vision_tower), ("fusion", core.fuser), ("llm", core.language_model)):
            layers = next(m for m in tower.modules() if isinstance(m, torch.nn.ModuleList))
            for layer in layers:
                self._watch(layer, part, PAPER[part] / len(layers))
        core.language_model.register_forward_pre_hook(self._which, with_kwargs=True)
        for part, module in (("vision", core.vision_tower), ("vision", core.merger), ("fusion", core.fuser),
                             ("llm", core.language_model), ("llm", model.lm_head)):  # fmt: skip
            self._watch(module, part, 1.0)

    def _which(self, module, args, kwargs) -> None:
        self.llm_phase = "prefill" if kwargs["inputs_embeds"].shape[1] > 1 else "decode"

    def _watch(self, module, part, factor) -> None:
        module.register_forward_pre_hook(lambda *_: self.stack.append((part, time.process_time(), 0.0)))
        module.register_forward_hook(lambda *_: self._leave(factor))

    def _leave(self, factor) -> None:
        part, started, inside = self.stack.pop()
        whole = time.process_time() - started
        phase = {"vision": "encode", "fusion": "fuse"}.get(part, self.llm_phase)
        self.seconds[phase] += (whole - inside) * factor
        if self.stack:
            name, begun, already = self.stack[-1]
            self.stack[-1] = (name, begun, already + whole)
        else:
            self.measured = getattr(self, "measured", 0.0) + whole

    def run(self, work):
        """(result, {phase: seconds}) of a call."""
        self.seconds, self.measured = dict.fromkeys(PHASES, 0.0), 0.0
        started = time.process_time()
        result = work()
        self.seconds["other"] = time.process_time() - started - self.measured
        return result, dict(self.seconds)


def build(folder: Path) -> VisualChat:
    """The paper's shapes with few layers, behind a `VisualChat`."""
    set_seed(0)
    llm, query = tiny.text_tokenizer(), tiny.query_tokenizer()
    llm.save_pretrained(folder / "llm")
    config = FusedVLMConfig(
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336,
            "num_hidden_layers": BUILT["vision"], "num_attention_heads": 16, "patch_size": 14,
        },
        fuser_config={"num_hidden_layers": BUILT["fusion"], "vocab_size": query.vocab_size + 255,
                      "eos_token_id": query.eos_token_id},
        first_query_token_id=query.vocab_size,
        text_config={"model_type": "llama", "num_hidden_layers": BUILT["llm"], "max_position_embeddings": 4096,
                     "eos_token_id": None},
        num_visual_tokens=256, num_followup_visual_tokens=8, fusion_row_per_turn=True, max_local_views=9,
        image_token_id=llm.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    model = FusedVLMForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    processor = build_processor(config, text=str(folder / "llm"), query_tokenizer=query)
    chat = VisualChat.__new__(VisualChat)  # the model is in memory already
    chat.name, chat.model, chat.processor = "paper's shapes", model, processor
    chat.answerer = Answerer(model, processor, ByteCache(2 * GIBIBYTE), 2 * GIBIBYTE)
    return chat


def conversations(image, followed: bool) -> list[list[dict]]:
    """The five prompts; with `followed` each goes on from those before, with an answer of a few words between."""
    prompts, messages = [], []
    for number, question in enumerate(QUESTIONS):
        messages = [*messages, user_message([image] if number == 0 or not followed else [], question)]
        prompts.append(messages)
        messages = [*messages, tiny.assistant("a red cat sleeps on the sofa.")] if followed else []
    return prompts


def separate(chat: VisualChat, conversation: list[dict]) -> list[int]:
    """New tokens of a call that knows nothing of others."""
    inputs = chat.prepare([conversation])
    output = chat.model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def kept(chat: VisualChat, conversation: list[dict]) -> list[int]:
    """New tokens by what `VisualChat` runs."""
    prompts = chat.answerer.prompts([conversation])
    return chat.answerer.generate(prompts, max_new_tokens=ANSWER, do_sample=False)[0].token_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder of the record")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        chat = build(Path(folder))
    clock = Clock(chat.model)
    image = tiny.picture(1, 1008, 1008)
    rows, totals, equal = [], {}, {}
    with torch.inference_mode():
        for way, followed in (("a conversation", True), ("five first questions", False)):
            prompts = conversations(image, followed)
            chat.answerer.clear()
            for name, ask in (("separate calls", separate), ("VisualChat", kept)):
                found = [clock.run(lambda prompt=prompt, ask=ask: ask(chat, prompt)) for prompt in prompts]
                for number, (tokens, seconds) in enumerate(found):
                    rows.append((way, name, number + 1, seconds))
                    equal.setdefault((way, number), []).append(tokens)
                    print(
                        way, name, number + 1, {phase: round(value, 2) for phase, value in seconds.items()}, flush=True
                    )
                totals[way, name] = {phase: sum(seconds[phase] for _, seconds in found) for phase in PHASES}
    same = sum(first == second for first, second in equal.values())
    write(options.output, chat, rows, totals, f"{same} of {len(equal)}", load)


def write(output: Path | None, chat: VisualChat, rows: list, totals: dict, equal: str, load: float) -> None:
    """The record as a page."""
    header = "| " + " | ".join(PHASES) + " | all |"
    lines = [
        "# Five questions about one image: VisualChat against separate calls", "",
        "10 views, m = 256, m' = 8, five questions, answers of 8 tokens; paper's shapes, float32, random weights. CPU "
        f"seconds on one thread; layers built (vision, fusion, LLM): {tuple(BUILT.values())}, time inside layers "
        f"multiplied up to {tuple(PAPER.values())}, everything else as measured.", "",
        "| five questions as | by " + header, "|" + "---|" * (len(PHASES) + 3),
    ]  # fmt: skip
    for (way, name), seconds in totals.items():
        cells = [f"{seconds[phase]:.1f}" for phase in PHASES]
        lines.append(f"| {way} | {name} | {' | '.join(cells)} | {sum(seconds.values()):.1f} |")
    lines.append("")
    for way in ("a conversation", "five first questions"):
        whole, part = (sum(totals[way, name].values()) for name in ("separate calls", "VisualChat"))
        without = [
            sum(v for k, v in totals[way, name].items() if k != "decode") for name in ("separate calls", "VisualChat")
        ]
        lines.append(
            f"- {way}: {whole / part:.2f} times faster, {without[0] / without[1]:.2f} times before the first new token."
        )
    lines += ["", "| way | by | question " + header, "|" + "---|" * (len(PHASES) + 4)]
    for way, name, number, seconds in rows:
        cells = [f"{seconds[phase]:.2f}" for phase in PHASES]
        lines.append(f"| {way} | {name} | {number} | {' | '.join(cells)} | {sum(seconds.values()):.2f} |")
    lines += [
        "", f"Answers equal, token by token: {equal}. Kept at the end: "
        f"{chat.answerer.encoder.cache.num_bytes / 2**20:.0f} MiB of the image (float32), "
        f"{chat.answerer.prefixes.cache.num_bytes / 2**20:.0f} MiB of prompts in the LLM's "
        f"{BUILT['llm']} layers.", "",
        f"Hardware: {platform.machine()} CPU, {os.cpu_count()} cores, 1 thread used; load average {load:.1f} at the "
        f"start and {os.getloadavg()[0]:.1f} at the end.",
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}. "
        f"Date: {datetime.date.today()}.",
        f"Command: `OMP_NUM_THREADS=1 {shlex.join(['python', 'benchmarks/questions_chat.py', *sys.argv[1:]])}`", "",
    ]  # fmt: skip
    text = "\n".join(lines)
    print(text)
    if output is not None:
        (output / f"questions_chat_cpu_{datetime.date.today()}.md").write_text(text)


if __name__ == "__main__":
    main()
