"""Clusters of keys: centres, and what replaces the keys of a cluster to first and second order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from perf_vit.ops.windows import split_dim

__all__ = ["Clusters", "Sample", "choose_clusters", "describe_clusters", "sample_tokens"]

NUM_GROUPS = 4
"""Groups of clusters, each with its own covariance of keys and values."""

# The sample has fewer tokens than this.
_SAMPLE = 8192
_ITERATIONS = 2
# Below the number of tokens of a cluster or group that has any.
_LEAST = 1e-6
# Inverse temperature of soft k-means, for keys whose mean square is 1 in each channel.
_SHARPNESS = 10.0


@dataclass(frozen=True, eq=False)
class Clusters:
    """What describes the M clusters of each sample and head; all in at least float32.

    Attributes:
        mean: Mean key of the sample, [B, H, 1, D].
        centers: Centres minus that mean; a key belongs to the nearest one, [B, H, M, D].
        spread: Half the variance of a logit within each cluster, [B, H, M, 1].
        groups: Membership of each cluster in the G groups, [B, H, M, G]; a row sums to 1.
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
        """Return the index of the nearest centre of each key, [B, H, n, D] -> [B, H, n]."""
        # |k - mean - c|^2 without a copy of all keys: -k.c + mean.c + |c|^2 / 2.
        centers = self.centers.flatten(0, 1)
        length = centers.square().sum(dim=-1, keepdim=True)
        away = torch.baddbmm(length, centers, self.mean.flatten(0, 1).mT, beta=0.5).mT
        closeness = torch.baddbmm(away, k.detach().flatten(0, 1), centers.mT, beta=-1)
        return split_dim(closeness.max(dim=-1).indices, 0, *k.shape[:2])


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

    def mean_and_scale_k(self) -> tuple[Tensor, Tensor]:
        """Return the mean key, [B, H, 1, D], and the root mean square of keys around it, [B, H, 1, 1]."""
        if self.valid is None:
            mean = self.k.mean(dim=2, keepdim=True)
            square = (self.k - mean).square().mean(dim=(2, 3), keepdim=True)
        else:
            number = self.valid.sum(dim=2, keepdim=True).clamp(min=1.0)
            mean = self.k.sum(dim=2, keepdim=True) / number
            off = (self.k - mean) * self.valid
            square = off.square().sum(dim=(2, 3), keepdim=True) / (number * self.k.shape[-1])
        return mean, (square + torch.finfo(self.k.dtype).tiny).sqrt()

    def mean_square_q(self) -> Tensor:
        """Return the mean square of each channel of the queries, [B, H, 1, D]."""
        square = self.q.square()
        if self.valid is None:
            return square.mean(dim=2, keepdim=True)
        return square.sum(dim=2, keepdim=True) / self.valid.sum(dim=2, keepdim=True).clamp(min=1.0)

    def evenly(self, x: Tensor, number: int) -> Tensor:
        """Select evenly spaced tokens that count, [B, H, n, C] -> [B, H, number, C]."""
        if self.valid is None:
            return _every(x, x.shape[2] // number, number)
        steps = torch.arange(number, device=x.device).view(-1, 1)
        most = self.valid.sum(dim=2, keepdim=True).long()
        indices = (steps * (most // number).clamp(min=1)).minimum((most - 1).clamp(min=0))
        return x.take_along_dim(indices, dim=2)


def describe_clusters(sample: Sample, num_clusters: int) -> Clusters:
    """Find clusters of keys, and their statistics, in a sample of the tokens.

    Centres come from two iterations of soft k-means, initialised with evenly spaced keys (Lloyd 1982, "Least squares
    quantization in PCM"). The statistics are those of the second assignment. The clusters form G groups, by one
    iteration of the same on their centres. The assignments have no gradient.

    Args:
        sample: Tokens of the grid.
        num_clusters: Largest number of clusters; there are at most as many as tokens in the sample.
    """
    head_dim, num_clusters = sample.k.shape[-1], min(num_clusters, sample.k.shape[2])
    with torch.no_grad():
        mean, scale = sample.mean_and_scale_k()
    # Without their mean and scale, the keys of every model are told apart by the same distance.
    k = (sample.k - mean) / scale
    ones = k.new_ones(1).expand(*k.shape[:-1], 1) if sample.valid is None else sample.valid.expand(*k.shape[:-1], 1)
    rows = torch.cat([ones, k, sample.v], dim=-1)
    keys = slice(1, head_dim + 1)
    means = sample.evenly(rows, num_clusters)
    for columns in (*[slice(head_dim + 1)] * (_ITERATIONS - 1), slice(None)):
        member = _memberships(k, means[..., keys], sample.valid)
        means, number = _means(member, rows[..., columns], means[..., columns])
        if columns.stop:
            means = F.pad(means, (0, rows.shape[-1] - means.shape[-1]))
    residual = rows - member @ means
    r_k, r_v = residual[..., keys], residual[..., head_dim + 1 :]
    if sample.valid is not None:
        r_k = r_k * sample.valid
    centers = means[..., keys].detach()
    with torch.no_grad():
        num_groups = min(NUM_GROUPS, num_clusters)
        seeds = _every(means, num_clusters // num_groups, num_groups)
        seeds, _ = _means(_memberships(centers, seeds[..., keys]), means, seeds)
        groups = _memberships(centers, seeds[..., keys])
        weight = member @ groups
    by_group = (weight.unsqueeze(-1) * r_k.unsqueeze(-2)).flatten(-2)
    of_groups = weight.sum(dim=2).clamp(min=_LEAST)[..., None, None]
    covariance = split_dim(by_group.mT @ r_v, 2, num_groups, head_dim) * (scale.unsqueeze(-1) / of_groups)
    variance = r_k.square() @ (sample.mean_square_q() * scale.square() / (2 * head_dim)).mT
    spread = member.mT @ variance / number
    return Clusters(mean, centers * scale, spread, groups, covariance)


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
        step = _step(k.shape[2])
        q, k, v = (_every(x, step, x.shape[2] // step).to(dtype) for x in (q, k, v))
        return Sample(q, k, v)
    seen = key_mask.sum(dim=1, keepdim=True)
    step, places = _step(seen), torch.arange(min(k.shape[2], _SAMPLE * 2 // 3), device=k.device)
    seen_first = (~key_mask).to(torch.uint8).argsort(dim=1, stable=True)
    indices = seen_first.gather(1, (places * step).clamp(max=k.shape[2] - 1))[:, None, :, None]
    valid = (places < seen // step)[:, None, :, None]
    q, k, v = (x.take_along_dim(indices, 2).to(dtype).where(valid, 0.0) for x in (q, k, v))
    return Sample(q, k, v, valid.to(dtype))


def choose_clusters(q: Tensor, k: Tensor, v: Tensor, num_clusters: int, key_mask: Tensor | None = None) -> Tensor:
    """Return the cluster of each key, [B, H, N, D] -> [B, H, N]; arguments as in `describe_clusters`."""
    clusters = describe_clusters(sample_tokens(q, k, v, key_mask), num_clusters)
    return clusters.nearest(k.to(clusters.centers.dtype))


def _step(number: Any) -> Any:
    """Return the distance of sampled tokens: 1 below 3,072 tokens, 3 below 8,192, then 3, 5, 7 .."""
    some = (number >= _SAMPLE // 8 * 3) & (number < _SAMPLE)
    return number // _SAMPLE * 2 + 1 + some * 2


def _every(x: Tensor, step: int, number: int) -> Tensor:
    """Return the first `number` of every `step`-th token: a view with sizes that torch.compile can keep symbolic."""
    return split_dim(x[:, :, : number * step], 2, number, step)[:, :, :, 0]


def _memberships(k: Tensor, centers: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the soft membership of each key in the cluster of each centre, [B, H, n, M]; a row sums to 1, or to 0."""
    # The assignment has no gradient.
    with torch.no_grad():
        member = _closeness(k, centers, _SHARPNESS).softmax(dim=-1)
    return member if valid is None else member * valid


def _means(member: Tensor, rows: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean row of each cluster, [B, H, M, C], and its number of rows, [B, H, M, 1].

    Args:
        member: Memberships, [B, H, n, M].
        rows: 1 for a row that counts or 0, and other columns, [B, H, n, C].
        before: Rows that clusters without members keep, [B, H, M, C].
    """
    sums = member.mT @ rows
    number = sums[..., :1] + _LEAST
    return torch.add(sums, before.detach(), alpha=_LEAST) / number, number


def _closeness(k: Tensor, centers: Tensor, factor: float = 1.0) -> Tensor:
    """Return k.c - |c|^2 / 2 times a factor, which is largest for the nearest centre, [B, H, n, M]."""
    length = centers.square().sum(dim=-1).flatten(0, 1).unsqueeze(1)
    found = torch.baddbmm(length, k.flatten(0, 1), centers.flatten(0, 1).mT, beta=-0.5 * factor, alpha=factor)
    return split_dim(found, 0, *k.shape[:2])
