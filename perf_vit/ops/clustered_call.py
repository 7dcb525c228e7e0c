"""One call of clustered attention: columns of queries and keys, sums over clusters, and windows in chunks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from perf_vit.ops.clusters import NUM_GROUPS, Clusters, constant, sum_by_label
from perf_vit.ops.stripes import Reduce
from perf_vit.ops.windows import WindowGrid, row_windows, split_dim, split_rows

__all__ = ["ClusteredCall", "exact_attention", "lowest_logit", "tokens_at_once"]

# Tokens x samples x heads of a chunk: on a CPU, its intermediate results fit in the cache; elsewhere only memory
# limits them, to about 6 GiB in float32.
_CPU_TOKENS, _DEVICE_TOKENS = 2**14, 2**21
# Fused attention on GPUs takes at most this many windows x samples x heads.
_MOST_WINDOWS = 2**16 - 1


@dataclass(frozen=True, eq=False)
class ClusteredCall:
    """One attention call: what all windows share.

    Queries, keys and values get extra columns, so that one call of `scaled_dot_product_attention` computes logits with
    additive terms and, beside the attended values, the weight of each group of clusters:

    - queries [q, 0, c, c], keys [k, 1 for a valid key, and two parts of the log weight x sqrt(D) / c]; products are
      divided by sqrt(D), and the column of ones counts keys and is for the search of the nearest cluster;
    - values [v, membership in the G groups]; near keys are in no group.

    Attributes:
        clusters: Clusters of the keys of the grid.
        windows: Windows of the grid.
        shared: Keys, values and validity of the prefix tokens and the sinks, [B, H, s, C]; None where all are valid.
        exact_near: Whether queries attend exactly to the keys of their window.
        padded: Whether windows may reach outside the grid.
        sizes: Channels of keys and of values, D and Dv.
        zero: 0 in the dtype of the attention, [1]; sums over clusters are in at least float32.
        one: 1 in the same dtype, [1].
        constant: Value of the constant columns of queries, c, in the same dtype, [1].
        chunk_size: Largest number of tokens per sample and head to process at once; None for the default.
        reduce: Sum over the processes that share the image; None if there is one.
    """

    clusters: Clusters
    windows: WindowGrid
    shared: tuple[Tensor, Tensor, Tensor | None]
    exact_near: bool
    padded: bool
    sizes: tuple[int, int]
    zero: Tensor
    one: Tensor
    constant: Tensor
    chunk_size: int | None
    reduce: Reduce | None

    @classmethod
    def of(
        cls,
        clusters: Clusters,
        grid: tuple[int, int],
        window_size: int,
        shared: tuple[Tensor, Tensor, Tensor | None],
        chunk_size: int | None = None,
        reduce: Reduce | None = None,
    ) -> ClusteredCall:
        """Return the call for a grid, with windows of at most `window_size` tokens a side; 0 for no windows."""
        windows = WindowGrid.of(grid, window_size) if window_size else row_windows(grid)
        k, v = shared[:2]
        return cls(
            clusters=clusters,
            windows=windows,
            shared=shared,
            exact_near=window_size > 0,
            padded=windows.reaches_outside(grid),
            sizes=(int(k.shape[-1]), int(v.shape[-1])),
            zero=constant(0.0, k),
            one=constant(1.0, k),
            constant=constant(_query_constant(int(k.shape[-1])), k),
            chunk_size=chunk_size,
            reduce=reduce,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the attention."""
        return self.zero.dtype

    @property
    def width(self) -> int:
        """Number of columns of queries, keys and values each; fused attention on GPUs needs a multiple of 8."""
        return -(-max(self.sizes[0] + 3, self.sizes[1] + NUM_GROUPS) // 8) * 8

    def run(
        self, prefix: Tensor, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, grid: tuple[int, int]
    ) -> Tensor:
        """Attend with the queries of the grid and append them to the prefix, [B, H, P, Dv] -> [B, H, P + n, Dv]."""
        needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        rows = self._rows_at_once(q, grid)
        # Split, not sliced: the gradients of slices would be summed as a full-size tensor each.
        parts = [split_rows(x, grid, rows) for x in (q, k, v, valid)]
        if valid is None:
            parts[-1] *= len(parts[0])
        chunks = list(zip(*parts, strict=True))
        if q.device.type == "cpu" and not (needs_gradient or is_traced):
            return self._in_buffers(prefix, chunks, grid)
        return _join(prefix, self._in_chunks(_checkpointed if needs_gradient else _called, chunks))

    def _in_chunks(self, call: Callable[..., Tensor], chunks: list[tuple[Any, ...]]) -> list[Tensor]:
        """Return the attended values of chunks of rows, [B, rows, columns, H, Dv] each, from top to bottom."""
        if len(chunks) == 1 and self.reduce is None:
            return [call(self._whole, *chunks[0])]
        own = [call(self._sums_of_rows, *chunk[1:]) for chunk in chunks]
        total = self._total(own)
        return [call(self._attend_rows, *chunk, part, total) for chunk, part in zip(chunks, own, strict=True)]

    def _total(self, own: list[Tensor]) -> Tensor:
        """Sum the results of `_sums_of_rows` over all windows of the image, also of other processes."""
        total = own[0].sum(dim=2)
        for part in own[1:]:
            total = total + part.sum(dim=2)
        return total if self.reduce is None else self.reduce(total, "sum")

    def _rows_at_once(self, q: Tensor, grid: tuple[int, int]) -> int:
        if torch.compiler.is_compiling():
            return grid[0]
        tokens = tokens_at_once(q) if self.chunk_size is None else self.chunk_size
        most = tokens // (self.windows.height * grid[1])
        if q.device.type != "cpu":
            most = min(most, _MOST_WINDOWS // (q.shape[0] * q.shape[1] * self.windows.across))
        return self.windows.height * max(1, most)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Attend with all queries at once, [B, H, rows, columns, D] -> [B, rows, columns, H, Dv]."""
        tokens = self.windows.split(*self.query_columns(q), *self.key_columns(k, v, valid))
        own = self.sums(tokens[..., self.width :], valid is not None)
        return self.windows.join(self.attend(tokens, own, own.sum(dim=2), valid is not None), q.shape[2])

    def _sums_of_rows(self, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Sum keys and values of rows of windows by cluster, [B, H, rows, columns, D] -> [B, H, W, M, 2 x width]."""
        columns = self.windows.split(*self.key_columns(k, v, valid))
        return self.sums(columns, valid is not None)

    def _attend_rows(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, own: Tensor, total: Tensor) -> Tensor:
        """Attend with the queries of rows of windows, [B, H, rows, columns, D] -> [B, rows, columns, H, Dv].

        Args:
            q: Queries.
            k: Keys.
            v: Values.
            valid: Which keys count, [B, H or 1, rows, columns, 1]; None for all.
            own: Result of `_sums_of_rows`.
            total: Sum over all windows of the image, [B, H, M, 2 x width].
        """
        tokens = self.windows.split(*self.query_columns(q), *self.key_columns(k, v, valid))
        return self.windows.join(self.attend(tokens, own, total, valid is not None), q.shape[2])

    def query_columns(self, q: Tensor) -> list[Tensor]:
        """Return the parts of the columns of queries, [..., width] together."""
        size, head_dim = q.shape[:-1], self.sizes[0]
        after = self.zero.expand(*size, self.width - head_dim - 3)
        return [q, self.zero.expand(*size, 1), self.constant.expand(*size, 2), after]

    def key_columns(self, k: Tensor, v: Tensor, valid: Tensor | None) -> list[Tensor]:
        """Return the parts of the columns of keys and values, [..., 2 x width] together; log weights are 0."""
        size = k.shape[:-1]
        ones = self.one.expand(*size, 1) if valid is None else valid.to(k.dtype).expand(*size, 1)
        after_k, after_v = (self.zero.expand(*size, self.width - gap) for gap in (self.sizes[0] + 1, self.sizes[1]))
        return [k, ones, after_k, v, after_v]

    def _hide(self, columns: Tensor) -> Tensor:
        """Set the log weight of invalid keys far below any logit, in place."""
        head_dim = self.sizes[0]
        columns[..., head_dim + 1].masked_fill_(columns[..., head_dim] == 0, lowest_logit(self.dtype))
        return columns

    def sums(self, columns: Tensor, masked: bool) -> Tensor:
        """Sum the columns over the keys of each cluster in each window, [B, H, W, T, C] -> [B, H, W, M, C]."""
        columns, head_dim = columns.to(self.clusters.columns.dtype), self.sizes[0]
        nearest = self.clusters.nearest(columns[..., : head_dim + 1].flatten(2, 3)).view(columns.shape[:-1])
        if masked:
            nearest = nearest.masked_fill(columns[..., head_dim] == 0, self.clusters.num_clusters)
        return sum_by_label(columns, nearest, self.clusters.num_clusters)

    def attend(self, tokens: Tensor, own: Tensor, total: Tensor, masked: bool) -> Tensor:
        """Attend with the queries of windows, [B, H, W, T, 3 x width] -> [B, H, W, T, Dv].

        Args:
            tokens: Columns of queries, keys and values.
            own: Sums over the keys of each window, from `sums`.
            total: Sums over all windows of the image, [B, H, M, 2 x width].
            masked: Whether some keys are invalid.
        """
        each = (-1, -1, tokens.shape[2], -1, -1)
        keys = [self._shared_columns().unsqueeze(2).expand(each), self._far(own, total).expand(each)]
        if self.exact_near:
            near = tokens[..., self.width :]
            keys.insert(0, self._hide(near) if masked or self.padded else near)
        return self._attend_to(tokens[..., : self.width], torch.cat(keys, dim=3))

    def _attend_to(self, queries: Tensor, keys: Tensor, moved: Tensor | None = None) -> Tensor:
        """Attend with the columns of queries, [B, H, W, T, width], to those of keys, [B, H, W, n, 2 x width]."""
        head_dim = self.sizes[0]
        q, kv = (x.flatten(0, 2).unsqueeze(1) for x in (queries, keys))
        out = F.scaled_dot_product_attention(q, kv[..., : self.width], kv[..., self.width :], scale=head_dim**-0.5)
        out, end = out.view(*queries.shape[:-1], self.width), self.sizes[1] + self.clusters.groups.shape[-1]
        return self.corrected(queries[..., :head_dim], out[..., : self.sizes[1]], out[..., self.sizes[1] : end], moved)

    def _shared_columns(self) -> Tensor:
        """Return the columns of the keys that all queries attend to, [B, H, s, 2 x width]."""
        shared = torch.cat(self.key_columns(*self.shared), dim=-1)
        return shared if self.shared[2] is None else self._hide(shared)

    def _in_buffers(self, prefix: Tensor, chunks: list[tuple[Any, ...]], grid: tuple[int, int]) -> Tensor:
        """Attend as `run` does, without a gradient, in buffers that all chunks of one height share.

        Every value is written once: joining and padding columns would copy all of them several times.
        """
        buffers = {int(chunk[0].shape[2]): chunk for chunk in chunks}
        near = {rows: self._near_buffer(chunk[1], 0) for rows, chunk in buffers.items()}
        own = [self.sums(self._fill(near[int(q.shape[2])], *keys), keys[-1] is not None) for q, *keys in chunks]
        del near
        total = self._total(own)
        filled = {rows: self._buffers(*chunk[:2]) for rows, chunk in buffers.items()}
        out = prefix.new_empty(prefix.shape[0], prefix.shape[2] + grid[0] * grid[1], *prefix.shape[1::2])
        out[:, : prefix.shape[2]] = prefix.transpose(1, 2)
        on_grid = split_dim(out[:, prefix.shape[2] :], 1, *grid).permute(0, 3, 1, 2, 4)
        first = 0
        for (q, k, v, valid), part in zip(chunks, own, strict=True):
            rows, (queries, keys, moved) = int(q.shape[2]), filled[int(q.shape[2])]
            self.windows.write(q, queries[..., : self.sizes[0]])
            num_near = queries.shape[3] if self.exact_near else 0
            if num_near:
                self._fill(keys[:, :, :, :num_near], k, v, valid)
            self._write_far(part, total, keys[:, :, :, num_near + self.shared[0].shape[2] :])
            self.windows.read(self._attend_to(queries, keys, moved), on_grid[:, :, first : first + rows])
            first += rows
        return out.transpose(1, 2)

    def _write_far(self, own: Tensor, total: Tensor, out: Tensor) -> None:
        """Write the columns of `_far` into `out`."""
        if self.dtype != total.dtype:
            out.copy_(self._far(own, total))
            return
        left = torch.sub(total.unsqueeze(2), own, out=out) if self.exact_near else out.copy_(total.unsqueeze(2))
        head_dim = self.sizes[0]
        number = left[..., head_dim, None].clone()
        left /= number.clamp(min=1.0)
        for column, part in enumerate(self._log_weights(number), head_dim + 1):
            out[..., column, None] = part
        groups = self.clusters.groups.unsqueeze(2)
        start = self.width + self.sizes[1]
        out[..., start : start + groups.shape[-1]] = groups

    def _near_buffer(self, k: Tensor, extra: int) -> Tensor:
        """Return columns of the keys of windows and `extra` keys, of which only the validity of the first is set."""
        tokens = self.windows.height * self.windows.width
        down = -(-k.shape[2] // self.windows.height)
        columns = k.new_zeros(*k.shape[:2], down * self.windows.across, tokens + extra, 2 * self.width)
        near = columns[:, :, :, :tokens]
        self.windows.write(self.one.expand(*k.shape[:-1], 1), near[..., self.sizes[0], None])
        self._hide(near)
        return columns

    def _buffers(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the columns of queries and keys of a chunk, whose shared parts are set, and room for `corrected`."""
        head_dim, shared = self.sizes[0], self._shared_columns()
        if self.exact_near:
            keys = self._near_buffer(k, shared.shape[2] + self.clusters.num_clusters)
        else:
            number = -(-q.shape[2] // self.windows.height) * self.windows.across
            size = (*q.shape[:2], number, shared.shape[2] + self.clusters.num_clusters, 2 * self.width)
            keys = q.new_zeros(size)
        start = keys.shape[3] - self.clusters.num_clusters - shared.shape[2]
        keys[:, :, :, start : start + shared.shape[2]] = shared.unsqueeze(2)
        queries = q.new_zeros(*keys.shape[:3], self.windows.height * self.windows.width, self.width)
        queries[..., head_dim + 1 : head_dim + 3] = self.constant
        moved = q.new_empty(*queries.shape[:4], self.clusters.groups.shape[-1], head_dim)
        return queries, keys, moved

    def _fill(self, columns: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Write keys, values and validity into the columns of windows."""
        self.windows.write(k, columns[..., : self.sizes[0]])
        self.windows.write(v, columns[..., self.width : self.width + self.sizes[1]])
        if valid is not None:
            self.windows.write(valid.expand(*k.shape[:-1], 1).to(k.dtype), columns[..., self.sizes[0], None])
            columns[..., self.sizes[0] + 1] = 0.0
            self._hide(columns)
        return columns

    def corrected(self, q: Tensor, values: Tensor, mass: Tensor, moved: Tensor | None = None) -> Tensor:
        """Add the first-order change of the values of clusters, [B, H, W, T, Dv].

        Args:
            q: Queries, [B, H, W, T, D].
            values: Attended values, [B, H, W, T, Dv].
            mass: Weights of the groups of clusters, [B, H, W, T, G].
            moved: Room for the products of weights and queries, [B, H, W, T, G, D].
        """
        moved = torch.mul(mass.unsqueeze(-1), q.unsqueeze(-2), out=moved).flatten(-2).flatten(2, 3).flatten(0, 1)
        covariance = self.clusters.covariance.flatten(0, 1).flatten(1, 2).to(moved.dtype)
        scale, flat = self.sizes[0] ** -0.5, values.flatten(2, 3).flatten(0, 1)
        return torch.baddbmm(flat, moved, covariance, alpha=scale).view(values.shape)

    def _far(self, own: Tensor, total: Tensor) -> Tensor:
        """Return the columns of the clusters outside each window, [B, H, W or 1, M, 2 x width]."""
        head_dim, value_dim = self.sizes
        left = total.unsqueeze(2) - own if self.exact_near else total.unsqueeze(2)
        number = left[..., head_dim, None].detach()
        far = left / number.clamp(min=1.0)
        groups = self.clusters.groups.unsqueeze(2).expand(*far.shape[:-1], -1)
        after_v = self.zero.expand(*far.shape[:-1], self.width - value_dim - groups.shape[-1])
        of_keys, of_values = far[..., : head_dim + 1], far[..., head_dim + 3 : self.width + value_dim]
        parts = [of_keys, *self._log_weights(number), of_values, groups, after_v]
        return torch.cat([part.to(self.dtype) for part in parts], dim=-1)

    def _log_weights(self, number: Tensor) -> tuple[Tensor, Tensor]:
        """Return two parts of the log weight of clusters with so many keys outside the window, [B, H, W, M, 1]."""
        # Counts are exact: a cluster that lies within the window has weight 0, whatever its variance.
        log_number, spread, lowest = number.log(), self.clusters.spread.unsqueeze(2), lowest_logit(self.dtype)
        factor = self.sizes[0] ** 0.5 / _query_constant(self.sizes[0])
        if factor != 1.0:
            log_number, spread = log_number * factor, spread * factor
        if self.dtype == number.dtype:
            return log_number.clamp(min=lowest), spread.expand(number.shape)
        # The second part is the rounding error of the first.
        both = (log_number + spread).clamp(lowest, -lowest)
        rounded = both.to(self.dtype)
        return rounded, both - rounded


def _query_constant(head_dim: int) -> float:
    """Return the value of the constant columns of queries: about sqrt(D), and the same in every dtype."""
    return 2.0 ** round(math.log2(head_dim) / 2)


def tokens_at_once(q: Tensor) -> int:
    """Return how many tokens per sample and head, [B, H, N, D], to process at once on the device of the queries."""
    return (_CPU_TOKENS if q.device.type == "cpu" else _DEVICE_TOKENS) // (q.shape[0] * q.shape[1])


def exact_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """Attend exactly; a sample without a visible key, whose values are 0, gets 0."""
    if key_mask is None:
        return F.scaled_dot_product_attention(q, k, v)
    hidden = q.new_zeros(key_mask.shape).masked_fill(~key_mask, lowest_logit(q.dtype))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=hidden[:, None, None])


def lowest_logit(dtype: torch.dtype) -> float:
    """Return an additive term of logits that removes a key, whose product with sqrt(D) is finite in float32."""
    return -3e4 if dtype == torch.float16 else -1e30


def _called(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return function(*arguments)


def _checkpointed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call a function so that the backward pass computes it again: no tensor of a chunk is stored."""
    found: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return found


def _join(prefix: Tensor, parts: list[Tensor]) -> Tensor:
    """Join the prefix, [B, H, P, Dv], and chunks of rows, [B, rows, columns, H, Dv], to [B, H, N, Dv]."""
    tokens = [prefix.transpose(1, 2), *(part.flatten(1, 2) for part in parts)]
    return torch.cat(tokens, dim=1).transpose(1, 2)
