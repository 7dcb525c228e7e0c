"""Attention over an image that is read in parts: every query attends to all keys, and memory holds one part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from perf_vit.ops.clustered_call import ClusteredCall
from perf_vit.ops.clusters import Sample, describe_clusters, sampled_places
from perf_vit.ops.features import LOWEST_SCALE, token_slices
from perf_vit.ops.state import KVState
from perf_vit.ops.stripes import Reduce, sum_together
from perf_vit.ops.windows import WindowGrid, attend_where, split_dim

__all__ = [
    "AttentionStream",
    "ClusteredStream",
    "LinearStream",
    "Part",
    "Reduce",
    "WholeStream",
    "WindowStream",
    "sampled_places",
]

_FEATURE_TOKENS = 512
"""Tokens whose random features are in memory at once, as in `favor_attention` on a CPU."""

_WINDOW_TOKENS = 2**14
"""Tokens x samples x heads whose windows are attended to at once, as in `clustered_attention` on a CPU."""


@dataclass(frozen=True, eq=False)
class Part:
    """Tokens of some rows of a grid; tokens that aren't computed are left out.

    Attributes:
        first_row: First row of the grid that the part covers.
        rows: Number of rows.
        places: Index of each token in the row-major order of these rows, increasing, [n].
        counted: Tokens that queries attend to, bool [n]; None for all.
    """

    first_row: int
    rows: int
    places: Tensor
    counted: Tensor | None = None

    def keys(self, x: Tensor) -> Tensor:
        """Return the tokens that queries attend to, [B, H, n, D]."""
        return x if self.counted is None else x[:, :, self.counted]

    def of_keys(self) -> Part:
        """Return the part without the other tokens."""
        return self if self.counted is None else replace(self, places=self.places[self.counted], counted=None)


class AttentionStream(ABC):
    """Attention of one layer in two passes over the parts of an image: `collect` from all, then `attend` with each.

    Memory is that of one part and of sums whose size doesn't depend on the image. Queries, keys and values are [B, H,
    n, D]; parts are given in any order, each once. Several processes may hold parts of one image: each collects from
    its own, and `reduce` adds up the sums of all before any attends.
    """

    @property
    def rows_at_once(self) -> int:
        """Number of rows of the grid that belong together: parts begin at a multiple of it."""
        return 1

    @abstractmethod
    def collect(self, q: Tensor, k: Tensor, v: Tensor, part: Part) -> None:
        """Add the tokens of a part."""

    @abstractmethod
    def reduce(self, reduce: Reduce) -> None:
        """Replace what this process collected by what all processes collected; all of them must call it.

        Args:
            reduce: Element-wise sum or maximum over processes.
        """

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, part: Part) -> Tensor:
        """Attend with the queries of a part to all that was collected, [B, H, n, Dv]."""

    @abstractmethod
    def attend_prefix(self) -> Tensor:
        """Attend with the queries of the prefix tokens to all that was collected, [B, H, P, Dv]."""


class WholeStream(AttentionStream):
    """Any attention, of a small image: all queries, keys and values stay in memory.

    Args:
        function: Attention of queries, keys and values, [B, H, P + rows x columns, D], given the keys that count, bool
            [B, P + rows x columns].
        prefix: Queries, keys and values of the prefix tokens, [B, H, P, D] each.
        grid: Rows and columns of the image's tokens.
    """

    def __init__(
        self,
        function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        prefix: tuple[Tensor, Tensor, Tensor],
        grid: tuple[int, int],
    ) -> None:
        self._function, self._columns, self._num_prefix = function, grid[1], prefix[0].shape[2]
        self._prefix = prefix
        self._tensors = [F.pad(torch.zeros_like(x), (0, 0, 0, grid[0] * grid[1])) for x in prefix]
        self._valid = torch.zeros(self._tensors[0].shape[2], dtype=torch.bool)
        self._attended: Tensor | None = None

    def collect(self, q: Tensor, k: Tensor, v: Tensor, part: Part) -> None:
        """Add the tokens of a part."""
        index = self._index(part)
        for whole, some in zip(self._tensors, (q, k, v), strict=True):
            whole[:, :, index] = some
        self._valid[index] = True if part.counted is None else part.counted

    def reduce(self, reduce: Reduce) -> None:
        """Replace what this process collected by what all processes collected."""
        self._tensors = [reduce(x, "sum") for x in self._tensors]
        self._valid = reduce(self._valid.to(torch.uint8), "max").bool()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, part: Part) -> Tensor:
        """Attend with the queries of a part to all that was collected, [B, H, n, Dv]."""
        return self._all()[:, :, self._index(part)]

    def attend_prefix(self) -> Tensor:
        """Attend with the queries of the prefix tokens to all that was collected, [B, H, P, Dv]."""
        return self._all()[:, :, : self._num_prefix]

    def _all(self) -> Tensor:
        if self._attended is None:
            for whole, some in zip(self._tensors, self._prefix, strict=True):
                whole[:, :, : self._num_prefix] = some
            self._valid[: self._num_prefix] = True
            q, k, v = self._tensors
            self._attended = self._function(q, k, v, self._valid.expand(q.shape[0], -1))
        return self._attended

    def _index(self, part: Part) -> Tensor:
        return part.places + self._num_prefix + part.first_row * self._columns


class LinearStream(AttentionStream):
    """FAVOR+ attention in parts: their states add up (see `KVState`).

    Args:
        prefix: Queries, keys and values of the prefix tokens, [B, H, P, D].
        projection: Rows of the feature map, [R, D].
        kernel: Name of the feature map.

    Raises:
        ValueError: The kernel fits a parameter to all queries and keys.
    """

    def __init__(self, prefix: tuple[Tensor, Tensor, Tensor], projection: Tensor, kernel: str) -> None:
        self._prefix = prefix
        self._projection, self._kernel = projection, kernel
        # The state of no keys.
        none = torch.zeros_like(prefix[1][:, :, :1]) if prefix[1].shape[2] else F.pad(prefix[1], (0, 0, 0, 1))
        mask = torch.zeros(none.shape[0], 1, dtype=torch.bool)
        self._state = KVState.from_keys(none, none, projection, kernel, mask)
        self._normalized: KVState | None = None

    def collect(self, q: Tensor, k: Tensor, v: Tensor, part: Part) -> None:
        """Add the tokens of a part."""
        k, v = part.keys(k), part.keys(v)
        for tokens in token_slices(k, _FEATURE_TOKENS) if k.shape[2] else ():
            self._state = self._state.update(k[tokens], v[tokens])

    def reduce(self, reduce: Reduce) -> None:
        """Replace what this process collected by what all processes collected."""
        self._state = self._state.reduced(reduce)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, part: Part) -> Tensor:
        """Attend with the queries of a part to all that was collected, [B, H, n, Dv]."""
        state = self._all()
        return torch.cat([state.attend(q[tokens]) for tokens in token_slices(q, _FEATURE_TOKENS)], dim=2)

    def attend_prefix(self) -> Tensor:
        """Attend with the queries of the prefix tokens to all that was collected, [B, H, P, Dv]."""
        return self._all().attend(self._prefix[0])

    def _all(self) -> KVState:
        """Return the state of all keys, those of the prefix included."""
        if self._normalized is None:
            _, k, v = self._prefix
            state = self._state.update(k, v) if k.shape[2] else self._state
            self._normalized = state.normalized()
        return self._normalized


class ClusteredStream(AttentionStream):
    """Clustered attention without sinks in parts: sums over clusters add up, and windows lie within a part.

    Args:
        sample: Queries, keys and values of the tokens at `sampled_places`, [B, H, n, D] each.
        prefix: Queries, keys and values of the prefix tokens, [B, H, P, D] each.
        grid: Rows and columns of the image's tokens.
        window_size: Largest number of rows and columns of a window; 0 for no windows.
        num_clusters: Largest number of clusters per sample and head.
    """

    def __init__(
        self,
        sample: tuple[Tensor, Tensor, Tensor],
        prefix: tuple[Tensor, Tensor, Tensor],
        grid: tuple[int, int],
        window_size: int,
        num_clusters: int,
    ) -> None:
        dtype = torch.promote_types(sample[1].dtype, torch.float32)
        tokens = Sample(*(x.to(dtype) for x in sample))
        mean = tokens.mean_k().detach()
        clusters = describe_clusters(tokens.minus(mean), num_clusters)
        # One vector subtracted from all keys changes no weight, but would round 16-bit keys.
        if dtype != prefix[1].dtype:
            clusters, mean = clusters.moved(mean), mean.new_zeros(1, dtype=prefix[1].dtype)
        self._mean = mean
        self._prefix_keys = (prefix[1] - self._mean, prefix[2])
        self._call = ClusteredCall.of(clusters, grid, window_size, (*self._prefix_keys, None))
        shape = (*clusters.columns.shape[:3], 2 * self._call.width)
        self._total = torch.zeros(shape, dtype=clusters.columns.dtype)
        self._prefix = _ExactQueries(prefix[0], prefix[2].shape[-1])
        self._attended_prefix: Tensor | None = None

    @property
    def rows_at_once(self) -> int:
        """Number of rows of a window."""
        return self._call.windows.height

    def collect(self, q: Tensor, k: Tensor, v: Tensor, part: Part) -> None:
        """Add the tokens of a part."""
        k, v, call = part.keys(k), part.keys(v), self._call
        if not k.shape[2]:
            return
        k = k - self._mean
        self._prefix.collect(k, v)
        slots = _Slots.of(call.windows, part.of_keys(), k)
        columns = slots.fill(torch.cat(call.key_columns(k, v, None), dim=-1))
        for windows in slots.groups(columns):
            self._total += call.sums(windows, slots.is_padded).sum(dim=2)

    def reduce(self, reduce: Reduce) -> None:
        """Replace what this process collected by what all processes collected."""
        self._total = self._prefix.reduce(reduce, self._total)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, part: Part) -> Tensor:
        """Attend with the queries of a part to all that was collected, [B, H, n, Dv]."""
        call, slots = self._call, _Slots.of(self._call.windows, part, k)
        counted = None if part.counted is None else part.counted[:, None]
        columns = [*call.query_columns(q), *call.key_columns(k - self._mean, v, counted)]
        tokens = slots.fill(torch.cat(columns, dim=-1))
        masked = slots.is_padded or counted is not None
        found = [
            call.attend(windows, call.sums(windows[..., call.width :], masked), self._total, masked)
            for windows in slots.groups(tokens)
        ]
        return slots.take(torch.cat(found, dim=2))

    def attend_prefix(self) -> Tensor:
        """Attend with the queries of the prefix tokens to all that was collected, [B, H, P, Dv]."""
        if self._attended_prefix is None:
            if self._prefix_keys[0].shape[2]:
                self._prefix.collect(*self._prefix_keys)
            self._attended_prefix = self._prefix.attend()
        return self._attended_prefix


class WindowStream(AttentionStream):
    """Exact attention within windows in parts, and of the prefix tokens to all tokens; windows lie within a part.

    Args:
        prefix: Queries, keys and values of the prefix tokens, [B, H, P, D] each.
        grid: Rows and columns of the image's tokens.
        window_size: Largest number of rows and columns of a window.
        to_prefix: Whether all tokens attend to the prefix tokens, too.
    """

    def __init__(
        self, prefix: tuple[Tensor, Tensor, Tensor], grid: tuple[int, int], window_size: int, *, to_prefix: bool
    ) -> None:
        self._windows = WindowGrid.of(grid, window_size)
        q, self._k, self._v = prefix
        self._shared = q.shape[2] if to_prefix else 0
        self._prefix = _ExactQueries(q, self._v.shape[-1])
        self._attended_prefix: Tensor | None = None

    @property
    def rows_at_once(self) -> int:
        """Number of rows of a window."""
        return self._windows.height

    def collect(self, q: Tensor, k: Tensor, v: Tensor, part: Part) -> None:
        """Add the tokens of a part, which only prefix tokens attend to from outside."""
        k, v = part.keys(k), part.keys(v)
        if k.shape[2] and self._k.shape[2]:
            self._prefix.collect(k, v)

    def reduce(self, reduce: Reduce) -> None:
        """Replace what this process collected by what all processes collected."""
        self._prefix.reduce(reduce, self._v.new_zeros(1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, part: Part) -> Tensor:
        """Attend with the queries of a part to their windows, [B, H, n, Dv]; 0 where no key is visible."""
        slots = _Slots.of(self._windows, part, k)
        counted = k.new_ones(len(part.places)) if part.counted is None else part.counted.to(k.dtype)
        columns = [q, k, v, counted[:, None].expand(*k.shape[:3], 1)]
        sizes = [x.shape[-1] for x in columns]
        groups = slots.groups(slots.fill(torch.cat(columns, dim=-1)))
        return slots.take(torch.cat([self._attend(*torch.split(each, sizes, dim=-1)) for each in groups], dim=2))

    def attend_prefix(self) -> Tensor:
        """Attend with the queries of the prefix tokens to all that was collected, [B, H, P, Dv]."""
        if self._attended_prefix is None:
            if self._k.shape[2]:
                self._prefix.collect(self._k, self._v)
            self._attended_prefix = self._prefix.attend()
        return self._attended_prefix

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, counted: Tensor) -> Tensor:
        """Attend within windows, [B, H, W, T, D], to keys that count, [B, H, W, T, 1], and to the prefix."""
        num_heads, num_windows = q.shape[1:3]
        first = (x[:, :, : self._shared].repeat_interleave(num_windows, dim=1) for x in (self._k, self._v))
        k, v = (torch.cat([one, own.flatten(1, 2)], dim=2) for one, own in zip(first, (k, v), strict=True))
        seen = F.pad(counted[..., 0].flatten(1, 2) > 0, (self._shared, 0), value=True)
        return split_dim(attend_where(q.flatten(1, 2), k, v, seen), 1, num_heads, num_windows)


@dataclass(frozen=True, eq=False)
class _Slots:
    """Where the tokens of a part lie in its windows; windows without a token are left out.

    Attributes:
        slot: Index of each token among those of all windows, [n].
        num_windows: Number of windows W.
        size: Number of tokens of a window, T.
        at_once: Windows of a group.
    """

    slot: Tensor
    num_windows: int
    size: int
    at_once: int

    @classmethod
    def of(cls, windows: WindowGrid, part: Part, k: Tensor) -> _Slots:
        """Return the places of the tokens of a part, whose keys are [B, H, n, D]."""
        row, column = part.places // windows.columns, part.places % windows.columns
        window = row // windows.height * windows.across + column // windows.width
        kept, rank = torch.unique(window, return_inverse=True)
        size = windows.height * windows.width
        inner = row % windows.height * windows.width + column % windows.width
        at_once = max(1, _WINDOW_TOKENS // (size * k.shape[0] * k.shape[1]))
        return cls(rank * size + inner, len(kept), size, at_once)

    @property
    def is_padded(self) -> bool:
        """Whether some places of the windows hold no token."""
        return len(self.slot) < self.num_windows * self.size

    def fill(self, x: Tensor) -> Tensor:
        """Arrange tokens as windows, 0 where there is none, [B, H, n, C] -> [B, H, W, T, C]."""
        filled = x.new_zeros(*x.shape[:2], self.num_windows * self.size, x.shape[-1]).index_copy(2, self.slot, x)
        return filled.view(*x.shape[:2], self.num_windows, self.size, x.shape[-1])

    def take(self, x: Tensor) -> Tensor:
        """Return the tokens of windows, [B, H, W, T, C] -> [B, H, n, C]."""
        return x.flatten(2, 3).index_select(2, self.slot)

    def groups(self, x: Tensor) -> list[Tensor]:
        """Split windows, [B, H, W, T, C], into groups."""
        return list(torch.split(x, self.at_once, dim=2))


class _ExactQueries:
    """Exact attention of a few queries to keys that arrive in parts.

    Sums are rescaled when a larger logit arrives (Milakov and Gimelshein 2018, "Online normalizer calculation for
    softmax", algorithm 3).

    Args:
        q: Queries, [B, H, P, D].
        value_dim: Channels of values, Dv.
    """

    def __init__(self, q: Tensor, value_dim: int) -> None:
        self._dtype = q.dtype
        # Parts of a large image would be lost in the rounding of 16-bit sums.
        q = q.to(torch.promote_types(q.dtype, torch.float32))
        self._q = q * q.shape[-1] ** -0.5
        self._largest = q.new_full((*q.shape[:3], 1), LOWEST_SCALE)
        self._sums, self._weights = q.new_zeros(*q.shape[:3], value_dim), q.new_zeros(*q.shape[:3], 1)

    def collect(self, k: Tensor, v: Tensor) -> None:
        """Add keys, [B, H, n, D], and values, [B, H, n, Dv]."""
        k, v = k.to(self._q.dtype), v.to(self._q.dtype)
        logits = self._q @ k.mT
        self._rescale(torch.maximum(logits.amax(dim=-1, keepdim=True), self._largest))
        weights = (logits - self._largest).exp()
        self._sums = self._sums + weights @ v
        self._weights = self._weights + weights.sum(dim=-1, keepdim=True)

    def reduce(self, reduce: Reduce, other: Tensor) -> Tensor:
        """Replace what this process collected by what all processes collected, and return other sums over them."""
        self._rescale(reduce(self._largest, "max"))
        other, self._sums, self._weights = sum_together(reduce, other, self._sums, self._weights)
        return other

    def attend(self) -> Tensor:
        """Return the attended values, [B, H, P, Dv]."""
        return (self._sums / self._weights).to(self._dtype)

    def _rescale(self, largest: Tensor) -> None:
        kept = (self._largest - largest).exp()
        self._largest, self._sums, self._weights = largest, kept * self._sums, kept * self._weights
