"""A training step at several m of the same samples: one forward and backward for each m, or one for all.

Width 256 in vision and fusion, an LLM of four layers; the LLM is frozen, everything else learns.

    OMP_NUM_THREADS=1 python benchmarks/training_counts.py --output benchmarks/results
"""

import os
from collections.abc import Callable

import torch
from runner import Goal, Record, arguments, publish, take_turns
from shapes import one_thread, pixels, whole_model

from fusedvlm.trainers.elastic import join_versions, shrink_visual_tokens

COUNTS = (64, 8, 1)
EACH, TOGETHER = "one m after the other", "all m of a sample in one pass"


def build(
    samples: int = 2, views: int = 5, width: int = 256
) -> tuple[dict[str, Callable[[], dict[str, torch.Tensor]]], int]:
    """Both ways, each of which gives the gradients; and how many samples x m a step has."""
    model = whole_model(width=width, vision_layers=6, fusion_layers=4).train()
    for part in (model.model.language_model, model.lm_head):
        part.requires_grad_(False)
    placeholder, largest = model.config.image_token_id, max(COUNTS)
    row = torch.cat([torch.full((largest,), placeholder), torch.arange(10, 60)])
    ids = row.expand(samples, -1).clone()
    labels = torch.where(torch.arange(len(row)) >= len(row) - 20, ids, -100)
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels,
        "pixel_values": pixels(samples * views), "image_num_views": torch.full((samples,), views),
        "question_input_ids": torch.arange(100, 100 + 10 * samples), "question_lengths": torch.full((samples,), 10),
        "question_turns": torch.zeros(samples, dtype=torch.long), "num_visual_tokens": torch.full((samples,), largest),
        "image_num_questions": torch.ones(samples, dtype=torch.long),
        "sample_num_images": torch.ones(samples, dtype=torch.long),
    }  # fmt: skip
    versions = [shrink_visual_tokens(batch, m, placeholder, 0) for m in COUNTS]

    def step(batches: list[dict]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for one in batches:
            model(**one, num_items_in_batch=torch.tensor(20.0 * samples), answer_logits_only=True).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    ways = {EACH: lambda: step(versions), TOGETHER: lambda: step([join_versions(versions, 0)])}
    return ways, samples * len(COUNTS)


def main() -> None:
    """Measure and write the record."""
    options = arguments(__doc__, rounds=5).parse_args()
    one_thread()
    load = os.getloadavg()[0]
    ways, number = build()
    alone, together = (way() for way in ways.values())
    # Of all gradients as one vector: the bias of keys has none at all but rounding.
    whole, gap = (
        torch.cat([part.flatten() for part in parts]).norm()
        for parts in (alone.values(), [together[name] - alone[name] for name in alone])
    )
    worst = float(gap / whole)
    record = Record(
        "training_counts",
        "Several m of a sample in one training step",
        f"m = {', '.join(map(str, COUNTS))}; two "
        "conversations of one image with five views of 336 x 336 and 50 text tokens, width 256, 6 vision, 4 fusion "
        "and 4 LLM layers (LLM frozen, width 128); forward and backward.",
    )
    times = take_turns(ways, options.rounds)
    record.add(f"{number} samples x m", times, EACH, {TOGETHER: f"gradients differ by {worst:.1e} of their norm"})
    record.goals = [
        Goal("samples x m per second over one m per pass", 1.5, record.gain(f"{number} samples x m", TOGETHER)),
        Goal("relative difference of gradients", 1e-5, worst, at_most=True),
    ]
    publish(record, options.output, load)


if __name__ == "__main__":
    main()
