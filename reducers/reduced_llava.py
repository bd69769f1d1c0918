"""LLaVA-1.5 and LLaVA-NeXT of transformers behind a training-free reducer; nothing in the model is changed."""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from .clip_questions import ClipQuestions
from .token_reducers import TokenBudget, TokenReducer, build_reducer
from .tower_features import TowerFeatures, check_layer, read_tower

IMAGE_INPUTS = ("pixel_values", "image_sizes")


class ReducedLlava:
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

    def __init__(
        self,
        model,
        reducer: TokenReducer | str,
        tokens_per_view: int | None = None,
        clip_questions: ClipQuestions | None = None,
    ):
        config = model.config
        if config.model_type not in ("llava", "llava_next"):
            raise ValueError(f"ReducedLlava takes LLaVA-1.5 and LLaVA-NeXT, not {config.model_type!r}.")
        if config.vision_feature_select_strategy != "default":
            raise ValueError(
                "vision_feature_select_strategy must be 'default' (patches without the class token), not "
                f"{config.vision_feature_select_strategy!r}."
            )
        check_layer(config.vision_feature_layer, config.vision_config.num_hidden_layers)
        self.model = model.eval()
        self.reducer = build_reducer(reducer) if isinstance(reducer, str) else reducer
        self.num_patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
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

    def views_per_image(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None) -> list[int]:
        """Views of each image of a batch."""
        if self.model.config.model_type == "llava":
            return [1] * len(pixel_values)
        if image_sizes is None:
            raise ValueError("LLaVA-NeXT needs image_sizes beside pixel_values; the processor returns both.")
        side, pinpoints = self.model.config.vision_config.image_size, self.model.config.image_grid_pinpoints
        return [image_size_to_num_patches(size, pinpoints, side) for size in image_sizes]

    def budgets(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None) -> list[TokenBudget]:
        """Tokens per view and in total, of each image; with all kept NeXT's newline vectors come on top."""
        return [TokenBudget(self.tokens_per_view, views) for views in self.views_per_image(pixel_values, image_sizes)]

    @torch.no_grad()
    def image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        questions: Sequence[str] | None = None,
    ) -> list[torch.Tensor]:
        """(tokens, H) for every image of a batch, in front of the LLM.

        Args:
            pixel_values: (images, 3, S, S), or for NeXT (images, views, 3, S, S) padded to the largest count.
            image_sizes: (images, 2) heights and widths, for NeXT.
            questions: one per image, for reducers that read them.
        """
        base, config = self.model.model, self.model.config
        if self.keeps_all:
            sizes = {} if config.model_type == "llava" else {"image_sizes": image_sizes}
            return list(base.get_image_features(pixel_values=pixel_values, return_dict=True, **sizes).pooler_output)
        views = self.views_per_image(pixel_values, image_sizes)
        if pixel_values.dim() == 5:
            pixel_values = torch.cat([image[:count] for image, count in zip(pixel_values, views, strict=True)])
        features = read_tower(base.vision_tower, pixel_values, config.vision_feature_layer)
        if self.reducer.reads_question:
            features = self._with_questions(features, questions, views)
        kept = base.multi_modal_projector(self.reducer(features, self.tokens_per_view))
        return [part.flatten(0, 1) for part in kept.split(views)]

    def _with_questions(
        self, features: TowerFeatures, questions: Sequence[str] | None, views: list[int]
    ) -> TowerFeatures:
        if questions is None or len(questions) != len(views):
            given = "no questions" if questions is None else f"{len(questions)} questions"
            raise ValueError(f"{self.reducer.name} needs one question per image: {given} for {len(views)} images.")
        per_view = [question for question, count in zip(questions, views, strict=True) for _ in range(count)]
        projected = self.model.model.multi_modal_projector(features.tokens)
        return features.with_question(projected, self.clip_questions.similarity(features, per_view))

    def own_counts(self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None) -> list[int]:
        """Placeholders the model's own processor writes for each image."""
        views = self.views_per_image(pixel_values, image_sizes)
        if self.model.config.model_type == "llava":
            return [self.num_patches] * len(views)
        blank = [torch.zeros(count, self.num_patches, 1) for count in views]
        packed, _ = self.model.model.pack_image_features(blank, image_sizes, "default", image_newline=torch.zeros(1))
        return [len(tokens) for tokens in packed]

    @torch.no_grad()
    def prepare(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        questions: Sequence[str] | None = None,
        labels: torch.Tensor | None = None,
        padding_side: str = "left",
    ) -> dict[str, torch.Tensor]:
        """What the processor returned, as inputs of the model with the reduced tokens in place.

        Args:
            input_ids, attention_mask, pixel_values, image_sizes: from the model's own processor.
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
        features, counts = [], []
        if pixel_values is not None:
            features = self.image_features(pixel_values, image_sizes, questions)
            counts = self.own_counts(pixel_values, image_sizes)
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
        ids = padded.pop("input_ids")
        placeholders = (ids == image_token) & padded["attention_mask"].bool()
        # The placeholder may lie outside the LLM's vocabulary; any other id stands in until it is replaced.
        embeds = self.model.get_input_embeddings()(ids.masked_fill(placeholders, 0))
        if features:
            visual = torch.cat(features).to(embeds.device, embeds.dtype)
            embeds = embeds.masked_scatter(placeholders.unsqueeze(-1), visual)
        return {"inputs_embeds": embeds, **padded}

    @torch.no_grad()
    def generate(self, questions: Sequence[str] | None = None, **kwargs) -> torch.Tensor:
        """As the model's `generate`, but only the new tokens are returned: the prompt goes in as embeddings.

        Args:
            questions: one per image, for reducers that read them.
            kwargs: what the processor returned, and any option of `generate`.
        """
        names = ("input_ids", "attention_mask", *IMAGE_INPUTS)
        batch = {name: kwargs.pop(name) for name in names if kwargs.get(name) is not None}
        return self.model.generate(**self.prepare(questions=questions, **batch), **kwargs)

    @torch.no_grad()
    def __call__(self, questions: Sequence[str] | None = None, **kwargs):
        """One forward pass, right-padded; arguments as for `generate`, and `labels`."""
        names = ("input_ids", "attention_mask", "labels", *IMAGE_INPUTS)
        batch = {name: kwargs.pop(name) for name in names if kwargs.get(name) is not None}
        return self.model(**self.prepare(questions=questions, padding_side="right", **batch), **kwargs)
