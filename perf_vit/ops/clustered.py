"""Clustered attention: exact within windows and on sinks, one weight per cluster of keys elsewhere."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from perf_vit.ops.features import LOWEST_SCALE, token_slices, without_autocast
from perf_vit.ops.sinks import spread_tokens
from perf_vit.ops.state import check_attention_keys
from perf_vit.ops.window_attention import Call, SummaryKeys, Windows, attend_with_summaries, check_grid

__all__ = ["choose_clusters", "clustered_attention"]

SINK_QUERIES = 32
_CHUNK_KEYS = 1024
# Means of queries and cluster centres are computed from a subsample of at least this many tokens.
_STATISTICS_TOKENS = 2048
_ITERATIONS = 2


def clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    window_size: int = 16,
    num_sinks: int = 64,
    num_clusters: int = 96,
    num_prefix_tokens: int = 1,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Softmax attention with one weight per cluster of keys; the keys of a query's window and the sinks stay exact.

    out_i = (sum_{j in S(i)} exp(q_i.k_j / sqrt(D)) v_j + sum_{j not in S(i)} w_i,c(j) v_j) / (the sums without v_j),
    where c(j) is the cluster of key j, with the mean m_c and the variance s_c of its keys in each channel, and

        w_i,c = exp(q_i.m_c / sqrt(D) + sum_d E[q_d^2] s_c,d / 2 D)

    is the second-order approximation of the mean of exp(q_i.k_j / sqrt(D)) over the cluster. The second-order term uses
    the mean (E) over all queries, or over a subsample of 2,048 or more. S(i) holds the tokens of the 2-D window of i,
    the prefix tokens and the sinks of the head: the keys with the largest weights in exact attention. Prefix tokens
    attend exactly.

    The weight by cluster size follows merged tokens (Bolya et al. 2022, "Token Merging", equation 1), the combination
    of fine-grained near and coarse far attention follows focal attention (Yang et al. 2021). The operation is
    deterministic. The assignment of keys to clusters has no gradient. Time and memory are linear in the number of
    tokens, forward and backward. `perf_vit.ops.naive.naive_clustered_attention` is the N x N reference.

    Args:
        q: Queries, [B, H, N, D]: prefix tokens first, then the grid in row-major order.
        k: Keys, [B, H, N, D].
        v: Values, [B, H, N, Dv].
        grid: Rows and columns of tokens; N = num_prefix_tokens + rows x columns.
        window_size: Largest number of rows and columns of a window; the grid is split into the fewest windows of nearly
            equal size. 0 for no windows.
        num_sinks: Number of keys per sample and head to which every query attends exactly; 0 for none.
        num_clusters: Number of clusters per sample and head, at most the number of tokens of the grid.
        num_prefix_tokens: Number of class and register tokens, which come first.
        key_mask: [B, N] bool, False for keys to ignore.

    Returns:
        Attended values, [B, H, N, Dv], in the dtype of `q`; 0 for queries without a visible key.

    Raises:
        ValueError: The shapes are inconsistent or `num_clusters` is below 1.
    """
    check_attention_keys(k, v, key_mask)
    check_grid(q, k, grid, window_size, num_sinks, num_prefix_tokens)
    if num_clusters < 1:
        raise ValueError(f"num_clusters must be 1 or more, got {num_clusters}; 96 suits images of 500 px and up")
    with without_autocast(q):

        def make_summaries(queries: Tensor, keys: Tensor, log_mask: Tensor) -> _Clusters:
            seen = None if key_mask is None else key_mask[:, num_prefix_tokens:]
            nearest = _NearestCenter(keys, num_clusters, seen)
            return _Clusters(_mean_square(queries, seen, log_mask.dtype), keys, log_mask, nearest)

        sizes = (window_size, num_sinks, num_prefix_tokens)
        return attend_with_summaries(q, k, v, grid, *sizes, key_mask, make_summaries, SINK_QUERIES).to(q.dtype)


def choose_clusters(k: Tensor, num_clusters: int, key_mask: Tensor | None = None) -> Tensor:
    """Assign each key to the nearest of `num_clusters` centres by Euclidean distance.

    The centres come from two Lloyd iterations of k-means on 2,048 or more evenly spaced keys, initialised with evenly
    spaced keys (Lloyd 1982, "Least squares quantization in PCM").

    Args:
        k: Keys, [B, H, N, D].
        num_clusters: Number of clusters, at most N.
        key_mask: [B, N] bool, False for keys to exclude from the centres.

    Returns:
        Cluster index of each key, [B, H, N].
    """
    nearest = _NearestCenter(k, num_clusters, key_mask)
    return torch.cat([nearest(k[keys].to(nearest.centers.dtype)) for keys in token_slices(k, _CHUNK_KEYS)], dim=2)


class _NearestCenter:
    """K-means centres of keys; a call returns the index of the nearest centre."""

    def __init__(self, k: Tensor, num_clusters: int, key_mask: Tensor | None) -> None:
        k = k.detach()
        dtype = torch.promote_types(k.dtype, torch.float32)
        every = slice(None, None, max(1, k.shape[2] // _STATISTICS_TOKENS))
        some = k[:, :, every].to(dtype)
        self._set(spread_tokens(k, num_clusters, key_mask).to(dtype))
        numbers = torch.arange(self.centers.shape[2], device=k.device).unsqueeze(-1)
        for _ in range(_ITERATIONS):
            is_member = self(some).unsqueeze(-2) == numbers
            if key_mask is not None:
                is_member &= key_mask[:, None, None, every]
            members = is_member.to(dtype)
            number = members.sum(dim=-1, keepdim=True)
            # A centre without keys is kept.
            self._set(torch.where(number > 0, members @ some / number.clamp(min=1.0), self.centers))

    def _set(self, centers: Tensor) -> None:
        self.centers, self.bias = centers, centers.square().sum(dim=-1).unsqueeze(-2) * -0.5

    def __call__(self, k: Tensor) -> Tensor:
        """Return the index of the nearest centre of each key, [B, H, n, D] -> [B, H, n]."""
        # `max` takes half the time of `argmax`. torch.compile can't trace a method decorated with `no_grad`.
        return (k.detach() @ self.centers.mT).add_(self.bias).max(dim=-1).indices


class _Clusters(SummaryKeys):
    """Cluster means as summary keys; a cluster's weight counts its keys outside the window.

    Args:
        mean_square: Mean square of the queries per channel, [B, H, 1, D].
        k: Keys of the grid, [B, H, N, D].
        log_mask: 0 for keys that belong to clusters, [B, H, N, 1].
        nearest: Cluster assignment.
    """

    def __init__(self, mean_square: Tensor, k: Tensor, log_mask: Tensor, nearest: _NearestCenter) -> None:
        self.num_clusters = nearest.centers.shape[2]
        factors = mean_square.mT / (2 * k.shape[-1])
        labels, squares = [], []
        sums, number = (log_mask.new_zeros(*k.shape[:2], 1, self.num_clusters, size) for size in (k.shape[-1], 1))
        for chunk in token_slices(k, _CHUNK_KEYS):
            keys = k[chunk].to(log_mask.dtype).contiguous()
            # Keys outside clusters get an extra index, whose sums are discarded.
            labels.append(torch.where(log_mask[chunk] == 0, nearest(keys).unsqueeze(-1), self.num_clusters))
            sums = self._sums(keys.unsqueeze(2), labels[-1].mT, sums)
            number = self._sums(None, labels[-1].mT, number)
            squares.append(keys.square() @ factors)
        self.labels = torch.cat(labels, dim=2)
        least_one = number.clamp(min=1.0)
        self.rows = (sums / least_one).squeeze(2)
        squared = self._sums(torch.cat(squares, dim=2).unsqueeze(2), self.labels.mT, torch.zeros_like(number))
        spread = squared / least_one - (self.rows.square() @ factors).unsqueeze(2)
        # Rounding can make the variance of a single key negative.
        self.number, self.spread = number, spread.clamp(min=0.0)

    def collect(self, windows: list[Windows], call: Call) -> list[tuple[Tensor, ...]]:
        """Return each cluster's sum of values, number of keys and log-weight correction, over all windows."""
        parts = [call(self._sum_values, each) for each in windows]
        return [(torch.stack(parts).sum(dim=0), self.number, self.spread)] * len(windows)

    def weigh(self, own: Windows | None, *collected: Tensor) -> tuple[Tensor, Tensor]:
        total, number, spread = collected
        sums, left = total, number
        if own is not None:
            labels, values = self._labels(own), own.tokens(own.v)
            sums = self._sums(values, labels, total, sign=-1)
            left = self._sums(None, labels, number, sign=-1)
        # Counts are exact: a cluster that lies within the window has weight 0, whatever its variance.
        log_weights = (left.log() + spread).masked_fill(left == 0, LOWEST_SCALE)
        return log_weights, sums / left.clamp(min=1.0)

    def _sum_values(self, own: Windows) -> Tensor:
        """Sum the values of each cluster over all windows of a group, [B, H, 1, M, Dv]."""
        values = own.tokens(own.v).flatten(2, 3).unsqueeze(2)
        nothing = values.new_zeros(*values.shape[:2], 1, self.num_clusters, values.shape[-1])
        return self._sums(values, self._labels(own).flatten(2).unsqueeze(2), nothing)

    def _labels(self, own: Windows) -> Tensor:
        assert own.labels is not None
        return own.labels.flatten(4).flatten(2, 3)

    def _sums(self, x: Tensor | None, labels: Tensor, start: Tensor, sign: int = 1) -> Tensor:
        """Add sums over the tokens of each cluster in each window to `start`, [B, H, W, M, C].

        Args:
            x: Summands, [B, H, W, T, C]; None counts the tokens.
            labels: Cluster indices, [B, H, W, T].
            start: Initial values, [B, H, W or 1, M, C].
            sign: 1 to add, -1 to subtract.
        """
        windows, rows = labels.shape[:3], self.num_clusters + 1
        first = torch.arange(math.prod(windows), device=labels.device).view(*windows, 1) * rows
        indices = (first + labels).flatten()
        width = start.shape[-1]
        sums = F.pad(start, (0, 0, 0, 1)).expand(*windows, -1, -1).reshape(-1, width)
        if x is None:
            x = start.new_ones(1).expand(indices.numel())
        elif width == 1:
            x = x.flatten()
        else:
            x = x.flatten(0, 3)
        # Summing a flat tensor is several times as fast as summing rows of length 1.
        sums = (sums.flatten() if width == 1 else sums.contiguous()).index_add_(0, indices, x, alpha=sign)
        return sums.view(*windows, rows, width)[..., :-1, :]


def _mean_square(q: Tensor, seen: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the mean square of each channel over evenly spaced unmasked queries, [B, H, 1, D]."""
    every = slice(None, None, max(1, q.shape[2] // _STATISTICS_TOKENS))
    q = q[:, :, every].to(dtype)
    if seen is None:
        return q.square().mean(dim=2, keepdim=True)
    seen = seen[:, None, every, None]
    return q.masked_fill(~seen, 0.0).square().sum(dim=2, keepdim=True) / seen.sum(dim=2, keepdim=True).clamp(min=1)
