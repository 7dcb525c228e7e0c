"""N x N references of the mixers that Performers are compared with. Use float64 and small N."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from perf_vit.ops.lsh import hash_buckets
from perf_vit.ops.windows import window_indices

__all__ = ["naive_convolve_grid", "naive_linformer", "naive_lsh_attention", "naive_window_attention"]


def naive_linformer(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention to projected keys and values (Wang et al. 2020, equation 7).

    Args:
        q: Queries, [B, H, N, D].
        k: Keys, [B, H, N, D].
        v: Values, [B, H, N, D].
        keys: Projection of the keys, [K, N].
        values: Projection of the values, [K, N].
    """
    return (q @ (keys @ k).mT * q.shape[-1] ** -0.5).softmax(dim=-1) @ (values @ v)


def naive_lsh_attention(
    q: Tensor,
    v: Tensor,
    rotations: Tensor,
    chunk_size: int,
    num_buckets: int,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Softmax attention over the pairs that any round of hashing makes visible, see `lsh_attention`."""
    N = q.shape[2]
    buckets = hash_buckets(q, rotations, num_buckets, key_mask)
    # Place of a token in its round: tokens of lower buckets, and earlier ones of its own.
    place = torch.arange(N)
    same = buckets[..., :, None] == buckets[..., None, :]
    rank = (buckets[..., None, :] < buckets[..., :, None]).sum(-1) + (same & (place[None, :] < place[:, None])).sum(-1)
    if is_causal:
        # Tokens of the same bucket after a key, up to the query.
        since = rank[..., :, None] - rank[..., None, :]
        near = (place[:, None] >= place) & (since <= chunk_size)
    else:
        chunk = rank // chunk_size
        near = (chunk[..., :, None] - chunk[..., None, :]).abs() <= 1
    visible = (same & near).any(dim=2)
    logits = q @ F.normalize(q, dim=-1).mT * q.shape[-1] ** -0.5
    logits = logits.masked_fill(torch.eye(N, dtype=torch.bool), -1e5).masked_fill(~visible, -torch.inf)
    return logits.softmax(dim=-1) @ v


def naive_convolve_grid(u: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Sum over all pairs of tokens of a grid, see `convolve_grid`."""
    return torch.einsum("bcij,cyi,cxj->bcyx", u, _lags(columns), _lags(rows))


def _lags(kernel: Tensor) -> Tensor:
    """Return the matrix of a convolution in both directions, [2, C, L] -> [C, L (to), L (from)]."""
    length = kernel.shape[-1]
    lag = torch.arange(length)[:, None] - torch.arange(length)
    ahead, back = (kernel[side][:, index.clamp(min=0)] for side, index in ((0, lag), (1, -lag - 1)))
    return torch.where(lag >= 0, ahead, back)


def naive_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    window_size: int,
    num_prefix_tokens: int,
    *,
    to_prefix: bool,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Softmax attention with the mask of `window_attention`."""
    window = window_indices(grid, window_size)
    window = torch.cat([torch.full((num_prefix_tokens,), -1), window])
    visible = (window[:, None] == window) | (window[:, None] == -1)
    if to_prefix:
        visible = visible | (window == -1)
    logits = q @ k.mT * q.shape[-1] ** -0.5
    seen = visible if key_mask is None else visible & key_mask[:, None, None]
    weights = logits.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return weights.nan_to_num() @ v
