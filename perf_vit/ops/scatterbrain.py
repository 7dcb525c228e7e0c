"""Sparse + low-rank attention: exact where it matters, linear everywhere else, under one denominator."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from perf_vit.ops.balancing import Balancing
from perf_vit.ops.chunks import token_slices
from perf_vit.ops.features import LOWEST_SCALE, FeatureMap, exp_, without_autocast
from perf_vit.ops.kernels import Kernel
from perf_vit.ops.linear_attention import favor_attention
from perf_vit.ops.oprf import optimal_parameter
from perf_vit.ops.state import check_keys, make_feature_map
from perf_vit.ops.windows import WindowGroup, even_window, from_windows, group_windows, split_dim, to_windows

__all__ = ["choose_sinks", "scatterbrain_attention"]

# A group of windows has about so many keys, counted for each window; without windows, so many tokens.
_GROUP_KEYS = 8192
_GROUP_TOKENS = 2048
_SINK_QUERIES = 128
_SINK_KEYS = 1024


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
        window_size: rows and columns of a window, at most; the grid is cut into the fewest such, of nearly equal size.
            0 for none.
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
        return _attend(q, k, v, feature_map, grid, window_size, num_sinks, num_prefix_tokens, key_mask).to(q.dtype)


@torch.no_grad()
def choose_sinks(q: Tensor, k: Tensor, num_sinks: int, num_prefix_tokens: int, key_mask: Tensor | None) -> Tensor:
    """The keys with the largest mean root of their weights in exact attention of 128 queries spread over the grid.

    The root, because a key that many queries look at serves better than one that holds all of a few.

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
    asking = q[:, :, places].float() * q.shape[-1] ** -0.5

    def logits() -> Iterator[Tensor]:
        # Computed anew for each use: to write all of them down takes longer.
        for keys in token_slices(k, _SINK_KEYS):
            values = asking @ k[keys].float().mT
            yield values if key_mask is None else values.masked_fill_(~key_mask[:, None, None, keys[2]], LOWEST_SCALE)

    log_sums = torch.stack([values.logsumexp(dim=-1, keepdim=True) for values in logits()]).logsumexp(dim=0)
    mass = torch.cat([exp_(values.sub_(log_sums).mul_(0.5)).sum(dim=2) for values in logits()], dim=-1)[
        ..., num_prefix_tokens:
    ]
    if key_mask is not None:
        mass = mass.masked_fill(~key_mask[:, None, num_prefix_tokens:], -1.0)
    return mass.topk(min(num_sinks, length), dim=-1).indices + num_prefix_tokens


@dataclass(frozen=True, eq=False)
class _Windows:
    """What belongs to the windows of a group: views of it, [B, H, .., .., h, w, C].

    Attributes:
        q: queries.
        k: keys.
        v: values.
        log_mask: of the keys.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_mask: Tensor


@dataclass(frozen=True, eq=False)
class _Attention:
    """One call: what all groups of windows need.

    An estimate is a softmax too: that of a query's logits with the rows of the projection, and its values are the means
    that the features of the keys weight. So a query attends, in one exact attention, to the keys of its window, to
    those that all queries see, and to M features in place of all other keys. Two more columns carry what is no
    product: queries are [q / sqrt(D), log h(q), 1], keys [k, 0, log mask] and features [row, 1, log z].

    Attributes:
        q: queries of the grid, [B, H, N, D].
        k: keys of the grid, [B, H, N, D].
        v: values of the grid, [B, H, N, Dv].
        log_mask: 0 for keys that take part in windows and sums, far below any logit for masked ones and sinks,
            [B, H, N, 1].
        shared: keys and values of the prefix and the sinks, which all queries see, [B, H, s, C] each.
        feature_map: of the estimate.
        grid: rows and columns.
        own: whether queries see the keys of their window exactly.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_mask: Tensor
    shared: tuple[Tensor, Tensor]
    feature_map: FeatureMap
    grid: tuple[int, int]
    own: bool

    @property
    def num_columns(self) -> int:
        """C."""
        return self.shared[0].shape[-1]

    @property
    def differentiable(self) -> bool:
        """Whether a backward pass may follow."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.k, self.v))

    def run(self, groups: list[WindowGroup]) -> Iterator[Tensor]:
        """Attention of the queries of each group, [B, rows, columns, H, Dv]."""
        dtype = self.log_mask.dtype
        (query_rows, query_offset), (key_rows, key_offset) = (
            rows(dtype) for rows in (self.feature_map.query_rows, self.feature_map.key_rows)
        )
        key_rows = _with_columns(key_rows, key_rows.shape[-1] + 1, 1.0)
        far_rows = query_rows * self.q.shape[-1] ** 0.5
        parts = (to_windows(x, self.grid, groups) for x in (self.q, self.k, self.v, self.log_mask))
        windows = [_Windows(*each) for each in zip(*parts, strict=True)]
        sums = [self._call(self._sum_windows, each, key_rows) for each in windows]
        total, log_scale = sums[0][0].sum(dim=2), sums[0][1]
        for s, c in sums[1:]:
            larger = torch.maximum(log_scale, c)
            mine_by, its_by = exp_(log_scale - larger).unsqueeze(-1), exp_(c - larger).unsqueeze(-1)
            total, log_scale = total * mine_by + s.sum(dim=2) * its_by, larger
        offset = (log_scale.unsqueeze(-2) + query_offset + key_offset).mT.unsqueeze(2)
        blanks = {} if self.differentiable else {group.size: self._blank(group, far_rows) for group in groups}
        for group, each, (s, c) in zip(groups, windows, sums, strict=True):
            own_by = exp_(c - log_scale)[:, :, None, :, None]
            arguments = (each, total.unsqueeze(2), s, own_by, offset, far_rows, blanks.get(group.size))
            yield from_windows(self._call(self._attend, *arguments), group)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call it so that the backward pass computes it again: nothing of a group's size is kept."""
        if self.differentiable:
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        return function(*arguments)

    def _sum_windows(self, own: _Windows, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[S, z] of each window, [B, H, W, M, Dv + 1], and their common logarithmic scale, [B, H, M]."""
        log_mask = self._tokens(own.log_mask)
        keys = self._tokens(own.k).flatten(2, 3)
        log_amplitude = self.feature_map.key_log_amplitude(self.feature_map.key_inputs(keys))
        assert log_amplitude is not None
        logs = torch.cat([keys, log_amplitude + log_mask.flatten(2, 3)], dim=-1) @ rows.mT
        log_scale = logs.detach().amax(dim=-2).clamp(min=LOWEST_SCALE)
        # The e^-40 that is left of a masked key, beside 1, is nothing.
        features = split_dim(exp_(logs.sub_(log_scale.unsqueeze(-2))), 2, *log_mask.shape[2:4])
        return features.mT @ _with_columns(self._tokens(own.v), own.v.shape[-1] + 1, 1.0), log_scale

    def _attend(
        self,
        own: _Windows,
        total: Tensor,
        sums: Tensor,
        own_by: Tensor,
        offset: Tensor,
        far_rows: Tensor,
        blank: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Attention of the queries of some windows, [B, H, W x T, Dv]."""
        head_dim, value_dim = own.q.shape[-1], own.v.shape[-1]
        # All windows but a query's own.
        far = torch.addcmul(total, sums, own_by, value=-1.0) if self.own else total.expand_as(sums)
        limits, ones = torch.finfo(far.dtype), slice(value_dim, value_dim + 1)
        # Where a window holds all that a feature sees, rounding errors are left of the others.
        z = far[..., ones].clamp(min=0.0) + (total[..., ones] * limits.eps + limits.tiny)
        log_z, means = z.log() + offset, far[..., :value_dim] / z
        k, v = self._join(own, far_rows, log_z, means) if blank is None else self._fill_in(own, log_z, means, *blank)
        own_q = self._tokens(own.q)
        log_amplitude = self._log_amplitude(own_q.flatten(2, 3)).view(*own_q.shape[:4], 1)
        q = _with_columns(own_q * head_dim**-0.5, self.num_columns, log_amplitude, 1.0)
        q, k, v = (x.flatten(0, 2).unsqueeze(1) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return out.view(*self.q.shape[:2], -1, out.shape[-1])[..., :value_dim]

    def _join(self, own: _Windows, far_rows: Tensor, log_z: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that a window's queries attend to, [B, H, W, n, C] each, for a backward pass to follow."""
        each = log_z.shape[:3]
        far_k = _with_columns(far_rows.unsqueeze(2).expand(*each, -1, -1), self.num_columns, 1.0, log_z)
        k, v = ([x.unsqueeze(2).expand(*each, -1, -1)] for x in self.shared)
        if self.own:
            k.insert(0, _with_columns(self._tokens(own.k), self.num_columns, 0.0, self._tokens(own.log_mask)))
            v.insert(0, _with_columns(self._tokens(own.v), self.num_columns))
        return torch.cat([*k, far_k], dim=3), torch.cat([*v, _with_columns(means, self.num_columns)], dim=3)

    def _fill_in(self, own: _Windows, log_z: Tensor, means: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The same, written on what all groups of windows of one size share."""
        head_dim, value_dim, far = self.q.shape[-1], self.v.shape[-1], slice(k.shape[3] - means.shape[3], None)
        k[:, :, :, far, head_dim + 1 : head_dim + 2] = log_z
        v[:, :, :, far, :value_dim] = means
        if self.own:
            shape, near = own.q.shape[2:6], slice(0, own.q.shape[4] * own.q.shape[5])
            near_k, near_v = (split_dim(split_dim(x[:, :, :, near], 3, *shape[2:]), 2, *shape[:2]) for x in (k, v))
            near_k[..., :head_dim] = own.k
            near_k[..., head_dim + 1 : head_dim + 2] = own.log_mask
            near_v[..., :value_dim] = own.v
        return k, v

    def _blank(self, group: WindowGroup, far_rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as `_join` has them, but for the windows' own and what is known of the features."""
        each = (*self.q.shape[:2], math.prod(group.shape))
        near = self.log_mask.new_zeros(*each, math.prod(group.window) if self.own else 0, self.num_columns)
        shared_k, shared_v = (x.unsqueeze(2).expand(*each, -1, -1) for x in self.shared)
        far = _with_columns(far_rows, self.num_columns, 1.0).unsqueeze(2).expand(*each, -1, -1)
        return torch.cat([near, shared_k, far], dim=3), torch.cat([near, shared_v, torch.zeros_like(far)], dim=3)

    def _log_amplitude(self, q: Tensor) -> Tensor:
        """Of queries, [B, H, W x T, 1], beside exact weights."""
        log_amplitude = self.feature_map.query_log_amplitude(self.feature_map.query_inputs(q))
        if self.feature_map.balancing is None:
            return log_amplitude
        # Exact weights are those of keys as they came, estimated ones those of centred keys.
        center = self.feature_map.balancing.key_center.to(q.dtype) * q.shape[-1] ** -0.5
        return log_amplitude + q @ center.mT

    def _tokens(self, windows: Tensor) -> Tensor:
        """[B, H, .., .., h, w, C] -> [B, H, W, T, C] in the dtype of the sums."""
        return windows.to(self.log_mask.dtype).flatten(4, 5).flatten(2, 3)


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
    # While torch.jit traces, sizes are tensors; a trace is for images of one size.
    grid = int(grid[0]), int(grid[1])
    log_mask = k.new_zeros(*k.shape[:3], 1, dtype=torch.promote_types(k.dtype, torch.float32))
    if key_mask is not None:
        masked = ~key_mask[:, None, :, None]
        # What a masked key carries may be anything, NaN included.
        k, v = k.masked_fill(masked, 0.0), v.masked_fill(masked, 0.0)
        log_mask = log_mask.masked_fill(masked, LOWEST_SCALE)
    prefix = _exact(q[:, :, :num_prefix_tokens], k, v, log_mask)
    sinks = choose_sinks(q, k, num_sinks, num_prefix_tokens, key_mask)
    shared = _shared_keys(k, v, log_mask, sinks, num_prefix_tokens)
    log_mask = log_mask.scatter(2, sinks.unsqueeze(-1), LOWEST_SCALE)
    q, k, v, log_mask = (x[:, :, num_prefix_tokens:] for x in (q, k, v, log_mask))
    attention = _Attention(q, k, v, log_mask, shared, feature_map, grid, own=window_size > 0)
    num_features = feature_map.projection.shape[0] * feature_map.kernel.features_per_row
    groups = _groups(grid, window_size, int(shared[0].shape[2] + num_features))
    return _join(prefix, attention.run(groups), groups, grid)


def _shared_keys(
    k: Tensor, v: Tensor, log_mask: Tensor, sinks: Tensor, num_prefix_tokens: int
) -> tuple[Tensor, Tensor]:
    """Keys and values of the prefix tokens and the sinks, with their columns, [B, H, P + s, C]."""
    places = torch.arange(num_prefix_tokens, device=k.device).expand(*sinks.shape[:2], -1)
    places = torch.cat([places, sinks], dim=-1).unsqueeze(-1)
    k, v, log_mask = (torch.take_along_dim(x, places, dim=2).to(log_mask.dtype) for x in (k, v, log_mask))
    # Fused attention on GPUs needs rows of 16 bytes.
    num_columns = -(-max(k.shape[-1] + 2, v.shape[-1]) // 4) * 4
    return _with_columns(k, num_columns, 0.0, log_mask), _with_columns(v, num_columns)


def _exact(q: Tensor, k: Tensor, v: Tensor, log_mask: Tensor) -> Tensor:
    q, k, v = (x.to(log_mask.dtype) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=log_mask.mT)


def _join(prefix: Tensor, parts: Iterator[Tensor], groups: list[WindowGroup], grid: tuple[int, int]) -> Tensor:
    """The prefix, [B, H, P, Dv], and the groups' rectangles, [B, rows, columns, H, Dv], as [B, H, N, Dv]."""
    batch, heads, num_prefix, value_dim = prefix.shape
    if torch.is_grad_enabled():
        rows: dict[int, list[Tensor]] = {}
        for group, part in zip(groups, parts, strict=True):
            rows.setdefault(group.rows.start, []).append(part)
        patches = torch.cat([torch.cat(row, dim=2) for row in rows.values()], dim=1).flatten(1, 2)
        return torch.cat([prefix.transpose(1, 2), patches], dim=1).transpose(1, 2)
    out = prefix.new_empty(batch, num_prefix + grid[0] * grid[1], heads, value_dim)
    out[:, :num_prefix] = prefix.transpose(1, 2)
    patches = split_dim(out[:, num_prefix:], 1, *grid)
    for group, part in zip(groups, parts, strict=True):
        patches[:, group.rows, group.columns] = part
    return out.transpose(1, 2)


def _with_columns(x: Tensor, num_columns: int, *columns: Tensor | float) -> Tensor:
    """[..., n] with more columns, numbers or [..., 1], and zeros after those, [..., C]."""
    numbers = (y if isinstance(y, Tensor) else x.new_full((1,), y) for y in columns)
    missing = num_columns - x.shape[-1] - len(columns)
    parts = [x, *numbers, x.new_zeros(missing)]
    return torch.cat([part.expand(*x.shape[:-1], -1) for part in parts], dim=-1)


def _groups(grid: tuple[int, int], window_size: int, num_shared: int) -> list[WindowGroup]:
    if not window_size:
        # Without windows tokens still come in groups, of whole rows or of parts of one.
        rows = max(1, _GROUP_TOKENS // grid[1])
        return group_windows(grid, (min(grid[0], rows), min(grid[1], _GROUP_TOKENS)), max_windows=1)
    window = even_window(grid, window_size)
    return group_windows(grid, window, max(1, _GROUP_KEYS // (window[0] * window[1] + num_shared)))


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
    if not (kernel.estimates_softmax and kernel.log_linear):
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
