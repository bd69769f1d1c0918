"""From the patch tokens of a view to its view tokens: merge of the patch grid and the newline vector.

Shape legend
    V   views of all images of the batch          P   patch tokens of one view (grid x grid)
    T   tokens of one view after merge + newline  C   width of vision tower and fusion decoder
"""

import torch
from torch import nn
from transformers import initialization as init


class FusedVLMViewMerger(nn.Module):
    """Merge 2x2 neighborhoods of the patch grid and end each view with a learned newline vector.

    merged = conv3x3, stride 2, padding 1, no bias (grid) + nearest-neighbor half-size grid
    (fusedvlm's docs/reference.md, "Local merge and newline"). On an odd grid the residual takes the even rows
    and columns, which are the centers of the convolution windows.
    """

    def __init__(self, hidden_size: int, merge_views: bool, newline_token: bool, initializer_range: float) -> None:
        super().__init__()
        self.initializer_range = initializer_range
        self.conv = (
            nn.Conv2d(hidden_size, hidden_size, kernel_size=3, stride=2, padding=1, bias=False) if merge_views else None
        )
        self.newline = nn.Parameter(torch.zeros(1, 1, hidden_size)) if newline_token else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The published start, N(0, 0.02^2) for both."""
        for parameter in self.parameters():
            init.normal_(parameter, std=self.initializer_range)

    def forward(self, patch_tokens: torch.Tensor) -> torch.Tensor:
        """(V, P, C) patch tokens -> (V, T, C) view tokens. Raises `ValueError` when P is not a square number."""
        num_views, num_patches, hidden_size = patch_tokens.shape
        tokens = patch_tokens
        if self.conv is not None:
            side = round(num_patches**0.5)
            if side * side != num_patches:
                raise ValueError(f"The vision tower returned {num_patches} patch tokens, which is not a square grid.")
            grid = patch_tokens.transpose(1, 2).reshape(num_views, hidden_size, side, side)
            merged = self.conv(grid) + grid[:, :, ::2, ::2]
            tokens = merged.flatten(2).transpose(1, 2)
        if self.newline is not None:
            tokens = torch.cat([tokens, self.newline.to(tokens.dtype).expand(num_views, -1, -1)], dim=1)
        return tokens
