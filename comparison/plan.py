"""Sizes of a comparison: what every entrant shares, and how much each may spend."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Plan:
    """Everything that distinguishes one comparison from another; the defaults fit two CPU cores.

    One view of 64 pixels in patches of 16 is a 4 x 4 grid: each patch shows one cell of the world, so all 16 tokens
    hold the whole image, and 1 or 4 are pooled without remainder.

    Args:
        training_tflops: counted forward and backward FLOPs that each set of weights may spend, in 10^12.
        look_up_share: first share of them, on one-word questions at small m only: a look-up is learned in one jump,
            which other work delays.
        one_word_rows, dense_rows: conversations of a step after that.
    """

    num_visual_tokens: tuple[int, ...] = (1, 2, 4, 8, 16)
    num_images: int = 8_000
    num_held_out: int = 800
    questions_per_task: int = 256
    llm_steps: int = 700
    llm_width: int = 64
    llm_layers: int = 2
    vision_width: int = 96
    vision_layers: int = 3
    tower_steps: int = 240
    connector_layers: int = 2
    batch_size: int = 64
    one_word_rows: int = 20
    dense_rows: int = 40
    learning_rate: float = 2e-3
    look_up_share: float = 0.5
    look_up_largest: int = 4
    training_tflops: float = 1.2
    latency_repeats: int = 15

    @property
    def largest(self) -> int:
        """The largest m compared."""
        return max(self.num_visual_tokens)


CPU = Plan()
# More of everything, for a GPU. Not tuned and not run: a starting point.
GPU = replace(
    CPU,
    num_images=60_000,
    num_held_out=4_000,
    questions_per_task=1024,
    llm_steps=3000,
    llm_width=128,
    llm_layers=3,
    vision_width=192,
    vision_layers=4,
    tower_steps=1500,
    connector_layers=4,
    batch_size=256,
    one_word_rows=80,
    dense_rows=160,
    learning_rate=1e-3,
    training_tflops=200.0,
)
# Seconds, for a look at the page; its scores mean nothing.
GLANCE = replace(
    CPU,
    num_visual_tokens=(1, 4, 16),
    num_images=64,
    num_held_out=32,
    questions_per_task=6,
    llm_steps=4,
    llm_width=32,
    llm_layers=1,
    vision_width=32,
    vision_layers=2,
    tower_steps=3,
    connector_layers=1,
    batch_size=4,
    one_word_rows=2,
    dense_rows=2,
    training_tflops=2e-4,
    latency_repeats=2,
)
PRESETS = {"cpu": CPU, "gpu": GPU, "glance": GLANCE}
