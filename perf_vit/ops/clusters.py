"""Clusters of keys: centres, and what replaces the keys of a cluster to first and second order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from perf_vit.ops.windows import split_dim

__all__ = [
    "SAMPLE_TOKENS",
    "Clusters",
    "Sample",
    "choose_clusters",
    "clusters_for_size",
    "describe_clusters",
    "nearest_center",
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


@dataclass(frozen=True, eq=False)
class Clusters:
    """What describes the M clusters of each sample and head; all in at least float32.

    Attributes:
        mean: Mean key of the sample, [B, H, 1, D].
        centers: Centres minus that mean; a key belongs to the nearest one, [B, H, M, D].
        spread: Half the variance of a logit within each cluster, [B, H, M, 1].
        groups: 1 for the group of each cluster and 0 for the others, [B, H, M, G].
        covariance: Covariance of keys and values within the clusters of a group, [B, H, G, D, Dv].
    """

    mean: Tensor
    centers: Tensor
    spread: Tensor
    groups: Tensor
    covariance: Tensor

    @property
    def num_clusters(self) -> int:
        """Number of clusters."""
        return int(self.centers.shape[2])

    def nearest(self, k: Tensor) -> Tensor:
        """Return the index of the nearest centre of each key, as `nearest_center`, [B, H, n, C] -> [B, H, n]."""
        return nearest_center(k, self.centers, self.mean)


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

    def mean_square_q(self) -> Tensor:
        """Return the mean square of each channel of the queries, [B, H, 1, D]."""
        square = self.q.square()
        if self.valid is None:
            return square.mean(dim=2, keepdim=True)
        return square.sum(dim=2, keepdim=True) / self.valid.sum(dim=2, keepdim=True).clamp(min=1.0)

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
    quantization in PCM"). The statistics are those of the second assignment. The clusters form G groups: those
    nearest to each of G of them. The assignments have no gradient.

    Args:
        sample: Tokens of the grid.
        num_clusters: Largest number of clusters; there are at most as many as tokens in the sample.
    """
    head_dim, num_clusters = sample.k.shape[-1], min(num_clusters, sample.k.shape[2])
    with torch.no_grad():
        mean = sample.mean_k()
    # Distances of keys that share a large mean would be lost in its rounding.
    k = sample.k - mean
    ones = k.new_ones(1) if sample.valid is None else sample.valid
    k = k if sample.valid is None else k * sample.valid
    weight = (sample.mean_square_q() / (2 * head_dim)).mT
    rows = torch.cat([k, ones.expand(*k.shape[:-1], 1), k.square() @ weight, sample.v], dim=-1)
    keys = rows[..., : head_dim + 1].detach()
    centers = sample.evenly(keys[..., :head_dim], num_clusters)
    for _ in range(_ITERATIONS - 1):
        centers = _means(keys, nearest_center(keys, centers), num_clusters, head_dim)[0][..., :head_dim]
    labels = nearest_center(keys, centers)
    means, number = _means(rows, labels, num_clusters, head_dim)
    spread = (means[..., head_dim + 1, None] - means[..., :head_dim].square() @ weight).clamp(min=0.0)
    # Residuals of a cluster sum to 0, so that its mean has no gradient in products of them.
    residual = rows - _of_label(means.detach(), labels)
    r_k, r_v = residual[..., :head_dim], residual[..., head_dim + 2 :]
    if sample.valid is not None:
        r_k = r_k * sample.valid
    centers = means[..., :head_dim].detach()
    groups = _group(centers)
    by_group = (_of_label(groups, labels).unsqueeze(-1) * r_k.unsqueeze(-2)).flatten(-2)
    of_groups = (groups.mT @ number).clamp(min=1.0).unsqueeze(-1)
    covariance = split_dim(by_group.mT @ r_v, 2, groups.shape[-1], head_dim) / of_groups
    return Clusters(mean, centers, spread, groups, covariance)


def nearest_center(k: Tensor, centers: Tensor, offset: Tensor | None = None) -> Tensor:
    """Return the index of the nearest centre of each key, which has no gradient, [B, H, n, C] -> [B, H, n].

    Args:
        k: Keys and a last column of ones, [B, H, n, C]. Columns between the D of the keys and the last are 0 or finite.
        centers: Centres, [B, H, M, D].
        offset: What all centres are to be moved by, [B, H, 1, D]; None for nothing.
    """
    # -|k - offset - c|^2 / 2, without the same term in all centres: a product with an extra column, as a bias added to
    # a product would be copied for each key.
    c = centers.flatten(0, 1)
    bias = (c.square() if offset is None else c * (c + 2 * offset.flatten(0, 1))).sum(dim=-1, keepdim=True)
    between = k.shape[-1] - 1 - c.shape[-1]
    columns = [c, bias * -0.5] if between == 0 else [c, c.new_zeros(1).expand(*c.shape[:2], between), bias * -0.5]
    closeness = k.detach().flatten(0, 1) @ torch.cat(columns, dim=-1).mT
    # `max` takes half the time of `argmax`.
    return split_dim(closeness.max(dim=-1).indices, 0, *centers.shape[:2])


def sum_by_label(x: Tensor, labels: Tensor, number: int) -> Tensor:
    """Sum the rows of each label, [..., n, C] -> [..., number, C]; rows with the label `number` are left out.

    Args:
        x: Rows, [..., n, C].
        labels: Labels from 0 to `number`, [..., n].
        number: Number of labels.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        # Atomic additions of a GPU have no fixed order.
        return _one_hot(labels, number + 1, x.dtype)[..., :number].mT @ x
    leading = labels.shape[:-1]
    first = torch.arange(math.prod(leading)).view(*leading, 1) * (number + 1)
    sums = x.new_zeros(math.prod(leading) * (number + 1), x.shape[-1])
    sums = sums.index_add_(0, (first + labels).flatten(), x.reshape(-1, x.shape[-1]))
    return sums.view(*leading, number + 1, x.shape[-1])[..., :number, :]


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
    dtype = torch.promote_types(k.dtype, torch.float32)
    if key_mask is None:
        step = sample_step(k.shape[2])
        q, k, v = (_every(x, step, x.shape[2] // step).to(dtype) for x in (q, k, v))
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
    clusters = describe_clusters(sample_tokens(q, k, v, key_mask), num_clusters)
    return clusters.nearest(F.pad(k.to(clusters.centers.dtype), (0, 1), value=1.0))


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


def _one_hot(labels: Tensor, number: int, dtype: torch.dtype) -> Tensor:
    """Return 1 in the column of the label of each row, [..., n] -> [..., n, number]."""
    zeros = torch.zeros(*labels.shape, number, dtype=dtype, device=labels.device)
    return zeros.scatter_(-1, labels.unsqueeze(-1), 1.0)


def _means(rows: Tensor, labels: Tensor, number: int, ones: int) -> tuple[Tensor, Tensor]:
    """Return the mean row of each label, 0 for labels without rows, [B, H, M, C], and the number of rows, [B, H, M, 1].

    Args:
        rows: Keys, 1 for a row that counts or 0, and other columns, [B, H, n, C].
        labels: Labels, [B, H, n].
        number: Number of labels, M.
        ones: Index of the column that counts.
    """
    sums = sum_by_label(rows, labels, number)
    counted = sums[..., ones, None]
    return sums / counted.clamp(min=1.0), counted


def _group(centers: Tensor) -> Tensor:
    """Return the group of each cluster as 1 in a row of zeros, [B, H, M, D] -> [B, H, M, G]."""
    number = min(NUM_GROUPS, centers.shape[2])
    nearest = nearest_center(F.pad(centers, (0, 1), value=1.0), _spaced(centers, number))
    return _one_hot(nearest, number, centers.dtype)
