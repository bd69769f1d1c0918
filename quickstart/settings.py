"""Sizes and step counts of a quickstart run."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Settings:
    """Everything that distinguishes one quickstart from another; the defaults fit two CPU cores and six minutes."""

    seed: int = 0
    minutes: float = 6.0
    num_images: int = 12_000
    num_held_out: int = 800
    llm_steps: int = 700
    llm_width: int = 64
    llm_layers: int = 2
    vision_width: int = 96
    vision_layers: int = 2
    warmup_steps: int = 180
    contrastive_steps: int = 60
    generation_steps: int = 1600
    batch_size: int = 64
    learning_rate: float = 2e-3
    fuser_layers: int = 2
    fuse_question: bool = False
    num_visual_tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    # First share of the steps, at the largest m only: it can spell an image out word by word, as the language model
    # knows it from its texts; smaller m then learn to say it shorter.
    elastic_warmup_fraction: float = 0.3
    # How much more often than the others the largest m is drawn afterwards.
    largest_m_weight: float = 2.5
    questions_per_task: int = 256

    @property
    def max_num_visual_tokens(self) -> int:
        """Upper end of the dial."""
        return max(self.num_visual_tokens)


CPU = Settings()
# More of everything, for a GPU. Not tuned: a starting point.
GPU = replace(
    CPU,
    minutes=30.0,
    num_images=60_000,
    llm_steps=3000,
    llm_width=128,
    llm_layers=3,
    vision_width=192,
    vision_layers=4,
    warmup_steps=600,
    contrastive_steps=400,
    generation_steps=12_000,
    batch_size=256,
    fuser_layers=4,
    num_visual_tokens=(1, 2, 4, 8, 16, 32, 64),
)
PRESETS = {"cpu": CPU, "gpu": GPU}
