"""What every model of the package shares: flags, initialization, new models from backbones, loading and saving."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel, initialization as init

from .configuration_fusedvlm import FusedVLMConfig
from .modeling_fusedvlm_connector_fused import FusedVLMProjector
from .modeling_fusedvlm_connectors import FusedVLMConnector, carrying_connector, connector_class
from .modeling_fusedvlm_integrity import check_finite, check_record, check_tensors, recording
from .modeling_fusedvlm_loading import (
    check_backbones,
    find_image_token_id,
    is_language_key,
    load_generation_config,
    load_vision_tower,
    load_with_text_model,
    pinned_revision,
    quantize_only_llm,
)
from .modeling_fusedvlm_views import FusedVLMViewMerger

if TYPE_CHECKING:
    from transformers.modeling_utils import LoadStateDictConfig, LoadStateDictInfo

Model = TypeVar("Model", bound="FusedVLMPreTrainedModel")

AUTO_MAP = {
    "AutoConfig": "configuration_fusedvlm.FusedVLMConfig",
    "AutoModel": "modeling_fusedvlm.FusedVLMModel",
    "AutoModelForImageTextToText": "modeling_fusedvlm.FusedVLMForConditionalGeneration",
}


class FusedVLMPreTrainedModel(PreTrainedModel):
    """Flags, initialization, and loading or saving with the LLM as a reference."""

    config: FusedVLMConfig
    base_model_prefix = "model"
    input_modalities: Any = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["FusedVLMViewMerger"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    if TYPE_CHECKING:  # transformers wraps it in a way that checkers take for a function of two models

        def to(self: Model, *args: Any, **kwargs: Any) -> Model: ...  # type: ignore[override]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FusedVLMProjector):
            init.normal_(module.weight, std=self.config.projector_initializer_range)
            return
        super()._init_weights(module)
        if isinstance(module, (FusedVLMViewMerger, FusedVLMConnector)):
            module.reset_parameters()

    def freeze_text_model(self) -> None:
        """Stop gradients to the LLM and its head; what a reference points to must not be trained."""
        for name, parameter in self.named_parameters():
            if is_language_key(name) or name.startswith("language_model."):
                parameter.requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        quantization_config: Any = None,
        **kwargs: Any,
    ) -> Model:
        """Load a variant; the LLM comes from the repository it refers to, unless the variant is self-contained.

        `quantization_config` is applied to the LLM only: the trained modules keep their precision.

        Raises:
            ValueError: naming the tensor or the field, when the weights lack a tensor, hold one that the model has not
                or one of another shape, hold NaN, or were trained under another configuration. What differs in names,
                shapes or configuration loads all the same with `ignore_mismatched_sizes=True`.
        """
        if quantization_config is not None:
            kwargs["quantization_config"] = quantize_only_llm(quantization_config)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if hasattr(model, "suppress_placeholder"):
            model.suppress_placeholder()  # the generation settings of a file, or none, have replaced the model's own
        if quantization_config is not None:
            # Only the frozen LLM is quantized; Trainer would otherwise refuse to train the rest.
            model.is_quantized = False
        return loaded

    @classmethod
    def from_backbones(
        cls: type[Model],
        vision: str | os.PathLike | PreTrainedModel,
        text: str | os.PathLike,
        *,
        num_visual_tokens: int | None = None,
        connector: str = "fused",
        query_vocab_size: int = 49408,
        query_eos_token_id: int = 49407,
        fuser_config: dict | None = None,
        image_token_id: int | None = None,
        vision_revision: str | None = None,
        text_revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        **config_kwargs: Any,
    ) -> Model:
        """Assemble a new model of either stage from an existing vision tower and an existing LLM.

        Stage 1 only refers to the LLM, which is not loaded; give it an `answer_config`.

        Args:
            vision: repo id or folder of a CLIP or SigLIP (whole or tower), or a tower model.
            text: repo id or folder of a causal LM; kept frozen and referred to, not copied, on save.
            num_visual_tokens: m; also the largest m unless `trained_num_visual_tokens` is given. By default 256, or the
                most below it that the connector gives.
            connector: how view tokens become visual tokens; its settings are `connector_config`.
            query_vocab_size: size of the query tokenizer's vocabulary (CLIP BPE: 49408); queries get the next rows.
            query_eos_token_id: row of the last query of every group (CLIP BPE: 49407).
            fuser_config: overrides of the fusion decoder's config, e.g. `{"num_hidden_layers": 12}`; for the fused
                connector, as are the two above.
            image_token_id: placeholder in the LLM's vocabulary; by default a reserved token of its tokenizer.
            vision_revision, text_revision: commits, tags or branches; the commit they resolve to is stored.
            config_kwargs: further fields of `FusedVLMConfig`; `fusion_row_per_turn` is on unless given.

        Raises:
            ValueError: when widths disagree, the LLM's tokenizer has no reserved token for placeholders, the tower
                reads no pixels, or an argument is unknown.
        """
        check_backbones(vision, text, cls.config_class, config_kwargs)
        text = str(text)
        vision_name = None if isinstance(vision, PreTrainedModel) else str(vision)
        tower = load_vision_tower(vision if isinstance(vision, PreTrainedModel) else str(vision), vision_revision)
        vision_config = tower.config
        text_config = AutoConfig.from_pretrained(text, revision=text_revision)
        fields = connector_class(connector).fields_from_backbones(
            vision_config=vision_config,
            largest=max(config_kwargs.get("trained_num_visual_tokens") or [num_visual_tokens or 256]),
            query_vocab_size=query_vocab_size,
            query_eos_token_id=query_eos_token_id,
            fuser_config=fuser_config,
        )
        given = {name: value for name, value in config_kwargs.items() if value is not None}
        if image_token_id is None:
            image_token_id = find_image_token_id(text, text_revision)
        config = FusedVLMConfig(
            vision_config=vision_config.to_dict(),
            text_config=text_config.to_dict(),
            connector=connector,
            num_visual_tokens=num_visual_tokens,
            image_token_id=image_token_id,
            text_model_name_or_path=text,
            text_model_revision=pinned_revision(text, text_revision),
            vision_model_name_or_path=vision_name,
            vision_model_revision=pinned_revision(vision_name, vision_revision),
            **{"trained_num_visual_tokens_is_range": False, **fields, **given},
        )
        wanted = {f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
        # CODEPATH: SigLIP towers, whose pooling head is not built here.
        if not getattr(config.vision_config, "vision_use_head", True):
            wanted = {name: tensor for name, tensor in wanted.items() if ".vision_tower.head." not in name}
        model = cls.from_pretrained(None, config=config, state_dict=wanted, dtype=dtype)
        model.name_or_path = model.config.name_or_path = ""
        settings = load_generation_config(text, text_revision, image_token_id) if model.can_generate() else None
        if settings is not None:
            model.generation_config = settings
        return model

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel,
        state_dict: dict | None,
        checkpoint_files: list[str] | None,
        load_config: "LoadStateDictConfig",
        expected_keys: list[str] | None = None,
    ) -> "tuple[LoadStateDictInfo, dict]":
        if expected_keys is None:  # else an adapter is being loaded, and the files are the adapter's
            lenient, name = load_config.ignore_mismatched_sizes, load_config.pretrained_model_name_or_path
            check_record(model.config, checkpoint_files, name, lenient)
        config, needs_llm = model.config, hasattr(model, "_has_llm")
        # CODEPATH: variants by reference take their LLM from its own repository; merged ones have none to refer to.
        is_whole = config.text_model_name_or_path is None or config.text_model_inside
        if is_whole or expected_keys is not None or not needs_llm:
            return PreTrainedModel._load_pretrained_model(
                model, state_dict, checkpoint_files, load_config, expected_keys
            )
        return load_with_text_model(model, state_dict, checkpoint_files, load_config)

    @staticmethod
    def _finalize_model_loading(
        model: Any, load_config: "LoadStateDictConfig", loading_info: "LoadStateDictInfo"
    ) -> "LoadStateDictInfo":
        # Before what is missing gets memory and random numbers.
        check_tensors(model, loading_info, load_config)
        loading_info = PreTrainedModel._finalize_model_loading(model, load_config, loading_info)
        if load_config.pretrained_model_name_or_path is not None:
            check_finite(model, load_config.pretrained_model_name_or_path)
        if model.config.text_model_name_or_path is not None:
            model.freeze_text_model()  # loading creates parameters anew, with gradients switched on
        return loading_info

    def save_pretrained(  # type: ignore[override]  # what is a second positional argument there, is a keyword here
        self,
        save_directory: str | os.PathLike,
        merged: bool = False,
        state_dict: dict | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the trained parts and refer to the LLM by repo id and commit.

        Args:
            save_directory: folder, created when missing.
            merged: write the LLM too, as a self-contained copy. Always so for a model that refers to no LLM.
        """
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **AUTO_MAP}
        is_main = kwargs.get("is_main_process", True)
        merged = merged or self.config.text_model_name_or_path is None
        # CODEPATH: variants by reference leave the LLM out; merged ones and models without a reference hold it.
        if merged:
            ignored, self._keys_to_ignore_on_save = self._keys_to_ignore_on_save, None
            try:
                with self._writing(save_directory, is_main, merged):
                    return super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
            finally:
                self._keys_to_ignore_on_save = ignored
        state_dict = self.state_dict() if state_dict is None else state_dict
        trained = {name: tensor for name, tensor in state_dict.items() if not is_language_key(name)}
        kwargs["save_original_format"] = False  # a pre-quantized LLM would leave conversions that cannot be reverted
        quantizer, quantization_config = self.__dict__.pop("hf_quantizer", None), None
        if quantizer is not None:
            # The trained parts are not quantized, so the variant must not claim to be.
            quantization_config = self.config.__dict__.pop("quantization_config", None)
        try:
            with self._writing(save_directory, is_main, merged):
                return super().save_pretrained(save_directory, state_dict=trained, **kwargs)
        finally:
            if quantizer is not None:
                self.hf_quantizer = quantizer
                self.config.quantization_config = quantization_config

    @contextmanager
    def _writing(self, folder: str | os.PathLike, is_main: bool, merged: bool) -> Iterator[None]:
        """What every save needs around it: the record, the connector's file, whether the LLM is inside."""
        config, before = self.config, self.config.text_model_inside
        config.text_model_inside = merged if hasattr(self, "_has_llm") else None
        try:
            with recording(config), carrying_connector(config.connector_class, folder, is_main):
                yield
        finally:
            config.text_model_inside = before

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Refuse to resize an LLM that is only referred to: reloading it would not fit."""
        if self.config.text_model_name_or_path is not None and (args or kwargs.get("new_num_tokens") is not None):
            raise ValueError(
                f"The embeddings of {self.config.text_model_name_or_path} cannot be resized: the variant refers to "
                "that model and would not load again. Set config.text_model_name_or_path = None to keep an own copy."
            )
        return super().resize_token_embeddings(*args, **kwargs)
