"""A variant folder back to a published checkpoint folder, for people who stay with the research code."""

from pathlib import Path

from huggingface_hub import save_torch_state_dict

from fusedvlm.files import write_json
from fusedvlm.modeling_fusedvlm.configuration_fusedvlm import FusedVLMConfig
from fusedvlm.processing import FusedVLMProcessor

from .convert import MODEL_CLASSES, ConversionReport, describe_sizes
from .published_files import read_json_if_there
from .published_names import to_published

# Field names of their config that have another name or an inverted home here.
FUSION_MODEL_TYPE = "modeling_image_hd_multi_query_clip"
FULL_MODEL_TYPE = "modeling_query_adapt_clip_llm"


def export_published(source: str, output: str, max_shard_size: str = "5GB") -> ConversionReport:
    """Write a variant folder as a published checkpoint folder.

    Args:
        source: variant folder, by reference or merged, of either training stage.
        output: folder, created when missing.
        max_shard_size: largest weight file.

    Raises:
        ValueError: when the variant has something the published model cannot express, naming it.
    """
    if Path(source).resolve() == Path(output).resolve():
        raise ValueError(f"{output} is the variant itself; write the published folder elsewhere.")
    config = FusedVLMConfig.from_pretrained(source)
    _refuse_what_cannot_be_expressed(config)
    stage = "generation" if config.answer_config is None else "contrastive"
    model = MODEL_CLASSES[stage].from_pretrained(source, dtype="auto")
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    report = ConversionReport(**vars(to_published(state, stage)), source=str(source), output=str(output), stage=stage)
    report.sizes = describe_sizes(config)
    published = {name: state[name] for name in report.used}
    published.update({new: state[old] for old, new in report.renamed})
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(
        {name: tensor.contiguous() for name, tensor in published.items()}, folder, max_shard_size=max_shard_size
    )
    write = full_config if stage == "generation" else fusion_config
    write_json(folder / "config.json", write(config))
    _save_processor(Path(source), folder, config, report)
    if not (config.merge_views and config.newline_token):
        report.notes.append("The published code forgets enable_local_merge=False and enable_token_crlf=False on load.")
    if config.fuse_question is False:
        report.notes.append("fuse_question=False has no field there: give the research code empty questions.")
    if config.fusion_row_per_turn:
        report.notes.append(
            "fusion_row_per_turn=True has no field there: the research code reads later questions behind earlier ones; "
            "ask one question per conversation."
        )
    return report


def _refuse_what_cannot_be_expressed(config: FusedVLMConfig) -> None:
    vision = config.vision_config
    if vision.model_type != "clip_vision_model":
        raise ValueError(f"The published model reads CLIP towers only; this variant has a {vision.model_type}.")
    grid = vision.image_size // vision.patch_size
    if config.merge_views and grid % 2:
        raise ValueError(f"The published merge needs an even patch grid; this variant has {grid} x {grid}.")
    heads = config.fuser_config.num_attention_heads
    if heads != max(1, vision.hidden_size // 64):
        raise ValueError(
            f"The published fusion module has heads of 64 ({vision.hidden_size // 64} here); this variant has {heads}."
        )


def vision_config(config: FusedVLMConfig) -> dict:
    """Published `vision_config` of a variant."""
    vision = config.vision_config
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels")
    more = ("image_size", "patch_size", "hidden_act", "layer_norm_eps", "projection_dim")
    return {
        "model_type": "clip_vision_hd",
        **{name: getattr(vision, name) for name in (*same, *more)},
        "enable_local_merge": config.merge_views,
        "enable_token_crlf": config.newline_token,
        "vembed_hidden_size": vision.hidden_size,
        "vembed_merge_kernel_size": 3,
        "vembed_merge_stride": 2,
    }


def fusion_config(config: FusedVLMConfig) -> dict:
    """Published config of the fusion part: the whole config of a stage-1 checkpoint, a part of a full one."""
    fuser, answer = config.fuser_config, config.answer_config
    text = {"model_type": "clip_text_model", "vocab_size": config.first_query_token_id}
    if answer is not None:
        text.update({name: value for name, value in answer.to_dict().items() if name not in ("dtype", "_name_or_path")})
    text.update(eos_token_id=fuser.eos_token_id, bos_token_id=fuser.eos_token_id - 1, pad_token_id=1)
    return {
        "architectures": ["ImageHDMultiQueryCLIPModel"],
        "model_type": FUSION_MODEL_TYPE,
        "hidden_size": fuser.hidden_size,
        "num_hidden_layers": fuser.num_hidden_layers,
        "vocab_size": fuser.vocab_size,
        "projection_dim": config.projection_dim,
        "logit_scale_init_value": config.logit_scale_init_value,
        **_token_counts(config),
        "text_config": text,
        "vision_config": vision_config(config),
        "torch_dtype": str(config.dtype).removeprefix("torch."),
    }


def full_config(config: FusedVLMConfig) -> dict:
    """Published config of a full model."""
    return {
        "architectures": ["ImageMultiQueryCLIPLLMModel"],
        "model_type": FULL_MODEL_TYPE,
        "fusion_name": "img_multi_que_clip_fusion_linear",
        "enable_que_end": True,
        "hidden_size": config.text_config.hidden_size,
        **_token_counts(config),
        "imgque_config": fusion_config(config),
        "llm_config": llm_config(config),
        "torch_dtype": str(config.dtype).removeprefix("torch."),
    }


def llm_config(config: FusedVLMConfig) -> dict:
    """The LLM's config as transformers 4 reads it: rotary parameters were two fields then."""
    fields = {name: value for name, value in config.text_config.to_dict().items() if not name.startswith("_")}
    rotary = dict(fields.pop("rope_parameters", None) or {})
    if "rope_theta" in rotary:
        fields["rope_theta"] = rotary.pop("rope_theta")
        fields["rope_scaling"] = None if rotary.get("rope_type", "default") == "default" else rotary
    dtype = fields.pop("dtype", None)
    return {**fields, **({} if dtype is None else {"torch_dtype": str(dtype).removeprefix("torch.")})}


def _token_counts(config: FusedVLMConfig) -> dict:
    return {
        "length_que_end": config.num_visual_tokens,
        "length_que_end_short": config.num_followup_visual_tokens,
        "append_special_padding": config.distinct_queries,
    }


def _save_processor(source: Path, output: Path, config: FusedVLMConfig, report: ConversionReport) -> None:
    if not (source / "processor_config.json").is_file():
        report.notes.append("The variant has no processor: write tokenizers and preprocessor_config.json yourself.")
        return
    processor = FusedVLMProcessor.from_pretrained(source)
    processor.tokenizer.save_pretrained(output)
    if config.distinct_queries:
        queries = config.fuser_config.vocab_size - config.first_query_token_id
        processor.query_tokenizer.add_tokens([f"<|placeholder_qed_{i}|>" for i in range(queries)])
    processor.query_tokenizer.save_pretrained(output / "clip")
    for folder in (output, output / "clip"):
        _make_readable_for_transformers_4(folder)
    images = processor.image_processor
    document = {
        "image_processor_type": "Phi3VImageProcessor",
        "num_crops": images.max_local_views,
        "image_mean": list(images.image_mean),
        "image_std": list(images.image_std),
        "do_convert_rgb": True,
    }
    write_json(output / "preprocessor_config.json", document)


def _make_readable_for_transformers_4(folder: Path) -> None:
    """Undo two habits of newer libraries: a class name, and merges written as pairs instead of strings."""
    settings = read_json_if_there(folder / "tokenizer_config.json")
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    kept = {name: value for name, value in settings.items() if name not in ("backend", "is_local", "auto_map")}
    write_json(folder / "tokenizer_config.json", kept)
    document = read_json_if_there(folder / "tokenizer.json")
    if document and document["model"].get("merges"):
        merges = document["model"]["merges"]
        document["model"]["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
        write_json(folder / "tokenizer.json", document)
