"""Windows of nearly equal size on a 2-D grid of tokens in row-major order."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from perf_vit.ops.features import LOWEST_SCALE
from perf_vit.ops.sinks import choose_sinks

__all__ = [
    "SummaryKeys",
    "WindowGroup",
    "Windows",
    "attend_with_summaries",
    "check_grid",
    "from_windows",
    "group_windows",
    "split_dim",
    "to_windows",
    "window_indices",
]


@dataclass(frozen=True)
class WindowGroup:
    """Windows of one size that are processed together: a rectangle of the grid.

    Attributes:
        rows: Rows of the grid.
        columns: Columns of the grid.
        window: Rows and columns of a window, which divide those of the rectangle.
    """

    rows: slice
    columns: slice
    window: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and columns of windows."""
        rows, columns = self.rows.stop - self.rows.start, self.columns.stop - self.columns.start
        return rows // self.window[0], columns // self.window[1]

    @property
    def size(self) -> tuple[int, ...]:
        """Sizes that determine the memory of a group."""
        return *self.shape, *self.window


def group_windows(grid: tuple[int, int], largest: tuple[int, int], max_windows: int) -> list[WindowGroup]:
    """Split a grid into groups of at most `max_windows` windows each, in row-major order.

    Rows and columns are split into the fewest windows of at most `largest`, whose sizes differ by at most 1: 37 tokens
    with windows of at most 16 are split into 13 + 12 + 12, not 16 + 16 + 5. The windows of a group have one size.
    """
    columns = _spans(grid[1], largest[1], max_windows)
    most = max(1, max_windows // max((span.stop - span.start) // width for span, width in columns))
    return [
        WindowGroup(rows, part, (height, width))
        for rows, height in _spans(grid[0], largest[0], most)
        for part, width in columns
    ]


def to_windows(x: Tensor, grid: tuple[int, int], groups: list[WindowGroup]) -> list[Tensor]:
    """Return views of the windows of each group, [B, H, .., .., h, w, C], given a grid, [B, H, rows x columns, C].

    The dots are the rows and columns of windows, h and w the rows and columns of a window. The groups must cover the
    grid in the order of `group_windows`. The tensor is split instead of sliced: gradients of slices would be summed as
    one full-size tensor per group.
    """
    heights = {group.rows.start: group.rows.stop - group.rows.start for group in groups}
    widths = {group.columns.start: group.columns.stop - group.columns.start for group in groups}
    parts: list[Tensor] = []
    for band in torch.split(split_dim(x, 2, *grid), list(heights.values()), dim=2):
        parts.extend(torch.split(band, list(widths.values()), dim=3))
    return [
        split_dim(split_dim(part, 3, -1, group.window[1]), 2, -1, group.window[0]).transpose(3, 4)
        for part, group in zip(parts, groups, strict=True)
    ]


def from_windows(x: Tensor, group: WindowGroup) -> Tensor:
    """Arrange a group's windows, [B, H, windows x tokens, C], as its rectangle, [B, rows, columns, H, C]."""
    x = split_dim(x, 2, *group.shape, *group.window).permute(0, 2, 4, 3, 5, 1, 6)
    return x.flatten(3, 4).flatten(1, 2)


def split_dim(x: Tensor, dim: int, *sizes: int) -> Tensor:
    """Return a view with one dimension split into several."""
    return x.view(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def window_indices(grid: tuple[int, int], largest: tuple[int, int]) -> Tensor:
    """Return the index of the window of `group_windows` that holds each token of the grid, [rows x columns]."""
    row, column = (
        torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        for sizes in (_window_sizes(length, most) for length, most in zip(grid, largest, strict=True))
    )
    return (row[:, None] * grid[1] + column).flatten()


def _window_sizes(length: int, largest: int) -> list[int]:
    number = -(-length // largest)
    return [length // number + (place < length % number) for place in range(number)]


def _spans(length: int, largest: int, most: int) -> list[tuple[slice, int]]:
    """Return runs of at most `most` windows of one size that cover `length` tokens, with that size."""
    spans, start = [], 0
    for size, of_size in itertools.groupby(_window_sizes(length, largest)):
        number = len(list(of_size))
        for run in _window_sizes(number, most):
            spans.append((slice(start, start + run * size), size))
            start += run * size
    return spans


# Approximate number of keys of a group, summed over its windows; without windows, its number of tokens.
_GROUP_KEYS = 4096

_GROUP_TOKENS = 2048

Call = Callable[..., Any]

Buffers = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Windows:
    """Views of the windows of a group, [B, H, .., .., h, w, C].

    Attributes:
        q: Queries.
        k: Keys.
        v: Values.
        log_mask: 0 for keys in use, far below any logit for the others.
        labels: Label of each key for the summary keys, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_mask: Tensor
    labels: Tensor | None = None

    def tokens(self, x: Tensor) -> Tensor:
        """Flatten windows, [B, H, .., .., h, w, C] -> [B, H, W, T, C], in the dtype of the sums."""
        return x.to(self.log_mask.dtype).flatten(4, 5).flatten(2, 3)


class SummaryKeys(ABC):
    """M keys per head that summarise all keys outside a query's window and the shared keys.

    A query attends to a summary key as to any other: the key is [row, log weight], the value the mean of the summarised
    values. Weight and value depend on the window, whose tokens are excluded.

    Attributes:
        rows: Keys, [B or 1, H or 1, M, D].
        labels: Label of each token of the grid, [B, H, N, 1], passed to `weigh` with the windows; None if not needed.
    """

    rows: Tensor
    labels: Tensor | None = None

    @abstractmethod
    def collect(self, windows: list[Windows], call: Call) -> list[tuple[Tensor, ...]]:
        """Collect what `weigh` needs from all windows, per group; `call` lets the backward pass recompute a part."""

    @abstractmethod
    def weigh(self, own: Windows | None, *collected: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log weights, [B, H, W or 1, M, 1], and the values, [B, H, W or 1, M, Dv].

        Args:
            own: Windows whose tokens are excluded, or None to exclude none.
            *collected: Result of `collect` for their group.
        """


def attend_with_summaries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    window_size: int,
    num_sinks: int,
    num_prefix_tokens: int,
    key_mask: Tensor | None,
    make_summaries: Callable[[Tensor, Tensor, Tensor], SummaryKeys],
    sink_queries: int = 128,
) -> Tensor:
    """Attend exactly to windows, prefix tokens and sinks, and to summary keys for the rest.

    Args:
        q: Queries, [B, H, N, D]: prefix tokens first, then the grid in row-major order.
        k: Keys, [B, H, N, D].
        v: Values, [B, H, N, Dv].
        grid: Rows and columns of tokens.
        window_size: Largest number of rows and columns of a window; 0 for no windows.
        num_sinks: Number of keys per sample and head to which every query attends exactly.
        num_prefix_tokens: Number of tokens at the start that attend exactly and are attended to exactly.
        key_mask: [B, N] bool, False for keys to ignore.
        make_summaries: Function of the queries and keys of the grid and their log mask, [B, H, n, 1], that returns the
            summary keys.
        sink_queries: Number of queries that the choice of sinks samples.

    Returns:
        Attended values, [B, H, N, Dv], in at least float32.
    """
    # Under torch.jit.trace sizes are tensors; a trace is valid for one image size.
    grid = int(grid[0]), int(grid[1])
    log_mask = k.new_zeros(*k.shape[:3], 1, dtype=torch.promote_types(k.dtype, torch.float32))
    if key_mask is not None:
        masked = ~key_mask[:, None, :, None]
        # Masked keys may hold any value, including NaN.
        k, v = k.masked_fill(masked, 0.0), v.masked_fill(masked, 0.0)
        log_mask = log_mask.masked_fill(masked, LOWEST_SCALE)
    prefix = _exact(q[:, :, :num_prefix_tokens], k, v, log_mask)
    sinks = choose_sinks(q, k, num_sinks, num_prefix_tokens, key_mask, sink_queries)
    shared = _shared_keys(k, v, log_mask, sinks, num_prefix_tokens)
    log_mask = log_mask.scatter(2, sinks.unsqueeze(-1), LOWEST_SCALE)
    q, k, v, log_mask = (x[:, :, num_prefix_tokens:] for x in (q, k, v, log_mask))
    summaries = make_summaries(q, k, log_mask)
    attention = _Attention(q, k, v, log_mask, shared, summaries, grid, own=window_size > 0)
    groups = _groups(grid, window_size, int(shared[0].shape[2] + summaries.rows.shape[2]))
    return _join(prefix, attention.run(groups), groups, grid)


def _with_columns(x: Tensor, num_columns: int, *columns: Tensor | float) -> Tensor:
    """Append columns (scalars or [..., 1]) to [..., n] and pad with zeros to [..., C]."""
    numbers = (y if isinstance(y, Tensor) else x.new_full((1,), y) for y in columns)
    missing = num_columns - int(x.shape[-1]) - len(columns)
    parts = [x, *numbers, x.new_zeros(missing)]
    return torch.cat([part.expand(*x.shape[:-1], -1) for part in parts], dim=-1)


def check_grid(
    q: Tensor, k: Tensor, grid: tuple[int, int], window_size: int, num_sinks: int, num_prefix_tokens: int
) -> None:
    """Check that queries, keys, grid and sizes are consistent.

    Raises:
        ValueError: q and k differ in shape, a size is negative, or the grid doesn't match the number of tokens.
    """
    if q.shape != k.shape:
        raise ValueError(f"q and k must have one shape [B, H, N, D], got {list(q.shape)} and {list(k.shape)}")
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


@dataclass(frozen=True, eq=False)
class _Attention:
    """One attention call: the tensors shared by all groups of windows.

    A query attends, in one exact attention, to the keys of its window, to the shared keys and to the summary keys. An
    extra column carries the additive terms: queries are [q, sqrt(D)], keys [k, log mask] and summary keys [row, log
    weight], and products are divided by sqrt(D).

    Attributes:
        q: Queries of the grid, [B, H, N, D].
        k: Keys of the grid, [B, H, N, D].
        v: Values of the grid, [B, H, N, Dv].
        log_mask: 0 for keys in windows and summaries, far below any logit for masked keys and sinks, [B, H, N, 1].
        shared: Keys and values of the prefix tokens and the sinks, to which all queries attend, [B, H, s, C] each.
        summaries: Summary keys.
        grid: Rows and columns of tokens.
        own: Whether queries attend exactly to the keys of their window.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_mask: Tensor
    shared: tuple[Tensor, Tensor]
    summaries: SummaryKeys
    grid: tuple[int, int]
    own: bool

    @property
    def num_columns(self) -> int:
        """Number of columns C of keys and values."""
        return int(self.shared[0].shape[-1])

    @property
    def differentiable(self) -> bool:
        """Whether a backward pass may follow."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.k, self.v))

    def run(self, groups: list[WindowGroup]) -> Iterator[Tensor]:
        """Attend with the queries of each group, [B, rows, columns, H, Dv]."""
        parts = [to_windows(x, self.grid, groups) for x in (self.q, self.k, self.v, self.log_mask)]
        labels = self.summaries.labels
        parts.append([None] * len(groups) if labels is None else to_windows(labels, self.grid, groups))  # type: ignore[list-item]
        windows = [Windows(*each) for each in zip(*parts, strict=True)]
        collected = self.summaries.collect(windows, self._call)
        rows = self.summaries.rows
        sizes = {} if self.differentiable else {group.size: group for group in groups}
        buffers_by_size = {size: self._make_buffers(group, rows) for size, group in sizes.items()}
        for group, own, of_group in zip(groups, windows, collected, strict=True):
            yield from_windows(self._call(self._attend, own, rows, buffers_by_size.get(group.size), *of_group), group)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function with checkpointing: the backward pass recomputes it, so no tensor of the group is stored."""
        if self.differentiable:
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        return function(*arguments)

    def _attend(self, own: Windows, rows: Tensor, buffers: Buffers | None, *collected: Tensor) -> Tensor:
        """Attend with the queries of a group's windows, [B, H, W x T, Dv]."""
        head_dim, value_dim = int(own.q.shape[-1]), int(own.v.shape[-1])
        log_weights, means = self.summaries.weigh(own if self.own else None, *collected)
        parts = (
            self._concatenate(own, rows, log_weights, means)
            if buffers is None
            else self._fill_buffers(own, log_weights, means, *buffers)
        )
        q, k, v = (x.flatten(0, 2).unsqueeze(1) for x in parts)
        out = F.scaled_dot_product_attention(q, k, v, scale=head_dim**-0.5)
        return out.view(*self.q.shape[:2], -1, out.shape[-1])[..., :value_dim]

    def _concatenate(
        self, own: Windows, rows: Tensor, log_weights: Tensor, means: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Build queries, [B, H, W, T, C], keys and values, [B, H, W, n, C], for a backward pass."""
        q = _with_columns(own.tokens(own.q), self.num_columns, own.q.shape[-1] ** 0.5)
        each = (*self.q.shape[:2], math.prod(own.q.shape[2:4]))
        far_k = _with_columns(
            rows.unsqueeze(2).expand(*each, -1, -1), self.num_columns, log_weights.expand(*each, -1, -1)
        )
        far_v = _with_columns(means.expand(*each, -1, -1), self.num_columns)
        k, v = ([x.unsqueeze(2).expand(*each, -1, -1)] for x in self.shared)
        if self.own:
            k.insert(0, _with_columns(own.tokens(own.k), self.num_columns, own.tokens(own.log_mask)))
            v.insert(0, _with_columns(own.tokens(own.v), self.num_columns))
        return q, torch.cat([*k, far_k], dim=3), torch.cat([*v, far_v], dim=3)

    def _fill_buffers(
        self, own: Windows, log_weights: Tensor, means: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Build the same tensors in the buffers shared by all groups with windows of one size."""
        head_dim, value_dim, far = self.q.shape[-1], self.v.shape[-1], slice(k.shape[3] - means.shape[3], None)
        shape, near = own.q.shape[2:6], slice(0, own.q.shape[4] * own.q.shape[5])
        split_dim(split_dim(q, 3, *shape[2:]), 2, *shape[:2])[..., :head_dim] = own.q
        k[:, :, :, far, head_dim : head_dim + 1] = log_weights
        v[:, :, :, far, :value_dim] = means
        if self.own:
            near_k, near_v = (split_dim(split_dim(x[:, :, :, near], 3, *shape[2:]), 2, *shape[:2]) for x in (k, v))
            near_k[..., :head_dim] = own.k
            near_k[..., head_dim : head_dim + 1] = own.log_mask
            near_v[..., :value_dim] = own.v
        return q, k, v

    def _make_buffers(self, group: WindowGroup, rows: Tensor) -> Buffers:
        """Allocate buffers for queries, keys and values, filled with the parts that all groups share."""
        each, head_dim = (*self.q.shape[:2], math.prod(group.shape)), int(self.q.shape[-1])
        q = self.log_mask.new_zeros(*each, math.prod(group.window), head_dim)
        q = _with_columns(q, self.num_columns, head_dim**0.5)
        near = self.log_mask.new_zeros(*each, math.prod(group.window) if self.own else 0, self.num_columns)
        shared_k, shared_v = (x.unsqueeze(2).expand(*each, -1, -1) for x in self.shared)
        far = _with_columns(rows, self.num_columns).unsqueeze(2).expand(*each, -1, -1)
        return q, torch.cat([near, shared_k, far], dim=3), torch.cat([near, shared_v, torch.zeros_like(far)], dim=3)


def _shared_keys(
    k: Tensor, v: Tensor, log_mask: Tensor, sinks: Tensor, num_prefix_tokens: int
) -> tuple[Tensor, Tensor]:
    """Return the keys and values of prefix tokens and sinks with their extra columns, [B, H, P + s, C]."""
    indices = torch.arange(num_prefix_tokens, device=k.device).expand(*sinks.shape[:2], -1)
    indices = torch.cat([indices, sinks], dim=-1).unsqueeze(-1)
    k, v, log_mask = (torch.take_along_dim(x, indices, dim=2).to(log_mask.dtype) for x in (k, v, log_mask))
    # Fused attention on GPUs needs rows that are a multiple of 16 bytes.
    num_columns = -(-max(k.shape[-1] + 1, v.shape[-1]) // 4) * 4
    return _with_columns(k, num_columns, log_mask), _with_columns(v, num_columns)


def _exact(q: Tensor, k: Tensor, v: Tensor, log_mask: Tensor) -> Tensor:
    q, k, v = (x.to(log_mask.dtype) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=log_mask.mT)


def _join(prefix: Tensor, parts: Iterator[Tensor], groups: list[WindowGroup], grid: tuple[int, int]) -> Tensor:
    """Join the prefix, [B, H, P, Dv], and the rectangles of the groups, [B, rows, columns, H, Dv], to [B, H, N, Dv]."""
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


def _groups(grid: tuple[int, int], window_size: int, num_shared: int) -> list[WindowGroup]:
    if not window_size:
        # Without windows, tokens are grouped by whole rows, or by parts of one row.
        rows = max(1, _GROUP_TOKENS // grid[1])
        return group_windows(grid, (rows, _GROUP_TOKENS), max_windows=1)
    return group_windows(grid, (window_size, window_size), max(1, _GROUP_KEYS // (window_size**2 + num_shared)))
