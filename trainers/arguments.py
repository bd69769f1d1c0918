"""Training arguments of both stages; defaults are the paper's (appendix C) for one device."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class FusedVLMArguments(TrainingArguments):
    """Arguments both stages share.

    > Parameters that control what learns

    Args:
        freeze: module prefixes to keep fixed beside the LLM, e.g. `model.vision_tower.`.
        vision_learning_rate: learning rate of the vision tower; the common one when not given.

    > Parameters that control the training (as in `TrainingArguments`, with the paper's values)
    """

    freeze: list[str] = field(default_factory=list, metadata={"help": "Module prefixes to keep fixed."})
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision tower; by default the common one."}
    )
    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    use_cache: bool = field(
        default=True,
        metadata={"help": "Stays on: Trainer writes it into the saved config, and generation without a cache is slow."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the collator reads images and messages."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop the images and messages; leave it off.")


@dataclass
class ContrastiveArguments(FusedVLMArguments):
    """Stage 1.

    Args:
        identity_loss_weight: weight of the identity part against the contrastive part.
        local_loss: compute each rank's rows of the global logits only (open_clip).
        gather_with_grad: let gradients flow through gathered features (open_clip).
    """

    identity_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the identity loss."})
    local_loss: bool = field(default=False, metadata={"help": "Each rank computes only its rows of the logits."})
    gather_with_grad: bool = field(default=True, metadata={"help": "Gradients flow through gathered features."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up steps, or a fraction of all steps."})
    max_steps: int = field(default=1000, metadata={"help": "Number of steps."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluation reports losses only."})
    label_names: list[str] | None = field(
        default_factory=lambda: ["answer_input_ids"], metadata={"help": "Batch entries that are targets."}
    )


@dataclass
class GenerationArguments(FusedVLMArguments):
    """Stages 2 and 3.

    > Parameters that control the number of visual tokens

    Args:
        elastic_num_visual_tokens: counts to draw m from at each step; the collator must build batches at the largest.
            Without it every step trains the collator's m.
        elastic_probabilities: probability of each count; uniform when not given.
        elastic_warmup_fraction: during this first fraction of the steps only counts of at least
            `elastic_warmup_minimum` are drawn.
        elastic_warmup_minimum: see above.
        elastic_seed: seed of the draw; it depends on nothing else but the step.
    """

    elastic_num_visual_tokens: list[int] | None = field(
        default=None, metadata={"help": "Counts to draw m from at each step."}
    )
    elastic_probabilities: list[float] | None = field(
        default=None, metadata={"help": "Probability of each count; uniform when not given."}
    )
    elastic_warmup_fraction: float = field(default=0.0, metadata={"help": "Fraction of steps with large m only."})
    elastic_warmup_minimum: int = field(default=1, metadata={"help": "Smallest m during that fraction."})
    elastic_seed: int = field(default=0, metadata={"help": "Seed of the draw of m."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up steps, or a fraction of all steps."})
    num_train_epochs: float = field(default=2.0, metadata={"help": "Passes over the data."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluation reports losses only."})

    def __post_init__(self):
        super().__post_init__()
        choices = self.elastic_num_visual_tokens
        if choices is None:
            return
        if not choices or min(choices) < 1:
            raise ValueError(f"elastic_num_visual_tokens must be positive counts, got {choices}.")
        if self.elastic_probabilities is not None and len(self.elastic_probabilities) != len(choices):
            raise ValueError(
                f"elastic_probabilities has {len(self.elastic_probabilities)} entries for {len(choices)} counts."
            )
        if max(choices) < self.elastic_warmup_minimum:
            raise ValueError(f"elastic_warmup_minimum={self.elastic_warmup_minimum} exceeds every count in {choices}.")
