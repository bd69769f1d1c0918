"""Training arguments of both stages; defaults are the paper's (appendix C) for one device."""

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

from fusedvlm.data.mixing.grouped import micro_batches
from fusedvlm.data.prepare.row_check import RowLimits

from .elastic import count_shares, log_uniform_shares

INFINITE = math.inf
# Smallest and largest value of numbers that transformers takes as they are.
RANGES = {
    "weight_decay": (0, 1e6),
    "per_device_train_batch_size": (1, INFINITE),
    "per_device_eval_batch_size": (1, INFINITE),
    "gradient_accumulation_steps": (1, INFINITE),
    "max_grad_norm": (0, INFINITE),
    "warmup_steps": (0, INFINITE),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, 1),
    "label_smoothing_factor": (0, 1),
    "seed": (0, 2**32 - 1),
    "save_total_limit": (1, INFINITE),
    "dataloader_num_workers": (0, INFINITE),
    "watch_steps": (1, INFINITE),
    "max_skipped_rows": (0, INFINITE),
    "lora_rank": (1, INFINITE),
    "lora_alpha": (1, INFINITE),
    "lora_dropout": (0, 1),
    "identity_loss_weight": (0, 1e6),
    "elastic_warmup_fraction": (0, 1),
    "elastic_warmup_minimum": (1, INFINITE),
    "elastic_seed": (0, 2**63),
    "until_loss_steps": (1, INFINITE),
}


@dataclass
class FusedVLMArguments(TrainingArguments):
    """Arguments both stages share.

    > Parameters that control what learns

    Args:
        freeze: module prefixes to keep fixed beside the LLM, e.g. `model.vision_tower.`.
        vision_learning_rate: learning rate of the vision tower; the common one when not given.

    > Parameters that control what is computed once

        view_cache: folder for the view tokens of every image, computed before the first step and read from there; needs
            `freeze=["model.vision_tower.", "model.merger."]` and a dataset with a length. About 3 MB per image at the
            paper's size in 16 bits.

    > Parameters that control which rows are trained on

        max_length: most tokens of a row's prompt, visual ones included; by default, and at most, what the LLM reads.
        overlong: what happens to longer rows: "drop" skips them, "truncate" leaves out whole turns from the end and
            cuts the last answer that is left.
        max_skipped_rows: rows that cannot be trained on (too long, without an answer or a question, with an image that
            cannot be opened) are skipped, counted and listed in `skipped_rows.jsonl`; more than so many, of all
            processes together, end the run.

    > Parameters that control which rows share a batch, and when a phase ends

        batch_groups: samples of each source in every optimizer step and process, e.g. `{"one_word": 20, "dense": 40}`;
            each source gets micro-batches of its own, of at most `per_device_train_batch_size` samples, and
            `gradient_accumulation_steps` follows from them. The sources are the names in the data section.
        until_loss: end the training as soon as the loss, in the mean over the last `until_loss_steps` steps, is below
            this; `max_steps` is then the most steps. The learning rate should not fall on the way:
            `lr_scheduler_type="constant_with_warmup"`.
        until_loss_steps: steps of that mean.

    > Parameters that control adapters (then exactly they learn, see `adapters.add_lora`)

        lora: presets: "fusion", "vision", "llm".
        lora_rank, lora_alpha, lora_dropout: as in `peft.LoraConfig`.
        lora_train_also: modules that learn whole beside the adapters.

    > Parameters that control what is watched and measured

        watch_steps: every so many steps, beside every save and the end, make sure that frozen weights did not change.
            Gradients are looked at in every step: present for all that learns in the first, finite in all.
        peak_tflops: dense peak of one device in the training precision, for MFU; known for common accelerators.

    > Parameters that control the training (as in `TrainingArguments`, with the paper's values)
    """

    freeze: list[str] = field(default_factory=list, metadata={"help": "Module prefixes to keep fixed."})
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision tower; by default the common one."}
    )
    view_cache: str | None = field(
        default=None, metadata={"help": "Folder for view tokens, computed once; needs a frozen vision tower and merge."}
    )
    batch_groups: dict[str, int] | str | None = field(
        default=None, metadata={"help": "Samples of each source in a step, in micro-batches of their own, as JSON."}
    )
    until_loss: float | None = field(
        default=None, metadata={"help": "End as soon as the loss of the last steps is below this."}
    )
    until_loss_steps: int = field(default=50, metadata={"help": "Steps that until_loss takes the mean of."})
    lora: list[str] | None = field(
        default=None, metadata={"help": "Train adapters instead, on one or several of: fusion, vision, llm."}
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Adapters are scaled by alpha / rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the adapters."})
    lora_train_also: list[str] = field(
        default_factory=list, metadata={"help": "Modules that learn whole beside adapters, e.g. model.projector."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Most tokens of a row, visual ones included; what the LLM reads by default."}
    )
    overlong: Literal["drop", "truncate"] = field(
        default="drop", metadata={"help": "Skip longer rows, or truncate their answers."}
    )
    max_skipped_rows: int = field(
        default=100, metadata={"help": "Rows that cannot be trained on are skipped and counted, up to so many."}
    )
    watch_steps: int = field(default=500, metadata={"help": "Look at the frozen weights every so many steps."})
    peak_tflops: float | None = field(
        default=None, metadata={"help": "Dense peak TFLOP/s of one device, for MFU; known for common accelerators."}
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

    def __post_init__(self) -> None:
        self._read_groups()
        super().__post_init__()
        self.enable_jit_checkpoint = False  # ours always do so, and wholly; see `interruption`
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop the images and messages; leave it off.")
        RowLimits(self.max_length, self.overlong)
        self._check_numbers()
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"peak_tflops={self.peak_tflops} must be positive, e.g. 312 for an A100 in bf16.")

    def _read_groups(self) -> None:
        """Groups as a mapping, and the micro-batches of a step that follow from them.

        Raises:
            ValueError: for groups that are none, and for what contradicts them.
        """
        groups = self.batch_groups = read_json_argument(self.batch_groups, "batch_groups")
        if self.until_loss is not None and not 0 < self.until_loss < math.inf:
            raise ValueError(f"until_loss={self.until_loss} must be a positive number.")
        if groups is None:
            return
        if not (isinstance(groups, dict) and groups and all(type(n) is int and n > 0 for n in groups.values())):
            raise ValueError(f"batch_groups={groups!r} must map sources to positive numbers of samples.")
        needed = micro_batches(groups, self.per_device_train_batch_size)
        if self.gradient_accumulation_steps not in (1, needed):
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} contradicts batch_groups, whose "
                f"sources are {needed} micro-batches of at most {self.per_device_train_batch_size}; leave it out."
            )
        if str(getattr(self.train_sampling_strategy, "value", self.train_sampling_strategy)) != "random":
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy} and batch_groups each order the rows; "
                "leave one out."
            )
        self.gradient_accumulation_steps = needed

    def _check_numbers(self) -> None:
        """Refuse numbers with which training would do nothing, do harm, or divide by zero.

        Raises:
            ValueError: with the value and what is possible.
        """
        for name, (low, high) in RANGES.items():
            value = getattr(self, name, None)
            if value is None or isinstance(value, str):
                continue
            if not (low <= value <= high):  # not a number is outside too
                wanted = f"at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
                raise ValueError(f"{name}={value} must be {wanted}.")
        for name in ("learning_rate", "vision_learning_rate", "num_train_epochs"):
            value = getattr(self, name)
            is_decided = name == "num_train_epochs" and self.max_steps > 0
            if value is not None and not is_decided and not (0 < value < math.inf):
                raise ValueError(f"{name}={value} must be a positive number, or nothing is learned.")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps={self.max_steps} must be positive; -1 trains num_train_epochs.")
        for kind in ("save", "eval", "logging"):
            every, strategy = getattr(self, f"{kind}_steps"), getattr(self, f"{kind}_strategy")
            if getattr(strategy, "value", strategy) == "steps" and every is not None and not 0 < every < math.inf:
                raise ValueError(f"{kind}_steps={every} must be positive; to do without, set {kind}_strategy to 'no'.")


@dataclass
class ContrastiveArguments(FusedVLMArguments):
    """Stage 1.

    Args:
        identity_loss_weight: weight of the identity part against the contrastive part.
    """

    identity_loss_weight: float = field(default=1.0, metadata={"help": "Weight of the identity loss."})
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
            Without it (and `elastic_range`) every step trains the collator's m.
        elastic_range: smallest and largest m; every integer between is drawn, log-uniformly, so that every one of them
            can be asked for afterwards. In place of `elastic_num_visual_tokens`.
        elastic_probabilities: probability of each count; uniform when not given.
        elastic_warmup_fraction: during this first fraction of the steps only counts of at least
            `elastic_warmup_minimum` are drawn.
        elastic_warmup_minimum: smallest count that is drawn during the warm-up.
        elastic_warmup_sources: sources of `batch_groups` that the warm-up is for; all by default.
        elastic_by_source: what to draw m from for sources of `batch_groups` that want something else: a count, a
            log-uniform range, or a list of such, each drawn equally often; e.g. `{"dense": [32, "1-32", "8-32"]}`.
        elastic_followup: counts to draw m' from at each step, for every question about an image after its first; m'
            never exceeds m. By default m' is the collator's.
        elastic_per_sample: draw an m for every sample rather than one for the whole step on all ranks.
        elastic_per_sample_sources: the same for the samples of some sources of `batch_groups` only.
        elastic_samples_per_step: draw so many m for every step and train each sample at all of them, its views and
            question read once; the loss is their mean. The LLM reads so many times the prompts, padded to the longest.
        elastic_seed: seed of the draw; it depends on nothing else but the step (per sample also on rank and batch).
        distillation_weight: weight of self-distillation: KL divergence from the same weights' answer distribution at
            the largest m, which are not changed by it. Costs a forward pass at the largest m per step. 0 is off.
        distillation_temperature: softens both distributions; the divergence is multiplied by its square.

    > Parameters that control the loss

        loss_per: "token" is the mean over all labeled tokens of the global batch; "answer" takes each answer's mean
            over its tokens, then the mean over answers, so that one word counts as much as a long description.
    """

    elastic_num_visual_tokens: list[int] | None = field(
        default=None, metadata={"help": "Counts to draw m from at each step."}
    )
    elastic_range: list[int] | None = field(
        default=None, metadata={"help": "Smallest and largest m: every integer between is drawn, log-uniformly."}
    )
    elastic_by_source: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Another draw of m for sources of batch_groups, as JSON."}
    )
    elastic_followup: list[int] | None = field(
        default=None, metadata={"help": "Counts to draw m' from, for an image's later questions."}
    )
    elastic_per_sample_sources: list[str] | None = field(
        default=None, metadata={"help": "Draw an m for every sample of these sources of batch_groups."}
    )
    elastic_warmup_sources: list[str] | None = field(
        default=None, metadata={"help": "Sources of batch_groups that the warm-up is for; all by default."}
    )
    loss_per: Literal["token", "answer"] = field(
        default="token", metadata={"help": "Mean over labeled tokens, or over answers of each one's mean."}
    )
    elastic_probabilities: list[float] | None = field(
        default=None, metadata={"help": "Probability of each count; uniform when not given."}
    )
    elastic_warmup_fraction: float = field(default=0.0, metadata={"help": "Fraction of steps with large m only."})
    elastic_warmup_minimum: int = field(default=1, metadata={"help": "Smallest m during that fraction."})
    elastic_per_sample: bool = field(default=False, metadata={"help": "Draw an m for every sample, not every step."})
    distillation_weight: float = field(
        default=0.0, metadata={"help": "Weight of self-distillation from the largest m; 0 is off."}
    )
    distillation_temperature: float = field(default=1.0, metadata={"help": "Softens both distributions."})
    elastic_samples_per_step: int = field(
        default=1, metadata={"help": "Draw so many m per step; each sample is trained at all of them in one view pass."}
    )
    elastic_seed: int = field(default=0, metadata={"help": "Seed of the draw of m."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up steps, or a fraction of all steps."})
    num_train_epochs: float = field(default=2.0, metadata={"help": "Passes over the data."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluation reports losses only."})

    def __post_init__(self) -> None:
        self.elastic_by_source = read_json_argument(self.elastic_by_source, "elastic_by_source")
        super().__post_init__()
        if self.distillation_weight < 0 or self.distillation_temperature <= 0:
            raise ValueError(
                f"distillation_weight={self.distillation_weight} must not be negative and distillation_temperature="
                f"{self.distillation_temperature} must be positive."
            )
        self._check_loss()
        self._check_choices()
        self._check_probabilities()
        self._check_sources()
        if self.elastic_counts() is None and (self.elastic_per_sample or self.distillation_weight):
            raise ValueError(
                "elastic_per_sample and distillation_weight need several m: set elastic_num_visual_tokens, "
                "e.g. 1 8 64 256."
            )
        self._check_samples_per_step()
        largest = max(self.elastic_counts() or (), default=math.inf)
        if largest < self.elastic_warmup_minimum:
            raise ValueError(
                f"elastic_warmup_minimum={self.elastic_warmup_minimum} exceeds every m that is drawn (up to {largest})."
            )

    def elastic_shares(self, source: str | None = None) -> dict[int, float] | None:
        """{m: probability} for a source; None when its m is not drawn."""
        by_source: Any = self.elastic_by_source or {}
        if source is not None and source in by_source:
            return count_shares(by_source[source])
        if self.elastic_range is not None:
            return log_uniform_shares(*self.elastic_range)
        choices = self.elastic_num_visual_tokens
        if choices is None:
            return None
        shares = dict.fromkeys(choices, 0.0)
        for m, share in zip(choices, self.elastic_probabilities or [1 / len(choices)] * len(choices), strict=True):
            shares[m] += share
        return shares

    def elastic_counts(self) -> list[int] | None:
        """Every m that can be drawn, in ascending order; None when m is fixed."""
        named = [None, *(self.elastic_by_source or {})]
        counts = {m for source in named for m in self.elastic_shares(source) or ()}
        return sorted(counts) or None

    def _check_loss(self) -> None:
        if self.loss_per == "answer" and (self.label_smoothing_factor or self.distillation_weight):
            raise ValueError("loss_per='answer' goes with neither label_smoothing_factor nor distillation_weight.")

    def _check_samples_per_step(self) -> None:
        number = self.elastic_samples_per_step
        if number < 1:
            raise ValueError(f"elastic_samples_per_step={number} must be at least 1, the m of a step.")
        if number > 1 and self.elastic_counts() is None:
            raise ValueError(
                f"elastic_samples_per_step={number} needs several m: set elastic_num_visual_tokens or elastic_range."
            )
        one_each = self.elastic_per_sample or self.elastic_per_sample_sources
        if number > 1 and (one_each or self.distillation_weight or self.label_smoothing_factor):
            raise ValueError(
                "elastic_samples_per_step gives every sample the same m, and goes with neither elastic_per_sample, "
                "distillation_weight nor label_smoothing_factor."
            )

    def _check_choices(self) -> None:
        choices, limits = self.elastic_num_visual_tokens, self.elastic_range
        if choices is not None and limits is not None:
            raise ValueError("elastic_num_visual_tokens and elastic_range both say what m is drawn from; state one.")
        if limits is not None and not (len(limits) == 2 and 1 <= limits[0] <= limits[1]):
            raise ValueError(f"elastic_range={limits} must be the smallest and the largest m, e.g. 1 32.")
        for name in ("elastic_num_visual_tokens", "elastic_followup"):
            counts = getattr(self, name)
            if counts is not None and (not counts or min(counts) < 1):
                raise ValueError(f"{name} must be positive counts, got {counts}.")

    def _check_sources(self) -> None:
        groups = self.batch_groups or {}
        for name in ("elastic_by_source", "elastic_per_sample_sources", "elastic_warmup_sources"):
            sources = getattr(self, name)
            unknown = [source for source in sources or () if source not in groups]
            if unknown:
                raise ValueError(
                    f"{name} names {', '.join(unknown)[:80]}, and batch_groups ({', '.join(groups)[:80] or 'not set'}) "
                    "does not: m is drawn by source only where every micro-batch is of one."
                )
        by_source: Any = self.elastic_by_source or {}
        for source, spec in by_source.items():
            try:
                count_shares(spec)
            except ValueError as error:
                raise ValueError(f"elastic_by_source, {source}: {error}") from None
        if self.elastic_by_source and self.elastic_shares() is None and {*groups} - {*self.elastic_by_source}:
            raise ValueError(
                "elastic_by_source leaves sources out: set elastic_range or elastic_num_visual_tokens too."
            )

    def _check_probabilities(self) -> None:
        shares, choices = self.elastic_probabilities, self.elastic_num_visual_tokens
        if shares is None:
            return
        if len(shares) != len(choices or ()):
            raise ValueError(f"elastic_probabilities has {len(shares)} entries for {len(choices or ())} counts.")
        if not (all(0 <= share <= 1 for share in shares) and math.isclose(sum(shares), 1, abs_tol=1e-6)):
            raise ValueError(
                f"elastic_probabilities={shares} must be from 0 to 1 and add up to 1, not {sum(shares):g}."
            )


def read_json_argument(value: Any, name: str) -> Any:
    """A mapping as it is, or from the JSON that a command line has.

    Raises:
        ValueError: for text that is no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON ({error}): {value[:120]}") from None
