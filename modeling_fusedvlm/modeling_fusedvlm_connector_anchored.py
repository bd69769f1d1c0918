"""Anchored: pooled anchors keep the layout, queries conditioned on them add detail (PARCEL, arXiv 2605.30126)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, initialization as init

from .modeling_fusedvlm_connector import FusedVLMConnector, register_connector
from .modeling_fusedvlm_connector_parts import (
    FusedVLMConnectorBlock,
    check_heads,
    grid_side,
    sincos,
    sincos_grid,
    tokens_to_grid,
)
from .modeling_fusedvlm_connector_pool import pool_tokens


@register_connector("anchored")
class FusedVLMAnchoredConnector(FusedVLMConnector):
    """m tokens: the averages of the finest anchor grid with at most m cells, and the first m - cells queries of a bank.

    Queries first look at anchors and each other (one block), then at all patches (one block); anchors are emitted as
    they were pooled, in front, and one linear layer takes all to the LLM's width. With no queries the anchors are all
    there is. Each query depends on all others of its call, so fewer tokens are not a part of more.

    `fuse_question=True`, our step beyond the paper: the words of the question, as the LLM embeds them, stand beside the
    anchors in the first block, so that queries know what is asked.

    The paper leaves open the norms, residuals and feed-forward parts of the blocks and their positions: here blocks are
    pre-norm with residuals and an MLP, and patches and anchors have sine positions.
    """

    summary = "Averages of the patch grid keep the layout, queries that have seen them add detail (PARCEL)."
    reads_question = "optional"
    question_tokens = "llm"
    query: Any  # a parameter, or None where no m needs one
    question_proj: Any
    settings = {"anchor_grids": None, "num_queries": None, "num_heads": None, "mlp_ratio": 4}

    @classmethod
    def counts(cls, config: PreTrainedConfig) -> Sequence[int]:
        """From the coarsest grid up to what the bank of queries reaches."""
        settings = config.connector_config
        grids = settings["anchor_grids"]
        count = grids[0] ** 2
        while count < grid_side(config) ** 2 and count + 1 - _num_anchors(grids, count + 1) <= settings["num_queries"]:
            count += 1
        return range(grids[0] ** 2, count + 1)

    @classmethod
    def explain_counts(cls, config: PreTrainedConfig) -> str:
        """Anchors and queries."""
        settings = config.connector_config
        return f"has anchor grids {settings['anchor_grids']} and {settings['num_queries']} queries"

    @classmethod
    def complete_settings(cls, config: PreTrainedConfig, settings: dict[str, Any]) -> dict[str, Any]:
        """Published grids (4, 8, 16, ... below the side) where they divide it, else its proper divisors."""
        side, width = grid_side(config), config.vision_config.hidden_size
        divisors = [g for g in range(1, side) if side % g == 0]
        published = [g for g in divisors if g >= 4 and g & (g - 1) == 0]
        grids = settings["anchor_grids"] or published or divisors or [1]
        if list(grids) != sorted(set(grids)) or min(grids) < 1 or any(side % g for g in grids):
            raise ValueError(
                f"connector_config anchor_grids={list(grids)} must rise and divide the {side} x {side} grid; take some "
                f"of {[*divisors, side]}."
            )
        largest = max(config.trained_num_visual_tokens or [config.num_visual_tokens or min(256, side * side)])
        smallest = grids[0] ** 2
        needed = max((m - _num_anchors(grids, m) for m in range(smallest, largest + 1)), default=0)
        queries = needed if settings["num_queries"] is None else settings["num_queries"]
        heads = settings["num_heads"] or max(1, width // 64)
        if queries < 0 or settings["mlp_ratio"] < 1:
            raise ValueError(
                f"connector_config num_queries={queries}, mlp_ratio={settings['mlp_ratio']}: need 0 and 1 or more."
            )
        check_heads(cls.name, width, heads)
        return {**settings, "anchor_grids": list(grids), "num_queries": queries, "num_heads": heads}

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        width, settings = config.vision_config.hidden_size, config.connector_config
        self.grids = settings["anchor_grids"]
        self.projection = nn.Linear(width, config.text_config.hidden_size)
        self.query = self.question_proj = None
        if settings["num_queries"]:
            self.query = nn.Parameter(torch.zeros(settings["num_queries"], width))
            sizes = (width, settings["num_heads"], settings["mlp_ratio"])
            self.anchor_block = FusedVLMConnectorBlock(*sizes)
            self.view_block = FusedVLMConnectorBlock(*sizes)
            # CODEPATH: variants whose queries know the question, or the paper's, which do not.
            if config.fuse_question:
                self.question_proj = nn.Linear(config.text_config.hidden_size, width)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """N(0, 0.02^2) for the queries."""
        if self.query is not None:
            init.normal_(self.query, std=0.02)

    def read_questions(
        self, questions: list[torch.Tensor], language_model: nn.Module | None
    ) -> tuple[torch.Tensor, ...]:
        """The LLM's embeddings of the words (G, words, H), and (G, words) which of them are there."""
        if language_model is None:
            raise ValueError(f"The {self.name} connector embeds questions with the LLM, which stage 1 does not have.")
        ids = pad_sequence(questions, batch_first=True)
        lengths = torch.tensor([len(question) for question in questions], device=ids.device)
        with torch.no_grad():
            embed: Any = language_model.get_input_embeddings
            words = embed()(ids)
        return words, torch.arange(ids.shape[1], device=ids.device)[None] < lengths[:, None]

    def example_question(self, num_views: int, question_length: int) -> tuple[torch.Tensor, ...]:
        """Words of the right shape."""
        like, length = self.projection.weight, max(question_length, 1)
        words = like.new_zeros(num_views, length, like.shape[0])
        return words, torch.ones(num_views, length, dtype=torch.bool, device=like.device)

    def reduce(self, view_tokens: torch.Tensor, num_visual_tokens: int, *question: torch.Tensor) -> torch.Tensor:
        """(V, N, C) to (V, m, H); the question's words (V, words, H) and mask (V, words) where it is read."""
        num_anchors = _num_anchors(self.grids, num_visual_tokens)
        target = round(num_anchors**0.5)
        anchors = pool_tokens(view_tokens, target)
        if num_visual_tokens == num_anchors:
            return self.projection(anchors) + self._gradient_anchor()
        queries = self._detail(view_tokens, anchors, num_visual_tokens - num_anchors, question)
        return self.projection(torch.cat([anchors, queries], dim=1))

    def _detail(
        self, view_tokens: torch.Tensor, anchors: torch.Tensor, count: int, question: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """(V, count, C): queries that have looked at anchors, question and patches."""
        views, width = len(view_tokens), view_tokens.shape[-1]
        side, target = tokens_to_grid(view_tokens).shape[-1], tokens_to_grid(anchors).shape[-1]
        places = sincos_grid(side, width, view_tokens.device).to(view_tokens.dtype)[None]
        queries = self.query[:count].expand(views, -1, -1)
        seen = [anchors + pool_tokens(places, target), queries]
        mask = None
        if question:
            words, is_word = question
            order = sincos(torch.arange(words.shape[1], device=words.device), width).to(view_tokens.dtype)
            seen.append(self.question_proj(words.to(view_tokens.dtype)) + order)
            always = torch.ones(views, anchors.shape[1] + count, dtype=torch.bool, device=view_tokens.device)
            mask = torch.cat([always, is_word], dim=1)
        queries = self.anchor_block(queries, torch.cat(seen, dim=1), mask)
        return self.view_block(queries, view_tokens + places)

    def _gradient_anchor(self) -> torch.Tensor | float:
        """Zero that depends on every weight, for an m without queries in training: ranks must agree on gradients."""
        if not (self.training and torch.is_grad_enabled()):
            return 0.0
        return sum(parameter.sum() for parameter in self.parameters()) * 0.0


def _num_anchors(grids: list[int], count: int) -> int:
    """Cells of the finest grid that has at most `count`."""
    return max(grid * grid for grid in grids if grid * grid <= count)
