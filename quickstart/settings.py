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
    batch_size: int = 64
    learning_rate: float = 2e-3
    fuser_layers: int = 2
    fuse_question: bool = True
    # The m that are measured and saved as variants; the largest is the end of the dial.
    num_visual_tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    # And the m between them that are measured too, to see that every m is served.
    between: tuple[int, ...] = (3, 6, 12, 24)
    questions_per_task: int = 256
    second_turn_questions: int = 128  # per task and pair of (m, m')
    # Stage 2 begins with one-word questions alone, at m = 1, until their loss says that looking up is learned: that
    # comes in one jump, which everything else delays, at another step for every seed.
    look_up_first: bool = True
    look_up_steps: int = 900  # at most
    look_up_loss: float | None = 0.7
    generation_steps: int = 1250
    # Conversations of a step by kind, each kind in a micro-batch of its own with an m of its own.
    groups: tuple[tuple[str, int], ...] = (("one_word", 12), ("follow_up", 8), ("dense", 32), ("dense_first", 8))
    # m' of second turns.
    followups: tuple[int, ...] = (1, 2, 4)
    # First share of the steps at the largest m only (of dense questions, after a look-up phase): it can spell an image
    # out word by word, as the language model knows it from its texts; smaller m then learn to say it shorter.
    elastic_warmup_fraction: float = 0.32
    # Without a look-up phase: how much more often than the others the largest m is drawn afterwards.
    largest_m_weight: float = 2.5

    @property
    def max_num_visual_tokens(self) -> int:
        """Upper end of the dial."""
        return max(self.num_visual_tokens)

    @property
    def trained_num_visual_tokens(self) -> list[int]:
        """Every m that is drawn in stage 2."""
        if self.look_up_first:
            return list(range(1, self.max_num_visual_tokens + 1))
        return list(self.num_visual_tokens)

    @property
    def dense_counts(self) -> list[int | str]:
        """What the m of dense questions is drawn from: the largest, any, the upper three quarters; equally often."""
        largest = self.max_num_visual_tokens
        return [largest, f"1-{largest}", f"{max(1, largest // 4)}-{largest}"]

    def without_question(self) -> "Settings":
        """The unconditioned recipe: two one-word questions and the dense one in every conversation, m from a list."""
        return replace(
            self,
            fuse_question=False,
            look_up_first=False,
            generation_steps=round(1.28 * self.generation_steps),
            elastic_warmup_fraction=0.3,
        )


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
    generation_steps=9_500,
    look_up_steps=6_000,
    batch_size=256,
    groups=(("one_word", 48), ("follow_up", 32), ("dense", 128), ("dense_first", 32)),
    fuser_layers=4,
    num_visual_tokens=(1, 2, 4, 8, 16, 32, 64),
    between=(3, 6, 12, 24, 48),
)
PRESETS = {"cpu": CPU, "gpu": GPU}
