"""Published research checkpoints to variants of this package, and back.

Names and shapes: docs/reference.md, "Tensors". What a saved config loses: docs/reference.md,
"Configurations that do not survive a reload".

Sizes are read from the tensors: the published config loses some of them on reload. What tensors cannot tell (heads of
the vision tower and the LLM, activations, epsilons, rotary base, m and m') comes from the published config.
"""

import functools
import math
import re
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration, FusedVLMForContrastiveLearning
from fusedvlm.modeling_fusedvlm.configuration_fusedvlm import FusedVLMConfig
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_loading import (
    PLACEHOLDER_TOKENS,
    is_language_key,
    load_vision_tower,
)
from fusedvlm.processing import FusedVLMImageProcessor, build_processor
from fusedvlm.processing.published_templates import choose_conversation, published_chat_template

from . import published_quecc
from .published_files import copy_tokenizer, first_placeholder_id, read_json_if_there, read_weights
from .published_names import KeyReport, published_stage, to_ours

DEFAULT_LOCAL_VIEWS = 9
MODEL_CLASSES = {"generation": FusedVLMForConditionalGeneration, "contrastive": FusedVLMForContrastiveLearning}


@dataclass
class ConversionReport(KeyReport):
    """Every key, the sizes found, and remarks a user should read."""

    source: str = ""
    output: str = ""
    stage: str = ""
    sizes: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict:
        """For JSON."""
        document = asdict(self)
        document["renamed"] = [{"from": old, "to": new} for old, new in self.renamed]
        document["dropped"] = [{"key": key, "reason": reason} for key, reason in self.dropped]
        return document


@dataclass
class ConversionOptions:
    """What a published folder does not say.

    Args:
        text_model: repo id or folder of the LLM to refer to instead of copying; it must have the same weights.
        text_revision: its commit, tag or branch.
        conversation: name of the published chat template; by default the one the LLM's vocabulary calls for.
        fuse_question: `False` for the published "vision query only" variants.
        num_visual_tokens, num_followup_visual_tokens: m and m', where the published config is wrong or silent.
        max_local_views: HD setting, where there is no preprocessor config.
        tokenizer, query_tokenizer: folders of the LLM's and the fusion module's tokenizers, where the published folder
            lacks them.
        vision_model: repo id or folder of the vision tower, for QueCC checkpoints, which have none; by default the one
            that their config names.
        published_answer_mask: stage 1 with the published batch-dependent mask.
        dtype: cast the weights, e.g. "bfloat16"; by default they stay as stored.
    """

    text_model: str | None = None
    text_revision: str | None = None
    conversation: str | None = None
    fuse_question: bool = True
    num_visual_tokens: int | None = None
    num_followup_visual_tokens: int | None = None
    max_local_views: int | None = None
    tokenizer: str | None = None
    query_tokenizer: str | None = None
    vision_model: str | None = None
    published_answer_mask: bool = False
    dtype: str | None = None


def convert_published(
    source: str | Path, output: str | Path, options: ConversionOptions | None = None
) -> ConversionReport:
    """Write a published checkpoint folder as a variant folder.

    Args:
        source: published folder: weights, `config.json`, LLM tokenizer and `preprocessor_config.json` at the top, query
            tokenizer in `clip/`.
        output: variant folder, must not be `source`.
        options: see `ConversionOptions`.

    Raises:
        ValueError: naming the keys that are unexpected, missing or of another shape than the rest implies; or when the
            referenced LLM is not the one in the checkpoint.
    """
    options = options or ConversionOptions()
    folder, target = Path(source), Path(output)
    if folder.resolve() == target.resolve():
        raise ValueError(f"{output} is the published folder itself; write the variant elsewhere.")
    with tempfile.TemporaryDirectory() as scratch:
        tokenizers = _collect_tokenizers(folder, Path(scratch), options)
        model, report = load_published(folder, options, tokenizers)
        report.output = str(output)
        model.save_pretrained(target, merged=options.text_model is None)
        _save_processor(model.config, folder, target, options, tokenizers, report)
    return report


def load_published(
    source: Path, options: ConversionOptions | None = None, tokenizers: dict[str, Path | None] | None = None
) -> tuple[FusedVLMForConditionalGeneration | FusedVLMForContrastiveLearning, ConversionReport]:
    """A published checkpoint as a model of this package, in memory; arguments and errors as `convert_published`."""
    options, source = options or ConversionOptions(), Path(source)
    if tokenizers is None:
        with tempfile.TemporaryDirectory() as scratch:
            return load_published(source, options, _collect_tokenizers(source, Path(scratch), options))
    published = read_weights(source)
    if published_quecc.is_quecc(published):
        return _load_quecc(source, published, options, tokenizers)
    stage = published_stage(published)
    keys = to_ours(published, stage)
    state = {name: published[name] for name in keys.used}
    state.update({new: published[old] for old, new in keys.renamed})
    report = ConversionReport(**vars(keys), source=str(source), stage=stage)
    if options.max_local_views is None:
        options = replace(options, max_local_views=_local_views(source, report.notes))
    config = read_config(state, read_json_if_there(source / "config.json"), stage, options, tokenizers, report.notes)
    report.sizes = describe_sizes(config)
    model = _fill(MODEL_CLASSES[stage], config, state, options.dtype, report.notes)
    if stage == "generation":
        _set_generation_defaults(model, tokenizers["llm"])
        if options.text_model is not None:
            _check_text_model(state, options)
    return model, report


def _load_quecc(
    source: Path, published: dict[str, torch.Tensor], options: ConversionOptions, tokenizers: dict[str, Path | None]
) -> tuple[FusedVLMForConditionalGeneration, ConversionReport]:
    """A LLaVA with a QueCC compressor; its vision tower, which such checkpoints leave out, from its own repository."""
    keys = published_quecc.to_ours(published)
    state = published_quecc.rename_tensors(published, keys)
    report = ConversionReport(**vars(keys), source=str(source), stage="quecc")
    settings = read_json_if_there(source / "config.json")
    if not any(name.startswith("model.language_model.") for name in state):
        raise ValueError(f"{source} holds a compressor without its language model; convert the whole checkpoint.")
    if any(name.startswith("model.vision_tower.") for name in state):
        vision = read_vision_config(state, settings.get("vision_config") or {})
    else:
        name = options.vision_model or settings.get("mm_vision_tower")
        if name is None:
            raise ValueError(f"{source} has no vision tower and names none; give one (--vision-model).")
        tower = load_vision_tower(name)
        vision = tower.config.to_dict()
        state.update({f"model.vision_tower.{key}": tensor for key, tensor in tower.state_dict().items()})
        report.notes.append(f"The vision tower is that of {name}; the checkpoint has none.")
    family = str(settings.get("model_type", "llava_llama")).removeprefix("llava_")
    if family == "llava":
        family = "llama"
    config = FusedVLMConfig(
        vision_config=vision,
        text_config=read_text_config(state, {**settings, "model_type": family}),
        image_token_id=_placeholder_id(tokenizers["llm"], report.notes),
        max_local_views=options.max_local_views or 0,
        text_model_name_or_path=options.text_model,
        text_model_revision=options.text_revision,
        **published_quecc.connector_fields(state, settings, vision),
    )
    report.notes.append(
        "One view per image, padded to a square with black; the published code pads with the mean color."
    )
    report.sizes = describe_sizes(config)
    model = _fill(FusedVLMForConditionalGeneration, config, state, options.dtype, report.notes)
    _set_generation_defaults(model, tokenizers["llm"])
    if options.text_model is not None:
        _check_text_model(state, options)
    return model, report


def _fill(
    model_class: Any, config: FusedVLMConfig, state: dict[str, torch.Tensor], dtype: str | None, notes: list[str]
) -> Any:
    """The model with `state` as its weights, after checking that every key and shape is the one the config implies."""
    with torch.device("meta"):
        skeleton = model_class(config)
    expected = {name: tuple(parameter.shape) for name, parameter in skeleton.state_dict().items()}
    if config.tie_word_embeddings and model_class is FusedVLMForConditionalGeneration:
        state.setdefault("lm_head.weight", state["model.language_model.embed_tokens.weight"])
    problems = [f"missing {name}" for name in sorted(expected.keys() - state.keys())]
    problems += [f"unexpected {name}" for name in sorted(state.keys() - expected.keys())]
    problems += [
        f"{name} has shape {tuple(state[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if problems:
        raise ValueError(f"The checkpoint does not fit the model it implies: {'; '.join(problems)}.")
    return model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=_common_dtype(state, dtype, notes)
    ).eval()


def _common_dtype(state: dict[str, torch.Tensor], dtype: str | None, notes: list[str]) -> torch.dtype:
    if dtype is not None:
        return getattr(torch, dtype)
    found = {tensor.dtype for tensor in state.values()}
    common = functools.reduce(torch.promote_types, found)
    if len(found) > 1:
        notes.append(f"Weights of {len(found)} precisions became {common}, the one that holds them all.")
    return common


# -- config ------------------------------------------------------------------------------------------------------------


def read_config(
    state: dict[str, torch.Tensor],
    published: dict,
    stage: str,
    options: ConversionOptions,
    tokenizers: dict[str, Path | None],
    notes: list[str],
) -> FusedVLMConfig:
    """Config of a published checkpoint: sizes from `state` (our names), the rest from its own config.

    Remarks are appended to `notes`.
    """
    fusion = published.get("imgque_config", {}) if stage == "generation" else published
    vision = read_vision_config(state, fusion.get("vision_config", {}))
    rows = state["model.fuser.embed_tokens.weight"].shape[0]
    first, eos = _query_rows(fusion, rows, tokenizers["query"], notes)
    counts = _token_counts({**fusion, **published}, rows - first + 1, options, notes)
    fields = {
        "vision_config": vision,
        "fuser_config": read_fuser_config(state, rows, eos),
        "first_query_token_id": first,
        "distinct_queries": bool(published.get("append_special_padding", True)),
        "merge_views": "model.merger.conv.weight" in state,
        "newline_token": "model.merger.newline" in state,
        "fuse_question": options.fuse_question,
        "fusion_row_per_turn": False,  # the published code packs all questions about an image into one row
        "max_local_views": options.max_local_views,
        **counts,
    }
    if stage == "generation":
        fields["text_config"] = read_text_config(state, published.get("llm_config") or {})
        fields["image_token_id"] = _placeholder_id(tokenizers["llm"], notes)
        fields["text_model_name_or_path"] = options.text_model
        fields["text_model_revision"] = options.text_revision
    else:
        fields["answer_config"] = read_answer_config(state, fusion.get("text_config", {}), eos)
        fields["projection_dim"] = state["image_projection.weight"].shape[0]
        fields["logit_scale_init_value"] = float(fusion.get("logit_scale_init_value", 2.6592))
        fields["zero_large_answer_entries"] = options.published_answer_mask
    return FusedVLMConfig(**fields)


def count_layers(state: dict[str, torch.Tensor], prefix: str) -> int:
    """Transformer layers whose names begin with `prefix`."""
    numbers = [int(match[1]) for name in state if (match := re.match(re.escape(prefix) + r"(\d+)\.", name))]
    return 1 + max(numbers, default=-1)


def read_vision_config(state: dict[str, torch.Tensor], published: dict) -> dict:
    """CLIP tower: all sizes from tensors but the number of heads."""
    prefix = "model.vision_tower."
    width, channels, _, patch = state[f"{prefix}embeddings.patch_embedding.weight"].shape
    grid = math.isqrt(state[f"{prefix}embeddings.position_embedding.weight"].shape[0] - 1)
    return {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": state[f"{prefix}encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": count_layers(state, f"{prefix}encoder.layers."),
        "num_attention_heads": published.get("num_attention_heads") or width // 64,
        "num_channels": channels,
        "patch_size": patch,
        "image_size": grid * patch,
        "hidden_act": published.get("hidden_act", "quick_gelu"),
        "layer_norm_eps": published.get("layer_norm_eps", 1e-5),
        "projection_dim": published.get("projection_dim", 768),
    }


def read_fuser_config(state: dict[str, torch.Tensor], rows: int, eos: int) -> dict:
    """Fusion decoder. Its published config is rebuilt on every load, so its constants are too: heads of 64."""
    width = state["model.fuser.norm.weight"].shape[0]
    return {
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": state["model.fuser.layers.0.mlp.up_proj.weight"].shape[0],
        "num_hidden_layers": count_layers(state, "model.fuser.layers."),
        "num_attention_heads": max(1, width // 64),
        "rms_norm_eps": 1e-6,
        "eos_token_id": eos,
    }


def read_text_config(state: dict[str, torch.Tensor], published: dict) -> dict:
    """The LLM, any family of transformers; its architecture's own fields only, sizes from tensors."""
    if "model_type" not in published:
        raise ValueError("config.json has no llm_config.model_type, so the LLM's architecture is unknown.")
    prefix = "model.language_model."
    known = AutoConfig.for_model(published["model_type"]).to_dict().keys() | {"rope_theta", "rope_scaling"}
    fields = {name: published[name] for name in published if name in known and name not in ("dtype", "architectures")}
    vocabulary, width = state[f"{prefix}embed_tokens.weight"].shape
    fields.update(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=count_layers(state, f"{prefix}layers."))
    for name, divisor in (("up_proj", 1), ("gate_up_proj", 2)):
        if (weight := state.get(f"{prefix}layers.0.mlp.{name}.weight")) is not None:
            fields["intermediate_size"] = weight.shape[0] // divisor
    fields["tie_word_embeddings"] = "lm_head.weight" not in state
    return fields


def read_answer_config(state: dict[str, torch.Tensor], published: dict, eos: int) -> dict:
    """CLIP text tower of stage 1; its position table may have been stretched."""
    vocabulary, width = state["answer_tower.embeddings.token_embedding.weight"].shape
    return {
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": state["answer_tower.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": count_layers(state, "answer_tower.encoder.layers."),
        "num_attention_heads": published.get("num_attention_heads") or width // 64,
        "max_position_embeddings": state["answer_tower.embeddings.position_embedding.weight"].shape[0],
        "hidden_act": published.get("hidden_act", "quick_gelu"),
        "layer_norm_eps": published.get("layer_norm_eps", 1e-5),
        "projection_dim": state["answer_projection.weight"].shape[0],
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": eos,
    }


def _query_rows(fusion: dict, rows: int, tokenizer: Path | None, notes: list[str]) -> tuple[int, int]:
    """Rows of the first query and of the eos: from the query tokenizer, or else from the CLIP text config."""
    if tokenizer is not None:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
        first = first_placeholder_id(tokenizer)
        return (len(loaded) if first is None else first), loaded.eos_token_id
    first = fusion.get("text_config", {}).get("vocab_size") or 49408
    notes.append(
        f"No query tokenizer: assumed that queries begin at row {first} of {rows} and the eos is the row before."
    )
    return first, first - 1


def _token_counts(published: dict, rows: int, options: ConversionOptions, notes: list[str]) -> dict:
    m = options.num_visual_tokens or published.get("length_que_end")
    if m is None:
        m = rows
        notes.append(f"No length_que_end in config.json: m is the {rows} queries of the embedding table.")
    followup = options.num_followup_visual_tokens or published.get("length_que_end_short")
    if followup is not None and followup > m:
        notes.append(f"m'={followup} exceeds m={m}, which the published code refuses: m' is {m}.")
        followup = m
    counts = {"num_visual_tokens": m, "num_followup_visual_tokens": followup, "trained_num_visual_tokens": [m]}
    return {**counts, "trained_num_visual_tokens_is_range": False}


def _placeholder_id(tokenizer: Path | None, notes: list[str]) -> int:
    """A reserved id of the LLM's vocabulary; the published code reuses pad or eos, which also end its answers."""
    if tokenizer is None:
        notes.append("No LLM tokenizer: the placeholder of visual tokens is id 0.")
        return 0
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    vocabulary = loaded.get_vocab()
    for token in (*PLACEHOLDER_TOKENS, loaded.unk_token):
        if token is not None and token in vocabulary:
            return vocabulary[token]
    raise ValueError(f"The tokenizer in {tokenizer} has no reserved token that can stand for a visual token.")


def _local_views(source: Path, notes: list[str]) -> int:
    views = read_json_if_there(source / "preprocessor_config.json").get("num_crops")
    if views is None:
        notes.append(f"No num_crops in preprocessor_config.json: assumed HD-{DEFAULT_LOCAL_VIEWS}.")
    return DEFAULT_LOCAL_VIEWS if views is None else views


def describe_sizes(config: FusedVLMConfig) -> dict:
    """The numbers a user compares with a model card."""
    vision = config.vision_config
    sizes = {
        "vision": {"width": vision.hidden_size, "layers": vision.num_hidden_layers, "image_size": vision.image_size},
        **_connector_sizes(config),
        "num_visual_tokens": config.num_visual_tokens,
        "num_followup_visual_tokens": config.num_followup_visual_tokens,
        "first_query_token_id": config.first_query_token_id,
        "tokens_per_view": config.tokens_per_view,
        "merge_views": config.merge_views,
        "newline_token": config.newline_token,
    }
    if config.answer_config is None:
        text = config.text_config
        sizes["llm"] = {"family": text.model_type, "width": text.hidden_size, "layers": text.num_hidden_layers}
    return sizes


def _connector_sizes(config: FusedVLMConfig) -> dict:
    sizes, fuser = config.connector_class.describe(config), config.fuser_config
    if fuser is None:
        return {"connector": {"name": config.connector, **sizes}}
    decoder = {"width": fuser.hidden_size, "layers": fuser.num_hidden_layers, "embedding_rows": fuser.vocab_size}
    return {"fusion": decoder}


# -- around the weights ------------------------------------------------------------------------------------------------


def _collect_tokenizers(source: Path, scratch: Path, options: ConversionOptions) -> dict[str, Path | None]:
    """Copies of both tokenizers that load on their own: the published config would stand in their way."""
    found = {}
    places = {"llm": options.tokenizer or source, "query": options.query_tokenizer or source / "clip"}
    for name, place in places.items():
        found[name] = scratch / name if copy_tokenizer(Path(place), scratch / name) else None
    return found


def _set_generation_defaults(model: Any, tokenizer: Path | None) -> None:
    """Answers end where the published demo ends them, and placeholders are never generated."""
    loaded = None if tokenizer is None else AutoTokenizer.from_pretrained(tokenizer)
    eos = pad = None
    if loaded is not None:
        vocabulary = loaded.get_vocab()
        eos = next(
            (vocabulary[t] for t in ("<|eot_id|>", "<|im_end|>", "<|end|>") if t in vocabulary), loaded.eos_token_id
        )
        pad = loaded.eos_token_id if loaded.pad_token_id is None else loaded.pad_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=None if loaded is None else loaded.bos_token_id,
        eos_token_id=eos,
        pad_token_id=pad,
        suppress_tokens=[model.config.image_token_id],
    )


def _check_text_model(state: dict[str, torch.Tensor], options: ConversionOptions) -> None:
    """Refuse to refer to an LLM that is not the one in the checkpoint, compared at the checkpoint's precision."""
    reference = AutoModelForCausalLM.from_pretrained(
        str(options.text_model), revision=options.text_revision, dtype="auto"
    )
    prefix = reference.base_model_prefix + "."
    theirs = {
        f"model.language_model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name: tensor
        for name, tensor in reference.state_dict().items()
    }
    ours = {name: tensor for name, tensor in state.items() if is_language_key(name)}
    different = sorted(ours.keys() ^ theirs.keys()) or [
        name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name].to(tensor.dtype))
    ]
    if different:
        raise ValueError(
            f"{options.text_model} is not the LLM of this checkpoint: {len(different)} of {len(ours)} tensors differ, "
            f"first {', '.join(different[:3])}. Leave the reference out to keep the checkpoint's own LLM."
        )


def _save_processor(
    config: FusedVLMConfig, source: Path, output: Path, options: Any, tokenizers: Any, report: ConversionReport
) -> None:
    """Processor of the variant, from the published tokenizers and `preprocessor_config.json`."""
    own_tokens = config.connector_class.has_own_question_tokens(config)
    if (own_tokens and tokenizers["query"] is None) or tokenizers["llm"] is None:
        report.notes.append(
            "No processor was written: "
            + ("no LLM tokenizer beside the weights" if tokenizers["llm"] is None else "no query tokenizer in clip/")
            + " (point to one with --tokenizer or --query-tokenizer)."
        )
        if tokenizers["query"] is not None:
            copy_tokenizer(tokenizers["query"], output / "query_tokenizer", with_placeholders=False)
        return
    query_tokenizer = None
    if own_tokens:
        plain = tokenizers["query"].parent / "query_without_placeholders"
        copy_tokenizer(tokenizers["query"], plain, with_placeholders=False)
        query_tokenizer = AutoTokenizer.from_pretrained(plain)
    published = read_json_if_there(source / "preprocessor_config.json")
    size = config.vision_config.image_size
    statistics = {name: published[name] for name in ("image_mean", "image_std") if published.get(name) is not None}
    conversation = options.conversation or choose_conversation(AutoTokenizer.from_pretrained(tokenizers["llm"]))
    report.notes.append(f"Chat template: {conversation}.")
    processor = build_processor(
        config,
        text=str(tokenizers["llm"]),
        query_tokenizer=query_tokenizer,
        image_processor=FusedVLMImageProcessor(
            size={"height": size, "width": size}, max_local_views=config.max_local_views, **statistics
        ),
        chat_template=published_chat_template(conversation),
    )
    processor.save_pretrained(output)
