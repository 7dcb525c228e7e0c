"""Attention that is exact nearby and sees what is far as clusters of like keys."""

from __future__ import annotations

import torch
from torch import Tensor

from perf_vit.ops.chunks import token_slices
from perf_vit.ops.features import without_autocast
from perf_vit.ops.state import check_attention_keys
from perf_vit.ops.window_attention import Call, StandIns, Windows, attend_joined, check_grid, means_of_others

__all__ = ["choose_clusters", "clustered_attention"]

_CHUNK_KEYS = 1024


def clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    window_size: int = 12,
    num_sinks: int = 64,
    num_clusters: int = 256,
    num_prefix_tokens: int = 1,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Softmax attention with one weight for all keys of a cluster, but for those of a token's window and the sinks.

    out_i = (sum_{j in S(i)} exp(q_i.k_j / sqrt(D)) v_j + sum_{j not in S(i)} w_i,c(j) v_j) / (the same sums of 1),
    where c(j) is the cluster of key j, with mean m_c and variances s_c of each channel over its keys, and

        w_i,c = exp(q_i.m_c / sqrt(D) + sum_d E[q_d^2] s_c,d / 2 D),

    which is the mean of exp(q_i.k_j / sqrt(D)) over the cluster up to second order, with the second term for the mean
    of all queries of tokens in clusters (E). S(i) holds the tokens of i's 2-D window, the prefix tokens and the head's
    sinks, the keys that most queries look at; prefix tokens attend exactly. Weights that count the keys behind one of
    them are those of merged tokens (Bolya et al. 2022, "Token Merging", equation 1); near tokens one by one and far
    ones together are those of focal attention (Yang et al. 2021). Nothing is random. Which keys share a
    cluster is constant to the backward pass. Time and memory are linear in the number of tokens, forward and backward.
    `perf_vit.ops.naive.naive_clustered_attention` is the same as an N x N matrix.

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
        raise ValueError(f"num_clusters must be 1 or more, got {num_clusters}; 256 suits images of 500 px and up")
    with without_autocast(q):

        def make(queries: Tensor, keys: Tensor, log_mask: Tensor) -> _Clusters:
            return _Clusters(queries, keys, log_mask, num_clusters)

        return attend_joined(q, k, v, grid, window_size, num_sinks, num_prefix_tokens, key_mask, make).to(q.dtype)


@torch.no_grad()
def choose_clusters(k: Tensor, num_clusters: int) -> Tensor:
    """The cluster of each key: the nearest, by Euclidean distance, of `num_clusters` keys spread evenly over all.

    Args:
        k: keys, [B, H, N, D].
        num_clusters: at most N are made.

    Returns:
        Their numbers, [B, H, N].
    """
    length = k.shape[2]
    places = torch.linspace(0, length - 1, min(num_clusters, length), device=k.device).long()
    dtype = torch.promote_types(k.dtype, torch.float32)
    seeds = k[:, :, places].to(dtype)
    bias = seeds.square().sum(dim=-1).unsqueeze(-2) * -0.5
    # `max` takes half the time of `argmax`.
    nearest = [(k[keys].to(dtype) @ seeds.mT).add_(bias).max(dim=-1).indices for keys in token_slices(k, _CHUNK_KEYS)]
    return torch.cat(nearest, dim=2)


class _Clusters(StandIns):
    """Means of clusters as stand-ins; each weighs as much as those of its keys that a window doesn't hold."""

    def __init__(self, q: Tensor, k: Tensor, log_mask: Tensor, num_clusters: int) -> None:
        dtype, self.takes_part = log_mask.dtype, log_mask == 0
        numbers = choose_clusters(k, num_clusters)
        self.labels, self.num_clusters = numbers.unsqueeze(-1), min(num_clusters, k.shape[2])
        seen = q.to(dtype).masked_fill(~self.takes_part, 0.0).square().sum(dim=2, keepdim=True)
        factors = seen / self.takes_part.sum(dim=2, keepdim=True).clamp(min=1) / (2 * k.shape[-1])
        k = k.to(dtype)
        columns = torch.cat([k, k.square() @ factors.mT], dim=-1)
        columns, numbers, takes_part = (x.unsqueeze(2) for x in (columns, numbers, self.takes_part))
        sums = _sums(columns, numbers, takes_part, self.num_clusters).squeeze(2)
        means = sums[..., :-1] / sums[..., -1:].clamp(min=1.0)
        self.rows = means[..., :-1]
        # Rounding must not make a variance of one key less than 0.
        self.spread = (means[..., -1:] - self.rows.square() @ factors.mT).clamp(min=0.0).unsqueeze(2)

    def collect(self, windows: list[Windows], call: Call) -> list[tuple[Tensor, ...]]:
        """Sums of values and numbers of keys over all windows, and what is added to their logarithms."""
        totals = [call(self._sum_windows, each, True) for each in windows]
        total = torch.stack(totals).sum(dim=0)
        return [(total, self.spread)] * len(windows)

    def weigh(self, own: Windows | None, *collected: Tensor) -> tuple[Tensor, Tensor]:
        total, spread = collected
        log_number, means = means_of_others(total if own is None else total - self._sum_windows(own), total)
        return log_number + spread, means

    def query_log_amplitude(self, q: Tensor) -> None:
        return None

    def _sum_windows(self, own: Windows, together: bool = False) -> Tensor:
        """Sums of values, and numbers, of the keys of each cluster, [B, H, W, M, Dv + 1]; W is 1 for all together."""
        assert own.labels is not None
        labels, takes_part = own.labels.flatten(2), own.tokens(own.log_mask) == 0
        values = own.tokens(own.v)
        if together:
            values, takes_part = (x.flatten(2, 3).unsqueeze(2) for x in (values, takes_part))
        return _sums(values, labels.view(values.shape[:4]), takes_part, self.num_clusters)


def _sums(x: Tensor, numbers: Tensor, takes_part: Tensor, num_clusters: int) -> Tensor:
    """Sums of [x, 1] over the tokens of each cluster of each window, [B, H, W, M, C + 1], of [B, H, W, T, C]."""
    windows = numbers.shape[:3]
    first = torch.arange(windows.numel(), device=x.device).view(*windows, 1) * num_clusters
    columns = torch.cat([x, x.new_ones(1).expand(*x.shape[:-1], 1)], dim=-1) * takes_part
    sums = columns.new_zeros(windows.numel() * num_clusters, columns.shape[-1])
    return sums.index_add(0, (first + numbers).flatten(), columns.flatten(0, 3)).view(*windows, num_clusters, -1)
