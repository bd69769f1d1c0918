"""What a recipe can say beside the trainers' own arguments: model, data, run and variants.

Fields that hold mappings or lists of them are typed `... | str | None`, as in `TrainingArguments`: on the command line
they are JSON.
"""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from fusedvlm.wording import shown

QUESTION_CHOICES = {"true": (True,), "false": (False,), "both": (True, False)}


def _parse_json(value: Any, name: str) -> Any:
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON ({error}): {shown(value)}") from error


@dataclass
class ModelArguments:
    """The model to train: a saved one, or new from backbones.

    Args:
        model_name_or_path, model_revision: a stage-1 folder or a variant to start from; its towers and sizes are used,
            and `vision`, `text`, `answer` and `fuser_config` are not.
        vision, vision_revision: tower of a new model: repo id, folder, or a mapping with `model_type` and sizes, which
            gives random weights.
        text, text_revision: the frozen LLM of a new model, in the same three forms; a mapping gives a random LLM that
            reads bytes, for smoke tests.
        answer, answer_revision: CLIP whose text tower reads the answers of stage 1, or a mapping of sizes.
        answer_positions: text positions of that tower; those beyond its own are drawn around its own.
        query_tokenizer: tokenizer of the fusion module: CLIP's BPE by default, `bytes`, a folder or a repo id.
        num_visual_tokens, num_followup_visual_tokens: m and m'.
        trained_num_visual_tokens: every m that is trained, for elastic runs; the largest is the end of the dial.
        max_local_views: most local views of an image (HD-9 is 9).
        connector: how view tokens become visual tokens: a name, or the file of your own (`my_connector.py`); the saved
            model's own, or fused, when not given.
        connector_config: its settings.
        fuse_question: whether the connector reads the question; by default it does if it can.
        fusion_row_per_turn: whether each turn's question reads the views on a fusion row of its own; when not given, as
            the saved model does, and true for a new one.
        fuser_config: sizes of the fused connector's decoder that differ from the tower's; others have none.
        attn_implementation: eager, sdpa or flash_attention_2; the best there is by default.
        dtype: dtype of the trained weights.
        text_dtype: dtype the frozen LLM is held in; `dtype` when not given.

    Raises:
        ValueError: when there is neither a model to start from nor both backbones.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Stage-1 folder or variant to start from, instead of new from backbones."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of it."})
    vision: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Vision tower of a new model: repo id, folder, or sizes as JSON."}
    )
    vision_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the vision tower."})
    text: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Frozen LLM of a new model: repo id, folder, or sizes as JSON."}
    )
    text_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the LLM."})
    answer: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "CLIP whose text tower reads answers in stage 1, or sizes as JSON."}
    )
    answer_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of it."})
    answer_positions: int = field(default=512, metadata={"help": "Text positions of the answer tower."})
    query_tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer of the fusion module; CLIP's BPE by default, or `bytes`."}
    )
    num_visual_tokens: int = field(
        default=256, metadata={"help": "m, visual tokens in front of an image's first question."}
    )
    num_followup_visual_tokens: int | None = field(
        default=None, metadata={"help": "m', visual tokens in front of later questions."}
    )
    trained_num_visual_tokens: list[int] | None = field(
        default=None, metadata={"help": "Every m that is trained; [m] by default."}
    )
    max_local_views: int = field(default=9, metadata={"help": "Most local views per image."})
    connector: str | None = field(
        default=None, metadata={"help": "How view tokens become visual tokens; the saved model's own, or fused."}
    )
    connector_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Settings of the connector, as JSON."}
    )
    fuse_question: bool | None = field(
        default=None, metadata={"help": "Whether the connector reads the question; by default it does if it can."}
    )
    fusion_row_per_turn: bool | None = field(
        default=None, metadata={"help": "A fusion row for each turn; the saved model's own way, or true for a new one."}
    )
    fuser_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Sizes of the fusion decoder, as JSON."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa or flash_attention_2."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Dtype of the trained weights."}
    )
    text_dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "Dtype of the frozen LLM."}
    )

    def __post_init__(self) -> None:
        for name in ("vision", "text", "answer", "connector_config", "fuser_config"):
            setattr(self, name, _parse_json(getattr(self, name), name))
        if self.model_name_or_path is None and (self.vision is None or self.text is None):
            raise ValueError("Say what to train: model.model_name_or_path, or both model.vision and model.text.")
        if self.num_followup_visual_tokens is not None and self.num_followup_visual_tokens > self.num_visual_tokens:
            raise ValueError(
                f"num_followup_visual_tokens={self.num_followup_visual_tokens} must not exceed num_visual_tokens="
                f"{self.num_visual_tokens}."
            )


@dataclass
class DataArguments:
    """The mixture to train on; see `fusedvlm.data.build_dataset`.

    Args:
        sources: list of `{"type": ..., "path": ..., "image_folder": ..., "weight": ...}`, or a YAML file with a data
            section (its `seed`, `stop` and `temperature` count too).
        mixture_seed: seed of the order in which the sources are mixed.
        manifest: file that `fusedvlm data manifest` wrote; it goes into `run.json`, and from there into the card.
        fraction: share of the data to use, a random subset that depends on `fraction_seed` alone.
        eval_sources: the same for evaluation; none by default.

    Raises:
        ValueError: for a fraction outside (0, 1], or sources that are not mappings.
    """

    sources: list[dict[str, Any]] | str | None = field(
        default=None, metadata={"help": "A data section's YAML file, or sources as JSON: [{type, path, ...}, ...]."}
    )
    mixture_seed: int = field(default=0, metadata={"help": "Seed of the mixture's order."})
    manifest: str | None = field(default=None, metadata={"help": "What `fusedvlm data manifest` wrote, for run.json."})
    fraction: float = field(default=1.0, metadata={"help": "Share of the data, a random subset."})
    fraction_seed: int = field(default=0, metadata={"help": "Seed of the random subset that `fraction` takes."})
    eval_sources: list[dict[str, Any]] | str | None = field(
        default=None, metadata={"help": "Sources to evaluate on, as JSON."}
    )

    def __post_init__(self) -> None:
        for name in ("sources", "eval_sources"):
            sources = _parse_json(getattr(self, name), f"data.{name}")
            setattr(self, name, sources)
            if isinstance(sources, str) and sources.endswith((".yaml", ".yml")):
                continue
            if sources is not None and not (isinstance(sources, list) and all(isinstance(s, dict) for s in sources)):
                raise ValueError(
                    f"data.{name} must be a YAML file or a list of mappings with type and path, got {shown(sources)}."
                )
        if not self.sources:
            raise ValueError("data.sources is empty: name at least one source, e.g. --data.sources.0.path data.jsonl.")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"data.fraction={self.fraction} must be above 0 and at most 1.")


@dataclass
class RunArguments:
    """How a run is carried out.

    Args:
        global_batch_size: samples of one optimizer step over all processes; gradient accumulation follows from it.
        resume: `auto` continues the newest complete checkpoint of the output folder, `never` starts anew, or a
            checkpoint's path.
        torch_compile_modules: modules to compile, e.g. `model.vision_tower model.fuser`.
        torch_compile_modules_backend: their backend.
    """

    global_batch_size: int | None = field(
        default=None, metadata={"help": "Samples of one optimizer step over all processes."}
    )
    resume: str = field(default="auto", metadata={"help": "auto, never, or a checkpoint's path."})
    torch_compile_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to compile, e.g. model.vision_tower model.fuser."}
    )
    torch_compile_modules_backend: str = field(default="inductor", metadata={"help": "Backend of torch.compile."})


@dataclass
class VariantArguments:
    """Stage 3: which variants to make.

    Args:
        pairs: list of [m, m'].
        fuse_question: `true`, `false` or `both`; the kinds of fusion input.

    Raises:
        ValueError: for a pair that is not two positive counts, or m' above m.
    """

    pairs: list[list[int]] | str | None = field(default=None, metadata={"help": "Pairs as JSON: [[m, m'], ...]."})
    fuse_question: str = field(default="both", metadata={"help": "true, false or both."})

    def __post_init__(self) -> None:
        self.pairs = _parse_json(self.pairs, "variants.pairs")
        self.fuse_question = str(self.fuse_question).lower()
        if self.fuse_question not in QUESTION_CHOICES:
            raise ValueError(f"variants.fuse_question={shown(self.fuse_question)} must be true, false or both.")
        pair: Any
        for pair in self.pairs or []:
            counts = isinstance(pair, list) and len(pair) == 2 and all(type(count) is int for count in pair)
            if not counts or not 1 <= pair[1] <= pair[0]:
                raise ValueError(f"variants.pairs: {shown(pair)} must be [m, m'] with 1 <= m' <= m.")
        if not self.pairs:
            raise ValueError("variants.pairs is empty: name at least one [m, m'].")
        if len({tuple(pair) for pair in self.pairs}) < len(self.pairs) or len({p[0] for p in self.pairs}) < len(
            self.pairs
        ):
            raise ValueError(f"variants.pairs names an m twice, and each m is one folder: {self.pairs}.")


def dataclasses_of(stage: str) -> dict[str, type]:
    """{section: dataclass} at a stage; generation has no `variants`."""
    from fusedvlm.trainers.arguments import ContrastiveArguments, GenerationArguments

    kinds = {
        "model": ModelArguments,
        "data": DataArguments,
        "run": RunArguments,
        "training": ContrastiveArguments if stage == "contrastive" else GenerationArguments,
    }
    return {**kinds, "variants": VariantArguments} if stage == "variants" else kinds
