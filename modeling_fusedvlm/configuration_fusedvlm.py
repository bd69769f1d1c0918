"""Configuration of FusedVLM: three nested towers and the dial `num_visual_tokens`.

Defaults are the paper's size ("Scaling Capability in Token Space", appendix C): CLIP ViT-L/14-336, a 20-layer fusion
decoder of width 1024, Llama-2-7B.
"""

import math
from typing import TYPE_CHECKING, Any, TypeAlias

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, CLIPTextConfig, LlamaConfig
from transformers.configuration_utils import PreTrainedConfig

from .modeling_fusedvlm_connectors import FusedVLMConnector, connector_class

# The paper's towers, used where a sub config is not given.
DEFAULT_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
# Bounds far beyond every model: what is above is damage, and would be counted up to before anything else is noticed.
MOST_TOKENS = 1_000_000
LARGEST_GRID = 4096
TOWERS = ("vision_config", "fuser_config", "text_config")
OTHER_TOWERS = ("vision_config", "text_config")  # of connectors without a fusion decoder
DEFAULT_TEXT = {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
# Heads that scale their logits in a way this package does not reproduce; such LLMs are refused, never ignored.
UNSUPPORTED_HEAD_FIELDS = ("lm_head_multiplier", "output_multiplier")

# What may be given, which is checked, and what `__post_init__` makes of it (a config, a count) are two types.
if TYPE_CHECKING:
    Tower: TypeAlias = Any
    Count: TypeAlias = Any
    Counts: TypeAlias = Any
else:
    Tower = dict | PreTrainedConfig | None
    Count = int | None
    Counts = list[int] | None


@strict
class FusedVLMFuserConfig(LlamaConfig):
    """The causal fusion decoder: a Llama without a head, whose embedding table holds question tokens and queries.

    It has a model type of its own so that `FusedVLMFuserConfig.from_pretrained(folder)` cannot read the LLM's config.

    Rows `first_query_token_id ...` of the embedding table are the learnable queries; the row `eos_token_id` is the last
    query of every group (fusedvlm's docs/reference.md, "Queries").
    """

    model_type = "fusedvlm_fuser"
    base_config_key = "fuser_config"

    vocab_size: int = 49408 + 255
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 20
    num_attention_heads: int = 16
    max_position_embeddings: int = 4096
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 49407


def _build_sub_config(value: dict | PreTrainedConfig | None, default: dict) -> PreTrainedConfig:
    """A tower's config from a dict, whose `model_type` decides the class; the paper's tower from None."""
    if isinstance(value, PreTrainedConfig):
        return value
    value = dict(default) if value is None else {"model_type": default["model_type"], **value}
    if value["model_type"] not in CONFIG_MAPPING:
        raise ValueError(f"model_type={value['model_type']!r} is not a model inside transformers.")
    return CONFIG_MAPPING[value["model_type"]](**value)


def _is_count(value: Any) -> bool:
    """A whole number from 1; not True, which Python takes for one."""
    return hasattr(value, "__index__") and not isinstance(value, bool) and value >= 1


@strict
class FusedVLMConfig(PreTrainedConfig):
    r"""Configuration of every FusedVLM model.

    Args:
        vision_config (`dict` or `PreTrainedConfig`): any transformers vision tower, CLIP by default.
        fuser_config (`dict` or `FusedVLMFuserConfig`): the fusion decoder; its width must be the vision tower's.
        text_config (`dict` or `PreTrainedConfig`): any causal LM inside transformers, the frozen LLM.
        answer_config (`dict` or `CLIPTextConfig`, *optional*): text tower that reads answers in stage 1.
        connector (`str`): how view tokens become visual tokens: `fused` by default, or any other registered name.
        connector_config (`dict`, *optional*): the connector's own settings.
        image_token_id (`int`): id of the placeholder in the LLM's vocabulary, one per visual token.
        num_visual_tokens (`int`, *optional*): m, visual tokens in front of the first question about an image; of each
            of its views, where the connector counts by view. Defaults to 256, or to what the connector gives.
        num_followup_visual_tokens (`int`, *optional*): m', visual tokens in front of every later question. Defaults to
            the paper's 8, or to m where m is smaller; for other connectors to m where the question is read, else to 0.
        trained_num_visual_tokens (`list[int]`, *optional*): every m this checkpoint was trained with; the largest is
            the upper end of the dial. Defaults to `[num_visual_tokens]`.
        trained_num_visual_tokens_is_range (`bool`, *optional*): whether every count from the smallest to the largest of
            these was drawn in training, not the listed ones alone; `None` in files older than the field.
        max_local_views (`int`): HD setting, most local views per image (HD-9 is 9).
        fuse_question (`bool`, *optional*): whether the connector reads the question; by default it does if it can.
        fusion_row_per_turn (`bool`, *optional*): whether every turn's question reads the views on a fusion row of its
            own, so that its visual tokens depend on image, question and m alone; `False` is the published row, on which
            a question stands behind those before it. New models have it; `False` where a file does not say, as every
            file before the field. Other connectors read each turn by itself anyway (fusedvlm's docs/reference.md, "A
            row per turn").
        distinct_queries (`bool`): one embedding row per query; `False` gives every query the eos row, so that only
            their positions differ (the published `append_special_padding=False`).
        first_query_token_id (`int`): embedding row of the first query; the query tokenizer's vocabulary size.
        merge_views (`bool`): 3x3 stride-2 merge of the patch grid (published `enable_local_merge`).
        newline_token (`bool`): one learned vector after every view (published `enable_token_crlf`).
        projection_dim (`int`): width of the contrastive space of stage 1.
        logit_scale_init_value (`float`): initial log temperature of stage 1.
        zero_large_answer_entries (`bool`): reproduce the published batch-dependent mask of stage 1, which zeroes
            projected answer entries further than one standard deviation from the mean of the whole batch
            (fusedvlm's docs/reference.md, "Large answer entries").
            Off by default: with it, a pair's score depends on the rest of the batch.
        projector_initializer_range (`float`): standard deviation of the projection's initial weights.
        text_model_name_or_path, text_model_revision (`str`, *optional*): repo id and commit of the frozen LLM.
            When set, checkpoints hold only the trained parts and the LLM is read from there.
        text_model_inside (`bool`, *optional*): whether the LLM's weights are in this checkpoint, set on saving: with
            `True` nothing is read from `text_model_name_or_path`, which then only names what was copied; with `False`
            the LLM is a reference. `None` in files older than the field, whose tensors have to be looked at.
        vision_model_name_or_path, vision_model_revision (`str`, *optional*): where the vision tower came from.

    Raises:
        ValueError: when widths disagree or a token count is out of range; the message has the numbers.
    """

    model_type = "fusedvlm"
    sub_configs = {
        "vision_config": AutoConfig,
        "fuser_config": FusedVLMFuserConfig,
        "text_config": AutoConfig,
        "answer_config": CLIPTextConfig,
    }

    vision_config: Tower = None
    fuser_config: Tower = None
    text_config: Tower = None
    answer_config: Tower = None

    connector: str = "fused"
    connector_config: dict | None = None
    image_token_id: int = 0
    num_visual_tokens: Count = None
    num_followup_visual_tokens: Count = None
    trained_num_visual_tokens: Counts = None
    trained_num_visual_tokens_is_range: bool | None = None
    max_local_views: int = 9
    fuse_question: bool | None = None
    fusion_row_per_turn: bool | None = None
    distinct_queries: bool = True
    first_query_token_id: int = 49408
    merge_views: bool = True
    newline_token: bool = True

    projection_dim: int = 768
    logit_scale_init_value: float = 2.6592
    zero_large_answer_entries: bool = False
    initializer_range: float = 0.02
    projector_initializer_range: float = 0.001

    text_model_name_or_path: str | None = None
    text_model_revision: str | None = None
    text_model_inside: bool | None = None
    vision_model_name_or_path: str | None = None
    vision_model_revision: str | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = _build_sub_config(self.vision_config, DEFAULT_VISION)
        self.text_config = _build_sub_config(self.text_config, DEFAULT_TEXT)
        kind = self.connector_class
        if not isinstance(self.fuser_config, PreTrainedConfig) and (kind.has_fusion_decoder or self.fuser_config):
            self.fuser_config = FusedVLMFuserConfig(**(self.fuser_config or {}))
        if isinstance(self.answer_config, dict):
            self.answer_config = CLIPTextConfig(**self.answer_config)
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = self.tie_word_embeddings or bool(self.text_config.tie_word_embeddings)
        if self.vision_config.model_type.startswith("siglip"):
            self.vision_config.vision_use_head = False  # SigLIP's pooling head is never read here
        kind.complete(self)
        self._check_scales()
        self._check_grid()
        self._check_token_counts()
        kind.check(self)
        self._check_text_head()

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs: Any) -> Any:
        """As the base class, for a file that states every tower.

        Raises:
            ValueError: naming a tower that is missing, for a default in its place would be the paper's, with a 7B LLM;
                and for whatever transformers cannot build a configuration from, in one line.
        """
        if not isinstance(config_dict, dict):
            raise ValueError(f"config.json must hold keys and values, not {type(config_dict).__name__}.")
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            raise ValueError(
                f"config.json is that of a {str(config_dict['model_type'])[:80]!r} model, not of a FusedVLM variant; "
                "from_backbones(vision, text) makes a variant of a vision tower and a language model."
            )
        has_fuser = connector_class(config_dict.get("connector") or "fused").has_fusion_decoder
        for name in TOWERS if has_fuser else OTHER_TOWERS:
            tower = config_dict.get(name)
            if isinstance(tower, PreTrainedConfig) or isinstance(kwargs.get(name), PreTrainedConfig):
                continue
            if not isinstance(tower, dict) or not tower.get("model_type"):
                raise ValueError(
                    f"config.json has no {name} with a model_type, so the size of that tower is unknown: the file is "
                    "damaged or of another kind of model. Take it from where the variant was saved."
                )
        try:
            return super().from_dict(config_dict, **kwargs)
        except Exception as error:  # transformers raises nearly anything for values that make no sense
            raise ValueError(f"config.json: {' '.join(str(error).split()) or type(error).__name__}"[:300]) from error

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """As the base class; a file that is JSON, but no configuration, is a `ValueError`."""
        try:
            return super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (TypeError, LookupError, AttributeError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise ValueError(
                f"{str(pretrained_model_name_or_path)[:120]}: config.json cannot be read ({reason})."
            ) from error

    def to_diff_dict(self) -> dict:
        """What is written to a file: as the base class, but with every tower whole, also where it is the default."""
        output, whole = super().to_diff_dict(), self.to_dict()
        towers = TOWERS if self.fuser_config is not None else OTHER_TOWERS
        return {**output, **{name: output.get(name) or whole[name] for name in towers}}

    @property
    def connector_class(self) -> type[FusedVLMConnector]:
        """Class of the connector, which answers from this configuration what it supports."""
        return connector_class(self.connector)

    @property
    def max_num_visual_tokens(self) -> int:
        """Upper end of the dial: the largest m this checkpoint was trained with."""
        return max(self.trained_num_visual_tokens)

    @property
    def view_grid_size(self) -> int:
        """Side of the token grid of one view after the merge (12 for a 24 x 24 patch grid)."""
        grid = self.vision_config.image_size // self.vision_config.patch_size
        return (grid + 1) // 2 if self.merge_views else grid

    @property
    def tokens_per_view(self) -> int:
        """View tokens per view, newline included (145 at the paper's size)."""
        return self.connector_class.tokens_per_view(self)

    def check_num_visual_tokens(self, num_visual_tokens: int, name: str = "num_visual_tokens") -> None:
        """Raise `ValueError` naming the possible counts when the connector cannot give this one."""
        self.connector_class.check_count(self, num_visual_tokens, name)

    # Checked at construction rather than in `validate_*` methods: those wrap the error in a type of their own, and a
    # wrong count is a plain ValueError everywhere in this package.
    def _check_scales(self) -> None:
        for name in ("initializer_range", "projector_initializer_range", "logit_scale_init_value"):
            value = getattr(self, name)
            if not math.isfinite(value) or (value < 0 and name != "logit_scale_init_value"):
                raise ValueError(f"{name}={value} must be a finite number, and a deviation is not negative.")

    def _check_grid(self) -> None:
        image: Any
        patch: Any
        image, patch = (getattr(self.vision_config, name, None) for name in ("image_size", "patch_size"))
        if not (_is_count(image) and _is_count(patch) and patch <= image and image // patch <= LARGEST_GRID):
            raise ValueError(
                f"vision_config has image_size={image!s:.40} and patch_size={patch!s:.40}; both must be whole numbers, "
                f"a patch no larger than the image, and at most {LARGEST_GRID} patches on a side."
            )

    def _check_token_counts(self) -> None:
        counts = self.trained_num_visual_tokens
        if not counts or not all(_is_count(count) and count <= MOST_TOKENS for count in counts):
            raise ValueError(
                f"trained_num_visual_tokens must be positive counts of at most {MOST_TOKENS:,}, got {counts!s:.80}."
            )
        self.check_num_visual_tokens(self.num_visual_tokens)
        for count in self.trained_num_visual_tokens:
            self.check_num_visual_tokens(count, "trained_num_visual_tokens")
        self.connector_class.check_followup_count(self, self.num_visual_tokens, self.num_followup_visual_tokens)

    def _check_text_head(self) -> None:
        for field in UNSUPPORTED_HEAD_FIELDS:
            if getattr(self.text_config, field, None) not in (None, 1, 1.0):
                raise ValueError(f"LLMs with {field} are not supported ({self.text_config.model_type}).")


FusedVLMConfig.register_for_auto_class("AutoConfig")

__all__ = ["FusedVLMConfig", "FusedVLMFuserConfig"]
