"""Clustered attention as one call of FlexAttention, for training and export on GPUs.

Each window of the grid has a room of queries and a room of keys, and attends within them:

    queries   [T tokens, padding]
    keys      [T tokens, S prefix tokens and sinks, M clusters without the T tokens, padding]

`score_mod` adds terms to the logits: log weights of clusters, and masks. Keys and values are columns of one buffer:

    columns   [key, 1 for a key that counts, membership in the G groups of clusters, probe, padding, value]

All but the key are columns of values, so that one call gives the weights of the groups, too. The probe is 0.

It keeps the backward pass deterministic. FlexAttention would add up the gradient of a term of `score_mod` by atomic
additions, one for each pair of a query and a key. That gradient is sum_i p_ic (do_i . v_c - do_i . o_i): the first part
is dv_c . v_c, and the second one is the gradient of a column of zeros whose result has the gradient do_i . o_i.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from perf_vit.ops.clustered import prepare
from perf_vit.ops.clustered_call import lowest_logit
from perf_vit.ops.clusters import NUM_GROUPS, nearest_cluster, sum_by_label
from perf_vit.ops.fused.flex_layout import FlexLayout, FlexSizes
from perf_vit.ops.windows import split_dim

__all__ = ["flex_clustered"]

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, BlockMask, float], Tensor]


def flex_clustered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    window_size: int,
    num_sinks: int,
    num_clusters: int,
    num_prefix_tokens: int,
    key_mask: Tensor | None,
    attend: Attend | None = None,
) -> Tensor:
    """Compute `perf_vit.ops.clustered_attention` by one call of FlexAttention.

    Args:
        q: Queries, [B, H, N, D].
        k: Keys, [B, H, N, D].
        v: Values, [B, H, N, Dv].
        grid: Rows and columns of tokens.
        window_size: See `clustered_attention`.
        num_sinks: See `clustered_attention`.
        num_clusters: See `clustered_attention`.
        num_prefix_tokens: Number of class and register tokens, which come first.
        key_mask: [B, N] bool, False for keys to ignore.
        attend: Function of queries, keys, values, terms of the logits, [B, H, L], pairs of blocks, and the scale of
            products; None for FlexAttention.

    Returns:
        Attended values, [B, H, N, Dv]; 0 for queries without a visible key.
    """
    call, prefix, q, k, v, valid = prepare(
        q, k, v, grid, window_size, num_sinks, num_clusters, num_prefix_tokens, key_mask
    )
    sizes, clusters = FlexSizes.of(call, grid), call.clusters
    layout = FlexLayout.of(sizes, q.device)
    of_clusters = (clusters.spread, clusters.groups, clusters.columns)
    queries, keys, values, terms = _Arrange.apply(
        q, k, v, *call.shared[:2], *of_clusters, valid, call.shared[2], layout
    )
    out = (attend or _flex)(queries, keys, values, terms, layout.block_mask, call.sizes[0] ** -0.5)
    values, mass = (x.unsqueeze(2) for x in _Read.apply(out, layout.query_slots, clusters.groups.shape[-1]))
    attended = call.corrected(q.unsqueeze(2), values, mass).squeeze(2)
    return torch.cat([prefix.transpose(1, 2), attended.transpose(1, 2)], dim=1).transpose(1, 2)


# Columns of values: how many come before the value, and which of them is the probe.
_BEFORE, _PROBE = 8, 1 + NUM_GROUPS


class _Arrange(torch.autograd.Function):
    """Write queries, keys and values into the rooms of their windows, and the clusters outside each window.

    Its own backward pass neither adds to a tensor that other values share nor stores the products of the sums.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shared_k: Tensor,
        shared_v: Tensor,
        spread: Tensor,
        groups: Tensor,
        centers: Tensor,
        valid: Tensor | None,
        shared_valid: Tensor | None,
        layout: FlexLayout,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return queries, [B, H, W x t, D], keys, [B, H, W x n, D], values, and terms of the logits, [B, H, W x n]."""
        sizes, (B, H, _, head_dim) = layout.sizes, q.shape
        buffer = torch.mul(layout.counted.expand(B, H, -1, -1, 1), _unit(head_dim, head_dim + _BEFORE + v.shape[-1], k))
        buffer[..., sizes.shared, :head_dim] = shared_k.unsqueeze(2)
        buffer[..., sizes.shared, head_dim + _BEFORE :] = shared_v.unsqueeze(2)
        rows = _write_near(buffer, k, v, valid, layout).to(spread.dtype).contiguous()
        labels = nearest_cluster(rows[..., : head_dim + 1].flatten(2, 3), centers).view(rows.shape[:-1])
        if sizes.is_padded or valid is not None:
            labels = labels.masked_fill(rows[..., head_dim] == 0, sizes.num_clusters)
        number, weights = _write_far(buffer, rows, labels, (spread, groups), head_dim, sizes)
        terms = _terms(weights.squeeze(-1), valid, shared_valid, layout)
        keys, values = (x.flatten(2, 3) for x in (buffer[..., :head_dim], buffer[..., head_dim:]))
        ctx.save_for_backward(values, number, labels)
        ctx.layout = layout
        ctx.mark_non_differentiable(terms)
        return q.index_select(2, layout.query_tokens), keys, values, terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_queries: Tensor, d_keys: Tensor, d_values: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of queries, keys, values, shared keys and values, and of spread."""
        (values, number, labels), layout = ctx.saved_tensors, ctx.layout
        sizes, head_dim, dtype = layout.sizes, d_keys.shape[-1], d_keys.dtype
        values, d_keys, d_values = (split_dim(x, 2, sizes.num_windows, -1) for x in (values, d_keys, d_values))
        d_far = d_values[..., sizes.far, :].to(number.dtype)
        d_weights = (d_far * values[..., sizes.far, :]).sum(dim=-1, keepdim=True) - d_far[..., _PROBE, None]
        d_spread = d_weights.where(number > 0, 0.0).sum(dim=2)
        d_left = torch.cat([d_keys[..., sizes.far, :], d_far[..., _BEFORE:]], dim=-1) / number.clamp(min=1.0)
        d_own = d_left.sum(dim=2, keepdim=True) - d_left if sizes.num_near else d_left
        # Tokens in no cluster have the label M.
        index = labels.unsqueeze(-1).expand(*labels.shape, d_own.shape[-1])
        d_rows = F.pad(d_own, (0, 0, 0, 1)).gather(3, index)
        d_k, d_v = d_rows[..., :head_dim], d_rows[..., head_dim:]
        if sizes.num_near:
            d_k = d_k + d_keys[..., : sizes.num_near, :]
            d_v = d_v + d_values[..., : sizes.num_near, _BEFORE:]
        d_k, d_v = (x.to(dtype).flatten(2, 3).index_select(2, layout.token_slots) for x in (d_k, d_v))
        d_shared_k = d_keys[..., sizes.shared, :].sum(dim=2)
        d_shared_v = d_values[..., sizes.shared, _BEFORE:].sum(dim=2)
        d_q = d_queries.index_select(2, layout.query_slots)
        return d_q, d_k, d_v, d_shared_k, d_shared_v, d_spread, None, None, None, None, None


class _Read(torch.autograd.Function):
    """Select the results of the tokens of the grid: values, [B, H, N, Dv], and weights of groups, [B, H, N, G]."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, slots: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
        """Return the values and weights of the slots."""
        tokens = out.index_select(2, slots)
        values, mass = tokens[..., _BEFORE:], tokens[..., 1 : 1 + num_groups]
        ctx.save_for_backward(values, mass, slots)
        ctx.shape = out.shape
        return values, mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_values: Tensor, d_mass: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the results; that of the probe is the product of result and gradient."""
        values, mass, slots = ctx.saved_tensors
        dtype = torch.promote_types(values.dtype, torch.float32)
        pairs = ((d_values, values), (d_mass, mass))
        product = sum((x.to(dtype) * y).sum(dim=-1, keepdim=True) for x, y in pairs)
        d_out = values.new_zeros(ctx.shape)
        few = torch.cat([d_mass, d_mass.new_zeros(*d_mass.shape[:-1], NUM_GROUPS - mass.shape[-1]), product], dim=-1)
        d_out[..., 1 : _PROBE + 1].index_copy_(2, slots, few.to(d_out.dtype))
        d_out[..., _BEFORE:].index_copy_(2, slots, d_values)
        return d_out, None, None


def _unit(index: int, size: int, like: Tensor) -> Tensor:
    """Return a row of zeros with a one, in the dtype and on the device of a tensor."""
    return (_make_unit if torch.compiler.is_compiling() else _kept_unit)(index, size, like.dtype, like.device)


def _make_unit(index: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (torch.arange(size, device=device) == index).to(dtype)


@lru_cache(maxsize=64)
def _kept_unit(index: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Tensors of inference mode can't be part of a later graph of gradients.
    with torch.inference_mode(False):
        return _make_unit(index, size, dtype, device)


def _write_near(buffer: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, layout: FlexLayout) -> Tensor:
    """Write the tokens of each window into its room, and return their columns, [B, H, W, T, C]."""
    sizes, head_dim = layout.sizes, k.shape[-1]
    places = layout.key_slots
    if not sizes.num_near:
        places = layout.token_slots
        buffer = _unit(head_dim, buffer.shape[-1], k).repeat(*k.shape[:2], 1, k.shape[2], 1)
    slots = buffer.flatten(2, 3)
    slots[..., :head_dim].index_copy_(2, places, k)
    slots[..., head_dim + _BEFORE :].index_copy_(2, places, v)
    if valid is not None:
        slots[..., head_dim].index_copy_(2, places, valid[..., 0].to(k.dtype).expand(*k.shape[:2], -1))
    return buffer[..., : sizes.num_tokens, :]


def _write_far(
    buffer: Tensor, rows: Tensor, labels: Tensor, of_clusters: tuple[Tensor, Tensor], count: int, sizes: FlexSizes
) -> tuple[Tensor, Tensor]:
    """Write the clusters without the tokens of each window; return their sizes and log weights, [B, H, W, M, 1].

    Args:
        buffer: Columns of keys and values, [B, H, W, n, C].
        rows: Columns of the tokens of each window, [B, H, W, T, C].
        labels: Cluster of each token, M for those in none, [B, H, W, T].
        of_clusters: Spread and groups of the clusters.
        count: Column that counts tokens; those of the groups follow.
        sizes: Sizes of the layout.
    """
    spread, groups = of_clusters
    left = sum_by_label(rows, labels, sizes.num_clusters)
    left = left.sum(dim=2, keepdim=True) - left if sizes.num_near else left
    number = left[..., count, None]
    far, at_least_one = buffer[..., sizes.far, :], number.clamp(min=1.0)
    if torch.compiler.is_compiling():
        far.copy_(left / at_least_one)
    else:
        torch.div(left, at_least_one, out=far)
    far[..., count + 1 : count + 1 + groups.shape[-1]] = groups.unsqueeze(2)
    weights = number.log() + spread.unsqueeze(2)
    if not sizes.num_near:
        # Elsewhere the keys of the window have finite terms, and come first.
        weights = weights.clamp(min=lowest_logit(spread.dtype))
    return number, weights


def _terms(weights: Tensor, valid: Tensor | None, shared_valid: Tensor | None, layout: FlexLayout) -> Tensor:
    """Return the terms of the logits of each window, [B, H, W x n], for log weights of clusters, [B, H, W, M]."""
    sizes, known = layout.sizes, layout.terms.to(weights.dtype).expand(*weights.shape[:2], -1, -1)
    near, shared = known[..., : sizes.num_near], known[..., sizes.shared]
    if valid is not None and sizes.num_near:
        hidden = _hidden(valid, weights).expand(*weights.shape[:2], -1)
        near = near.flatten(2).index_copy(2, layout.token_slots, hidden).view(near.shape)
    if shared_valid is not None:
        shared = _hidden(shared_valid, weights).unsqueeze(2).expand(shared.shape)
    return torch.cat([near, shared, weights, known[..., sizes.far.stop :]], dim=-1).flatten(2)


def _hidden(valid: Tensor, like: Tensor) -> Tensor:
    """Return terms that remove invalid keys, [.., n, 1] -> [.., n]."""
    return (~valid[..., 0]).to(like.dtype) * lowest_logit(like.dtype)


def _flex(q: Tensor, k: Tensor, v: Tensor, terms: Tensor, block_mask: BlockMask, scale: float) -> Tensor:
    """Attend by FlexAttention, with terms added to the logits; in kernels on GPUs."""

    def add_term(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + terms[batch, head, key]

    is_captured = torch.compiler.is_compiling() or q.device.type == "cpu"
    attend: Any = flex_attention if is_captured else _compiled()
    options = _kernel_options(block_mask.BLOCK_SIZE, v.shape[-1], q.dtype.itemsize)
    out: Tensor = attend(q, k, v, score_mod=add_term, block_mask=block_mask, scale=scale, kernel_options=options)
    return out


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, fullgraph=True)


# For 2 and 4 bytes a number, and values of up to so many columns: queries and keys of a tile, both in the backward
# pass, warps and stages. PyTorch chooses tiles by the width of queries, and values here are wider.
_TILES = {
    (2, 128): (128, 64, 64, 8, 2),
    (2, 256): (64, 32, 32, 4, 2),
    (4, 128): (32, 32, 16, 4, 1),
    (4, 256): (32, 16, 16, 4, 1),
}


def _kernel_options(blocks: tuple[int, int], num_columns: int, itemsize: int) -> dict[str, Any]:
    """Return options of the kernels for blocks of queries and keys, and values of so many columns and bytes each."""
    # All pairs of a row of blocks are one run, and no row is without a finite term.
    options: dict[str, Any] = {
        "BLOCKS_ARE_CONTIGUOUS": True,
        "ROWS_GUARANTEED_SAFE": True,
        "FORCE_USE_FLEX_ATTENTION": True,
    }
    width = 1 << (num_columns - 1).bit_length()
    tiles = _TILES.get((itemsize, width))
    if tiles is None:
        return options
    queries, keys, both, warps, stages = tiles
    forward = {"BLOCK_M": min(queries, blocks[0]), "BLOCK_N": min(keys, blocks[1])}
    of_pairs = min(both, *blocks)
    backward = dict.fromkeys(("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"), of_pairs)
    return {**options, **forward, **backward, "num_warps": warps, "num_stages": stages}
