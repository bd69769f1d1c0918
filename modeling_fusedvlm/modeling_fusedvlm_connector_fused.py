"""Fused, the default: a small causal decoder reads view tokens, questions and learnable queries.

Its modules keep their published places (`merger`, `fuser`, `projector` beside the vision tower, not below `connector`),
so every published variant loads unchanged.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlamaModel, PreTrainedConfig
from transformers.cache_utils import Cache

from .modeling_fusedvlm_connector import FusedVLMConnector, register_connector
from .modeling_fusedvlm_connector_parts import grid_side, refuse_query_rows, split_questions
from .modeling_fusedvlm_counts import read_every_count, with_count
from .modeling_fusedvlm_rows import FusionPlan, build_fusion_rows, query_token_ids, read_in_buckets
from .modeling_fusedvlm_turns import continue_caches, has_later_turns, read_turns, read_views, select_images
from .modeling_fusedvlm_views import FusedVLMViewMerger

# CLIP normalizes only the class token on its own; here its final LayerNorm is applied to every token (fusedvlm's
# docs/reference.md, "Vision tower"). Towers of other families return normalized tokens.
TOWERS_TO_NORMALIZE = ("clip_vision_model",)


class FusedVLMProjector(nn.Linear):
    """Bias-free linear from fusion width to LLM width; a class of its own because its initial scale is."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config.fuser_config.hidden_size, config.text_config.hidden_size, bias=False)


@register_connector("fused")
class FusedVLMFusedConnector(FusedVLMConnector):
    """Fusion rows through a causal decoder; m counts the tokens of an image, however many views it has."""

    summary = None
    reads_question = "optional"
    nested = True
    per_view = False
    has_fusion_decoder = True
    has_contrastive_stage = True
    turn_rows = "optional"
    parameter_groups = {"fusion": ("model.fuser.",), "projection": ("model.projector.",)}
    lora_prefix = "model.fuser."
    model: Any  # the FusedVLMFusionModel that holds its modules

    @classmethod
    def counts(cls, config: PreTrainedConfig) -> Sequence[int]:
        """Any m from 1 to the largest trained one: the decoder is causal, so its queries are nested."""
        return range(1, config.max_num_visual_tokens + 1)

    @classmethod
    def default_count(cls, config: PreTrainedConfig) -> int:
        """The paper's 256."""
        return 256

    @classmethod
    def default_followup_count(cls, config: PreTrainedConfig) -> int:
        """The paper's 8, or m where m is smaller."""
        return min(8, config.num_visual_tokens)

    @classmethod
    def tokens_per_view(cls, config: PreTrainedConfig) -> int:
        """Merged patches and the newline (145 at the paper's size)."""
        return config.view_grid_size**2 + int(config.newline_token)

    @classmethod
    def _complete_parts(cls, config: PreTrainedConfig) -> None:
        """The fusion decoder, merge and newline are its own."""

    @classmethod
    def fields_from_backbones(
        cls,
        vision_config: PreTrainedConfig,
        largest: int,
        query_vocab_size: int,
        query_eos_token_id: int,
        fuser_config: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """A decoder of the tower's width with a row per turn, whose queries stand behind the tokenizer's vocabulary."""
        fuser = {
            "hidden_size": vision_config.hidden_size,
            "intermediate_size": vision_config.intermediate_size,
            "num_attention_heads": max(1, vision_config.hidden_size // 64),
            "vocab_size": query_vocab_size + largest - 1,
            "eos_token_id": query_eos_token_id,
            **(fuser_config or {}),
        }
        return {"fuser_config": fuser, "first_query_token_id": query_vocab_size, "fusion_row_per_turn": True}

    @classmethod
    def check(cls, config: PreTrainedConfig) -> None:
        """Widths must agree, and the embedding table must hold every query."""
        vision, fuser = config.vision_config, config.fuser_config
        if vision.hidden_size != fuser.hidden_size:
            raise ValueError(
                f"fuser_config.hidden_size={fuser.hidden_size} must equal vision_config.hidden_size="
                f"{vision.hidden_size}: view tokens enter the fusion decoder without a projection."
            )
        largest = config.max_num_visual_tokens
        # CODEPATH: variants without distinct queries need no rows for them.
        if config.distinct_queries and largest > fuser.vocab_size - config.first_query_token_id + 1:
            raise ValueError(
                f"{largest} visual tokens need {largest - 1} query rows after row {config.first_query_token_id} of the "
                f"fusion table, which has {fuser.vocab_size} rows; set fuser_config.vocab_size to "
                f"{config.first_query_token_id + largest - 1}."
            )

    @classmethod
    def check_followup_count(cls, config: PreTrainedConfig, first: int, count: int) -> None:
        """1 to m: every question gets queries of its own."""
        cls.check_count(config, count, "num_followup_visual_tokens")
        if count > first:
            raise ValueError(f"num_followup_visual_tokens={count} must not exceed num_visual_tokens={first}.")

    @classmethod
    def facts(cls, config: PreTrainedConfig) -> dict[str, Any] | None:
        """None: what a processor does without an entry is what this connector needs."""
        return None

    @classmethod
    def describe(cls, config: PreTrainedConfig) -> dict[str, Any]:
        """Size of the fusion decoder."""
        fuser = config.fuser_config
        return {"layers": fuser.num_hidden_layers, "width": fuser.hidden_size, "heads": fuser.num_attention_heads}

    # -- building ------------------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Put merge, decoder and, where there is an LLM, the projection into the model itself."""
        config = self.config
        model.merger = FusedVLMViewMerger(
            config.vision_config.hidden_size, config.merge_views, config.newline_token, config.initializer_range
        )
        model.fuser = LlamaModel._from_config(config.fuser_config)
        if getattr(model, "_has_llm", False):
            model.projector = FusedVLMProjector(config)
        # Neither is a child of the other: the modules stand in the model once, under their published names, and what
        # wraps or replaces them there is what runs.
        object.__setattr__(model, "connector", self)
        object.__setattr__(self, "model", model)

    @torch.no_grad()
    def grow(self, num_visual_tokens: int, seed: int) -> None:
        """Add query rows where m needs more than there are; smaller m keep the rows they do not use.

        New rows are drawn as the decoder's embeddings are at the start, from (seed, number of rows) alone.
        """
        config, fuser = self.model.config, self.model.fuser
        count = config.first_query_token_id + num_visual_tokens - 1 - config.fuser_config.vocab_size
        # CODEPATH: variants without distinct queries give every query the eos row.
        if count <= 0 or not config.distinct_queries:
            return
        old = fuser.embed_tokens
        rows, width = old.weight.shape
        table = nn.Embedding(rows + count, width, old.padding_idx, device=old.weight.device, dtype=old.weight.dtype)
        generator = torch.Generator().manual_seed(seed + rows)
        new = torch.randn(count, width, generator=generator) * config.fuser_config.initializer_range
        table.weight.copy_(torch.cat([old.weight, new.to(old.weight)]))
        table.weight.requires_grad_(old.weight.requires_grad)
        fuser.embed_tokens = table
        config.fuser_config.vocab_size = fuser.config.vocab_size = fuser.vocab_size = rows + count

    # -- running -------------------------------------------------------------------------------------------------------

    def encode_views(self, tower: Any, pixel_values: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """(V, 3, S, S) to (V, T, C): normalized last layer, merged, a newline behind."""
        outputs = tower(pixel_values, return_dict=True, **kwargs)
        tokens = outputs.last_hidden_state
        # CODEPATH: CLIP towers return tokens before their final LayerNorm; SigLIP towers after it.
        if self.config.vision_config.model_type in TOWERS_TO_NORMALIZE:
            tokens = tower.post_layernorm(tokens)
        return self.model.merger(tokens[:, -(grid_side(self.config) ** 2) :]), outputs

    def unread_parameters(self, tower: nn.Module) -> set[str]:
        """The last layer is read, and its norm."""
        return set()

    def view_settings(self) -> dict[str, Any]:
        """Whether there are a merge and a newline."""
        return {"merge": [self.config.merge_views, self.config.newline_token]}

    def embed_segments(
        self, plan: FusionPlan, question_input_ids: torch.Tensor | None, device: torch.device | str
    ) -> list[torch.Tensor]:
        """Embedded [question; queries; eos] of each segment, list of (question tokens + m_g, C)."""
        config = self.config
        questions: Sequence[torch.Tensor | None] = [None] * len(plan.segments)
        # CODEPATH: variants trained with vision + question + queries, or with vision + queries only.
        if config.fuse_question:
            if question_input_ids is None:
                raise ValueError(
                    "This variant's fusion module reads the question (fuse_question=True), but question_input_ids is "
                    "missing. Build the batch with FusedVLMProcessor; a server that runs the vision part alone cannot "
                    "run this model."
                )
            questions = split_questions(plan, question_input_ids, device)
            refuse_query_rows(question_input_ids, config.first_query_token_id)
        ids = []
        for segment, question in zip(plan.segments, questions, strict=True):
            query_ids = query_token_ids(
                segment.num_visual_tokens,
                config.first_query_token_id,
                config.fuser_config.eos_token_id,
                config.distinct_queries,
            )
            queries = torch.tensor(query_ids, device=device)
            ids.append(queries if question is None else torch.cat([question, queries]))
        lengths = [len(segment_ids) for segment_ids in ids]
        return list(self.model.fuser.embed_tokens(torch.cat(ids)).split(lengths))

    def forward(
        self,
        view_tokens: torch.Tensor,
        plan: FusionPlan,
        question_input_ids: torch.Tensor | None = None,
        language_model: nn.Module | None = None,
    ) -> list[torch.Tensor]:
        """(m_g, C) states at the queries and eos of each segment; arguments as in the base."""
        # Not the embedding's device: its weight may be offloaded.
        text_tokens = self.embed_segments(plan, question_input_ids, view_tokens.device)
        return read_in_buckets(self._read, view_tokens.to(text_tokens[0]), text_tokens, plan)

    def _read(self, view_tokens: torch.Tensor, text_tokens: list[torch.Tensor], plan: FusionPlan) -> list[torch.Tensor]:
        keep_questions = self.config.fuse_question
        # CODEPATH: new variants read every turn on a row of its own, published ones behind the turns before it.
        if self.config.fusion_row_per_turn and has_later_turns(plan):
            return read_turns(self.model.fuser, view_tokens, text_tokens, plan, keep_questions)
        rows = build_fusion_rows(view_tokens, text_tokens, plan, keep_questions)
        states = self.model.fuser(
            inputs_embeds=rows.embeds, attention_mask=rows.attention_mask, use_cache=False
        ).last_hidden_state
        return [states[row, start:stop] for row, start, stop in rows.spans]

    def every_count(
        self,
        view_tokens: torch.Tensor,
        plan: FusionPlan,
        counts: list[int],
        question_input_ids: torch.Tensor | None = None,
        language_model: nn.Module | None = None,
    ) -> list[list[torch.Tensor]]:
        """Per segment, per count (m, C): views, question and queries are read once, with one eos per count behind."""
        text_tokens = self.embed_segments(with_count(plan, max(counts)), question_input_ids, view_tokens.device)

        def read(views: torch.Tensor, texts: list[torch.Tensor], part: FusionPlan) -> list[list[torch.Tensor]]:
            return read_every_count(self.model.fuser, views, texts, part, counts)

        return read_in_buckets(read, view_tokens.to(text_tokens[0]), text_tokens, plan)

    def project(self, states: torch.Tensor) -> torch.Tensor:
        """(tokens, C) to (tokens, H)."""
        return self.model.projector(states)

    # -- costs ---------------------------------------------------------------------------------------------------------

    def example(self, view_tokens: torch.Tensor, num_visual_tokens: int, question_length: int) -> torch.Tensor:
        """One image and one question through decoder and projection."""
        # CODEPATH: variants trained with vision + question + queries, or with vision + queries only.
        question = question_length if self.config.fuse_question else 0
        fuser = self.model.fuser
        ids = torch.zeros(question + num_visual_tokens, dtype=torch.long, device=view_tokens.device)
        row = torch.cat([view_tokens.flatten(0, 1), fuser.embed_tokens(ids)])[None]
        # On the meta device a mask of the right shape: transformers would look into position ids to build one.
        shape = (1, 1, row.shape[1], row.shape[1])
        mask = torch.ones(shape, dtype=torch.bool, device=row.device) if row.device.type == "meta" else None
        states = fuser(inputs_embeds=row, attention_mask=mask, use_cache=False).last_hidden_state
        return self.project(states[0, -num_visual_tokens:])

    def image_flops(
        self, num_views: int, question_lengths: Sequence[int], counts: Sequence[int], share: float
    ) -> float:
        """By formula: every view, question and query token once through the linear layers, whatever the rows."""
        config = self.config.fuser_config
        # CODEPATH: variants trained with vision + question + queries, or with vision + queries only.
        lengths = question_lengths if self.config.fuse_question else [0] * len(counts)
        views = num_views * self.tokens_per_view(self.config)
        turns = [length + count for length, count in zip(lengths, counts, strict=True)]
        # CODEPATH: new variants read every turn on a row of its own, published ones behind the turns before it.
        behind = turns if self.config.fusion_row_per_turn else [sum(turns)]
        squares = views**2 + sum((views + turn) ** 2 - views**2 for turn in behind)
        linear = sum(layer.weight.numel() for layer in self.model.fuser.modules() if isinstance(layer, nn.Linear))
        return 2.0 * linear * (views + sum(turns)) + share * 4 * config.num_hidden_layers * config.hidden_size * squares

    def projection_flops(self, num_tokens: int) -> float:
        """One linear layer."""
        return 2.0 * self.model.projector.weight.numel() * num_tokens

    def view_parts(self) -> list[nn.Module]:
        """Merge and newline."""
        return [self.model.merger]

    def fusion_parts(self) -> list[nn.Module]:
        """The decoder."""
        return [self.model.fuser]

    def projection_parts(self) -> list[nn.Module]:
        """The projection, where there is an LLM."""
        return [self.model.projector] if hasattr(self.model, "projector") else []

    def view_flops(self) -> float:
        """The merge's convolution."""
        conv = self.model.merger.conv
        return 0.0 if conv is None else 2.0 * self.config.view_grid_size**2 * conv.weight.numel()

    def view_width(self) -> int:
        """The tower's width."""
        return self.config.vision_config.hidden_size

    # -- conversations about one image, question by question -----------------------------------------------------------

    @torch.no_grad()
    def start_fusion(self, view_tokens: torch.Tensor, views_per_image: list[int]) -> list[Cache]:
        """Per image, a cache of its views; images of equally many views are read together."""
        fuser, views = self.model.fuser, view_tokens.split(views_per_image)
        caches: dict[int, Cache] = {}
        for count in sorted(set(views_per_image)):
            images = [image for image, size in enumerate(views_per_image) if size == count]
            together = read_views(fuser, torch.stack([views[image].flatten(0, 1) for image in images]))
            caches |= {image: select_images(together, [row], own=True) for row, image in enumerate(images)}
        return [caches[image] for image in range(len(views_per_image))]

    @torch.no_grad()
    def continue_fusion(
        self, states: list[Cache], plan: FusionPlan, question_input_ids: torch.Tensor | None, extend: bool
    ) -> list[torch.Tensor]:
        """Per image (m, C) of one more question; with `extend` each cache has the question and its queries behind."""
        first: Any = states[0].layers[0]
        text_tokens = self.embed_segments(plan, question_input_ids, first.keys.device)
        found = continue_caches(self.model.fuser, states, text_tokens, extend)
        return [row[-segment.num_visual_tokens :] for row, segment in zip(found, plan.segments, strict=True)]
