"""A model whose LLM reads fewer tokens of every view, chosen without training; nothing in the model is changed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from .clip_questions import ClipQuestions
from .token_reducers import TokenBudget, TokenReducer, build_reducer
from .tower_features import TowerFeatures, there


class ReducedModel:
    """Base of `ReducedLlava` and `ReducedDense`: budget, prompts and answers, whatever the model inside.

    Args:
        model: the model, put in evaluation mode.
        reducer: a `TokenReducer` or its name.
        tokens_per_view: budget of each view; all patches by default.
        clip_questions: for reducers that read the question.

    Raises:
        ValueError: when the budget does not fit, or the reducer reads questions and none can be read.
    """

    IMAGE_INPUTS: tuple[str, ...] = ("pixel_values",)
    # What the model's own processor returns beside these, and nobody needs here.
    UNUSED_INPUTS: tuple[str, ...] = ()

    def __init__(
        self,
        model: Any,
        reducer: TokenReducer | str,
        tokens_per_view: int | None = None,
        clip_questions: ClipQuestions | None = None,
    ) -> None:
        vision = model.config.vision_config
        self.model = model.eval()
        self.reducer = build_reducer(reducer) if isinstance(reducer, str) else reducer
        self.num_patches = (vision.image_size // vision.patch_size) ** 2
        self.tokens_per_view = self.num_patches if tokens_per_view is None else tokens_per_view
        self.reducer.check(self.tokens_per_view, self.num_patches)
        if self.reducer.reads_question and clip_questions is None:
            raise ValueError(
                f"{self.reducer.name} reads the question; pass clip_questions=ClipQuestions(the tower's CLIP)."
            )
        self.clip_questions = clip_questions

    @property
    def keeps_all(self) -> bool:
        """Whether the model's own features are used."""
        return self.tokens_per_view == self.num_patches and self.reducer.keeps_all_untouched()

    # -- what a model must tell: it names the images it takes ----------------------------------------------------------

    def views_per_image(self, *args: Any, **images: Any) -> list[int]:
        """Views of each image of a batch."""
        raise NotImplementedError

    def own_features(self, *args: Any, **images: Any) -> list[torch.Tensor]:
        """(tokens, H) of each image as the model itself has them."""
        raise NotImplementedError

    def own_counts(self, *args: Any, **images: Any) -> list[int]:
        """Placeholders the model's own processor writes for each image."""
        raise NotImplementedError

    def tower_features(self, *args: Any, **images: Any) -> TowerFeatures:
        """Features of all views of a batch."""
        raise NotImplementedError

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """(V, k, C) patches to (V, k, H) in front of the LLM."""
        raise NotImplementedError

    # -- the same for all ----------------------------------------------------------------------------------------------

    def budgets(self, **images: torch.Tensor) -> list[TokenBudget]:
        """Tokens per view and in total, of each image of a batch; images as the model's processor returns them."""
        return [TokenBudget(self.tokens_per_view, views) for views in self.views_per_image(**images)]

    @torch.no_grad()
    def image_features(self, questions: Sequence[str] | None = None, **images: torch.Tensor) -> list[torch.Tensor]:
        """(tokens, H) for every image of a batch, in front of the LLM.

        Args:
            questions: one per image, for reducers that read them.
            images: `IMAGE_INPUTS` as the model's own processor returns them.
        """
        if self.keeps_all:
            return self.own_features(**images)
        views = self.views_per_image(**images)
        features = self.tower_features(**images)
        if self.reducer.reads_question:
            features = self._with_questions(features, questions, views)
        kept = self.project(self.reducer(features, self.tokens_per_view))
        return [part.flatten(0, 1) for part in kept.split(views)]

    def _with_questions(
        self, features: TowerFeatures, questions: Sequence[str] | None, views: list[int]
    ) -> TowerFeatures:
        if questions is None or len(questions) != len(views):
            given = "no questions" if questions is None else f"{len(questions)} questions"
            raise ValueError(f"{self.reducer.name} needs one question per image: {given} for {len(views)} images.")
        per_view = [question for question, count in zip(questions, views, strict=True) for _ in range(count)]
        reader = there(self.clip_questions)
        return features.with_question(self.project(features.tokens), reader.similarity(features, per_view))

    @torch.no_grad()
    def prepare(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        questions: Sequence[str] | None = None,
        labels: torch.Tensor | None = None,
        padding_side: str = "left",
        **images: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """What the processor returned, as inputs of the model with the reduced tokens in place.

        Args:
            input_ids, attention_mask, images: from the model's own processor.
            questions: one per image.
            labels: (B, L); shortened along.
            padding_side: of rows that end up shorter than others.

        Returns:
            `inputs_embeds` (B, L', H), `attention_mask` (B, L') and, when given, `labels` (B, L').

        Raises:
            ValueError: when a batch has placeholders that its images do not account for.
        """
        image_token = self.model.config.image_token_id
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        is_placeholder = (input_ids == image_token) & mask.bool()
        features: list[torch.Tensor] = []
        counts: list[int] = []
        if images.get("pixel_values") is not None:
            features, counts = self.image_features(questions, **images), self.own_counts(**images)
        if int(is_placeholder.sum()) != sum(counts):
            raise ValueError(
                f"The prompts have {int(is_placeholder.sum())} image placeholders, their {len(counts)} images fill "
                f"{sum(counts)}; prepare the batch with the model's own processor."
            )
        keep = mask.bool()
        keep[is_placeholder] = torch.cat(
            [torch.arange(own) < len(new) for own, new in zip(counts, features, strict=True)]
            or [torch.zeros(0, dtype=torch.bool)]
        ).to(keep.device)
        ids = [row[kept] for row, kept in zip(input_ids, keep, strict=True)]
        rows = {"input_ids": ids, "attention_mask": [torch.ones_like(row) for row in ids]}
        if labels is not None:
            rows["labels"] = [row[kept] for row, kept in zip(labels, keep, strict=True)]
        padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        padded = {
            name: pad_sequence(row, batch_first=True, padding_value=padding[name], padding_side=padding_side)
            for name, row in rows.items()
        }
        new_ids = padded.pop("input_ids")
        placeholders = (new_ids == image_token) & padded["attention_mask"].bool()
        # The placeholder may lie outside the LLM's vocabulary; any other id stands in until it is replaced.
        embeds = self.model.get_input_embeddings()(new_ids.masked_fill(placeholders, 0))
        if features:
            visual = torch.cat(features).to(embeds.device, embeds.dtype)
            embeds = embeds.masked_scatter(placeholders.unsqueeze(-1), visual)
        return {"inputs_embeds": embeds, **padded}

    @torch.no_grad()
    def generate(self, questions: Sequence[str] | None = None, **kwargs: Any) -> torch.Tensor:
        """As the model's `generate`, but only the new tokens are returned: the prompt goes in as embeddings.

        Args:
            questions: one per image, for reducers that read them.
            kwargs: what the processor returned, and any option of `generate`.
        """
        return self.model.generate(**self.prepare(questions=questions, **self._take_inputs(kwargs)), **kwargs)

    @torch.no_grad()
    def __call__(self, questions: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """One forward pass, right-padded; arguments as for `generate`, and `labels`."""
        prepared = self.prepare(questions=questions, padding_side="right", **self._take_inputs(kwargs))
        return self.model(**prepared, **kwargs)

    def _take_inputs(self, kwargs: dict) -> dict:
        """Take what belongs to the prompt out of `kwargs`."""
        for name in self.UNUSED_INPUTS:
            kwargs.pop(name, None)
        names = ("input_ids", "attention_mask", "labels", *self.IMAGE_INPUTS)
        return {name: kwargs.pop(name) for name in names if kwargs.get(name) is not None}
