"""N x N references of the linear attention operations.

Use float64 and small N: nothing is stabilised, so long queries and keys overflow in lower precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perf_vit.ops.balancing import Balancing
from perf_vit.ops.kernels import Kernel, get_kernel
from perf_vit.ops.window_attention import window_indices

__all__ = ["kernel_matrix", "naive_clustered_attention", "naive_favor_attention", "softmax_attention"]


def naive_favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    kernel: str | Kernel = "softmax+",
    key_mask: Tensor | None = None,
    causal: bool = False,
    balancing: Balancing | None = None,
) -> Tensor:
    """Reference of `favor_attention`: row-normalised phi(q) phi(k)^T, times v.

    Choromanski et al. 2020, equation 4, with the matrix A' of section 2.2 computed explicitly.

    Args:
        q: Queries, [B, H, N_q, D].
        k: Keys, [B, H, N_k, D].
        v: Values, [B, H, N_k, Dv].
        projection: Rows of the feature map, [R, D].
        kernel: Feature map or its name; "oprf" needs a fixed parameter.
        key_mask: [B, N_k] bool, False for keys to ignore.
        causal: Whether query i attends to keys 0 .. i only.
        balancing: Centres and scale of queries and keys.

    Returns:
        Attended values, [B, H, N_q, Dv], in the dtype of `q`; 0 for queries without a visible key.

    Raises:
        ValueError: The kernel is unknown.
    """
    bias = torch.zeros_like(k[..., :1])
    if balancing is not None:
        query_center, key_center, scale = balancing.tensors()
        bias = ((k - key_center) * query_center).sum(dim=-1, keepdim=True) * q.shape[-1] ** -0.5
        q, k = (q - query_center) * scale, (k - key_center) / scale
    weights = kernel_matrix(q, k, projection, kernel) * bias.exp().mT
    weights = weights * _visible(weights, key_mask, causal)
    total = weights.sum(dim=-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0) @ v


def naive_clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    window_size: int,
    sinks: Tensor,
    clusters: Tensor,
    num_prefix_tokens: int = 1,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Reference of `clustered_attention`: exact weights in S(i) and one weight per cluster elsewhere.

    Args:
        q: Queries, [B, H, N, D].
        k: Keys, [B, H, N, D].
        v: Values, [B, H, N, Dv].
        grid: Rows and columns of tokens after the prefix tokens.
        window_size: Largest number of rows and columns of a window; 0 for no windows.
        sinks: Indices of the keys to which every query attends exactly, [B, H, s].
        clusters: Cluster index of each key of the grid, [B, H, rows x columns].
        num_prefix_tokens: Number of tokens before the grid.
        key_mask: [B, N] bool, False for keys to ignore.

    Returns:
        Attended values, [B, H, N, Dv]; 0 for queries without a visible key.
    """
    head_dim, first = q.shape[-1], num_prefix_tokens
    seen = torch.ones_like(q[:, :, first:, :1]) if key_mask is None else key_mask[:, None, first:, None].to(q.dtype)
    visible = _visible(q @ k.mT, key_mask, causal=False)
    takes_part = visible.expand(*q.shape[:2], -1, -1)[:, :, 0]
    takes_part = takes_part.scatter(2, sinks, False)[:, :, first:].to(q.dtype).unsqueeze(-1)
    same = (clusters.unsqueeze(-1) == clusters.unsqueeze(-2)).to(q.dtype) * takes_part.mT
    number = same.sum(dim=-1, keepdim=True).clamp(min=1.0)
    grid_k, grid_q = k[:, :, first:], q[:, :, first:] * seen
    # Mean and variances of each key's cluster.
    mean = same @ grid_k / number
    variance = (same @ grid_k.square() / number - mean.square()).clamp(min=0.0)
    mean_square = grid_q.square().sum(dim=2, keepdim=True) / seen.sum(dim=2, keepdim=True).clamp(min=1.0)
    logits = q @ k.mT * head_dim**-0.5
    far = q[:, :, first:] @ mean.mT * head_dim**-0.5 + (variance @ mean_square.mT / (2 * head_dim)).mT
    is_exact = _exact_pairs(logits, grid, window_size, sinks, first)
    weights = logits.exp()
    near = is_exact[:, :, first:, first:]
    patches = torch.where(near, weights[:, :, first:, first:], far.exp())
    patches = torch.cat([weights[:, :, first:, :first], patches], dim=3)
    weights = torch.cat([weights[:, :, :first], patches], dim=2) * visible
    total = weights.sum(dim=-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0) @ v


def kernel_matrix(q: Tensor, k: Tensor, projection: Tensor, kernel: str | Kernel = "softmax+") -> Tensor:
    """Return A' = phi(q) phi(k)^T, [..., N_q, N_k], for q, [..., N_q, D], and k, [..., N_k, D].

    For a softmax kernel and rows with "chi" norms it is an unbiased estimate of exp(q k^T / sqrt(D)).

    Raises:
        ValueError: The kernel is unknown.
    """
    return _features(q, projection, get_kernel(kernel)) @ _features(k, projection, get_kernel(kernel)).mT


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Exact attention, softmax(q k^T / sqrt(D) + bias) v (Vaswani et al. 2017, equation 1).

    Args:
        q: Queries, [B, H, N_q, D].
        k: Keys, [B, H, N_k, D].
        v: Values, [B, H, N_k, Dv].
        bias: Additive bias of the logits, [B, H, N_q, N_k] or broadcastable.

    Returns:
        Attended values, [B, H, N_q, Dv].
    """
    logits = q @ k.mT * q.shape[-1] ** -0.5
    return (logits if bias is None else logits + bias).softmax(dim=-1) @ v


def _exact_pairs(
    weights: Tensor, grid: tuple[int, int], window_size: int, sinks: Tensor, num_prefix_tokens: int
) -> Tensor:
    """Return the pairs of queries and keys with exact weights, bool [B, H, N, N]."""
    is_exact = torch.zeros_like(weights, dtype=torch.bool)
    is_exact[:, :, :num_prefix_tokens] = True
    is_exact[..., :num_prefix_tokens] = True
    if window_size:
        window = window_indices(grid, (window_size, window_size)).to(weights.device)
        is_exact[:, :, num_prefix_tokens:, num_prefix_tokens:] |= window.unsqueeze(1) == window
    is_sink = torch.zeros_like(is_exact[:, :, 0]).scatter_(2, sinks, True)
    return is_exact | is_sink.unsqueeze(2)


def _visible(weights: Tensor, key_mask: Tensor | None, causal: bool) -> Tensor:
    visible = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device)
    visible = visible.tril() if causal else visible
    return visible if key_mask is None else visible & key_mask[:, None, None, :]


def _features(x: Tensor, projection: Tensor, kernel: Kernel) -> Tensor:
    x, projection = x * x.shape[-1] ** -0.25, projection.to(x.dtype)
    features = kernel.features(x, projection)
    features = features.exp() if kernel.log_domain else features
    return features if kernel.log_amplitude is None else features * kernel.log_amplitude(x, projection.shape[0]).exp()
