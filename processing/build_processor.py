"""Build a processor for a newly assembled model (not shipped to the Hub: loading a variant needs none of this)."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoImageProcessor, AutoTokenizer, CLIPTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from fusedvlm.model_source import require_source

from .image_processing_fusedvlm import FusedVLMImageProcessor
from .processing_fusedvlm import FusedVLMProcessor

if TYPE_CHECKING:
    from fusedvlm.modeling_fusedvlm import FusedVLMConfig

FOLDER = Path(__file__).parent


def build_processor(
    config: "FusedVLMConfig",
    *,
    text: str | None = None,
    query_tokenizer: PreTrainedTokenizerBase | str | None = None,
    image_processor: Any = None,
    chat_template: str | None = None,
) -> FusedVLMProcessor:
    """Processor for a model from `FusedVLMForConditionalGeneration.from_backbones`.

    Args:
        config: the model's `FusedVLMConfig`.
        text: LLM repo id or folder; by default the one the config refers to.
        query_tokenizer: tokenizer of the fusion module, or where to load it; by default CLIP's BPE. Connectors
            that read no question or the LLM's own ids get the LLM's tokenizer.
        image_processor: by default `FusedVLMImageProcessor` at the tower's image size and normalization.
        chat_template: by default the LLM's own template behind the marker prelude, or the Llama-2 layout of the
            published checkpoints when the LLM has none.

    Raises:
        ValueError: when the query tokenizer's vocabulary does not end where the queries begin.
    """
    tokenizer = load_text_tokenizer(config, text)
    kind = config.connector_class
    if not kind.has_own_question_tokens(config):
        query_tokenizer = copy.deepcopy(tokenizer)  # the LLM's ids, or none are read
    if query_tokenizer is None:
        query_tokenizer = clip_query_tokenizer()
    if not isinstance(query_tokenizer, PreTrainedTokenizerBase):
        query_tokenizer = AutoTokenizer.from_pretrained(query_tokenizer)
    if kind.has_own_question_tokens(config) and len(query_tokenizer) != config.first_query_token_id:
        raise ValueError(
            f"The query tokenizer has {len(query_tokenizer)} tokens, but the model's queries begin at row "
            f"{config.first_query_token_id}: they must be equal."
        )
    return FusedVLMProcessor(
        image_processor=image_processor or default_image_processor(config),
        tokenizer=tokenizer,
        query_tokenizer=query_tokenizer,
        image_token_id=config.image_token_id,
        num_visual_tokens=config.num_visual_tokens,
        num_followup_visual_tokens=config.num_followup_visual_tokens,
        max_num_visual_tokens=config.max_num_visual_tokens,
        trained_num_visual_tokens=config.trained_num_visual_tokens,
        trained_num_visual_tokens_is_range=config.trained_num_visual_tokens_is_range,
        connector=kind.facts(config),
        chat_template=chat_template or default_chat_template(tokenizer.chat_template),
    )


def exactly_as_asked(processor: Any) -> dict[str, str]:
    """Keyword arguments of a call that trains or measures at m, and means m, where the processor rounds m down."""
    rounds = getattr(processor, "num_visual_tokens_policy", "as_asked") != "as_asked"
    return {"num_visual_tokens_policy": "as_asked"} if rounds else {}  # a variant's own older code knows no policy


def load_text_tokenizer(config: "FusedVLMConfig", text: str | None = None) -> PreTrainedTokenizerBase:
    """The LLM's tokenizer, padding on the left, with a pad token and the LLM's context as its length limit."""
    source, revision = text or config.text_model_name_or_path, None if text else config.text_model_revision
    if source is None:
        source = _own_folder(config)
        if source is None:
            raise ValueError(
                "The configuration refers to no language model, so its tokenizer is unknown: give text=, or load the "
                "variant's own processor with FusedVLMProcessor.from_pretrained(folder)."
            )
    require_source("text", source)
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    tokenizer.padding_side = "left"  # batches are for generation first; collators pad right explicitly
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    limit = getattr(config.text_config, "max_position_embeddings", None)
    if limit is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    return tokenizer


def default_image_processor(config: "FusedVLMConfig") -> FusedVLMImageProcessor:
    """HD image processor at the tower's image size, with the tower's published normalization where it has one."""
    size = config.vision_config.image_size
    kwargs: dict[str, Any] = {"size": {"height": size, "width": size}, "max_local_views": config.max_local_views}
    source = config.vision_model_name_or_path
    if getattr(config.vision_config, "image_mean", None) is not None:  # a converted tower brings its own
        kwargs.update(image_mean=config.vision_config.image_mean, image_std=config.vision_config.image_std)
    elif (own := _own_folder(config)) is not None:
        published = FusedVLMImageProcessor.from_pretrained(own)
        kwargs.update(image_mean=published.image_mean, image_std=published.image_std)
    elif source is not None and (not Path(source).is_dir() or (Path(source) / "preprocessor_config.json").exists()):
        published = AutoImageProcessor.from_pretrained(source, revision=config.vision_model_revision)
        kwargs.update(image_mean=published.image_mean, image_std=published.image_std)
    return FusedVLMImageProcessor(**kwargs)


def _own_folder(config: "FusedVLMConfig") -> str | None:
    """The local variant that the configuration was read from, which has a processor already."""
    folder = Path(config.name_or_path or ".")
    return str(folder) if (folder / "processor_config.json").is_file() and config.name_or_path else None


def default_chat_template(llm_template: str | dict | None) -> str:
    """The LLM's own chat template between what puts our markers around its messages; the Llama-2 layout without one."""
    if llm_template is None:
        return (FOLDER / "chat_template.jinja").read_text(encoding="utf-8")
    template: str = llm_template["default"] if isinstance(llm_template, dict) else llm_template
    prelude, postlude = (
        (FOLDER / f"chat_{part}.jinja").read_text(encoding="utf-8") for part in ("prelude", "postlude")
    )
    # Jinja itself takes one newline off the end of a template, but not off the end of a part of it.
    return prelude.removesuffix("\n") + template.removesuffix("\n") + postlude


def clip_query_tokenizer() -> CLIPTokenizer:
    """CLIP's BPE (49,408 tokens) from the vocabulary that open_clip ships, so no download is needed."""
    import open_clip

    source = open_clip.tokenizer.SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {renamed.get(token, token): token_id for token, token_id in source.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(source.bpe_ranks))
