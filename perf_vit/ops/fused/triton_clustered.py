"""Clustered attention without a gradient in three Triton kernels, which read queries, keys and values in place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from perf_vit.ops.clustered_call import exact_attention
from perf_vit.ops.clusters import Clusters, describe_clusters, sample_tokens
from perf_vit.ops.fused import clustered_kernels as kernels
from perf_vit.ops.fused.launches import Tiles, in_rows, strides
from perf_vit.ops.sinks import choose_sinks
from perf_vit.ops.windows import WindowGrid, row_windows

__all__ = ["triton_clustered_attention"]

# Clusters whose sums one program holds.
_SUMMED = 32


def triton_clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    window_size: int,
    num_sinks: int,
    num_clusters: int,
    num_prefix_tokens: int,
    key_mask: Tensor | None,
) -> Tensor:
    """Compute `perf_vit.ops.clustered_attention`; arguments are as there.

    Clusters come from PyTorch operations on the sample. The kernels find the nearest cluster of each key, sum keys and
    values by cluster in each window, and attend: to prefix tokens and sinks, to the clusters less the sums of the
    query's own window, and to the keys of that window, in one loop without an N x N or a gathered buffer. All sums have
    a fixed order.
    """
    first, q, k, v = num_prefix_tokens, in_rows(q), in_rows(k), in_rows(v)
    # Kernels read the mask of a sample as adjacent bytes.
    key_mask = None if key_mask is None else key_mask.contiguous()
    grid_mask = None if key_mask is None else key_mask[:, first:]
    sample = sample_tokens(q[:, :, first:], k[:, :, first:], v[:, :, first:], grid_mask)
    # The kernels subtract the mean from keys in float32; others would be rounded by it, so that clusters move instead.
    mean = sample.mean_k()
    clusters = describe_clusters(sample.minus(mean), num_clusters)
    if k.dtype != mean.dtype:
        clusters, mean = clusters.moved(mean), torch.zeros_like(mean)
    sinks = choose_sinks(q, k, num_sinks, first, key_mask).int() if num_sinks else None
    call = _Call.of(clusters, (q, k, v), mean, grid, window_size, first, sinks, key_mask)
    out = v.new_empty(v.shape[0], v.shape[2], v.shape[1], v.shape[3]).transpose(1, 2)
    if first:
        out[:, :, :first] = _prefix(q[:, :, :first], k, v, key_mask)
    labels = call.assign()
    own = call.sum_clusters(labels)
    call.attend(labels, own, own.sum(dim=2), out)
    return out


def _prefix(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    if key_mask is not None:
        masked = ~key_mask[:, None, :, None]
        k, v = (x.masked_fill(masked, 0.0) for x in (k, v))
    return exact_attention(q, k, v, key_mask)


@dataclass(frozen=True, eq=False)
class _Call:
    """What the launches of one call share.

    Attributes:
        clusters: Clusters of the keys of the grid.
        qkv: Queries, keys and values with their prefix tokens, channels adjacent.
        mean: Vector to subtract from keys, [B, H, 1, D].
        grid: Rows and columns of tokens.
        windows: Windows of the grid.
        first: Number of prefix tokens.
        exact_near: Whether queries attend exactly to the keys of their window.
        sinks: Places of the sinks, [B, H, s]; None without any.
        key_mask: [B, N] bool, False for keys to ignore; None where all count.
        tiles: Sizes of tiles.
    """

    clusters: Clusters
    qkv: tuple[Tensor, Tensor, Tensor]
    mean: Tensor
    grid: tuple[int, int]
    windows: WindowGrid
    first: int
    exact_near: bool
    sinks: Tensor | None
    key_mask: Tensor | None
    tiles: Tiles

    @classmethod
    def of(
        cls,
        clusters: Clusters,
        qkv: tuple[Tensor, Tensor, Tensor],
        mean: Tensor,
        grid: tuple[int, int],
        window_size: int,
        first: int,
        sinks: Tensor | None,
        key_mask: Tensor | None,
    ) -> _Call:
        """Return the call for a grid, with windows of at most `window_size` tokens a side; 0 for no windows."""
        windows = WindowGrid.of(grid, window_size) if window_size else row_windows(grid)
        tiles = Tiles.of(*qkv[1:], windows.height * windows.width, qkv[1].element_size())
        return cls(clusters, qkv, mean, grid, windows, first, window_size > 0, sinks, key_mask, tiles)

    @property
    def num_windows(self) -> int:
        """Number of windows."""
        return -(-self.grid[0] // self.windows.height) * self.windows.across

    @property
    def heads(self) -> int:
        """Number of samples x heads."""
        return self.qkv[0].shape[0] * self.qkv[0].shape[1]

    def assign(self) -> Tensor:
        """Return the nearest cluster of each key of the grid, [B, H, n]; the number of clusters for keys in none."""
        k, num_clusters = self.qkv[1], self.clusters.num_clusters
        valid, length = self._valid(), k.shape[2] - self.first
        labels = torch.empty(*k.shape[:2], length, dtype=torch.int32, device=k.device)
        kernels.assign[(triton.cdiv(length, self.tiles.keys), self.heads)](
            k,
            self.mean.contiguous(),
            self.clusters.columns.contiguous(),
            k if valid is None else valid,
            labels,
            *strides(k),
            *((0, 0) if valid is None else valid.stride()[:2]),
            k.shape[1],
            self.first,
            length,
            num_clusters,
            IS_MASKED=valid is not None,
            **self._shape(),
            **self.tiles.options(queries=False),
        )
        return labels

    def sum_clusters(self, labels: Tensor) -> Tensor:
        """Return the sums of [k, 1, v] over the keys of each cluster in each window, [B, H, W, M, D + 1 + Dv]."""
        _, k, v = self.qkv
        num_clusters, size = self.clusters.num_clusters, k.shape[3] + 1 + v.shape[3]
        own = torch.empty(*k.shape[:2], self.num_windows, num_clusters, size, device=k.device)
        blocks = triton.cdiv(num_clusters, _SUMMED)
        kernels.sum_clusters[(self.num_windows * blocks, self.heads)](
            k,
            v,
            self.mean.contiguous(),
            labels,
            own,
            *strides(k),
            *strides(v),
            k.shape[1],
            self.first,
            *self._places(),
            num_clusters,
            SUMMED=_SUMMED,
            **self._shape(),
            **self.tiles.options(queries=False),
        )
        return own

    def attend(self, labels: Tensor, own: Tensor, total: Tensor, out: Tensor) -> None:
        """Write the attended values of the queries of the grid into `out`, [B, H, N, Dv].

        Args:
            labels: Result of `assign`.
            own: Result of `sum_clusters`.
            total: Sum over all windows, [B, H, M, D + 1 + Dv].
            out: Room for the result.
        """
        q, k, v = self.qkv
        blocks = triton.cdiv(self.windows.height * self.windows.width, self.tiles.queries)
        kernels.attend[(self.num_windows * blocks, self.heads)](
            q,
            k,
            v,
            out,
            self.mean.contiguous(),
            labels,
            labels if self.sinks is None else self.sinks.contiguous(),
            q if self.key_mask is None else self.key_mask,
            own,
            total,
            self.clusters.spread.contiguous(),
            self.clusters.groups.contiguous(),
            self.clusters.covariance.contiguous(),
            *(each for x in (q, k, v, out) for each in strides(x)),
            k.shape[1],
            self.first,
            *self._places(),
            self.clusters.num_clusters,
            0 if self.sinks is None else self.sinks.shape[2],
            0 if self.key_mask is None else self.key_mask.stride(0),
            q.shape[3] ** -0.5 / math.log(2),
            NUM_GROUPS=self.clusters.groups.shape[3],
            EXACT_NEAR=self.exact_near,
            HAS_LABELS=self.sinks is not None or self.key_mask is not None,
            IS_MASKED=self.key_mask is not None,
            **self._shape(),
            **self.tiles.options(queries=True),
        )

    def _valid(self) -> Tensor | None:
        """Return which tokens of the grid belong to a cluster, [B, H, n] bool; None where all do."""
        k = self.qkv[1]
        length = k.shape[2] - self.first
        valid = None if self.key_mask is None else self.key_mask[:, None, self.first :].expand(-1, k.shape[1], -1)
        if self.sinks is None:
            return valid
        every = torch.ones(*k.shape[:2], length, dtype=torch.bool, device=k.device) if valid is None else valid
        return every.scatter(2, (self.sinks - self.first).long(), False)

    def _places(self) -> tuple[int, ...]:
        """Return what places windows on the grid."""
        return (*self.grid, self.windows.height, self.windows.width, self.windows.across, self.num_windows)

    def _shape(self) -> dict[str, Any]:
        """Return the constants that tell numbers of channels, and how keys are centred."""
        _, k, v = self.qkv
        return {"D": k.shape[3], "DV": v.shape[3], "IS_CENTERED": k.dtype == torch.float32}
