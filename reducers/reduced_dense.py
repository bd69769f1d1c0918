"""A FusedVLM with the dense connector behind a training-free reducer."""

from typing import TYPE_CHECKING

import torch

from .clip_questions import ClipQuestions
from .reduced_model import ReducedModel
from .token_reducers import TokenReducer
from .tower_features import TowerFeatures, read_tower

if TYPE_CHECKING:
    from fusedvlm.modeling_fusedvlm import FusedVLMForConditionalGeneration


class ReducedDense(ReducedModel):
    """A `connector="dense"` variant whose LLM reads `tokens_per_view` tokens of every view in place of all patches.

    Prompts come from the variant's own processor, written for all patches; what is reduced is cut out of them here.

    Args:
        model: `FusedVLMForConditionalGeneration` with the dense connector over a CLIP tower.
        reducer, tokens_per_view, clip_questions: as in `ReducedModel`.

    Raises:
        ValueError: for another connector, a budget that does not fit, or a reducer without its questions.
    """

    IMAGE_INPUTS = ("pixel_values", "image_num_views", "num_visual_tokens")
    UNUSED_INPUTS = (
        "question_input_ids",
        "question_lengths",
        "question_turns",
        "image_num_questions",
        "sample_num_images",
    )

    def __init__(
        self,
        model: "FusedVLMForConditionalGeneration",
        reducer: TokenReducer | str,
        tokens_per_view: int | None = None,
        clip_questions: ClipQuestions | None = None,
    ) -> None:
        if getattr(model.config, "connector", None) != "dense":
            kind = getattr(model.config, "connector", model.config.model_type)
            raise ValueError(f"Reducers keep some of a dense model's patches; connector={kind!r} has none to keep.")
        super().__init__(model, reducer, tokens_per_view, clip_questions)

    def views_per_image(
        self,
        pixel_values: torch.Tensor,
        image_num_views: torch.Tensor | None = None,
        num_visual_tokens: torch.Tensor | None = None,
    ) -> list[int]:
        """Views of each image, one each when `image_num_views` (images,) is not given."""
        return [1] * len(pixel_values) if image_num_views is None else image_num_views.tolist()

    def own_features(self, pixel_values: torch.Tensor, **counts: torch.Tensor) -> list[torch.Tensor]:
        """As the dense connector gives them."""
        tokens = self.project(self.model.model.get_view_features(pixel_values)[0])
        return [part.flatten(0, 1) for part in tokens.split(self.views_per_image(pixel_values, **counts))]

    def own_counts(self, pixel_values: torch.Tensor, **counts: torch.Tensor) -> list[int]:
        """All patches of all views, in front of the first question only."""
        views = self.views_per_image(pixel_values, **counts)
        wanted = counts.get("num_visual_tokens")
        if wanted is not None and sum(count > 0 for count in wanted.tolist()) > len(views):
            raise ValueError(
                "A later question has visual tokens of its own (num_followup_visual_tokens); the dense connector reads "
                "no question, so set it to 0."
            )
        return [self.num_patches * count for count in views]

    def tower_features(self, pixel_values: torch.Tensor, **counts: torch.Tensor) -> TowerFeatures:
        """Of the layer that the dense connector reads, the one before the last."""
        (layer,) = self.model.model.connector.hidden_layers()
        return read_tower(self.model.model.vision_tower, pixel_values, layer)

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """The dense connector's MLP."""
        return self.model.model.connector.reduce(tokens, tokens.shape[1])
