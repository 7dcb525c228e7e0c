"""Clustered attention: exact within windows, to first order in the keys of clusters elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perf_vit.ops.clustered_call import ClusteredCall, exact_attention, tokens_at_once
from perf_vit.ops.clusters import describe_clusters, mean_key, sample_tokens
from perf_vit.ops.features import without_autocast
from perf_vit.ops.fused.dispatch import backend_of, fused_attention
from perf_vit.ops.sinks import shared_keys
from perf_vit.ops.state import check_attention_keys
from perf_vit.ops.stripes import Stripe
from perf_vit.ops.windows import check_grid
from perf_vit.ops.workers import each_in_threads, num_workers

__all__ = ["clustered_attention", "clustered_stripe", "prepare"]


def clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    window_size: int = 16,
    num_sinks: int = 0,
    num_clusters: int = 160,
    num_prefix_tokens: int = 1,
    key_mask: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Softmax attention in which clusters replace the keys outside a query's window.

    out_i = sum_{j in S(i)} p_ij v_j + sum_c p_ic (v_c + A_g(c) q_i),   p_ij ~ exp(q_i.k_j / sqrt(D)),
    p_ic ~ n_c exp(q_i.k_c / sqrt(D) + s_c)

    - S(i) holds the tokens of the 2-D window of i, the prefix tokens and the sinks of the head.
    - n_c, k_c and v_c are the number, the mean key and the mean value of the keys of cluster c that are not in S(i).
    - s_c is half the variance of a logit within cluster c for the mean square of each channel of the queries, so that
      the weight is the mean of exp(q.k / sqrt(D)) over the cluster to second order.
    - A_g is the covariance of values and keys within the clusters of group g, divided by sqrt(D): the first-order
      change of the mean value when a query weights the keys of a cluster unequally. It is the dipole term of multipole
      attention (MuSe, arXiv 2509.10406), here with one matrix for each of 4 groups of clusters.
    - s_c, A_g and the centres come from a sample of the tokens (`describe_clusters`).

    Prefix tokens attend exactly. The weight by cluster size follows merged tokens (Bolya et al. 2022, "Token Merging",
    equation 1), near and far attention focal attention (Yang et al. 2021). The operation is deterministic. The
    assignment of keys to clusters has no gradient. Time and memory are linear in the number of tokens, forward and
    backward. `perf_vit.ops.naive.naive_clustered_attention` is the N x N reference.

    Args:
        q: Queries, [B, H, N, D]: prefix tokens first, then the grid in row-major order.
        k: Keys, [B, H, N, D].
        v: Values, [B, H, N, Dv].
        grid: Rows and columns of tokens; N = num_prefix_tokens + rows x columns.
        window_size: Largest number of rows and columns of a window; the grid is split into the fewest windows of equal
            size. 0 for no windows.
        num_sinks: Number of keys per sample and head to which every query attends exactly: those with the largest
            weights in exact attention. 0 for none.
        num_clusters: Largest number of clusters per sample and head.
        num_prefix_tokens: Number of class and register tokens, which come first.
        key_mask: [B, N] bool, False for keys to ignore.
        chunk_size: Largest number of tokens per sample and head that are processed at once, at least a row of windows;
            changes the result by rounding only. None for as many as fit in a processor's cache, on other devices in
            about 6 GiB.

    Returns:
        Attended values, [B, H, N, Dv], in the dtype of `q`; 0 for queries without a visible key.

    Raises:
        ValueError: The shapes are inconsistent, or `num_clusters` or `chunk_size` is below 1.
    """
    check_attention_keys(k, v, key_mask)
    check_grid(q, k, grid, window_size, num_sinks, num_prefix_tokens)
    if num_clusters < 1:
        raise ValueError(f"num_clusters must be 1 or more, got {num_clusters}; 160 suits images of 700 px and up")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}; None suits most machines")
    options = (window_size, num_sinks, num_clusters, num_prefix_tokens, key_mask)
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting() and not needs_gradient:
        # One node of the graph: the sizes of its windows would make a graph of every image size.
        return _compiled(q, k, v, list(grid), *options, chunk_size)
    number = num_workers(q)
    if number == 1 or q.shape[1] % number or backend_of("clustered", q, k, v) != "torch":
        return _clustered_attention(q, k, v, grid, *options, chunk_size)
    # No head depends on another.
    heads = list(zip(*(x.chunk(number, dim=1) for x in (q, k, v)), strict=True))
    tokens = tokens_at_once(q) if chunk_size is None else chunk_size

    def attend(part: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        q, k, v = part
        return _clustered_attention(q, k, v, grid, *options, tokens).transpose(1, 2)

    return torch.cat(each_in_threads(attend, heads, number), dim=2).transpose(1, 2)


def _clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    window_size: int,
    num_sinks: int,
    num_clusters: int,
    num_prefix_tokens: int,
    key_mask: Tensor | None,
    chunk_size: int | None,
) -> Tensor:
    # Under torch.jit.trace sizes are tensors; a trace is valid for one image size.
    rows, columns = grid if torch.compiler.is_compiling() else (int(grid[0]), int(grid[1]))
    grid, dtype = (rows, columns), q.dtype
    # Under autocast, layers with normalised queries and keys give these in float32.
    q, k = q.to(v.dtype), k.to(v.dtype)
    with without_autocast(q):
        options = (window_size, num_sinks, num_clusters, num_prefix_tokens, key_mask)
        found = fused_attention("clustered", q, k, v, grid, *options)
        if found is not None:
            return found.to(dtype)
        call, prefix, q, k, v, valid = prepare(q, k, v, grid, *options, chunk_size)
        return call.run(prefix, q, k, v, valid, grid).to(dtype)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    window_size: int,
    num_sinks: int,
    num_clusters: int,
    num_prefix_tokens: int,
    key_mask: Tensor | None,
    chunk_size: int | None = None,
) -> tuple[ClusteredCall, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Attend with the prefix tokens and find the clusters; arguments as in `clustered_attention`.

    Returns:
        The call, the results of the prefix tokens, [B, H, P, Dv], and queries, keys, values and validity of the grid.
    """
    first = num_prefix_tokens
    if key_mask is not None:
        # Masked keys may hold any value, including NaN.
        masked = ~key_mask[:, None, :, None]
        k, v = (x.masked_fill(masked, 0.0) for x in (k, v))
    prefix = exact_attention(q[:, :, :first], k, v, key_mask)
    grid_mask = None if key_mask is None else key_mask[:, first:]
    if k.dtype in (torch.float32, torch.float64):
        k = k - mean_key(k[:, :, first:], grid_mask)
        sample = sample_tokens(q[:, :, first:], k[:, :, first:], v[:, :, first:], grid_mask)
        clusters = describe_clusters(sample, num_clusters)
    else:
        # One vector subtracted from all keys changes no weight, but would round 16-bit keys.
        sample = sample_tokens(q[:, :, first:], k[:, :, first:], v[:, :, first:], grid_mask)
        mean = sample.mean_k().detach()
        clusters = describe_clusters(sample.minus(mean), num_clusters).moved(mean)
    shared, valid = shared_keys(q, k, v, num_sinks, first, key_mask)
    q, k, v = (x[:, :, first:] for x in (q, k, v))
    return ClusteredCall.of(clusters, grid, window_size, shared, chunk_size), prefix, q, k, v, valid


def clustered_stripe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stripe: Stripe,
    window_size: int,
    num_clusters: int,
    num_prefix_tokens: int,
    key_mask: Tensor | None,
    chunk_size: int | None = None,
) -> Tensor:
    """Clustered attention without sinks over an image of which this process holds a stripe.

    All processes must call it, also in the backward pass. Stripes begin at the border of a window.

    Args:
        q: Queries, [B, H, N, D]: prefix tokens, then the tokens of the stripe.
        k: Keys, [B, H, N, D].
        v: Values, [B, H, N, Dv].
        stripe: Where the tokens are in the image.
        window_size: See `clustered_attention`.
        num_clusters: See `clustered_attention`.
        num_prefix_tokens: Number of class and register tokens, which come first.
        key_mask: [B, N] bool, False for keys to ignore; in all processes or in none.
        chunk_size: See `clustered_attention`.

    Returns:
        Attended values, [B, H, N, Dv], in the dtype of `q`.
    """
    first, own, dtype = num_prefix_tokens, stripe.first_key(num_prefix_tokens), q.dtype
    grid = ((q.shape[2] - first) // stripe.grid[1], stripe.grid[1])
    q, k = q.to(v.dtype), k.to(v.dtype)
    with without_autocast(q):
        if key_mask is not None:
            masked = ~key_mask[:, None, :, None]
            k, v = (x.masked_fill(masked, 0.0) for x in (k, v))
        counting = None if key_mask is None else key_mask[:, own:]
        prefix = stripe.exact(q[:, :, :first], k[:, :, own:], v[:, :, own:], counting)
        valid = None if key_mask is None else key_mask[:, first:]
        sample = stripe.sample(q[:, :, first:], k[:, :, first:], v[:, :, first:], valid)
        mean = sample.mean_k().detach()
        clusters = describe_clusters(sample.minus(mean), num_clusters)
        if k.dtype == mean.dtype:
            k = k - mean
        else:
            clusters = clusters.moved(mean)
        shared, on_grid = shared_keys(q, k, v, 0, first, key_mask)
        q, k, v = (x[:, :, first:] for x in (q, k, v))
        call = ClusteredCall.of(clusters, stripe.grid, window_size, shared, chunk_size, stripe.reduce)
        return call.run(prefix, q, k, v, on_grid, grid).to(dtype)


_compiled = torch.library.custom_op("perf_vit::clustered_attention", _clustered_attention, mutates_args=())


@_compiled.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
