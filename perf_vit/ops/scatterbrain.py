"""Sparse + low-rank attention: exact where it matters, linear everywhere else, under one denominator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from perf_vit.ops.balancing import Balancing
from perf_vit.ops.features import LOWEST_SCALE, FeatureMap, exp_, without_autocast
from perf_vit.ops.kernels import Kernel
from perf_vit.ops.linear_attention import favor_attention
from perf_vit.ops.oprf import optimal_parameter
from perf_vit.ops.state import check_keys, make_feature_map
from perf_vit.ops.windows import from_windows, to_windows

__all__ = ["choose_sinks", "scatterbrain_attention"]

# Windows are worked on in groups of about so many tokens.
_GROUP_TOKENS = 2048
_SINK_QUERIES = 128


def scatterbrain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    grid: tuple[int, int],
    window_size: int = 8,
    num_sinks: int = 64,
    num_prefix_tokens: int = 1,
    kernel: str | Kernel = "softmax-hyp+",
    key_mask: Tensor | None = None,
    balancing: Balancing | None = None,
) -> Tensor:
    """Attention that is exact over a token's neighbourhood and linear over the rest.

    out_i = (sum_{j in S(i)} exp(q_i.k_j / sqrt(D)) v_j + sum_{j not in S(i)} phi(q_i).phi(k_j) v_j) / (the same sums of
    1): sparse and low-rank attention under one denominator (after Chen et al. 2021, "Scatterbrain"). S(i) holds the
    tokens of i's 2-D window, the prefix tokens and the head's sinks, the keys that most queries look at. Prefix tokens
    attend exactly. Time and memory are linear in the number of tokens, forward and backward.
    `perf_vit.ops.naive.naive_scatterbrain_attention` is the same as an N x N matrix.

    Args:
        q: queries, [B, H, N, D]: first the prefix tokens, then the grid's, row by row.
        k: keys, [B, H, N, D].
        v: values, [B, H, N, Dv].
        projection: rows of the feature map, [R, D], from `draw_projection` with this kernel.
        grid: rows and columns of tokens; N = num_prefix_tokens + rows x columns.
        window_size: rows and columns of a window; windows at the right and lower border may be cut. 0 for none.
        num_sinks: keys of each sample and head that every query sees exactly; 0 for none.
        num_prefix_tokens: class and register tokens, which come first.
        kernel: a positive kernel that estimates softmax, or its name.
        key_mask: [B, N] bool, False for keys that are left out.
        balancing: constants that centre and balance the inputs of the linear part, from `fit_balancing`.

    Returns:
        [B, H, N, Dv] in the dtype of `q`; 0 for queries that see no key.

    Raises:
        ValueError: shapes that don't fit together, or a kernel that doesn't estimate softmax by positive features.
    """
    feature_map = make_feature_map(kernel, projection, balancing)
    _check(q, k, v, feature_map, grid, window_size, num_sinks, num_prefix_tokens, key_mask)
    if window_size == 0 and num_sinks == 0:
        return favor_attention(q, k, v, projection, kernel, key_mask, balancing=balancing)
    with without_autocast(q):
        if feature_map.kernel.needs_parameter:
            assert feature_map.kernel.bind is not None
            fixed = feature_map.kernel.bind(optimal_parameter(feature_map, q, k, key_mask))
            feature_map = FeatureMap(fixed, projection, balancing)
        return _attend(q, k, v, feature_map, grid, window_size, num_sinks, num_prefix_tokens, key_mask)


@torch.no_grad()
def choose_sinks(q: Tensor, k: Tensor, num_sinks: int, num_prefix_tokens: int, key_mask: Tensor | None) -> Tensor:
    """The keys with the largest mean weight in exact attention of 128 queries spread evenly over the grid.

    Args:
        q: queries, [B, H, N, D].
        k: keys, [B, H, N, D].
        num_sinks: how many, at most as many as there are.
        num_prefix_tokens: tokens at the start that are no candidates.
        key_mask: [B, N] bool, False for keys that are no candidates either.

    Returns:
        Their places, [B, H, num_sinks].
    """
    length = q.shape[2] - num_prefix_tokens
    places = torch.linspace(0, length - 1, min(_SINK_QUERIES, length), device=q.device).long() + num_prefix_tokens
    logits = (q[:, :, places].float() @ k.float().mT) * q.shape[-1] ** -0.5
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None, :], LOWEST_SCALE)
    mass = logits.softmax(dim=-1).mean(dim=2)[..., num_prefix_tokens:]
    if key_mask is not None:
        mass = mass.masked_fill(~key_mask[:, None, num_prefix_tokens:], -1.0)
    return mass.topk(min(num_sinks, length), dim=-1).indices + num_prefix_tokens


@dataclass(frozen=True, eq=False)
class _Windows:
    """The grid's tokens, window by window, W windows of T tokens.

    Attributes:
        q: queries, [W, B, H, T, D].
        k: keys, centred.
        v: values, [W, B, H, T, Dv].
        features_k: keys as they came, for the features.
        masked: True for keys that take part neither in the window nor in the sums: masked ones, sinks and what lies
            beyond the grid, [W, B, H, T, 1].
        own: whether a window's queries see its own keys exactly.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    features_k: Tensor
    masked: Tensor
    own: bool

    def groups(self) -> list[slice]:
        """Slices of windows of about equally many tokens in all."""
        group = max(1, _GROUP_TOKENS // self.q.shape[3])
        return [slice(start, start + group) for start in range(0, self.q.shape[0], group)]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    grid: tuple[int, int],
    window_size: int,
    num_sinks: int,
    num_prefix_tokens: int,
    key_mask: Tensor | None,
) -> Tensor:
    dtype, given = torch.promote_types(q.dtype, torch.float32), q.dtype
    masked = torch.zeros_like(k[..., :1], dtype=torch.bool)
    if key_mask is not None:
        masked = masked | ~key_mask[:, None, :, None]
        v = v.masked_fill(masked, 0.0)
    sinks = choose_sinks(q, k, num_sinks, num_prefix_tokens, key_mask)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    # Moving all keys by one vector changes no exact weight; the features estimate the weights of the moved ones.
    centred = k if feature_map.balancing is None else k - feature_map.balancing.key_center.to(dtype)
    shared = _shared_keys(centred, v, masked, sinks, num_prefix_tokens)
    windows = _split_into_windows(q, centred, v, k, masked, sinks, grid, window_size, num_prefix_tokens)
    sums = _window_sums(windows, feature_map)
    total = sums[0].sum(dim=0), sums[1].sum(dim=0)
    out = torch.cat(
        [_run(_attend_group, windows, group, shared, sums, total, feature_map) for group in windows.groups()]
    )
    out = from_windows(out, grid, _window(grid, window_size))
    if num_prefix_tokens:
        prefix = _exact(q[:, :, :num_prefix_tokens], centred, v, masked)
        out = torch.cat([prefix, out], dim=2)
    return out.to(given)


def _shared_keys(
    k: Tensor, v: Tensor, masked: Tensor, sinks: Tensor, num_prefix_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and masks, [B, H, P + s, ...], of the prefix tokens and the sinks, which all queries see."""
    places = torch.arange(num_prefix_tokens, device=k.device).expand(*sinks.shape[:2], -1)
    places = torch.cat([places, sinks], dim=-1).unsqueeze(-1)
    keys, values, hidden = (torch.take_along_dim(x, places, dim=2) for x in (k, v, masked))
    return keys, values, hidden


def _split_into_windows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features_k: Tensor,
    masked: Tensor,
    sinks: Tensor,
    grid: tuple[int, int],
    window_size: int,
    num_prefix_tokens: int,
) -> _Windows:
    window = _window(grid, window_size)
    counts = (~masked).scatter(2, sinks.unsqueeze(-1), torch.zeros_like(sinks.unsqueeze(-1), dtype=torch.bool))
    q, in_window, v, counts = (to_windows(x[:, :, num_prefix_tokens:], grid, window) for x in (q, k, v, counts))
    moved = in_window if features_k is k else to_windows(features_k[:, :, num_prefix_tokens:], grid, window)
    return _Windows(q, in_window, v, moved, ~counts, own=window_size > 0)


def _window_sums(windows: _Windows, feature_map: FeatureMap) -> tuple[Tensor, Tensor, Tensor]:
    """(S, z) of each window, [W, B, H, M, ...], all on one scale, [B, H, 1, M]."""
    parts = [_run(_sum_group, windows, group, feature_map) for group in windows.groups()]
    s, z, log_scales = (torch.cat(x) for x in zip(*parts, strict=True))
    log_scale = log_scales.amax(dim=0)
    by = exp_(log_scales - log_scale).unsqueeze(-1)
    return s.mul_(by), z * by, log_scale.unsqueeze(-2)


def _sum_group(windows: _Windows, group: slice, feature_map: FeatureMap) -> tuple[Tensor, Tensor, Tensor]:
    keys = feature_map.keys(feature_map.key_inputs(windows.features_k[group]), windows.masked[group])
    log_scale = keys.scale()
    # The e^-40 that is left of a masked key, beside 1, is nothing.
    features = exp_(keys.values.sub_(log_scale.unsqueeze(-2)))
    return features.mT @ windows.v[group], features.sum(dim=-2).unsqueeze(-1), log_scale


def _attend_group(
    windows: _Windows,
    group: slice,
    shared: tuple[Tensor, Tensor, Tensor],
    sums: tuple[Tensor, Tensor, Tensor],
    total: tuple[Tensor, Tensor],
    feature_map: FeatureMap,
) -> Tensor:
    """Attention of the queries of some windows, [w, B, H, T, Dv]."""
    q = windows.q[group]
    keys, values, masked = _near(windows, group, shared)
    near = (q * q.shape[-1] ** -0.5) @ keys.mT
    near = near.add_(torch.zeros_like(masked, dtype=near.dtype).masked_fill_(masked, LOWEST_SCALE).mT)
    s, z, log_scale = sums
    far_s, far_z = total
    if windows.own:
        # All windows but a query's own.
        far_s, far_z = far_s - s[group], (far_z - z[group]).clamp(min=0.0)
    x = feature_map.query_inputs(q)
    far = feature_map.queries(x).add_(log_scale).add_(feature_map.query_log_amplitude(x))
    largest = far.detach().amax(dim=-1, keepdim=True)
    if keys.shape[-2]:
        largest = torch.maximum(largest, near.detach().amax(dim=-1, keepdim=True))
    # Where a query sees nothing, all weights are the same, and all values 0.
    near, far = exp_(near.sub_(largest)), exp_(far.sub_(largest))
    numerator = near @ values + far @ far_s
    denominator = near.sum(dim=-1, keepdim=True) + (far_z.mT @ far.mT).mT
    return numerator / denominator


def _near(windows: _Windows, group: slice, shared: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and masks that the queries of some windows see exactly, [w, B, H, n, ...]."""
    num_windows = windows.q[group].shape[0]
    everywhere = [x.expand(num_windows, *x.shape) for x in shared]
    if not windows.own:
        return everywhere[0], everywhere[1], everywhere[2]
    own = (windows.k[group], windows.v[group], windows.masked[group])
    keys, values, masked = (torch.cat(pair, dim=-2) for pair in zip(own, everywhere, strict=True))
    return keys, values, masked


def _exact(q: Tensor, k: Tensor, v: Tensor, masked: Tensor) -> Tensor:
    logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(masked.mT, LOWEST_SCALE)
    return logits.softmax(dim=-1) @ v


def _run(function: Callable[..., Any], windows: _Windows, group: slice, *arguments: Any) -> Any:
    """Call it so that the backward pass computes it again: nothing of a group's size is kept."""
    if torch.is_grad_enabled() and windows.q.requires_grad:
        return checkpoint(function, windows, group, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function(windows, group, *arguments)


def _window(grid: tuple[int, int], window_size: int) -> tuple[int, int]:
    # Without windows, tokens still come in groups: runs of one row of all tokens don't depend on the grid.
    return (window_size, window_size) if window_size else (1, min(grid[1], _GROUP_TOKENS))


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    grid: tuple[int, int],
    window_size: int,
    num_sinks: int,
    num_prefix_tokens: int,
    key_mask: Tensor | None,
) -> None:
    check_keys(k, v, feature_map.projection, key_mask)
    if q.shape != k.shape:
        raise ValueError(f"q and k must have one shape [B, H, N, D], got {list(q.shape)} and {list(k.shape)}")
    kernel = feature_map.kernel
    if not (kernel.estimates_softmax and kernel.log_domain):
        raise ValueError(
            "the linear part must estimate the exponential of the exact one by positive features: expected "
            f"softmax+, softmax-hyp+ or oprf, got {kernel.name!r}"
        )
    if min(window_size, num_sinks, num_prefix_tokens) < 0:
        raise ValueError(
            "window_size, num_sinks and num_prefix_tokens must be 0 or more, "
            f"got {window_size}, {num_sinks} and {num_prefix_tokens}"
        )
    if not isinstance(grid, tuple | list) or len(grid) != 2 or min(grid) < 1:
        raise ValueError(
            f"grid must be (rows, columns) of the patches, each 1 or more, got {grid!r}; {num_prefix_tokens} prefix "
            f"tokens come before the patches, rows x columns = {q.shape[2] - num_prefix_tokens}"
        )
    expected = num_prefix_tokens + grid[0] * grid[1]
    if q.shape[2] != expected:
        raise ValueError(
            f"{num_prefix_tokens} prefix tokens and a grid of {grid[0]} x {grid[1]} are {expected} tokens, got "
            f"{q.shape[2]}; pass grid=(rows, columns) of the patches"
        )
