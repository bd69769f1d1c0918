"""Loading and saving when the LLM is a reference: trained parts from the variant, the LLM from its own repository.

Both checkpoints are merged lazily (memory-mapped slices) before transformers' own loading pass runs once over them, so
dtype, device map, quantization and tied weights behave as for any checkpoint and the LLM is never held twice.
"""

import copy
import difflib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel, _get_resolved_checkpoint_files, load_state_dict
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import cached_file

if TYPE_CHECKING:
    from transformers.modeling_utils import LoadStateDictConfig, LoadStateDictInfo

# The parts of a model by the prefixes of their parameters' names.
VISION_PREFIXES = ("model.vision_tower.", "model.merger.")
CONNECTOR_PREFIXES = ("model.fuser.", "model.connector.")
PROJECTOR_PREFIX = "model.projector."
LANGUAGE_PREFIX, HEAD_PREFIX = LANGUAGE_PREFIXES = ("model.language_model.", "lm_head.")
CONTRASTIVE_PREFIXES = ("answer_tower.", "answer_projection.", "image_projection.", "logit_scale")
# Modules that quantization must leave alone: everything that is trained, and the head (see `quantize_only_llm`).
TRAINED_MODULES = tuple(name.rstrip(".") for name in (*VISION_PREFIXES, *CONNECTOR_PREFIXES, PROJECTOR_PREFIX))
# Where each quantizer keeps its list of modules to leave alone.
SKIP_LIST_FIELDS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")
# Reserved tokens that LLM vocabularies offer for a placeholder, best first; the unknown token is the last resort.
PLACEHOLDER_TOKENS = (
    "<image>",
    "<|image_pad|>",
    "<|vision_pad|>",
    "<|image|>",
    "<image_soft_token>",
    "<|reserved_special_token_0|>",
    "<|fim_pad|>",
    "<|placeholder1|>",
    "<unused0>",
)


def is_language_key(name: str) -> bool:
    """Whether a state-dict key belongs to the LLM (decoder or head)."""
    return name.startswith(LANGUAGE_PREFIXES)


def resolve_text_model(config: PreTrainedConfig, variant_folder: str | None) -> str:
    """Repo id or folder of the LLM; a path that starts with a dot is relative to the variant's own folder."""
    name = config.text_model_name_or_path
    if name.startswith(("./", "../")) and variant_folder:
        return os.path.normpath(os.path.join(variant_folder, name))
    return name


def open_weights(file: str) -> Any:
    """A safetensors file, opened.

    Raises:
        ValueError: naming the file, when it is cut off or none.
    """
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        name = str(file) if len(str(file)) <= 120 else f"...{str(file)[-117:]}"
        raise ValueError(f"{name}: damaged weights ({error}); fetch the file again.") from error


@contextmanager
def open_slices(files: list[str]) -> Iterator[dict[str, Any]]:
    """Yield {key: lazy slice} over checkpoint files, open for the duration of the block."""
    pointers, slices = [], {}
    for file in files:
        if not file.endswith(".safetensors"):
            slices.update(load_state_dict(file, weights_only=True))
            continue
        pointer = open_weights(file)
        pointers.append(pointer)
        keys = pointer.keys()  # a safetensors file is not a mapping, it cannot be iterated itself
        slices.update({key: pointer.get_slice(key) for key in keys})
    try:
        yield slices
    finally:
        for pointer in pointers:
            pointer.__exit__(None, None, None)


def text_checkpoint_files(config: PreTrainedConfig, load_config: "LoadStateDictConfig") -> list[str]:
    """Checkpoint files of the referenced LLM. Raises `OSError` naming the LLM and the commit when unavailable."""
    name = resolve_text_model(config, load_config.pretrained_model_name_or_path)
    revision = config.text_model_revision
    kwargs: Any = {**(load_config.download_kwargs or {}), "revision": revision, "subfolder": ""}
    try:
        files, _ = _get_resolved_checkpoint_files(
            pretrained_model_name_or_path=name,
            variant=None,
            gguf_file=None,
            use_safetensors=load_config.use_safetensors,
            user_agent=None,
            is_remote_code=False,
            download_kwargs=kwargs,
        )
    except (OSError, ValueError) as error:
        at = f" at commit {revision}" if revision else ""
        raise OSError(
            f"This variant needs the language model {name}{at}, which cannot be loaded: {error} "
            "Check access to it, or load a variant saved with save_pretrained(..., merged=True)."
        ) from error
    return files or []


def text_keys_to_ours(slices: dict[str, Any], text_config: PreTrainedConfig) -> dict[str, Any]:
    """Rename a causal LM's keys to ours: `model.layers.0...` -> `model.language_model.layers.0...`."""
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)]
    prefix = causal.base_model_prefix + "."
    return {
        LANGUAGE_PREFIX + key[len(prefix) :] if key.startswith(prefix) else key: value for key, value in slices.items()
    }


def load_with_text_model(
    model: PreTrainedModel,
    state_dict: dict | None,
    checkpoint_files: list[str] | None,
    load_config: "LoadStateDictConfig",
) -> "tuple[LoadStateDictInfo, dict]":
    """`PreTrainedModel._load_pretrained_model` over the variant's weights joined with the referenced LLM's."""
    with open_slices((checkpoint_files or []) if state_dict is None else []) as own:
        merged = dict(own) if state_dict is None else dict(state_dict)
        if any(key.startswith(LANGUAGE_PREFIX) for key in merged):  # a merged, self-contained copy
            return PreTrainedModel._load_pretrained_model(model, merged, checkpoint_files, load_config)
        with open_slices(text_checkpoint_files(model.config, load_config)) as text:
            renamed = text_keys_to_ours(text, model.config.text_config)
            wanted = set(model.state_dict())
            # The base model has no head, so the LLM's head is left out there rather than reported as unexpected.
            has_head = any(key.startswith(HEAD_PREFIX) for key in wanted)
            merged.update({k: v for k, v in renamed.items() if has_head or not k.startswith(HEAD_PREFIX)})
            return PreTrainedModel._load_pretrained_model(model, merged, checkpoint_files, load_config)


def quantize_only_llm(quantization_config: Any) -> Any:
    """Copy of a quantization config that leaves the trained modules and the head in full precision.

    Raises:
        ValueError: when the method has no list of modules to leave alone.
    """
    quantization_config = copy.deepcopy(quantization_config)
    skip = [*TRAINED_MODULES, "lm_head"]
    if isinstance(quantization_config, dict):
        bnb = quantization_config.get("quant_method") == "bitsandbytes" or any(
            key.startswith(("load_in_", "bnb_")) for key in quantization_config
        )
        field = "llm_int8_skip_modules" if bnb else "modules_to_not_convert"
        quantization_config[field] = sorted({*(quantization_config.get(field) or []), *skip})
        return quantization_config
    for field in SKIP_LIST_FIELDS:
        if hasattr(quantization_config, field):
            setattr(quantization_config, field, sorted({*(getattr(quantization_config, field) or []), *skip}))
            return quantization_config
    raise ValueError(
        f"{type(quantization_config).__name__} has no list of modules to leave unquantized "
        f"({', '.join(SKIP_LIST_FIELDS)}), so it would "
        "quantize the trained fusion module; quantize the language model's own repository instead."
    )


def find_image_token_id(text: str, revision: str | None) -> int:
    """Id of a reserved token of the LLM's tokenizer that can stand for one visual token.

    Raises:
        ValueError: when the vocabulary offers none.
    """
    tokenizer = AutoTokenizer.from_pretrained(text, revision=revision)
    vocabulary = tokenizer.get_vocab()
    for token in (*PLACEHOLDER_TOKENS, tokenizer.unk_token):
        if token is not None and token in vocabulary:
            return vocabulary[token]
    raise ValueError(
        f"The tokenizer of {text} has no reserved token for image placeholders; pass image_token_id= with the id of a "
        "token that never occurs in text."
    )


# Loaders of towers from elsewhere, by what stands before the colon of their name. The package fills it; a variant that
# was loaded from the Hub has its tower inside and needs none.
TOWER_LOADERS: dict[str, Callable[[str], PreTrainedModel]] = {}


def pinned_revision(name: str | None, revision: str | None) -> str | None:
    """Commit that `revision` stands for in a Hub repository; None for folders and files, which have no commits."""
    if name is None or os.path.exists(name) or name.partition(":")[0] in TOWER_LOADERS:
        return None
    path = cached_file(name, "config.json", revision=revision) or ""
    commit = re.search(r"snapshots[/\\]([0-9a-f]{40})[/\\]", path)
    return commit.group(1) if commit else revision


def check_backbones(vision: Any, text: Any, config_class: type | None, fields: dict) -> None:
    """Refuse what `from_backbones` cannot make a model of, before anything is loaded.

    Raises:
        ValueError: for a tower or LLM that is no name, and for a field that the configuration does not have.
    """
    for name, value, kinds in (
        ("vision", vision, (str, os.PathLike, PreTrainedModel)),
        ("text", text, (str, os.PathLike)),
    ):
        if not isinstance(value, kinds) or not str(value):
            also = ", or a tower model" if name == "vision" else ""
            raise ValueError(f"{name} must be a repo id or folder{also}, got {type(value).__name__}.")
    known = sorted(name for name in dir(config_class) if not name.startswith("_"))
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, "num_visual_tokens"], 1)
            hint = f"; did you mean {near[0]}?" if near else "; see FusedVLMConfig."
            raise ValueError(f"from_backbones has no argument {name!r}{hint}")


def load_vision_tower(vision: Any, revision: str | None = None) -> PreTrainedModel:
    """Vision tower model from a repo id, a folder (of the tower or of a whole CLIP/SigLIP), or a module as it is.

    Raises:
        ValueError: for a model that reads no pixels.
    """
    tower = _load_vision_tower(vision, revision)
    reads = getattr(tower, "main_input_name", "no pixels")
    if reads != "pixel_values":
        raise ValueError(
            f"The vision tower is a {type(tower).__name__}, which reads {reads}, not pixel_values: give a CLIP, SigLIP "
            "or other vision model."
        )
    return tower


def _load_vision_tower(vision: Any, revision: str | None) -> PreTrainedModel:
    if isinstance(vision, PreTrainedModel):
        return vision
    vision = os.fspath(vision)
    scheme, _, rest = vision.partition(":")
    if scheme in TOWER_LOADERS:
        return TOWER_LOADERS[scheme](rest)
    config = AutoConfig.from_pretrained(vision, revision=revision)
    tower_config = getattr(config, "vision_config", config)
    # The tower's own class reads the vision half out of a two-tower checkpoint.
    tower_class: Any = AutoModel._model_mapping[type(tower_config)]
    return tower_class.from_pretrained(vision, config=tower_config, revision=revision)


def load_generation_config(text: str, revision: str | None, image_token_id: int) -> GenerationConfig | None:
    """The LLM's own generation settings (its end-of-turn tokens above all), None when it publishes none."""
    try:
        settings = GenerationConfig.from_pretrained(text, revision=revision or "main")
    except OSError:
        return None
    settings.suppress_tokens = sorted({*(settings.suppress_tokens or []), image_token_id})
    return settings
