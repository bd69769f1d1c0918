"""Images of 10, 2, 2 and 2 views in one batch, against each of them alone.

OMP_NUM_THREADS=1 python benchmarks/mixed_rows.py --output benchmarks/results
"""

import os
from collections.abc import Callable
from unittest.mock import patch

import torch
from runner import Goal, Record, arguments, publish, ratio, take_turns
from shapes import fusion_model, largest_difference, one_thread

from fusedvlm.modeling_fusedvlm import modeling_fusedvlm_rows
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_rows import build_fusion_plan

ALONE, PADDED, BATCH = "each image alone", "one padded pass", "one batch, in buckets"
PACKED = "one packed row, block-causal mask"
VIEWS = [10, 2, 2, 2]


def build(width: int = 256, m: int = 64) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """The three ways; each gives the states of all images."""
    model = fusion_model(width=width, vision_layers=1, fusion_layers=4)
    features = torch.randn(sum(VIEWS), model.config.tokens_per_view, width, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(100, 110)

    def fuse(views: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
        return model.fuse(
            view_features=views,
            image_num_views=counts,
            question_input_ids=ids.repeat(len(counts)),
            question_lengths=[10] * len(counts),
            num_visual_tokens=m,
        )[0].segment_states

    def padded() -> list[torch.Tensor]:
        with patch.object(modeling_fusedvlm_rows, "bucket_rows", lambda lengths: [list(range(len(lengths)))]):
            return fuse(features, VIEWS)

    def packed() -> list[torch.Tensor]:
        """All images on one row, block-causal: no padding, but a mask over everything."""
        plan = build_fusion_plan(len(features), m, VIEWS, [10] * len(VIEWS))
        texts = model.connector.embed_segments(plan, ids.repeat(len(VIEWS)), "cpu")
        parts = [torch.cat([own.flatten(0, 1), text]) for own, text in zip(features.split(VIEWS), texts, strict=True)]
        lengths = [len(part) for part in parts]
        row = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(lengths))
        visible = (row[:, None] == row).tril()
        positions = torch.cat([torch.arange(length) for length in lengths])
        states = model.fuser(inputs_embeds=torch.cat(parts)[None], attention_mask=visible[None, None],
                             position_ids=positions[None], use_cache=False).last_hidden_state[0]  # fmt: skip
        return [part[-m:] for part in states.split(lengths)]

    ways = {
        PACKED: packed,
        ALONE: lambda: [fuse(part, [len(part)])[0] for part in features.split(VIEWS)],
        PADDED: padded,
        BATCH: lambda: fuse(features, VIEWS),
    }
    return {name: torch.no_grad()(way) for name, way in ways.items()}


def main() -> None:
    """Measure and write the record."""
    options = arguments(__doc__).parse_args()
    one_thread()
    load = os.getloadavg()[0]
    ways = build()
    worst = largest_difference(ways[BATCH](), ways[ALONE]())
    record = Record(
        "mixed_rows",
        "Fusion rows of unlike lengths",
        "Four images of 10, 2, 2 and 2 views of 145 tokens, m = 64, "
        "width 256, 4 fusion layers. Buckets were chosen over one packed row: without varlen kernels a packed row "
        "computes the attention of every image with every other, and its block mask loses the causal kernel.",
    )
    times = take_turns(ways, options.rounds)
    record.add("[10, 2, 2, 2] views", times, PADDED, {BATCH: f"differs by {worst:.1e}"})
    record.goals = [
        Goal("batch over the images alone", 1.15, ratio(times[BATCH], times[ALONE]).median, at_most=True),
        Goal("largest difference", 1e-5, worst, at_most=True),
    ]
    publish(record, options.output, load)


if __name__ == "__main__":
    main()
