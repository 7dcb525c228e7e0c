"""Attention that is exact nearby and sees what is far as clusters of like keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from perf_vit.ops.features import LOWEST_SCALE, token_slices, without_autocast
from perf_vit.ops.sinks import spread_tokens
from perf_vit.ops.state import check_attention_keys
from perf_vit.ops.window_attention import Call, StandIns, Windows, attend_joined, check_grid

__all__ = ["choose_clusters", "clustered_attention"]

SINK_QUERIES = 32
_CHUNK_KEYS = 1024
# A mean of at least so many queries, or centres of so many keys, serve as well as those of all.
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
    """Softmax attention with one weight for all keys of a cluster, but for those of a token's window and the sinks.

    out_i = (sum_{j in S(i)} exp(q_i.k_j / sqrt(D)) v_j + sum_{j not in S(i)} w_i,c(j) v_j) / (the same sums of 1),
    where c(j) is the cluster of key j, with mean m_c and variances s_c of each channel over its keys, and

        w_i,c = exp(q_i.m_c / sqrt(D) + sum_d E[q_d^2] s_c,d / 2 D),

    which is the mean of exp(q_i.k_j / sqrt(D)) over the cluster up to second order, with the second term for the mean
    (E) of all queries, or of 2,048 and more of them spread evenly. S(i) holds the tokens of i's 2-D window, the prefix
    tokens and the head's sinks, the keys that most queries look at; prefix tokens attend exactly.

    Weights that count the keys behind one of them are those of merged tokens (Bolya et al. 2022, "Token Merging",
    equation 1); near tokens one by one and far ones together are those of focal attention (Yang et al. 2021). Nothing
    is random. Which keys share a cluster is constant to the backward pass. Time and memory are linear in the number of
    tokens, forward and backward. `perf_vit.ops.naive.naive_clustered_attention` is the same as an N x N matrix.

    Args:
        q: queries, [B, H, N, D]: first the prefix tokens, then the grid's, row by row.
        k: keys, [B, H, N, D].
        v: values, [B, H, N, Dv].
        grid: rows and columns of tokens; N = num_prefix_tokens + rows x columns.
        window_size: rows and columns of a window, at most; the grid is cut into the fewest such, of nearly equal size.
            0 for none.
        num_sinks: keys of each sample and head that every query sees exactly; 0 for none.
        num_clusters: of each sample and head; at most one for each token of the grid is made.
        num_prefix_tokens: class and register tokens, which come first.
        key_mask: [B, N] bool, False for keys that are left out.

    Returns:
        [B, H, N, Dv] in the dtype of `q`; 0 for queries that see no key.

    Raises:
        ValueError: shapes that don't fit together, or no cluster.
    """
    check_attention_keys(k, v, key_mask)
    check_grid(q, k, grid, window_size, num_sinks, num_prefix_tokens)
    if num_clusters < 1:
        raise ValueError(f"num_clusters must be 1 or more, got {num_clusters}; 96 suits images of 500 px and up")
    with without_autocast(q):

        def make(queries: Tensor, keys: Tensor, log_mask: Tensor) -> _Clusters:
            seen = None if key_mask is None else key_mask[:, num_prefix_tokens:]
            nearest = _Nearest(keys, num_clusters, seen)
            return _Clusters(_mean_square(queries, seen, log_mask.dtype), keys, log_mask, nearest)

        return attend_joined(q, k, v, grid, window_size, num_sinks, num_prefix_tokens, key_mask, make, SINK_QUERIES).to(
            q.dtype
        )


def choose_clusters(k: Tensor, num_clusters: int, key_mask: Tensor | None = None) -> Tensor:
    """The cluster of each key: the nearest of `num_clusters` centres by Euclidean distance.

    Centres are those of k-means on 2,048 keys or more, evenly spaced, after two of Lloyd's iterations from as many of
    the keys, evenly spaced too (Lloyd 1982, "Least squares quantization in PCM").

    Args:
        k: keys, [B, H, N, D].
        num_clusters: at most N are made.
        key_mask: [B, N] bool, False for keys that no centre is made of.

    Returns:
        Their numbers, [B, H, N].
    """
    nearest = _Nearest(k, num_clusters, key_mask)
    return torch.cat([nearest(k[keys].to(nearest.centers.dtype)) for keys in token_slices(k, _CHUNK_KEYS)], dim=2)


class _Nearest:
    """Numbers of the nearest of some centres of the keys."""

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
            # A centre that no key is nearest to stays.
            self._set(torch.where(number > 0, members @ some / number.clamp(min=1.0), self.centers))

    def _set(self, centers: Tensor) -> None:
        self.centers, self.bias = centers, centers.square().sum(dim=-1).unsqueeze(-2) * -0.5

    def __call__(self, k: Tensor) -> Tensor:
        """[B, H, n, D] -> [B, H, n]."""
        # `max` takes half the time of `argmax`. `no_grad` around a method is more than torch.compile can trace.
        return (k.detach() @ self.centers.mT).add_(self.bias).max(dim=-1).indices


class _Clusters(StandIns):
    """Means of clusters as stand-ins; each weighs as much as those of its keys that a window doesn't hold.

    Args:
        mean_square: of each channel of the queries, [B, H, 1, D].
        k: keys of the grid, [B, H, N, D].
        log_mask: 0 for keys that are in clusters, [B, H, N, 1].
        nearest: tells the cluster of a key.
    """

    def __init__(self, mean_square: Tensor, k: Tensor, log_mask: Tensor, nearest: _Nearest) -> None:
        self.num_clusters = nearest.centers.shape[2]
        factors = mean_square.mT / (2 * k.shape[-1])
        labels, squares = [], []
        sums, number = (log_mask.new_zeros(*k.shape[:2], 1, self.num_clusters, size) for size in (k.shape[-1], 1))
        for chunk in token_slices(k, _CHUNK_KEYS):
            keys = k[chunk].to(log_mask.dtype).contiguous()
            # Keys that aren't in clusters have one more number, whose sums nobody reads.
            labels.append(torch.where(log_mask[chunk] == 0, nearest(keys).unsqueeze(-1), self.num_clusters))
            sums = self._sums(keys.unsqueeze(2), labels[-1].mT, sums)
            number = self._sums(None, labels[-1].mT, number)
            squares.append(keys.square() @ factors)
        self.labels = torch.cat(labels, dim=2)
        least_one = number.clamp(min=1.0)
        self.rows = (sums / least_one).squeeze(2)
        squared = self._sums(torch.cat(squares, dim=2).unsqueeze(2), self.labels.mT, torch.zeros_like(number))
        spread = squared / least_one - (self.rows.square() @ factors).unsqueeze(2)
        # Rounding must not make the variance of one key less than 0.
        self.number, self.spread = number, spread.clamp(min=0.0)

    def collect(self, windows: list[Windows], call: Call) -> list[tuple[Tensor, ...]]:
        """Sums of the values of all keys of each cluster, their number, and what is added to its logarithm."""
        parts = [call(self._sum_values, each) for each in windows]
        return [(torch.stack(parts).sum(dim=0), self.number, self.spread)] * len(windows)

    def weigh(self, own: Windows | None, *collected: Tensor) -> tuple[Tensor, Tensor]:
        total, number, spread = collected
        sums, left = total, number
        if own is not None:
            labels, values = self._labels(own), own.tokens(own.v)
            sums = self._sums(values, labels, total, sign=-1)
            left = self._sums(None, labels, number, sign=-1)
        # Numbers are exact: a cluster that a window holds all of has no weight, however far its keys spread.
        log_weights = (left.log() + spread).masked_fill(left == 0, LOWEST_SCALE)
        return log_weights, sums / left.clamp(min=1.0)

    def _sum_values(self, own: Windows) -> Tensor:
        """Sums of the values of each cluster over some windows, [B, H, 1, M, Dv]."""
        values = own.tokens(own.v).flatten(2, 3).unsqueeze(2)
        nothing = values.new_zeros(*values.shape[:2], 1, self.num_clusters, values.shape[-1])
        return self._sums(values, self._labels(own).flatten(2).unsqueeze(2), nothing)

    def _labels(self, own: Windows) -> Tensor:
        assert own.labels is not None
        return own.labels.flatten(4).flatten(2, 3)

    def _sums(self, x: Tensor | None, labels: Tensor, start: Tensor, sign: int = 1) -> Tensor:
        """Sums over the tokens of each cluster of each window, with others, [B, H, W, M, C].

        Args:
            x: what is summed, [B, H, W, T, C], or None for ones, to count.
            labels: numbers of the clusters, [B, H, W, T].
            start: what the sums are added to, [B, H, W or 1, M, C].
            sign: -1 to subtract the sums from it.
        """
        windows, rows = labels.shape[:3], self.num_clusters + 1
        first = torch.arange(math.prod(windows), device=labels.device).view(*windows, 1) * rows
        places = (first + labels).flatten()
        width = start.shape[-1]
        sums = F.pad(start, (0, 0, 0, 1)).expand(*windows, -1, -1).reshape(-1, width)
        if x is None:
            x = start.new_ones(1).expand(places.numel())
        elif width == 1:
            x = x.flatten()
        else:
            x = x.flatten(0, 3)
        # Numbers are summed several times as fast as rows of one.
        sums = (sums.flatten() if width == 1 else sums.contiguous()).index_add_(0, places, x, alpha=sign)
        return sums.view(*windows, rows, width)[..., :-1, :]


def _mean_square(q: Tensor, seen: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Of each channel over evenly spaced queries, those that are seen, [B, H, 1, D]."""
    every = slice(None, None, max(1, q.shape[2] // _STATISTICS_TOKENS))
    q = q[:, :, every].to(dtype)
    if seen is None:
        return q.square().mean(dim=2, keepdim=True)
    seen = seen[:, None, every, None]
    return q.masked_fill(~seen, 0.0).square().sum(dim=2, keepdim=True) / seen.sum(dim=2, keepdim=True).clamp(min=1)
