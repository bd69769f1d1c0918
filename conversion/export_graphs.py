"""Vision and fusion as `torch.export` graphs for other runtimes; the plan of views, questions and m stays outside.

Two graphs (docs/serving.md, "Other runtimes"):

    views    (V, 3, S, S) pixels to (V, T, C) view tokens, for any number of views
    fusion   (1, L, C) one fusion row to (1, L, H), projected states of every place, for any length

Between them stands plain indexing: `fusion_row` lays out views, question and queries, and the last m states of the row
are the visual tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from fusedvlm.modeling_fusedvlm.modeling_fusedvlm_rows import build_fusion_plan


@dataclass
class ExportedGraphs:
    """The graphs of a variant; `torch.export.save` writes each."""

    views: ExportedProgram
    fusion: ExportedProgram


class _Views(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_view_features(pixel_values)[0]


class _Fusion(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.fuser, self.connector = model.fuser, model.connector
        self.projector = model.projector

    def forward(self, row: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(row.shape[1], device=row.device)
        # Written out, so that no runtime has to know how transformers finds out that a mask is causal.
        mask = (positions[None] <= positions[:, None])[None, None]
        states = self.fuser(
            inputs_embeds=row, attention_mask=mask, position_ids=positions[None], use_cache=False
        ).last_hidden_state
        return self.projector(states)


@torch.no_grad()
def export_graphs(model: Any) -> ExportedGraphs:
    """Export vision tower with merge, and fusion decoder with projection.

    Args:
        model: `FusedVLMEncoder`, or a whole model, with the fused connector, in the dtype and on the device wanted.

    Raises:
        ValueError: for another connector.
    """
    core = model if hasattr(model, "fuse") else model.model
    config = core.config
    if config.connector != "fused":
        raise ValueError(f"Graphs are exported of the fused connector, not of {config.connector}.")
    device, dtype = next(core.parameters()).device, core.fuser.embed_tokens.weight.dtype
    size = config.vision_config.image_size
    pixels = torch.zeros(2, 3, size, size, device=device, dtype=dtype)
    views = torch.export.export(
        _Views(core).eval(),
        (pixels,),
        dynamic_shapes={"pixel_values": {0: Dim("views", min=1, max=4096)}},
        strict=False,
    )
    row = torch.zeros(1, config.tokens_per_view + 8, config.fuser_config.hidden_size, device=device, dtype=dtype)
    longest = config.fuser_config.max_position_embeddings
    fusion = torch.export.export(
        _Fusion(core).eval(), (row,), dynamic_shapes={"row": {1: Dim("length", min=2, max=longest)}}, strict=False
    )
    return ExportedGraphs(views, fusion)


@torch.no_grad()
def fusion_row(
    model: Any, view_tokens: torch.Tensor, question_input_ids: Sequence[int], num_visual_tokens: int
) -> torch.Tensor:
    """(1, L, C): the views of one image, a question and m queries, as the fusion graph reads them.

    Args:
        model: the model of the graphs; of it the decoder's embedding rows alone are used.
        view_tokens: (V, T, C) of one image.
        question_input_ids: tokens of the query tokenizer; none for variants that read no question.
        num_visual_tokens: m; the graph's last m states are the visual tokens.
    """
    core = model if hasattr(model, "fuse") else model.model
    ids = torch.tensor(list(question_input_ids), dtype=torch.long, device=view_tokens.device)
    plan = build_fusion_plan(1, num_visual_tokens, question_lengths=[len(ids)])
    (text,) = core.connector.embed_segments(plan, ids, view_tokens.device)
    return torch.cat([view_tokens.flatten(0, 1), text])[None]
