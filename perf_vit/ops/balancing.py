"""Centring and balancing of queries and keys: exact softmax attention is unchanged, its random features vary less."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Balancing", "fit_balancing", "moment_tokens"]


@dataclass(frozen=True, eq=False)
class Balancing:
    """Centres of queries and keys and a scale per channel.

    Softmax is invariant to a constant added to all logits of a query. With centres c_q, c_k and scales g, the weights
    softmax(q . k / sqrt(D)) therefore equal those of q' = g (q - c_q) and k' = (k - c_k) / g with the bias (k - c_k) .
    c_q / sqrt(D) added to the logits of each key. The variance of random features grows with exp(|q' + k'|^2 /
    sqrt(D)), so shorter q' and k' lower it. The bias is part of each key's amplitude and is exact.

    Attributes:
        query_center: c_q, [B, H, 1, D].
        key_center: c_k, [B, H, 1, D].
        scale: g > 0, [B, H, 1, D].
    """

    query_center: Tensor
    key_center: Tensor
    scale: Tensor

    def is_compatible(self, other: Balancing) -> bool:
        """Return whether both have equal values, so that products of their features are valid."""
        return self is other or all(
            torch.equal(mine, theirs) for mine, theirs in zip(self.tensors(), other.tensors(), strict=True)
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the centres and the scale, in the order of the constructor's arguments."""
        return self.query_center, self.key_center, self.scale


@torch.no_grad()
def fit_balancing(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None = None,
    *,
    center: bool = True,
    balance: bool = True,
    chunk_size: int | None = None,
) -> Balancing:
    """Fit the balancing to queries and keys.

    c_q and c_k are the means per head and channel. g = (E k_d^2 / E q_d^2)^(1/4) of the centred queries and keys
    minimises |q'|^2 + |k'|^2 in each channel. The values are constants: no gradient flows through them, and exact
    softmax attention does not depend on them.

    Args:
        q: Queries, [B, H, N_q, D].
        k: Keys, [B, H, N_k, D].
        key_mask: [B, N_k] bool, False for keys to ignore; applied to the queries too where N_q = N_k.
        center: Whether to fit the centres; False sets them to 0.
        balance: Whether to fit the scale; False sets it to 1.
        chunk_size: Number of tokens processed at once; None for 2,048, and on GPUs for all.

    Returns:
        The balancing, in float32, or float64 for float64 inputs.

    Raises:
        ValueError: Queries and keys aren't [B, H, N, D] with the same B, H and D.
    """
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q and k must be [B, H, N, D] with the same B, H and D, got {list(q.shape)} and {list(k.shape)}"
        )
    query_mask = key_mask if q.shape[2] == k.shape[2] else None
    query_center, query_square = _moments(q, query_mask, center, chunk_size)
    key_center, key_square = _moments(k, key_mask, center, chunk_size)
    scale = torch.ones_like(query_center)
    if balance:
        smallest = torch.finfo(scale.dtype).tiny
        ratio = key_square.clamp(min=smallest) / query_square.clamp(min=smallest)
        # A constant channel is 0 once centred: no scale is needed.
        scale = torch.where((key_square > 0) & (query_square > 0), ratio.sqrt().sqrt(), scale)
    return Balancing(query_center, key_center, scale)


def moment_tokens(x: Tensor) -> int:
    """Return how many tokens of [B, H, N, D] are summed at once: those that fit in a processor's cache, or all."""
    return 2048 if x.device.type == "cpu" else max(1, x.shape[2])


def _moments(x: Tensor, mask: Tensor | None, center: bool, chunk_size: int | None) -> tuple[Tensor, Tensor]:
    """Return the mean (0 unless `center`) and the mean square about it, [B, H, 1, D]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    count = x.shape[2] if mask is None else mask.sum(dim=1).reshape(-1, 1, 1, 1).clamp(min=1)
    mean = torch.zeros_like(x[:, :, :1], dtype=dtype)
    if center:
        mean = _sum(x, mask, torch.zeros_like(mean), 1, chunk_size) / count
    return mean, _sum(x, mask, mean, 2, chunk_size) / count


def _sum(x: Tensor, mask: Tensor | None, center: Tensor, power: int, chunk_size: int | None) -> Tensor:
    total = torch.zeros_like(center)
    chunk_size = chunk_size or moment_tokens(x)
    for start in range(0, x.shape[2], chunk_size):
        part = (x[:, :, start : start + chunk_size].to(center.dtype) - center).pow_(power)
        if mask is not None:
            part = part.masked_fill_(~mask[:, None, start : start + chunk_size, None], 0.0)
        total += part.sum(dim=2, keepdim=True)
    return total
