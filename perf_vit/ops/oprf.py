"""The parameter of optimal positive random features, from the queries and keys they are for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from perf_vit.ops.features import FeatureMap

__all__ = ["optimal_parameter"]


@torch.no_grad()
def optimal_parameter(
    feature_map: FeatureMap, q: Tensor, k: Tensor, key_mask: Tensor | None = None, chunk_size: int = 2048
) -> Tensor:
    """The A that minimises the logarithm of the estimator's second moment at the mean |x + y|^2 over all pairs.

    With phi = E |x + y|^2, x = D^(-1/4) q and y = D^(-1/4) k (centred and balanced where the map says so), that is
    A = (1 - u) / 8 with u = ((D + 2 phi) + sqrt((D + 2 phi)^2 + 8 D phi)) / (2 D): Likhosherstov et al. 2022, "Chefs'
    Random Tables", whose rho is 1 / u. The mean over pairs needs the means of x, y, |x|^2 and |y|^2 alone.

    Args:
        feature_map: scales the inputs; its kernel doesn't matter.
        q: queries, [B, H, N_q, D].
        k: keys, [B, H, N_k, D].
        key_mask: [B, N_k] bool, False for keys that don't count, and for queries if there are as many.
        chunk_size: tokens whose copies are in memory at once.

    Returns:
        A <= 0 of each sample and head, [B, H, 1, 1].
    """
    # Of as many queries as keys, the mask is that of the tokens.
    query_mask = key_mask if q.shape[2] == k.shape[2] else None
    mean_x, square_x = _means(feature_map.query_inputs, q, query_mask, chunk_size)
    mean_y, square_y = _means(feature_map.key_inputs, k, key_mask, chunk_size)
    mean_square = square_x + square_y + 2 * (mean_x * mean_y).sum(dim=-1, keepdim=True)
    head_dim = q.shape[-1]
    b = head_dim + 2 * mean_square
    u = (b + (b.square() + 8 * head_dim * mean_square).sqrt()) / (2 * head_dim)
    return (1 - u) / 8


def _means(
    inputs: Callable[[Tensor], Tensor], tokens: Tensor, mask: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Means of x, [B, H, 1, D], and of |x|^2, [B, H, 1, 1]."""
    sums, squares = [], []
    for start in range(0, tokens.shape[2], chunk_size):
        x = inputs(tokens[:, :, start : start + chunk_size])
        if mask is not None:
            x = x.masked_fill(~mask[:, None, start : start + chunk_size, None], 0.0)
        sums.append(x.sum(dim=2, keepdim=True))
        squares.append(x.square().sum(dim=(2, 3), keepdim=True))
    count = tokens.shape[2] if mask is None else mask.sum(dim=1).clamp(min=1).reshape(-1, 1, 1, 1)
    return torch.stack(sums).sum(dim=0) / count, torch.stack(squares).sum(dim=0) / count
