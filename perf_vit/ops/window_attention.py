"""Exact attention over windows and shared keys, joined with a few keys that stand in for all others."""

from __future__ import annotations

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
from perf_vit.ops.windows import WindowGroup, from_windows, group_windows, split_dim, to_windows

__all__ = ["StandIns", "Windows", "attend_joined", "check_grid"]

# A group of windows has about so many keys, counted for each window; without windows, so many tokens.
_GROUP_KEYS = 4096
_GROUP_TOKENS = 2048

Call = Callable[..., Any]
Blank = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Windows:
    """What belongs to the windows of a group: views of it, [B, H, .., .., h, w, C].

    Attributes:
        q: queries.
        k: keys.
        v: values.
        log_mask: 0 for keys that take part, far below any logit for the others.
        labels: of the keys, whatever the stand-ins need, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_mask: Tensor
    labels: Tensor | None = None

    def tokens(self, x: Tensor) -> Tensor:
        """[B, H, .., .., h, w, C] -> [B, H, W, T, C] in the dtype of the sums."""
        return x.to(self.log_mask.dtype).flatten(4, 5).flatten(2, 3)


class StandIns(ABC):
    """M keys of each head in place of all that a query sees neither in its window nor among the shared keys.

    To a query they are keys as any others, [row, log weight], whose value is the mean of those that they stand for.
    What weight and values are depends on the window: its own tokens are taken out.

    Attributes:
        rows: the keys, [B or 1, H or 1, M, D].
        labels: one a token of the grid, [B, H, N, 1], that `weigh` gets with the windows, or None.
    """

    rows: Tensor
    labels: Tensor | None = None

    @abstractmethod
    def collect(self, windows: list[Windows], call: Call) -> list[tuple[Tensor, ...]]:
        """What `weigh` needs of all windows, for each group; `call` lets the backward pass compute a part again."""

    @abstractmethod
    def weigh(self, own: Windows | None, *collected: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of the weights, [B, H, W or 1, M, 1], and values, [B, H, W or 1, M, Dv].

        Args:
            own: the windows whose tokens are taken out, or None to take out nothing.
            *collected: what `collect` gave for their group.
        """


def attend_joined(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    window_size: int,
    num_sinks: int,
    num_prefix_tokens: int,
    key_mask: Tensor | None,
    make: Callable[[Tensor, Tensor, Tensor], StandIns],
    sink_queries: int = 128,
) -> Tensor:
    """Attention that is exact over windows, prefix tokens and sinks, and takes stand-ins for the rest.

    Args:
        q: queries, [B, H, N, D]: first the prefix tokens, then the grid's, row by row.
        k: keys, [B, H, N, D].
        v: values, [B, H, N, Dv].
        grid: rows and columns of tokens.
        window_size: rows and columns of a window, at most; 0 for none.
        num_sinks: keys of each sample and head that every query sees exactly.
        num_prefix_tokens: tokens that come first, attend exactly and are seen exactly.
        key_mask: [B, N] bool, False for keys that are left out.
        make: the stand-ins, from queries and keys of the grid and the logarithm of their mask, [B, H, n, 1].
        sink_queries: how many queries are asked for the sinks.

    Returns:
        [B, H, N, Dv], in float32 at least.
    """
    # While torch.jit traces, sizes are tensors; a trace is for images of one size.
    grid = int(grid[0]), int(grid[1])
    log_mask = k.new_zeros(*k.shape[:3], 1, dtype=torch.promote_types(k.dtype, torch.float32))
    if key_mask is not None:
        masked = ~key_mask[:, None, :, None]
        # What a masked key carries may be anything, NaN included.
        k, v = k.masked_fill(masked, 0.0), v.masked_fill(masked, 0.0)
        log_mask = log_mask.masked_fill(masked, LOWEST_SCALE)
    prefix = _exact(q[:, :, :num_prefix_tokens], k, v, log_mask)
    sinks = choose_sinks(q, k, num_sinks, num_prefix_tokens, key_mask, sink_queries)
    shared = _shared_keys(k, v, log_mask, sinks, num_prefix_tokens)
    log_mask = log_mask.scatter(2, sinks.unsqueeze(-1), LOWEST_SCALE)
    q, k, v, log_mask = (x[:, :, num_prefix_tokens:] for x in (q, k, v, log_mask))
    others = make(q, k, log_mask)
    attention = _Attention(q, k, v, log_mask, shared, others, grid, own=window_size > 0)
    groups = _groups(grid, window_size, int(shared[0].shape[2] + others.rows.shape[2]))
    return _join(prefix, attention.run(groups), groups, grid)


def _with_columns(x: Tensor, num_columns: int, *columns: Tensor | float) -> Tensor:
    """[..., n] with more columns, numbers or [..., 1], and zeros after those, [..., C]."""
    numbers = (y if isinstance(y, Tensor) else x.new_full((1,), y) for y in columns)
    missing = num_columns - int(x.shape[-1]) - len(columns)
    parts = [x, *numbers, x.new_zeros(missing)]
    return torch.cat([part.expand(*x.shape[:-1], -1) for part in parts], dim=-1)


def check_grid(
    q: Tensor, k: Tensor, grid: tuple[int, int], window_size: int, num_sinks: int, num_prefix_tokens: int
) -> None:
    """Refuse what doesn't fit together.

    Raises:
        ValueError: other keys than queries, negative numbers, or a grid that isn't that of the tokens.
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
    """One call: what all groups of windows need.

    A query attends, in one exact attention, to the keys of its window, to those that all queries see, and to the
    stand-ins. One more column carries what is no product: queries are [q, sqrt(D)], keys [k, log mask] and stand-ins
    [row, log weight], and products are divided by sqrt(D).

    Attributes:
        q: queries of the grid, [B, H, N, D].
        k: keys of the grid, [B, H, N, D].
        v: values of the grid, [B, H, N, Dv].
        log_mask: 0 for keys that take part in windows and sums, far below any logit for masked ones and sinks,
            [B, H, N, 1].
        shared: keys and values of the prefix and the sinks, which all queries see, [B, H, s, C] each.
        others: the stand-ins.
        grid: rows and columns.
        own: whether queries see the keys of their window exactly.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_mask: Tensor
    shared: tuple[Tensor, Tensor]
    others: StandIns
    grid: tuple[int, int]
    own: bool

    @property
    def num_columns(self) -> int:
        """C."""
        return int(self.shared[0].shape[-1])

    @property
    def differentiable(self) -> bool:
        """Whether a backward pass may follow."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.k, self.v))

    def run(self, groups: list[WindowGroup]) -> Iterator[Tensor]:
        """Attention of the queries of each group, [B, rows, columns, H, Dv]."""
        parts = [to_windows(x, self.grid, groups) for x in (self.q, self.k, self.v, self.log_mask)]
        labels = self.others.labels
        parts.append([None] * len(groups) if labels is None else to_windows(labels, self.grid, groups))  # type: ignore[list-item]
        windows = [Windows(*each) for each in zip(*parts, strict=True)]
        collected = self.others.collect(windows, self._call)
        rows = self.others.rows
        sizes = {} if self.differentiable else {group.size: group for group in groups}
        blanks = {size: self._blank(group, rows) for size, group in sizes.items()}
        for group, own, of_group in zip(groups, windows, collected, strict=True):
            yield from_windows(self._call(self._attend, own, rows, blanks.get(group.size), *of_group), group)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call it so that the backward pass computes it again: nothing of a group's size is kept."""
        if self.differentiable:
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        return function(*arguments)

    def _attend(self, own: Windows, rows: Tensor, blank: Blank | None, *collected: Tensor) -> Tensor:
        """Attention of the queries of some windows, [B, H, W x T, Dv]."""
        head_dim, value_dim = int(own.q.shape[-1]), int(own.v.shape[-1])
        log_weights, means = self.others.weigh(own if self.own else None, *collected)
        parts = (
            self._put_together(own, rows, log_weights, means)
            if blank is None
            else self._fill_in(own, log_weights, means, *blank)
        )
        q, k, v = (x.flatten(0, 2).unsqueeze(1) for x in parts)
        out = F.scaled_dot_product_attention(q, k, v, scale=head_dim**-0.5)
        return out.view(*self.q.shape[:2], -1, out.shape[-1])[..., :value_dim]

    def _put_together(
        self, own: Windows, rows: Tensor, log_weights: Tensor, means: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, [B, H, W, T, C], keys and values, [B, H, W, n, C], for a backward pass to follow."""
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

    def _fill_in(
        self, own: Windows, log_weights: Tensor, means: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same, written on what all groups of windows of one size share."""
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

    def _blank(self, group: WindowGroup, rows: Tensor) -> Blank:
        """Queries, keys and values as `_put_together` has them, but for what differs from group to group."""
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
    """Keys and values of the prefix tokens and the sinks, with their columns, [B, H, P + s, C]."""
    places = torch.arange(num_prefix_tokens, device=k.device).expand(*sinks.shape[:2], -1)
    places = torch.cat([places, sinks], dim=-1).unsqueeze(-1)
    k, v, log_mask = (torch.take_along_dim(x, places, dim=2).to(log_mask.dtype) for x in (k, v, log_mask))
    # Fused attention on GPUs needs rows of 16 bytes.
    num_columns = -(-max(k.shape[-1] + 1, v.shape[-1]) // 4) * 4
    return _with_columns(k, num_columns, log_mask), _with_columns(v, num_columns)


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


def _groups(grid: tuple[int, int], window_size: int, num_shared: int) -> list[WindowGroup]:
    if not window_size:
        # Without windows tokens still come in groups, of whole rows or of parts of one.
        rows = max(1, _GROUP_TOKENS // grid[1])
        return group_windows(grid, (rows, _GROUP_TOKENS), max_windows=1)
    return group_windows(grid, (window_size, window_size), max(1, _GROUP_KEYS // (window_size**2 + num_shared)))
