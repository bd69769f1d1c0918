"""One more token of an answer: `generate` of a variant against that of its LLM alone, at growing vocabularies.

OMP_NUM_THREADS=1 python benchmarks/decode.py --output benchmarks/results
"""

import os
import statistics
import time
from collections.abc import Callable

import torch
from runner import Goal, Record, arguments, publish, take_turns
from shapes import one_thread, whole_model
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList, SuppressTokensLogitsProcessor

from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_placeholders import SuppressingLogitsProcessorList

OURS, PLAIN, THEIRS = "FusedVLM", "its LLM alone", "transformers"
VOCABULARIES = (2_000, 32_000, 152_000)


def build(vocabulary: int) -> dict[str, Callable[[int], object]]:
    """Both models: functions of the number of new tokens."""
    model = whole_model(width=64, vision_layers=1, fusion_layers=1, image_size=56, vocab_size=vocabulary)
    text = model.config.text_config
    plain = LlamaForCausalLM(LlamaConfig(**text.to_dict())).eval()
    plain.model.load_state_dict(model.model.language_model.state_dict())
    plain.lm_head.load_state_dict(model.lm_head.state_dict())
    placeholder = model.config.image_token_id
    prompt = torch.cat([torch.full((1, 16), placeholder), torch.arange(10, 50)[None]], dim=1)
    with torch.no_grad():
        features = model.get_image_features(
            pixel_values=torch.randn(1, 3, 56, 56),
            num_visual_tokens=16,
            question_input_ids=torch.tensor([7]),
            question_lengths=[1],
            return_dict=True,
        )

    def ask(chosen: object, tokens: int, **given: object) -> object:
        generate: Callable = chosen.generate  # type: ignore[attr-defined]
        return generate(
            **given,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )

    return {
        OURS: lambda tokens: ask(model, tokens, input_ids=prompt, mm_encoder_outputs={"image": features}),
        PLAIN: lambda tokens: ask(plain, tokens, input_ids=prompt % 1000 + 10),
    }


def steps(
    ways: dict[str, Callable[[int], object]], rounds: int, tokens: int = 60, few: int = 4
) -> dict[str, list[float]]:
    """CPU seconds of a step: what the later tokens of an answer cost more than the first ones."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            before = time.process_time()
            way(few)
            between = time.process_time()
            way(tokens)
            if number:
                seconds[name].append((time.process_time() - between - (between - before)) / (tokens - few))
    return seconds


def suppressing(vocabulary: int) -> dict[str, Callable[[], object]]:
    """Forbid one id 200 times: our way, and transformers' own."""
    scores, ids = torch.zeros(1, vocabulary), torch.zeros(1, 1, dtype=torch.long)
    theirs = LogitsProcessorList([SuppressTokensLogitsProcessor([5])])
    ours = SuppressingLogitsProcessorList.of(theirs, in_place=True)
    return {
        OURS: lambda: [ours(ids, scores) for _ in range(200)],
        THEIRS: lambda: [theirs(ids, scores) for _ in range(200)],
    }


def main() -> None:
    """Measure and write the record."""
    options = arguments(__doc__, rounds=11).parse_args()
    one_thread()
    load = os.getloadavg()[0]
    record = Record(
        "decode",
        "A decoding step",
        "Greedy, one sequence, 16 visual and 40 text tokens before; LLM of 4 layers "
        "of width 128. The step of a variant forbids the placeholder; the LLM alone forbids nothing.",
    )
    added = {}
    for vocabulary in VOCABULARIES:
        times = steps(build(vocabulary), options.rounds)
        record.add(f"{vocabulary:,} ids", times, None)
        added[vocabulary] = 1e3 * statistics.median(a - b for a, b in zip(times[OURS], times[PLAIN], strict=True))
    forbidding = {}
    for vocabulary in VOCABULARIES:
        times = {name: [value / 200 for value in row] for name, row in take_turns(suppressing(vocabulary), 9).items()}
        record.add(f"one id of {vocabulary:,} forbidden", times, THEIRS)
        forbidding[vocabulary] = 1e3 * statistics.median(times[OURS])
    record.facts = {f"added per token at {size:,} ids, ms": f"{value:.3f}" for size, value in added.items()}
    why = "one module more, with its outputs, and what transformers asks per step of a model with images"
    growth = forbidding[VOCABULARIES[-1]] - forbidding[VOCABULARIES[0]]
    record.goals = [
        Goal("ms per token over the plain LLM, 2,000 ids", 0.05, added[VOCABULARIES[0]], at_most=True, unmet=why),
        Goal("ms that 150,000 more ids add to forbidding one", 0.005, growth, at_most=True),
    ]
    publish(record, options.output, load)


if __name__ == "__main__":
    main()
