"""The model and processor a recipe describes: a saved one, new from backbones, or tiny and random for smoke tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.integrations import deepspeed as hf_deepspeed

from fusedvlm.model_source import require_source
from fusedvlm.modeling_fusedvlm import (
    FusedVLMConfig,
    FusedVLMForConditionalGeneration,
    FusedVLMForContrastiveLearning,
    FusedVLMPreTrainedModel,
)
from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_connectors import connector_class
from fusedvlm.modeling_fusedvlm.own_connectors import resolve_connector
from fusedvlm.processing import FusedVLMProcessor, build_processor
from fusedvlm.processing.build_processor import clip_query_tokenizer
from fusedvlm.trainers.checkpoints import MARKER, complete_folder, problems
from fusedvlm.trainers.recipes.command_words import RUN_IT_FIRST
from fusedvlm.trainers.recipes.run_arguments import ModelArguments

BYTES = "bytes"
# What a recipe says of a new model in the configuration's own words.
CONFIG_FIELDS = [name for name in ModelArguments.__annotations__ if name in FusedVLMConfig.__annotations__]


def build_model_and_processor(
    arguments: ModelArguments, stage: str, output_dir: str | Path, seed: int
) -> tuple[FusedVLMPreTrainedModel, FusedVLMProcessor]:
    """What a stage trains.

    Args:
        arguments: see `ModelArguments`.
        stage: contrastive or generation.
        output_dir: a random LLM is written to `backbones/llm` in it, because variants refer to their LLM.
        seed: of everything random.

    Raises:
        ValueError: for towers that do not fit together, or a stage-1 start that is not one.
    """
    set_seed(seed)
    with complete_on_every_rank():
        if arguments.model_name_or_path is None:
            model, processor = _from_backbones(arguments, stage, Path(output_dir), seed)
        else:
            model, processor = _from_saved(arguments, stage)
    set_visual_tokens(
        model,
        processor,
        arguments.num_visual_tokens,
        arguments.num_followup_visual_tokens,
        arguments.trained_num_visual_tokens,
        seed,
    )
    if arguments.fuse_question is not None:
        model.config.fuse_question = arguments.fuse_question
        model.config.connector_class.check_question(model.config)
    if arguments.fusion_row_per_turn is not None:
        model.config.fusion_row_per_turn = arguments.fusion_row_per_turn
        model.config.connector_class.check_turn_rows(model.config)
    model.config.max_local_views = processor.image_processor.max_local_views = arguments.max_local_views
    if arguments.text_dtype is not None and hasattr(model.model, "language_model"):
        model.model.language_model.to(getattr(torch, arguments.text_dtype))
        model.lm_head.to(getattr(torch, arguments.text_dtype))
    return model, processor


@contextmanager
def complete_on_every_rank() -> Iterator[None]:
    """Build the model whole even under ZeRO-3, which splits it later.

    transformers would build it split from the start, and a variant whose LLM is a reference cannot be read into that.
    """
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    config = reference() if reference is not None else None
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            hf_deepspeed.set_hf_deepspeed_config(config)


def set_visual_tokens(
    model: Any,
    processor: FusedVLMProcessor,
    num_visual_tokens: int,
    num_followup: int | None,
    trained: list[int] | None,
    seed: int,
) -> None:
    """Turn the dial of a model and its processor; the connector grows where the largest m needs more room.

    Args:
        num_visual_tokens, num_followup: m and m'; m' is the paper's 8, or m where m is smaller, when not given.
        trained: every m to be trained; [m] when not given.
    """
    config = model.config
    trained = list(trained or [num_visual_tokens])
    model.model.connector.grow(max(trained), seed)
    config.trained_num_visual_tokens = trained
    config.check_num_visual_tokens(num_visual_tokens)
    config.num_visual_tokens = num_visual_tokens
    kind = config.connector_class
    followup = int(kind.default_followup_count(config) if num_followup is None else num_followup)
    kind.check_followup_count(config, num_visual_tokens, followup)
    config.num_followup_visual_tokens = followup
    processor.num_visual_tokens, processor.num_followup_visual_tokens = num_visual_tokens, followup
    processor.max_num_visual_tokens = max(trained)
    processor.trained_num_visual_tokens = trained
    processor.trained_num_visual_tokens_is_range = config.trained_num_visual_tokens_is_range = False


def _from_saved(arguments: ModelArguments, stage: str) -> tuple[FusedVLMPreTrainedModel, FusedVLMProcessor]:
    kind = FusedVLMForContrastiveLearning if stage == "contrastive" else FusedVLMForConditionalGeneration
    path = str(arguments.model_name_or_path)
    try:
        require_source("model.model_name_or_path", path, "config.json", RUN_IT_FIRST)
    except ValueError as error:
        if arguments.connector is None or connector_class(resolve_connector(arguments.connector)).has_contrastive_stage:
            raise
        raise ValueError(
            f"model.model_name_or_path={path} does not exist, and the {arguments.connector} connector has no stage 1: "
            "train it from its backbones with --model.model_name_or_path null."
        ) from error
    if Path(path).is_dir() and (Path(path) / MARKER).exists():
        wrong = problems(Path(path), contents=False)
        if wrong:
            raise ValueError(f"model.model_name_or_path={path} is damaged: {'; '.join(wrong[:3])}.")
    options: dict[str, Any] = {"revision": arguments.model_revision} if arguments.model_revision else {}
    try:
        processor = FusedVLMProcessor.from_pretrained(path, **options)
    except OSError as error:
        where = "the folder" if Path(path).is_dir() else "no such folder, and the Hub repository of that name"
        raise ValueError(
            f"model.model_name_or_path={path}: {where} gives no processor ({str(error).splitlines()[0][:120]})."
        ) from error
    model = kind.from_pretrained(path, **options, **_loading(arguments))
    if arguments.connector is not None and resolve_connector(arguments.connector) != model.config.connector:
        raise ValueError(
            f"model.connector={arguments.connector}, but {path} has a {model.config.connector} connector; leave "
            "model.connector out, or start from model.vision and model.text."
        )
    return model, processor


def _loading(arguments: ModelArguments) -> dict:
    dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    attention = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
    return {"dtype": dtype, **attention}


def _from_backbones(
    arguments: ModelArguments, stage: str, output_dir: Path, seed: int
) -> tuple[FusedVLMPreTrainedModel, FusedVLMProcessor]:
    connector = resolve_connector(arguments.connector or "fused")
    for name in ("vision", "text", "answer"):
        value = getattr(arguments, name)
        if isinstance(value, str) and "/" in value:
            require_source(f"model.{name}", value, "config.json", RUN_IT_FIRST)
    query_tokenizer = load_query_tokenizer(arguments.query_tokenizer)
    vision: Any = arguments.vision
    if isinstance(vision, dict):
        vision = AutoModel.from_config(_config(vision, "model.vision"))
    text: Any = arguments.text
    if isinstance(text, dict):
        text = str(write_random_llm(text, output_dir / "backbones" / "llm", seed))
    # Seeded again for each part: whether the LLM had to be written must not change what comes after it.
    set_seed(seed)
    answer = _answer_tower(arguments, query_tokenizer, seed) if stage == "contrastive" else None
    options = {
        **{name: getattr(arguments, name) for name in CONFIG_FIELDS},
        "trained_num_visual_tokens": arguments.trained_num_visual_tokens or [arguments.num_visual_tokens],
        "query_vocab_size": len(query_tokenizer),
        "query_eos_token_id": query_tokenizer.eos_token_id,
        "connector": connector,
        "fuser_config": arguments.fuser_config if connector_class(connector).has_fusion_decoder else None,
        "vision_revision": arguments.vision_revision,
        "text_revision": arguments.text_revision,
        "dtype": _loading(arguments)["dtype"],
    }
    if answer is not None:
        options.update(answer_config=answer.config.to_dict(), projection_dim=answer.config.projection_dim)
    kind = FusedVLMForContrastiveLearning if stage == "contrastive" else FusedVLMForConditionalGeneration
    set_seed(seed)
    model = kind.from_backbones(vision, text, **options)
    if arguments.attn_implementation:
        model.set_attn_implementation(arguments.attn_implementation)
    if answer is not None:
        _load_answer_tower(model, answer)
    return model, build_processor(model.config, query_tokenizer=query_tokenizer)


def load_query_tokenizer(name: str | None) -> PreTrainedTokenizerBase:
    """The fusion module's tokenizer: CLIP's BPE, one that reads bytes, or any by folder or repo id."""
    if name is None:
        return clip_query_tokenizer()
    return byte_tokenizer(["<|endoftext|>"]) if name == BYTES else AutoTokenizer.from_pretrained(name)


def byte_tokenizer(special: list[str]) -> PreTrainedTokenizerFast:
    """One token per byte, so that any text can be read without a vocabulary; the last special token is the eos."""
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[-1], pad_token=special[0])


def write_random_llm(sizes: dict, folder: Path, seed: int) -> Path:
    """A random causal LM over bytes, written once and then reused. Returns its absolute path.

    Args:
        sizes: its config, with `model_type`; the vocabulary is 256 bytes and four special tokens.
        folder: where it goes; a whole one that is there is kept, so that a resumed run finds the same LLM.
    """
    folder = folder.absolute()
    with PartialState().main_process_first():
        if folder.is_dir() and not problems(folder):
            return folder
        tokenizer = byte_tokenizer(["<pad>", "<image>", "<s>", "</s>"])
        tokenizer.bos_token = "<s>"
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
        config = _config({**sizes, **ids, "vocab_size": len(tokenizer)}, "model.text")
        set_seed(seed)
        with complete_folder(folder) as staging:
            AutoModelForCausalLM.from_config(config).save_pretrained(staging)
            tokenizer.save_pretrained(staging)
    return folder


def _config(sizes: dict, name: str) -> PreTrainedConfig:
    if sizes.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(f"{name} has model_type={sizes.get('model_type')!r}, which is no model of transformers.")
    sizes = dict(sizes)
    return CONFIG_MAPPING[sizes.pop("model_type")](**sizes)


def _answer_tower(
    arguments: ModelArguments, query_tokenizer: PreTrainedTokenizerBase, seed: int
) -> CLIPTextModelWithProjection:
    """The text tower that reads answers, with as many positions as asked for."""
    if arguments.answer is None:
        raise ValueError("Stage 1 reads answers with a text tower: set model.answer to a CLIP, or to sizes as JSON.")
    eos = query_tokenizer.eos_token_id
    if isinstance(arguments.answer, dict):
        sizes = {"vocab_size": len(query_tokenizer), "max_position_embeddings": arguments.answer_positions}
        ids = {"eos_token_id": eos, "bos_token_id": None, "pad_token_id": eos}
        return CLIPTextModelWithProjection(CLIPTextConfig(**{**sizes, **ids, **arguments.answer}))
    tower = CLIPTextModelWithProjection.from_pretrained(arguments.answer, revision=arguments.answer_revision or "main")
    if tower.config.vocab_size != len(query_tokenizer):
        raise ValueError(
            f"The answer tower {arguments.answer} has {tower.config.vocab_size} tokens and the query tokenizer "
            f"{len(query_tokenizer)}: answers are read with the query tokenizer, so they must be equal."
        )
    extend_positions(tower, arguments.answer_positions, seed)
    return tower


@torch.no_grad()
def extend_positions(tower: CLIPTextModelWithProjection, positions: int, seed: int) -> None:
    """Give a text tower `positions` text positions: its own first, further ones drawn around the mean of its own.

    The published code draws them from a normal with the mean and deviation of the whole old table
    (docs/reference.md, "Answers and their positions"). Fewer positions than it has cut the table.
    """
    embeddings = tower.text_model.embeddings
    old = embeddings.position_embedding.weight
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(max(0, positions - len(old)), old.shape[1], generator=generator) * old.std() + old.mean()
    table = nn.Embedding(positions, old.shape[1], dtype=old.dtype)
    table.weight.copy_(torch.cat([old[:positions], drawn.to(old)]))
    embeddings.position_embedding = table
    embeddings.register_buffer("position_ids", torch.arange(positions)[None], persistent=False)
    tower.config.max_position_embeddings = positions


def _load_answer_tower(model: Any, answer: CLIPTextModelWithProjection) -> None:
    target = getattr(model.answer_tower, "text_model", model.answer_tower)  # nested before transformers 5.2x
    target.load_state_dict(answer.text_model.state_dict())
    model.answer_projection.load_state_dict(answer.text_projection.state_dict())
