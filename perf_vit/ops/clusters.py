"""Clusters of keys: centres, and what replaces the keys of a cluster to first and second order."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn import functional as F

from perf_vit.ops.windows import split_dim

__all__ = [
    "SAMPLE_TOKENS",
    "Clusters",
    "Sample",
    "choose_clusters",
    "clusters_for_size",
    "constant",
    "describe_clusters",
    "mean_key",
    "nearest_cluster",
    "sample_step",
    "sample_tokens",
    "sampled_places",
    "sum_by_label",
]

NUM_GROUPS = 4
"""Groups of clusters, each with its own covariance of keys and values."""

# Saved conversions depend on these values.
_CLUSTERS, _MOST_CLUSTERS, _MANY_TOKENS = 128, 160, 2**15

# The sample has fewer tokens than this.
_SAMPLE = 8192

SAMPLE_TOKENS = _SAMPLE * 2 // 3
"""Largest number of tokens of a sample."""

_ITERATIONS = 2

# Weight of the rows of other labels in a mean, far below rounding where a label has rows.
_OUTSIDE = 1e-12


@dataclass(frozen=True, eq=False)
class Clusters:
    """What describes the M clusters of each sample and head; all in at least float32.

    Attributes:
        columns: Centres c, and minus half the mean square norm of their keys, see `nearest_cluster`, [B, H, M, D + 1].
        spread: Half the variance of a logit within each cluster, [B, H, M, 1].
        groups: 1 for the group of each cluster and 0 for the others, [B, H, M, G].
        covariance: Covariance of keys and values within the clusters of a group, [B, H, G, D, Dv].
    """

    columns: Tensor
    spread: Tensor
    groups: Tensor
    covariance: Tensor

    @property
    def centers(self) -> Tensor:
        """Mean keys of the clusters in the sample, [B, H, M, D]."""
        return self.columns[..., :-1]

    @property
    def num_clusters(self) -> int:
        """Number of clusters."""
        return int(self.columns.shape[2])

    def moved(self, mean: Tensor) -> Clusters:
        """Return the clusters for keys to which a vector, [B, H, 1, D], has been added."""
        norms = torch.baddbmm(
            self.columns[..., -1, None].flatten(0, 1), self.centers.flatten(0, 1), mean.flatten(0, 1).mT, alpha=-1
        )
        columns = torch.cat([self.centers, split_dim(norms, 0, *self.columns.shape[:2])], dim=-1)
        return replace(self, columns=columns)

    def nearest(self, k: Tensor) -> Tensor:
        """Return the cluster of each key, as `nearest_cluster`, [B, H, n, D + 1] -> [B, H, n]."""
        return nearest_cluster(k, self.columns)


@dataclass(frozen=True, eq=False)
class Sample:
    """Some tokens, in at least float32.

    Attributes:
        q: Queries, [B, H, n, D].
        k: Keys, [B, H, n, D].
        v: Values, [B, H, n, Dv].
        valid: 1 for tokens that count, 0 for the others, whose q, k and v are 0, [B, 1, n, 1]; None where all count.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    valid: Tensor | None = None

    def mean_k(self) -> Tensor:
        """Return the mean key, [B, H, 1, D]."""
        if self.valid is None:
            return self.k.mean(dim=2, keepdim=True)
        return self.k.sum(dim=2, keepdim=True) / self.valid.sum(dim=2, keepdim=True).clamp(min=1.0)

    def means(self, rows: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Return the mean row of each label, and the number of rows, [B, H, n, C] -> [B, H, M, C] and [B, H, M, 1].

        The mean of a label without rows is that of all rows, its number is near 0.

        Args:
            rows: 1 for a token that counts or 0, and other columns, [B, H, n, C].
            labels: Labels from 0 to M - 1, [B, H, n].
            number: Number of labels, M.
        """
        sums = sum_by_label(rows, labels, number, _OUTSIDE)
        counted = sums[..., :1]
        if self.valid is not None:
            counted = counted.clamp(min=_OUTSIDE)
        return sums / counted, counted

    def mean_square_q(self) -> Tensor:
        """Return the mean square of each channel of the queries, [B, H, 1, D]."""
        square = self.q.square()
        if self.valid is None:
            return square.mean(dim=2, keepdim=True)
        return square.sum(dim=2, keepdim=True) / self.valid.sum(dim=2, keepdim=True).clamp(min=1.0)

    def minus(self, mean: Tensor) -> Sample:
        """Subtract a vector from the keys."""
        return replace(self, k=self.k - mean)

    def evenly(self, x: Tensor, number: int) -> Tensor:
        """Select evenly spaced tokens that count, [B, H, n, C] -> [B, H, number, C]."""
        if self.valid is None:
            return _spaced(x, number)
        most = self.valid.sum(dim=2, keepdim=True).long()
        step = (most // number).clamp(min=1)
        first = (most - step * number).clamp(min=0) // 2 + step // 2
        indices = first + step * torch.arange(number, device=x.device).view(-1, 1)
        return x.take_along_dim(indices.minimum((most - 1).clamp(min=0)), dim=2)


def clusters_for_size(num_tokens: int) -> int:
    """Return the number of clusters for an image: 128 up to 32,768 tokens, else 160."""
    return _CLUSTERS if num_tokens <= _MANY_TOKENS else _MOST_CLUSTERS


def describe_clusters(sample: Sample, num_clusters: int) -> Clusters:
    """Find clusters of keys, and their statistics, in a sample of the tokens.

    Centres come from two iterations of k-means, initialised with evenly spaced keys (Lloyd 1982, "Least squares
    quantization in PCM"), in which a key's distance from a cluster is |k - c|^2 plus the mean square distance of the
    cluster's keys from c. The statistics are those of the second assignment. The clusters form G groups: those
    nearest to each of G of them. The assignments have no gradient.

    Args:
        sample: Tokens of the grid. The mean key should be near 0: squares of keys that share a large mean
            lose the differences of the keys in rounding.
        num_clusters: Largest number of clusters; there are at most as many as tokens in the sample.
    """
    head_dim, num_clusters = sample.k.shape[-1], min(num_clusters, sample.k.shape[2])
    weight = sample.mean_square_q().mT
    rows, end = _rows(sample, weight), 2 * head_dim + 2
    keys = rows[..., : head_dim + 1].detach()
    columns = sample.evenly(rows, num_clusters)[..., head_dim + 1 : end].detach()
    for _ in range(_ITERATIONS - 1):
        labels = nearest_cluster(keys, columns)
        columns = sample.means(rows[..., head_dim:end].detach(), labels, num_clusters)[0][..., 1:]
    labels = nearest_cluster(keys, columns)
    rows = rows[..., head_dim:]
    means, number = sample.means(rows, labels, num_clusters)
    spread = torch.baddbmm(
        means[..., head_dim + 2, None].flatten(0, 1),
        means[..., 1 : head_dim + 1].square().flatten(0, 1),
        weight.flatten(0, 1),
        beta=-1 / head_dim,
        alpha=-0.5 / head_dim,
    )
    # Residuals of a cluster sum to 0, so that its mean has no gradient in products of them.
    residual = rows - _of_label(means.detach(), labels)
    r_k, r_v = residual[..., 1 : head_dim + 1], residual[..., head_dim + 3 :]
    if sample.valid is not None:
        r_k = r_k * sample.valid
    columns = means[..., 1 : head_dim + 2].detach()
    groups = _group(columns)
    by_group = (_of_label(groups, labels).unsqueeze(-1) * r_k.unsqueeze(-2)).flatten(-2)
    of_groups = (groups.mT @ number).unsqueeze(-1)
    covariance = split_dim(by_group.mT @ r_v, 2, groups.shape[-1], head_dim) / of_groups
    return Clusters(columns, split_dim(spread, 0, *columns.shape[:2]), groups, covariance)


def nearest_cluster(k: Tensor, columns: Tensor) -> Tensor:
    """Return the index of the nearest cluster of each key, which has no gradient, [B, H, n, D + 1] -> [B, H, n].

    Args:
        k: Keys and a column of ones, [B, H, n, D + 1].
        columns: Centres c and minus half the mean of |k|^2 over the keys of each cluster, [B, H, M, D + 1], so that the
            product with a key k is half the mean of |k|^2 - |k - k_j|^2 over the keys k_j of the cluster.
    """
    # The column of ones adds a term for each cluster: a bias added to the product would be copied for each key.
    closeness = k.detach().flatten(0, 1) @ columns.flatten(0, 1).mT
    # `max` takes half the time of `argmax`.
    return split_dim(closeness.max(dim=-1).indices, 0, *columns.shape[:2])


def sum_by_label(x: Tensor, labels: Tensor, number: int, outside: float = 0.0) -> Tensor:
    """Sum the rows of each label, [..., n, C] -> [..., number, C]; rows with the label `number` are left out.

    Args:
        x: Rows, [..., n, C].
        labels: Labels from 0 to `number`, [..., n].
        number: Number of labels.
        outside: Weight of the rows of all other labels.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        # Atomic additions of a GPU have no fixed order.
        return _one_hot(labels, number + 1, x, outside)[..., :number].mT @ x
    leading = labels.shape[:-1]
    first = torch.arange(math.prod(leading)).view(*leading, 1) * (number + 1)
    sums = x.new_zeros(math.prod(leading) * (number + 1), x.shape[-1])
    sums = sums.index_add_(0, (first + labels).flatten(), x.reshape(-1, x.shape[-1]))
    sums = sums.view(*leading, number + 1, x.shape[-1])[..., :number, :]
    return sums + outside * sums.sum(dim=-2, keepdim=True) if outside else sums


def mean_key(k: Tensor, key_mask: Tensor | None) -> Tensor:
    """Return the mean of the keys that `sample_tokens` takes, in at least float32, [B, H, N, D] -> [B, H, 1, D]."""
    with torch.no_grad():
        return sample_tokens(k, k, k, key_mask).mean_k()


def sample_tokens(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Sample:
    """Take every s-th token, 1,000 to 5,500 of them in images of 1,000 tokens and more.

    With a mask, it is every s-th of the visible tokens. The step s is odd: a step that divides the number of columns
    would take few columns of the grid, and most grids have an even number.

    Args:
        q: Queries, [B, H, N, D].
        k: Keys, [B, H, N, D].
        v: Values, [B, H, N, Dv].
        key_mask: [B, N] bool, False for tokens to leave out.
    """
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    if key_mask is None:
        step = sample_step(k.shape[2])
        parts = [_every(x, step, x.shape[2] // step) for x in (q, k, v)]
        if k.dtype != dtype and v.shape == k.shape and q.dtype == k.dtype == v.dtype:
            # One conversion instead of three.
            parts = list(torch.stack(parts).to(dtype).unbind(0))
        q, k, v = (x.to(dtype) for x in parts)
        return Sample(q, k, v)
    seen = key_mask.sum(dim=1, keepdim=True)
    step, places = sample_step(seen), torch.arange(min(k.shape[2], SAMPLE_TOKENS), device=k.device)
    seen_first = (~key_mask).to(torch.uint8).argsort(dim=1, stable=True)
    indices = seen_first.gather(1, (places * step).clamp(max=k.shape[2] - 1))[:, None, :, None]
    valid = (places < seen // step)[:, None, :, None]
    q, k, v = (x.take_along_dim(indices, 2).to(dtype).where(valid, 0.0) for x in (q, k, v))
    return Sample(q, k, v, valid.to(dtype))


def sampled_places(num_tokens: int) -> Tensor:
    """Return the indices of the tokens that `sample_tokens` takes of a number of visible tokens, [n]."""
    step = int(sample_step(num_tokens))
    return torch.arange(num_tokens // step) * step


def choose_clusters(q: Tensor, k: Tensor, v: Tensor, num_clusters: int, key_mask: Tensor | None = None) -> Tensor:
    """Return the cluster of each key, [B, H, N, D] -> [B, H, N]; arguments as in `describe_clusters`."""
    k = k - mean_key(k, key_mask)
    clusters = describe_clusters(sample_tokens(q, k, v, key_mask), num_clusters)
    return clusters.nearest(F.pad(k.to(clusters.columns.dtype), (0, 1), value=1.0))


def sample_step(number: Any) -> Any:
    """Return the distance of sampled tokens: 1 below 3,072 tokens, 3 below 8,192, then 3, 5, 7 .."""
    some = (number >= _SAMPLE // 8 * 3) & (number < _SAMPLE)
    return number // _SAMPLE * 2 + 1 + some * 2


def _every(x: Tensor, step: int, number: int) -> Tensor:
    """Return the first `number` of every `step`-th token: a view with sizes that torch.compile can keep symbolic."""
    return split_dim(x[:, :, : number * step], 2, number, step)[:, :, :, 0]


def _spaced(x: Tensor, number: int) -> Tensor:
    """Return as many evenly spaced tokens of [B, H, n, C], a view."""
    step = x.shape[2] // number
    first = (x.shape[2] - step * number) // 2
    return split_dim(x[:, :, first : first + step * number], 2, number, step)[:, :, :, step // 2]


def _of_label(x: Tensor, labels: Tensor) -> Tensor:
    """Return the row of each label, [B, H, M, C] and [B, H, n] -> [B, H, n, C]."""
    # `take_along_dim` would first wrap negative indices.
    return x.gather(2, labels.unsqueeze(-1).expand(*labels.shape, x.shape[-1]))


def _one_hot(labels: Tensor, number: int, like: Tensor, outside: float = 0.0) -> Tensor:
    """Return 1 in the column of the label of each row and `outside` elsewhere, [..., n] -> [..., n, number]."""
    return constant(outside, like).expand(*labels.shape, number).scatter(-1, labels.unsqueeze(-1), 1.0)


def _rows(sample: Sample, weight: Tensor) -> Tensor:
    """Return the columns of sampled tokens, [k, 1, k, -|k|^2 / 2, -k^2 @ weight / 2, v], [B, H, n, C]."""
    k, one = sample.k, constant(1.0, sample.k)
    k = k if sample.valid is None else k * sample.valid
    weights = torch.cat([one.expand(weight.shape), weight], dim=-1).flatten(0, 1)
    squares = torch.baddbmm(one, k.square().flatten(0, 1), weights, beta=0, alpha=-0.5)
    counts = (one if sample.valid is None else sample.valid).expand(*k.shape[:-1], 1)
    return torch.cat([k, counts, k, split_dim(squares, 0, *k.shape[:2]), sample.v], dim=-1)


def _group(columns: Tensor) -> Tensor:
    """Return the group of each cluster as 1 in a row of almost 0, [B, H, M, D + 1] -> [B, H, M, G]."""
    number = min(NUM_GROUPS, columns.shape[2])
    some, every = _spaced(columns, number).flatten(0, 1), columns[..., :-1].flatten(0, 1)
    closeness = torch.baddbmm(some[..., -1, None].mT, every, some[..., :-1].mT)
    return _one_hot(split_dim(closeness.max(dim=-1).indices, 0, *columns.shape[:2]), number, columns, _OUTSIDE)


def constant(value: float, like: Tensor) -> Tensor:
    """Return a value as a tensor of one element, with the device and dtype of another, which is made once."""
    if torch.compiler.is_compiling() or type(like) is not Tensor or is_functorch_wrapped_tensor(like):
        return like.new_full((1,), value)
    return _constant(value, like.dtype, like.device)


@lru_cache
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Tensors of inference mode can't be part of a later graph of gradients.
    with torch.inference_mode(False):
        return torch.full((1,), value, dtype=dtype, device=device)
