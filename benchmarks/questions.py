"""The second and every later question about an image: everything again, or behind the cached views.

At the paper's width of 1,024 and 10 views. Towers of one and of two layers are timed; the cost of 24 vision and 20
fusion layers follows from the difference.

    OMP_NUM_THREADS=1 python benchmarks/questions.py --output benchmarks/results
"""

import os
from collections.abc import Callable

import torch
from runner import Goal, Record, arguments, publish, ratio, take_turns
from shapes import fusion_model, one_thread, pixels, question

VISION, FUSION, LATER = "vision tower", "fusion over views and question", "continue_fusion"
LAYERS = {VISION: 24, FUSION: 20, LATER: 20}


def build(layers: int, width: int, views: int, m: int) -> dict[str, Callable[[], object]]:
    """The three parts, of so many layers."""
    model = fusion_model(width=width, vision_layers=layers, fusion_layers=layers)
    image, asked = pixels(views), question(15)
    features = torch.randn(views, model.config.tokens_per_view, width) * 0.1
    with torch.no_grad():
        cache = model.start_fusion(features)
    ways = {
        VISION: lambda: model.get_view_features(image),
        FUSION: lambda: model.fuse(view_features=features, image_num_views=[views], num_visual_tokens=m, **asked),
        LATER: lambda: model.continue_fusion(cache, asked["question_input_ids"], m),
    }
    return {name: torch.no_grad()(way) for name, way in ways.items()}


def main() -> None:
    """Measure and write the record."""
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--width", type=int, default=1024)
    options = parser.parse_args()
    one_thread()
    load = os.getloadavg()[0]
    record = Record(
        "questions",
        "The k-th question about an image",
        f"Ten views, width {options.width}, a question of 15 "
        "tokens, m' = 8 as in the paper; the whole of 24 and 20 layers is extrapolated from 1 and 2.",
    )
    few, many = (take_turns(build(n, options.width, 10, 8), options.rounds) for n in (1, 2))
    for case, times in (("1 layer", few), ("2 layers", many)):
        record.add(case, times, None)
    whole = {
        name: [one + (LAYERS[name] - 1) * (two - one) for one, two in zip(few[name], many[name], strict=True)]
        for name in LAYERS
    }
    again = [one + other for one, other in zip(whole[VISION], whole[FUSION], strict=True)]
    record.add("24 and 20 layers", {"everything again": again, "behind cached views": whole[LATER]}, "everything again")
    record.goals = [Goal("k-th question, image side", 20, ratio(again, whole[LATER]).median)]
    publish(record, options.output, load)


if __name__ == "__main__":
    main()
