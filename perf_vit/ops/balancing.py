"""Changes of queries and keys that leave exact softmax attention as it is and make its random features closer to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Balancing", "fit_balancing"]


@dataclass(frozen=True, eq=False)
class Balancing:
    """Centres of queries and keys, and a factor between their channels.

    Softmax over keys forgets what is the same for all of them, so with centres c_q, c_k and factors g the weights
    softmax(q . k / sqrt(D)) equal those of q' = g (q - c_q) and k' = (k - c_k) / g with the log-bias
    (k - c_k) . c_q / sqrt(D) on each key. Random features see the shorter q' and k', and their variance grows with
    exp(|q' + k'|^2 / sqrt(D)). The bias enters a key's amplitude; nothing is estimated in its place.

    Attributes:
        query_center: c_q, [B, H, 1, D].
        key_center: c_k, of the same shape.
        scale: g > 0, of the same shape.
    """

    query_center: Tensor
    key_center: Tensor
    scale: Tensor

    def same_as(self, other: Balancing) -> bool:
        """Whether features made with both may be multiplied."""
        return self is other or all(
            torch.equal(mine, theirs) for mine, theirs in zip(self.tensors(), other.tensors(), strict=True)
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The centres and the scale, in the order of the arguments."""
        return self.query_center, self.key_center, self.scale


@torch.no_grad()
def fit_balancing(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None = None,
    *,
    center: bool = True,
    balance: bool = True,
    chunk_size: int = 2048,
) -> Balancing:
    """The balancing that suits some queries and keys.

    c_q and c_k are their means and g = (E k_d^2 / E q_d^2)^(1/4), per head and channel, of the centred ones: the g
    that makes both halves of |q'|^2 + |k'|^2 equal in each channel, where their sum is smallest. The values are
    constants: no gradient flows through them, and exact softmax has none with respect to them.

    Args:
        q: queries, [B, H, N_q, D].
        k: keys, [B, H, N_k, D].
        key_mask: [B, N_k] bool, False for keys that don't count; where N_q = N_k, for the queries in their place too.
        center: find centres; False leaves them 0.
        balance: find factors; False leaves them 1.
        chunk_size: tokens whose copies are in memory at once.

    Returns:
        The balancing, in float32, or float64 for float64 inputs.

    Raises:
        ValueError: queries and keys that aren't [B, H, N, D] with the same B, H and D.
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
        # A channel that is constant, hence 0 once centred, has nothing to balance.
        scale = torch.where((key_square > 0) & (query_square > 0), ratio.sqrt().sqrt(), scale)
    return Balancing(query_center, key_center, scale)


def _moments(x: Tensor, mask: Tensor | None, center: bool, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Mean (0 unless `center`) and mean square about it, [B, H, 1, D]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    count = x.shape[2] if mask is None else mask.sum(dim=1).reshape(-1, 1, 1, 1).clamp(min=1)
    mean = torch.zeros_like(x[:, :, :1], dtype=dtype)
    if center:
        mean = _sum(x, mask, torch.zeros_like(mean), 1, chunk_size) / count
    return mean, _sum(x, mask, mean, 2, chunk_size) / count


def _sum(x: Tensor, mask: Tensor | None, center: Tensor, power: int, chunk_size: int) -> Tensor:
    total = torch.zeros_like(center)
    for start in range(0, x.shape[2], chunk_size):
        part = (x[:, :, start : start + chunk_size].to(center.dtype) - center).pow_(power)
        if mask is not None:
            part = part.masked_fill_(~mask[:, None, start : start + chunk_size, None], 0.0)
        total += part.sum(dim=2, keepdim=True)
    return total
