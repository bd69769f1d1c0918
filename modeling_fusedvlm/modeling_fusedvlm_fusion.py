"""The fusion model, which both training stages share: vision tower and connector.

Shape legend
    B   conversations      L   prompt length        H   LLM width
    V   views              T   tokens per view      C   width of vision tower and fusion decoder
    I   images             G   segments: one question asked about one image
    m_g visual tokens of segment g (m for an image's first question, m' for later ones)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_fusedvlm import FusedVLMConfig
from .modeling_fusedvlm_base import FusedVLMPreTrainedModel
from .modeling_fusedvlm_connectors import FusedVLMConnector, connector_class
from .modeling_fusedvlm_counts import check_counts
from .modeling_fusedvlm_rows import FusionPlan, build_fusion_plan


@dataclass
class FusedVLMFusionOutput(ModelOutput):
    """What the connector made of each segment.

    Args:
        segment_states (`list[torch.Tensor]`): per segment, image-major: (m_g, C) states at its queries and eos for the
            fused connector; others give (m_g, H) or, where m counts by view, (views x m_g, H).
        vision_outputs (`BaseModelOutputWithPooling`, *optional*): what the vision tower returned.
    """

    segment_states: Any = None
    vision_outputs: Any = None


class FusedVLMImageInputs(TypedDict, total=False):
    """The images of a batch and what is asked about them, as the processor gives them; all keywords, all optional.

    Args:
        pixel_values: (V, 3, S, S) all views of the batch, image after image.
        image_num_views: (I,) views of each image; one each when not given.
        question_input_ids: (sum of lengths,) question tokens of the query tokenizer, segment after segment.
        question_lengths: (G,) tokens of each question.
        question_turns: (G,) user turn of each question inside its conversation.
        num_visual_tokens: (G,) m or m' of each segment, or one number for all; of each view where the connector
            counts by view.
        image_num_questions: (I,) questions asked about each image.
        sample_num_images: (B,) images of each conversation, 0 for text only.
        view_features: (V, T, C) from `get_view_features`, instead of `pixel_values`.
    """

    pixel_values: torch.Tensor | None
    image_num_views: torch.Tensor | Sequence[int] | None
    question_input_ids: torch.Tensor | None
    question_lengths: torch.Tensor | Sequence[int] | None
    question_turns: torch.Tensor | Sequence[int] | None
    num_visual_tokens: torch.Tensor | Sequence[int] | int | None
    image_num_questions: torch.Tensor | Sequence[int] | None
    sample_num_images: torch.Tensor | Sequence[int] | None
    view_features: torch.Tensor | None


class FusedVLMKwargs(FusedVLMImageInputs, TransformersKwargs, total=False):
    """Keywords of `FusedVLMModel`: images, and what every language model of transformers takes."""


def split_image_inputs(kwargs: Mapping[str, Any]) -> tuple[FusedVLMImageInputs, dict[str, Any]]:
    """Keywords of a call: those about images, and the rest."""
    images = {name: value for name, value in kwargs.items() if name in FusedVLMImageInputs.__annotations__}
    return cast(FusedVLMImageInputs, images), {name: value for name, value in kwargs.items() if name not in images}


class FusedVLMFusionModel(FusedVLMPreTrainedModel):
    """Vision tower and connector: what both training stages share, under the same parameter names."""

    vision_tower: PreTrainedModel
    connector: FusedVLMConnector
    fuser: Any  # of the fused connector alone
    _uint8_scale: list[torch.Tensor] | None = None  # mean and standard deviation (3, 1, 1) of levels

    def __init__(self, config: FusedVLMConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        connector = connector_class(config.connector)(config)
        connector.attach(self)
        self._no_split_modules = [*type(self)._no_split_modules, type(connector).__name__]
        self._init_parts(config)
        self.post_init()

    def _init_parts(self, config: FusedVLMConfig) -> None:
        """Modules a subclass adds before `post_init`."""

    def get_view_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, ModelOutput]:
        """Encode views: vision tower, last norm, merge, newline (fusedvlm's docs/reference.md, "Vision tower").

        Args:
            pixel_values: (V, 3, S, S), normalized; or levels of uint8, once `read_uint8_views` said how to read them.

        Returns:
            (V, T, C) view tokens, and what the vision tower returned.

        Raises:
            ValueError: for whole numbers other than uint8, and for uint8 before `read_uint8_views`.
        """
        if not pixel_values.is_floating_point():
            pixel_values = self._normalized(pixel_values)
        return self.connector.encode_views(self.vision_tower, pixel_values.to(self.vision_tower.dtype), **kwargs)

    def read_uint8_views(self, image_processor: Any) -> None:
        """From now on take views as bytes too (`uint8_views=True` of the image processor), normalized on the device.

        Args:
            image_processor: the one that makes the views; its mean, standard deviation and factor are used.

        Raises:
            ValueError: for an image processor that does not normalize as this package's do.
        """
        factor, mean, std = (getattr(image_processor, f, None) for f in ("rescale_factor", "image_mean", "image_std"))
        asks = [getattr(image_processor, name, False) for name in ("do_rescale", "do_normalize")]
        if not all(asks) or not factor or mean is None or std is None:
            raise ValueError(
                "read_uint8_views takes the image processor that makes the views (processor.image_processor), with "
                "do_rescale and do_normalize on."
            )
        scaled = [torch.tensor(values, dtype=torch.float32) * (1.0 / factor) for values in (mean, std)]
        self._uint8_scale = [values.view(-1, 1, 1) for values in scaled]

    def _normalized(self, levels: torch.Tensor) -> torch.Tensor:
        if levels.dtype != torch.uint8:
            raise ValueError(f"pixel_values are {levels.dtype}: give normalized floats, or uint8 of uint8_views=True.")
        if self._uint8_scale is None:
            raise ValueError(
                "pixel_values are levels of uint8, and this model does not know how to normalize them: call "
                "read_uint8_views(processor.image_processor) once, or leave uint8_views out."
            )
        mean, std = (values.to(levels.device) for values in self._uint8_scale)
        return levels.to(torch.float32).sub_(mean).div_(std)

    def connector_parameters(self) -> list[nn.Parameter]:
        """Parameters that belong neither to the vision tower nor to the LLM."""
        others = ("vision_tower.", "language_model.")
        return [parameter for name, parameter in self.named_parameters() if not name.startswith(others)]

    def fuse(self, **inputs: Unpack[FusedVLMKwargs]) -> tuple[FusedVLMFusionOutput, FusionPlan]:
        """Run vision tower and connector.

        Args:
            inputs: see `FusedVLMImageInputs`; further ones are for the vision tower.

        Returns:
            States of every segment, and which segment belongs to which image and sample.

        Raises:
            ValueError: when counts disagree or a token count is out of range; the message has the numbers.
        """
        view_features, vision_outputs, plan = self._views_and_plan(inputs)
        if not plan.segments:
            return FusedVLMFusionOutput(segment_states=[], vision_outputs=vision_outputs), plan
        for count in sorted({segment.num_visual_tokens for segment in plan.segments}):
            self.config.check_num_visual_tokens(count)
        segment_states = self.connector(view_features, plan, *self._questions(inputs))
        return FusedVLMFusionOutput(segment_states=segment_states, vision_outputs=vision_outputs), plan

    def fuse_every_count(
        self, counts: Sequence[int], **inputs: Unpack[FusedVLMKwargs]
    ) -> tuple[list[list[torch.Tensor]], FusionPlan]:
        """Visual tokens of every image and question for every m: views, question and queries are read once for all m.

        Equal to one `fuse` (and projection) per m to rounding, for any connector. The fused one reads a single row
        with one eos per m behind its queries, so that ten m cost little more than the largest; with others the views
        are shared. Every question is read as the first one about its image, whatever `fusion_row_per_turn` says.
        Gradients flow through all of it.

        An evaluation computes `view_features` once, asks this once per image and question, and answers at each m with
        `get_image_features_every_count`, whose result `generate` takes as it is.

        Args:
            counts: every wanted m, in any order.
            inputs: as in `fuse`; `num_visual_tokens` must be left out.

        Returns:
            Per segment (image-major), per count: (m, H) for a model with an LLM, (m, C) for the fused connector of one
            without; m counts by view where the connector does. And which segment belongs to which image and sample.

        Raises:
            ValueError: for counts that the connector cannot give, or as `fuse`.
        """
        wanted = check_counts(counts)
        if inputs.get("num_visual_tokens") is not None:
            raise ValueError(
                "fuse_every_count takes the numbers of visual tokens as counts; leave num_visual_tokens out."
            )
        for count in sorted(set(wanted)):
            self.config.check_num_visual_tokens(count)
        view_features, _, plan = self._views_and_plan(inputs)
        if not plan.segments:
            return [], plan
        states = self.connector.every_count(view_features, plan, wanted, *self._questions(inputs))
        if getattr(self, "_has_llm", False):
            states = [[self.connector.project(part) for part in segment] for segment in states]
        return states, plan

    def _views_and_plan(self, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, ModelOutput | None, FusionPlan]:
        """(V, T, C) given or computed, what the tower returned for it, and the batch's plan."""
        images, kwargs = split_image_inputs(inputs)
        pixel_values, view_features = images.get("pixel_values"), images.get("view_features")
        vision_outputs = None
        if pixel_values is not None and view_features is None:
            view_features, vision_outputs = self.get_view_features(pixel_values, **kwargs)
        elif view_features is None or pixel_values is not None:
            raise ValueError("Give exactly one of pixel_values and view_features.")
        plan = build_fusion_plan(
            len(view_features),
            self.config.num_visual_tokens,
            images.get("image_num_views"),
            images.get("question_lengths"),
            images.get("question_turns"),
            images.get("num_visual_tokens"),
            images.get("image_num_questions"),
            images.get("sample_num_images"),
            self.connector.per_view,
        )
        return view_features, vision_outputs, plan

    def _questions(self, inputs: Mapping[str, Any]) -> tuple[torch.Tensor | None, nn.Module | None]:
        return inputs.get("question_input_ids"), getattr(self, "language_model", None)

    def start_fusion(self, view_features: torch.Tensor) -> Cache:
        """Read one image's views into a key-value cache that any number of questions can continue.

        Args:
            view_features: (V, T, C) of one image.

        Returns:
            Cache of V x T positions, which `continue_fusion` takes: with `fusion_row_per_turn` for every question and
            from several threads; without, several first questions about the same image need `extend=False`.

        Raises:
            ValueError: for connectors that keep nothing between questions.
        """
        return self.connector.start_fusion(view_features, [len(view_features)])[0]

    def start_fusions(self, view_features: torch.Tensor, image_num_views: torch.Tensor | Sequence[int]) -> list[Cache]:
        """`start_fusion` for several images in one pass (one per number of views, so that nothing is padded).

        Args:
            view_features: (V, T, C) of all images, image after image.
            image_num_views: (I,) views of each.

        Returns:
            A cache per image, each as of `start_fusion` and with memory of its own.

        Raises:
            ValueError: when counts disagree, or for connectors that keep nothing between questions.
        """
        plan = build_fusion_plan(len(view_features), 1, image_num_views)
        return self.connector.start_fusion(view_features, plan.views_per_image)

    def continue_fusion(
        self,
        cache: Cache,
        question_input_ids: torch.Tensor | None,
        num_visual_tokens: int,
        extend: bool | None = None,
    ) -> torch.Tensor:
        """Ask one more question about a cached image; costs only the question's tokens and the queries.

        Args:
            cache: from `start_fusion`.
            question_input_ids: (length,) or None.
            num_visual_tokens: m or m'.
            extend: whether the question and its queries stand in the cache afterwards, where later ones read them, as
                on the packed row. By default as the model was trained: not with `fusion_row_per_turn`, else yes. False
                asks another first question about the same image; no `copy.deepcopy` of the cache is needed.

        Returns:
            (m, C) fusion states, equal to those of one pass over all questions (the decoder is causal). Equal for every
            order of the questions with `fusion_row_per_turn`.

        Raises:
            ValueError: for a count out of range, or `extend=True` where every question has a row of its own.
        """
        lengths = [0 if question_input_ids is None else len(question_input_ids)]
        return self.continue_fusions([cache], question_input_ids, lengths, num_visual_tokens, extend)[0]

    def continue_fusions(
        self,
        caches: Sequence[Cache],
        question_input_ids: torch.Tensor | None,
        question_lengths: torch.Tensor | Sequence[int] | None,
        num_visual_tokens: torch.Tensor | Sequence[int] | int,
        extend: bool | None = None,
    ) -> list[torch.Tensor]:
        """`continue_fusion` for several images at once: one more question about each, possibly of different users.

        Args:
            caches: one per image, of any lengths; those of equal length are continued together.
            question_input_ids: (sum of lengths,) question tokens, image after image, or None.
            question_lengths: (I,) tokens of each question.
            num_visual_tokens: (I,) m of each, or one number for all.
            extend: see `continue_fusion`.

        Returns:
            Per image (m, C) fusion states.

        Raises:
            ValueError: when counts disagree, and as `continue_fusion`.
        """
        if not caches:
            raise ValueError("continue_fusions needs the cache of at least one image.")
        # CODEPATH: new variants read every turn on a row of its own, published ones behind the turns before it.
        own_rows = self.config.fusion_row_per_turn
        if extend and own_rows:
            raise ValueError("With fusion_row_per_turn no question reads another one; leave extend out.")
        plan = build_fusion_plan(
            len(caches), self.config.num_visual_tokens, None, question_lengths, None, num_visual_tokens
        )
        for count in sorted({segment.num_visual_tokens for segment in plan.segments}):
            self.config.check_num_visual_tokens(count)
        extend = not own_rows if extend is None else extend
        return self.connector.continue_fusion(list(caches), plan, question_input_ids, extend)
