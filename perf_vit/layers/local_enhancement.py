"""What linear attention blurs, a small convolution brings back: neighbours in the grid, told apart by place."""

from __future__ import annotations

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.layers.token_grid import TokenGrid, key_mask_of

__all__ = ["LocalEnhancement"]


# Tracers take it as one node: the grid isn't a thing that a graph could carry.
@register_notrace_module
class LocalEnhancement(nn.Conv2d):
    """Depth-wise 3 x 3 convolution of the values on the grid, to be added to what attention puts out.

    It is the locally-enhanced positional encoding (LePE) of Dong et al. 2022, "CSWin Transformer", eq. 7. The matrix of
    linear attention has rank M at most; the convolution's has full rank (Han et al. 2023, "FLatten Transformer"). All
    its parameters are 0 at first, so a model that gets it computes what it did. The cost is linear.

    Args:
        dim: channels of all heads.
        grid: where the rows and columns of the tokens are told.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        grid: TokenGrid,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
        self.grid = grid

    def reset_parameters(self) -> None:
        """Set all parameters to 0."""
        nn.init.zeros_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(
        self,
        v: Tensor,
        num_prefix_tokens: int = 0,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Convolve.

        Args:
            v: values, [B, H, N, D]: first those of the prefix tokens, then the grid's, row by row.
            num_prefix_tokens: class and register tokens, which have no place in the grid and get 0.
            attn_mask: which keys take part, bool, [B, N] or [B, 1, 1, N]; the values of others count as 0.
            is_causal: refused, as neighbours come from the future too.

        Returns:
            [B, H, N, D].

        Raises:
            ValueError: another mask, causal order, or a grid that nobody told.
        """
        if is_causal:
            raise ValueError("is_causal=True needs local_enhancement=False: the convolution looks into the future")
        key_mask = key_mask_of(attn_mask, v)
        if key_mask is not None:
            v = v.masked_fill(~key_mask[:, None, :, None], 0.0)
        B, H, N, D = v.shape
        rows, columns = self.grid.of(N - num_prefix_tokens)
        on_grid = v[:, :, num_prefix_tokens:].mT.reshape(B, H * D, rows, columns)
        convolved = super().forward(on_grid).reshape(B, H, D, -1).mT
        return F.pad(convolved, (0, 0, num_prefix_tokens, 0))
