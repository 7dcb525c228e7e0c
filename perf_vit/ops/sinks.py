"""Tokens spread evenly over those that are seen."""

from __future__ import annotations

import torch
from torch import Tensor

from perf_vit.ops.features import LOWEST_SCALE

__all__ = ["choose_sinks", "sinks_for_size", "spread_tokens"]


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


# So many queries at a time: their weights take less memory than queries, keys and values do.
_QUERIES = 32

# Of each head, at least and at most, and tokens x sinks in between. Saved conversions rest on these numbers.
_FEWEST, _MOST, _TOKENS_TIMES_SINKS = 64, 256, 5 * 2**18


def sinks_for_size(num_tokens: int) -> int:
    """Sinks of an image of so many tokens: 256 up to 5,120 tokens, 64 from 20,480, and the same cost in between.

    In small images attention is a small part of the work, so more of it costs little and keeps more of softmax.
    """
    return max(_FEWEST, min(_MOST, _TOKENS_TIMES_SINKS // max(num_tokens, 1)))


@torch.no_grad()
def choose_sinks(
    q: Tensor, k: Tensor, num_sinks: int, num_prefix_tokens: int, key_mask: Tensor | None, num_queries: int = 128
) -> Tensor:
    """The keys with the largest mean root of their weights in exact attention of some queries spread over the grid.

    The root, because a key that many queries look at serves better than one that holds all of a few.

    Args:
        q: queries, [B, H, N, D].
        k: keys, [B, H, N, D].
        num_sinks: how many, at most as many as there are.
        num_prefix_tokens: tokens at the start that are no candidates.
        key_mask: [B, N] bool, False for keys that are no candidates either, and whose tokens aren't asked.
        num_queries: how many queries are asked.

    Returns:
        Their places, [B, H, num_sinks].
    """
    length = q.shape[2] - num_prefix_tokens
    seen = None if key_mask is None else key_mask[:, num_prefix_tokens:]
    asking = spread_tokens(q[:, :, num_prefix_tokens:], num_queries, seen).float() * q.shape[-1] ** -0.5
    keys, mass = k.float().mT, torch.zeros_like(k[..., 0], dtype=torch.float32)
    for some in asking.split(_QUERIES, dim=2):
        logits = some @ keys
        if key_mask is not None:
            logits.masked_fill_(~key_mask[:, None, None], LOWEST_SCALE)
        mass += logits.softmax(dim=-1).sqrt_().sum(dim=2)
    mass = mass[..., num_prefix_tokens:]
    if seen is not None:
        mass = mass.masked_fill(~seen[:, None], -1.0)
    return mass.topk(min(num_sinks, length), dim=-1).indices + num_prefix_tokens
