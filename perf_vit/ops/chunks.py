"""Tokens in chunks: where they begin and end, and how results of chunks become one tensor."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import Tensor

__all__ = ["halves", "join_chunks", "token_slices"]


def token_slices(x: Tensor, chunk_size: int) -> list[tuple[slice, slice, slice]]:
    """Indices of the fewest chunks of [B, H, N, ...] that have at most `chunk_size` tokens each, about equally many."""
    every, length = slice(None), x.shape[2]
    if length <= chunk_size:
        # Not split where it need not be: an exported graph then takes any number of tokens.
        return [(every, every, every)]
    num_chunks = -(-length // chunk_size)
    even = -(-length // num_chunks)
    return [(every, every, slice(start, start + even)) for start in range(0, length, even)]


def join_chunks(chunks: Iterator[Tensor], num_tokens: int) -> Tensor:
    """Put chunks of tokens, [B, H, n, ...], together as they come, so that they are never all there twice."""
    first = next(chunks)
    if first.shape[2] == num_tokens:
        return first
    out = first.new_empty(*first.shape[:2], num_tokens, *first.shape[3:])
    start = 0
    for chunk in itertools.chain([first], chunks):
        out[:, :, start : start + chunk.shape[2]] = chunk
        start += chunk.shape[2]
    return out


def halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """First and second halves of the blocks of 2 `half` tokens of [B, H, T, ...]: [B, H, T / (2 half), half, ...]."""
    blocks = x.reshape(*x.shape[:2], -1, 2, half, *x.shape[3:])
    return blocks[:, :, :, 0], blocks[:, :, :, 1]
