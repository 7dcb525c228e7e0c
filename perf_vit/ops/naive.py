"""N x N references of the linear attention operations.

Use float64 and small N: nothing is stabilised, so long queries and keys overflow in lower precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perf_vit.ops.balancing import Balancing
from perf_vit.ops.clusters import describe_clusters, mean_key, sample_tokens
from perf_vit.ops.kernels import Kernel, get_kernel
from perf_vit.ops.windows import split_dim, window_indices

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
    num_clusters: int,
    num_prefix_tokens: int = 1,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Reference of `clustered_attention`: exact weights in S(i), and each cluster as one key elsewhere.

    Args:
        q: Queries, [B, H, N, D].
        k: Keys, [B, H, N, D].
        v: Values, [B, H, N, Dv].
        grid: Rows and columns of tokens after the prefix tokens.
        window_size: Largest number of rows and columns of a window; 0 for no windows.
        sinks: Indices of the keys to which every query attends exactly, [B, H, s].
        num_clusters: Largest number of clusters.
        num_prefix_tokens: Number of tokens before the grid.
        key_mask: [B, N] bool, False for keys to ignore.

    Returns:
        Attended values, [B, H, N, Dv]; 0 for queries without a visible key.
    """
    scale, first = q.shape[-1] ** -0.5, num_prefix_tokens
    visible = _visible(q @ k.mT, key_mask, causal=False).expand(*q.shape[:2], q.shape[2], -1)
    grid_mask = None if key_mask is None else key_mask[:, first:]
    # One vector added to all keys changes no weight.
    k = k - mean_key(k[:, :, first:], grid_mask)
    grid_q, grid_k, grid_v = (x[:, :, first:] for x in (q, k, v))
    clusters = describe_clusters(sample_tokens(grid_q, grid_k, grid_v, grid_mask), num_clusters)
    exact = _exact_pairs(q @ k.mT, grid, window_size, sinks, first) & visible
    weights = (q @ k.mT * scale).exp() * exact
    # Sums over the keys of each cluster that a query doesn't attend to exactly, [B, H, n, M, C].
    nearest = clusters.nearest(torch.nn.functional.pad(grid_k, (0, 1), value=1.0))
    member = torch.nn.functional.one_hot(nearest, clusters.num_clusters).to(q.dtype)
    left = (visible & ~exact)[:, :, first:, first:].to(q.dtype)
    number = left @ member
    mean_k, mean_v = (
        split_dim(left @ torch.einsum("bhjc,bhjd->bhjcd", member, x).flatten(3), 3, -1, x.shape[-1])
        / number.clamp(min=1).unsqueeze(-1)
        for x in (grid_k, grid_v)
    )
    logits = torch.einsum("bhid,bhicd->bhic", grid_q, mean_k) * scale + clusters.spread.mT
    far = torch.where(number > 0, number * logits.masked_fill(number == 0, 0.0).exp(), 0.0)
    moved = torch.einsum("bhcg,bhgde,bhid->bhice", clusters.groups, clusters.covariance, grid_q) * scale
    summed = weights @ v
    of_clusters = torch.einsum("bhic,bhice->bhie", far, mean_v + moved)
    summed = torch.cat([summed[:, :, :first], summed[:, :, first:] + of_clusters], dim=2)
    total = weights.sum(dim=-1)
    total = torch.cat([total[..., :first], total[..., first:] + far.sum(dim=-1)], dim=2).unsqueeze(-1)
    return summed / total.masked_fill(total == 0, 1.0)


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
        window = window_indices(grid, window_size).to(weights.device)
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
