"""Tokens spread evenly over those that are seen."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["spread_tokens"]


def spread_tokens(x: Tensor, number: int, key_mask: Tensor | None = None) -> Tensor:
    """Some tokens of [B, H, N, D], evenly spaced, from the first to the last one, [B, H, n, D].

    Args:
        x: tokens.
        number: n, at most N are taken.
        key_mask: [B, N] bool, False for tokens that are passed over. A sample with fewer than n others gives some of
            them more than once, and one without any a token that isn't seen.
    """
    number = min(number, x.shape[2])
    steps = torch.arange(number, device=x.device)
    if key_mask is None:
        return x[:, :, steps * (x.shape[2] - 1) // max(1, number - 1)]
    seen_first = (~key_mask).to(torch.uint8).argsort(dim=-1, stable=True)
    last = (key_mask.sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    places = seen_first.take_along_dim(steps * last // max(1, number - 1), dim=-1)
    return torch.take_along_dim(x, places[:, None, :, None], dim=2)
