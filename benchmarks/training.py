"""A stage-2 step by m: samples per second, peak memory, MFU; and what freezing, caching and checkpointing save.

Random weights, made-up images and text of the real shapes (10 views, 35 prompt tokens, 20 labeled ones), run through
`GenerationTrainer` itself. Every row is a process of its own, so that peaks do not mix. On a GPU `--size paper` is the
published size over Llama-2-7B; `--size small` is for CPUs.

    python benchmarks/training.py --size small --output benchmarks/results
    python benchmarks/training.py --size paper --batch 8 --output benchmarks/results
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from identity_loss import PeakMemory
from transformers import LlamaConfig, TrainerCallback

from fusedvlm.modeling_fusedvlm import FusedVLMConfig, FusedVLMForConditionalGeneration
from fusedvlm.trainers import GenerationArguments, GenerationTrainer

MS = {"paper": (1, 8, 64, 256, 768), "small": (1, 8, 32, 128)}
REFERENCE_M = {"paper": 256, "small": 32}
VIEWS, QUESTION, PROMPT, LABELS = 10, 10, 35, 20
FROZEN_TOWER = ["model.vision_tower.", "model.merger."]
# What is compared at one m: name -> arguments of the run.
OPTIONS = {
    "stage 2 as it is": {},
    "logits at every position": {"all_logits": True},
    "gradient checkpointing": {"checkpointing": True},
    "vision tower frozen": {"freeze_tower": True},
    "vision tower frozen, views cached": {"freeze_tower": True, "cached": True},
    "LLM learns too (not a stage of ours)": {"llm_learns": True},
}


def build_config(size: str) -> FusedVLMConfig:
    """The published size, or one for two CPU cores."""
    if size == "paper":
        largest = max(MS["paper"])
        return FusedVLMConfig(num_visual_tokens=largest, fuser_config={"vocab_size": 49408 + largest - 1})
    return FusedVLMConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "image_size": 112,
            "patch_size": 14,
        },
        fuser_config={
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "vocab_size": 1127,
            "eos_token_id": 999,
        },
        text_config=LlamaConfig(
            vocab_size=32000,
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=8,
            num_attention_heads=8,
        ).to_dict(),
        first_query_token_id=1000,
        num_visual_tokens=128,
    )


def build_model(size: str, device: str) -> FusedVLMForConditionalGeneration:
    """Random weights on the device: the frozen LLM in bf16, what learns in fp32."""
    with torch.device(device):
        model = FusedVLMForConditionalGeneration(build_config(size))
    if device == "cuda":
        model.model.language_model.bfloat16()
        model.lm_head.bfloat16()
    return model


def build_batch(config: FusedVLMConfig, batch_size: int, m: int, cached: bool) -> dict[str, torch.Tensor]:
    """One batch in the processor's layout: an image and a question per sample."""
    generator = torch.Generator().manual_seed(0)
    size, image_token = config.vision_config.image_size, config.image_token_id
    text = torch.randint(3, 1000, (batch_size, PROMPT), generator=generator)
    ids = torch.cat([text[:, :5], torch.full((batch_size, m), image_token), text[:, 5:]], dim=1)
    labels = torch.full_like(ids, -100)
    labels[:, -LABELS:] = ids[:, -LABELS:]
    ones = torch.ones(batch_size, dtype=torch.long)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "image_num_views": ones * VIEWS,
        "question_input_ids": torch.randint(0, 999, (batch_size * QUESTION,), generator=generator),
        "question_lengths": ones * QUESTION,
        "question_turns": ones * 0,
        "num_visual_tokens": ones * m,
        "image_num_questions": ones,
        "sample_num_images": ones,
    }
    if cached:
        shape = (batch_size * VIEWS, config.tokens_per_view, config.vision_config.hidden_size)
        batch["view_features"] = torch.randn(shape, generator=generator)
    else:
        batch["pixel_values"] = torch.randn(batch_size * VIEWS, 3, size, size, generator=generator)
    return batch


class Held(TrainerCallback):
    """Bytes of gradients and of optimizer state, of the LLM and of everything else, in front of a step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Count; the second step's optimizer state is complete."""
        self.held = {f"{part} {what}": 0 for part in ("LLM", "rest") for what in ("gradients", "optimizer")}
        for name, parameter in model.named_parameters():
            part = "LLM" if name.startswith(("model.language_model.", "lm_head.")) else "rest"
            tensors = [t for t in optimizer.state.get(parameter, {}).values() if isinstance(t, torch.Tensor)]
            self.held[f"{part} optimizer"] += sum(t.numel() * t.element_size() for t in tensors)
            if parameter.grad is not None:
                self.held[f"{part} gradients"] += parameter.grad.numel() * parameter.grad.element_size()


class OpenTrainer(GenerationTrainer):
    """For the rows that show what the package does not do."""

    def __init__(self, *args, llm_learns: bool, all_logits: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.all_logits = all_logits
        if llm_learns:
            for name, parameter in self.model.named_parameters():
                if name.startswith(("model.language_model.", "lm_head.")):
                    parameter.requires_grad_(True)
                    self.trainable_names.append(name)
            self.callback_handler.callbacks = [
                callback for callback in self.callback_handler.callbacks if type(callback).__name__ != "WeightWatch"
            ]

    def stage_loss(self, model, inputs, return_outputs, num_items_in_batch):
        """Compute logits at every position where told to."""
        if self.all_logits:
            forward = model.forward
            inputs = {**inputs}
            model.forward = lambda **kwargs: forward(**{**kwargs, "answer_logits_only": False})
            try:
                return super().stage_loss(model, inputs, return_outputs, num_items_in_batch)
            finally:
                del model.forward
        return super().stage_loss(model, inputs, return_outputs, num_items_in_batch)


def measure(options) -> dict:
    """One row: train a few steps, the first ones uncounted."""
    row = json.loads(options.row)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = build_model(options.size, device)
    batch = build_batch(model.config, options.batch, row["m"], row.get("cached", False))
    args = GenerationArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=options.batch,
        max_steps=2 * options.steps,
        logging_steps=options.steps,
        freeze=FROZEN_TOWER if row.get("freeze_tower") else [],
        gradient_checkpointing=row.get("checkpointing", False),
        bf16=device == "cuda",
        use_cpu=device == "cpu",
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = OpenTrainer(
        model=model,
        args=args,
        train_dataset=list(range(options.batch * 2 * options.steps)),
        data_collator=lambda samples: batch,
        llm_learns=row.get("llm_learns", False),
        all_logits=row.get("all_logits", False),
    )
    held = Held()
    trainer.add_callback(held)
    with PeakMemory(device) as memory:
        trainer.train()
    counted = [entry for entry in trainer.state.log_history if "images_per_second" in entry][-1]
    return {"bytes": memory.rise, **held.held, **counted}


def run_row(options, row: dict) -> dict:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--row", json.dumps(row), "--size", options.size]
    command += ["--batch", str(options.batch), "--steps", str(options.steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{row} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table_row(name: str, found: dict) -> str:
    """One line of a table; what was not measured is said to be missing."""
    mfu = f"{found['mfu']:.3f}" if "mfu" in found else "not known"
    mega = {key: f"{found[key] / 1e6:,.0f}" for key in ("bytes", "LLM gradients", "LLM optimizer")}
    return (
        f"| {name} | {found['images_per_second']:.3g} | {found['tokens_per_second']:,.0f} | "
        f"{found['tflops_per_second']:.3g} | {mfu} | {mega['bytes']} | {mega['LLM gradients']} | "
        f"{mega['LLM optimizer']} |"
    )


def main() -> None:
    """Measure every row, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["paper", "small"], default="paper" if torch.cuda.is_available() else "small")
    parser.add_argument("--batch", type=int, default=4, help="samples of a step")
    parser.add_argument("--steps", type=int, default=4, help="steps that are timed; as many before them are not")
    parser.add_argument("--output", type=Path, help="folder for the record")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        sys.stdout.write("\n" + json.dumps(measure(options)) + "\n")
        return
    head = "samples/s | tokens/s | TFLOP/s | MFU | peak, MB | LLM gradients, MB | LLM optimizer, MB |"
    rule = "|---|---|---|---|---|---|---|---|"
    gpu = torch.cuda.is_available()
    lines = [
        f"# Stage-2 step, size `{options.size}`, batch {options.batch}",
        "",
        f"{VIEWS} views, {PROMPT} prompt tokens, {LABELS} of them labeled. Peak memory is the rise over the loaded "
        "model: gradients, optimizer state, activations.",
        "",
        f"| m | {head}",
        rule,
    ]
    for m in MS[options.size]:
        lines.append(table_row(str(m), run_row(options, {"m": m})))
        sys.stderr.write(lines[-1] + "\n")
    reference = REFERENCE_M[options.size]
    lines += ["", f"At m = {reference}:", "", f"| | {head}", rule]
    for name, row in OPTIONS.items():
        lines.append(table_row(name, run_row(options, {"m": reference, **row})))
        sys.stderr.write(lines[-1] + "\n")
    hardware = torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU, {os.cpu_count()} cores"
    lines += [
        "",
        f"Hardware: {hardware}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'all')}, "
        f"{'bf16 autocast, LLM in bf16' if gpu else 'fp32'}.",
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}. "
        f"Date: {datetime.date.today()}.",
        f"Command: `python {shlex.join(sys.argv)}`",
    ]
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    if options.output is not None:
        name = f"training_{options.size}_{'gpu' if gpu else 'cpu'}_{datetime.date.today()}.md"
        (options.output / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
