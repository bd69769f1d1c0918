"""LLaVA-1.5 and LLaVA-NeXT of transformers behind a training-free reducer."""

from typing import Any

import torch
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from .clip_questions import ClipQuestions
from .reduced_model import ReducedModel
from .token_reducers import TokenReducer
from .tower_features import TowerFeatures, check_layer, read_tower


class ReducedLlava(ReducedModel):
    """A LLaVA whose LLM reads `tokens_per_view` tokens of every view in place of all patches.

    Views are the image itself (LLaVA-1.5) or its base view and tiles (LLaVA-NeXT), reduced one by one; the budget of an
    image is `tokens_per_view` times its views, in the order base, tiles. NeXT's newline vectors mark rows of a full
    grid, so they are left out with the rows, as the published reducers do. With all patches kept the model's own
    features are used, newlines and unpadding included.

    Args:
        model: `LlavaForConditionalGeneration` or `LlavaNextForConditionalGeneration` over a CLIP tower, with any
            attention implementation.
        reducer: a `TokenReducer` or its name.
        tokens_per_view: budget of each view; all patches by default.
        clip_questions: for reducers that read the question.

    Raises:
        ValueError: when tower, layer or budget do not fit, or the reducer reads questions and none can be read.

    Example:
        >>> llava = ReducedLlava(model, "visionzip", tokens_per_view=64)  # doctest: +SKIP
        >>> inputs = processor(images=image, text=prompt, return_tensors="pt")  # doctest: +SKIP
        >>> new_tokens = llava.generate(**inputs, max_new_tokens=32)  # doctest: +SKIP
    """

    IMAGE_INPUTS = ("pixel_values", "image_sizes")

    def __init__(
        self,
        model: Any,
        reducer: TokenReducer | str,
        tokens_per_view: int | None = None,
        clip_questions: ClipQuestions | None = None,
    ) -> None:
        config = model.config
        if config.model_type not in ("llava", "llava_next"):
            raise ValueError(f"ReducedLlava takes LLaVA-1.5 and LLaVA-NeXT, not {config.model_type!r}.")
        if config.vision_feature_select_strategy != "default":
            raise ValueError(
                "vision_feature_select_strategy must be 'default' (patches without the class token), not "
                f"{config.vision_feature_select_strategy!r}."
            )
        check_layer(config.vision_feature_layer, config.vision_config.num_hidden_layers)
        super().__init__(model, reducer, tokens_per_view, clip_questions)

    def views_per_image(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None) -> list[int]:
        """One, or for NeXT the base view and the tiles that `image_sizes` (images, 2) call for."""
        if self.model.config.model_type == "llava":
            return [1] * len(pixel_values)
        if image_sizes is None:
            raise ValueError("LLaVA-NeXT needs image_sizes beside pixel_values; the processor returns both.")
        side, pinpoints = self.model.config.vision_config.image_size, self.model.config.image_grid_pinpoints
        return [image_size_to_num_patches(size, pinpoints, side) for size in image_sizes]

    def own_features(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None) -> list[torch.Tensor]:
        """As `get_image_features` of the model, newlines and unpadding included."""
        sizes = {} if self.model.config.model_type == "llava" else {"image_sizes": image_sizes}
        return list(
            self.model.model.get_image_features(pixel_values=pixel_values, return_dict=True, **sizes).pooler_output
        )

    def own_counts(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None) -> list[int]:
        """All patches; for NeXT what unpadding leaves of them, and the newlines."""
        views = self.views_per_image(pixel_values, image_sizes)
        if self.model.config.model_type == "llava":
            return [self.num_patches] * len(views)
        blank = [torch.zeros(count, self.num_patches, 1) for count in views]
        packed, _ = self.model.model.pack_image_features(blank, image_sizes, "default", image_newline=torch.zeros(1))
        return [len(tokens) for tokens in packed]

    def tower_features(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None) -> TowerFeatures:
        """Of every view, base view first; NeXT's (images, views, 3, S, S) are padded to the largest count."""
        if pixel_values.dim() == 5:
            views = self.views_per_image(pixel_values, image_sizes)
            pixel_values = torch.cat([image[:count] for image, count in zip(pixel_values, views, strict=True)])
        return read_tower(self.model.model.vision_tower, pixel_values, self.model.config.vision_feature_layer)

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """LLaVA's two-layer MLP."""
        return self.model.model.multi_modal_projector(tokens)
