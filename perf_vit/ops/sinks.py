"""Attention sinks: the keys with the largest weights, to which every query attends exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from perf_vit.ops.features import LOWEST_SCALE

__all__ = ["choose_sinks", "shared_keys", "sinks_for_size", "spread_tokens"]


def spread_tokens(x: Tensor, number: int, key_mask: Tensor | None = None) -> Tensor:
    """Select evenly spaced tokens of [B, H, N, D], from the first to the last, [B, H, n, D].

    Args:
        x: Tokens, [B, H, N, D].
        number: Number n of tokens, at most N.
        key_mask: [B, N] bool, False for tokens to skip. A sample with fewer than n other tokens repeats some of them; a
            sample without any returns a masked token.
    """
    number = min(number, x.shape[2])
    steps = torch.arange(number, device=x.device)
    if key_mask is None:
        return x[:, :, steps * (x.shape[2] - 1) // max(1, number - 1)]
    seen_first = (~key_mask).to(torch.uint8).argsort(dim=-1, stable=True)
    last = (key_mask.sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    indices = seen_first.take_along_dim(steps * last // max(1, number - 1), dim=-1)
    return torch.take_along_dim(x, indices[:, None, :, None], dim=2)


# Number of queries whose weights choose the sinks.
_QUERIES = 32

# Saved conversions depend on these values.
_SINKS, _FEW_TOKENS = 256, 2560


def sinks_for_size(num_tokens: int) -> int:
    """Return the number of sinks for an image: 256 up to 2,560 tokens, else none.

    In small images a key stands for a larger part of its cluster. In large ones, clusters bring more than sinks.
    """
    return _SINKS if num_tokens <= _FEW_TOKENS else 0


@torch.no_grad()
def choose_sinks(q: Tensor, k: Tensor, num_sinks: int, num_prefix_tokens: int, key_mask: Tensor | None) -> Tensor:
    """Select the keys with the largest mean square root of attention weight over queries spread over the grid.

    The square root favours keys that many queries attend to over keys with all the weight of a few queries.

    Args:
        q: Queries, [B, H, N, D].
        k: Keys, [B, H, N, D].
        num_sinks: Number of sinks, at most the number of candidates.
        num_prefix_tokens: Number of tokens at the start, which are no candidates.
        key_mask: [B, N] bool, False for tokens that are neither candidates nor sampled as queries.

    Returns:
        Indices of the sinks, [B, H, num_sinks].
    """
    length = q.shape[2] - num_prefix_tokens
    seen = None if key_mask is None else key_mask[:, num_prefix_tokens:]
    asking = spread_tokens(q[:, :, num_prefix_tokens:], _QUERIES, seen).float() * q.shape[-1] ** -0.5
    logits = asking @ k.float().mT
    if key_mask is not None:
        logits.masked_fill_(~key_mask[:, None, None], LOWEST_SCALE)
    mass = logits.softmax(dim=-1).sqrt_().sum(dim=2)
    mass = mass[..., num_prefix_tokens:]
    if seen is not None:
        mass = mass.masked_fill(~seen[:, None], -1.0)
    return mass.topk(min(num_sinks, length), dim=-1).indices + num_prefix_tokens


def shared_keys(
    q: Tensor, k: Tensor, v: Tensor, num_sinks: int, num_prefix_tokens: int, key_mask: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor | None], Tensor | None]:
    """Return prefix tokens and sinks as (keys, values, validity), and which tokens of the grid are in neither.

    Returns:
        [B, H, s, C] each and the validity of the grid, [B, H or 1, n, 1]; None for a validity where all are.
    """
    first = num_prefix_tokens
    valid = None if key_mask is None else key_mask[:, None, :, None]
    every = [k, v] if valid is None else [k, v, valid.expand(-1, k.shape[1], -1, -1)]
    shared = [x[:, :, :first] for x in every]
    on_grid = None if valid is None else valid[:, :, first:]
    if num_sinks:
        sinks = choose_sinks(q, k, num_sinks, first, key_mask).unsqueeze(-1)
        shared = [torch.cat([few, x.take_along_dim(sinks, dim=2)], dim=2) for few, x in zip(shared, every, strict=True)]
        every_key = (
            torch.ones_like(k[:, :, first:, :1], dtype=torch.bool) if on_grid is None else every[2][:, :, first:]
        )
        on_grid = every_key.scatter(2, sinks - first, 0)
    return (shared[0], shared[1], None if valid is None else shared[2]), on_grid
