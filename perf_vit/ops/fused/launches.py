"""What launches of Triton kernels share: sizes of tiles, strides, and products of matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

__all__ = ["Tiles", "dot", "in_rows", "strides"]


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes of the tiles of a kernel, powers of 2 from 16 up, as products of matrices need.

    Attributes:
        queries: Queries of a program.
        keys: Keys that a program loads at once.
        k_channels: Channels of queries and keys with padding.
        v_channels: Channels of values with padding.
        precision: How products of float32 are computed.
        is_emulated: Whether operands are cast to float32, because the interpreter has no products of bfloat16.
    """

    queries: int
    keys: int
    k_channels: int
    v_channels: int
    precision: str
    is_emulated: bool

    @classmethod
    def of(cls, k: Tensor, v: Tensor, most_queries: int) -> Tiles:
        """Return sizes for keys and values, at most `most_queries` queries being processed together."""
        k_channels, v_channels = (_padded(x.shape[-1]) for x in (k, v))
        # Queries, keys and values of a program fit in the 100 KiB of shared memory of small GPUs.
        row = max(k_channels, v_channels) * k.element_size()
        return cls(
            queries=min(_padded(most_queries), 128 if row <= 128 else 64 if row <= 256 else 32),
            keys=64 if row <= 128 else 32,
            k_channels=k_channels,
            v_channels=v_channels,
            # Sums of three products of tensor cores, which are as exact as float32; others lack them.
            precision="ieee" if torch.version.hip else "tf32x3",
            is_emulated=not k.is_cuda,
        )

    def options(self, *, queries: bool) -> dict[str, Any]:
        """Return the constants of a kernel, with or without queries."""
        found: dict[str, Any] = {
            "BLOCK_N": self.keys,
            "BLOCK_D": self.k_channels,
            "BLOCK_DV": self.v_channels,
            "PRECISION": self.precision,
            "IS_EMULATED": self.is_emulated,
            "num_warps": 4,
            "num_stages": 2,
        }
        return found | ({"BLOCK_M": self.queries, "num_warps": 8 if self.queries > 64 else 4} if queries else {})


def in_rows(x: Tensor) -> Tensor:
    """Return a tensor whose channels are adjacent in memory: itself, as a rule."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of samples, heads and tokens of [B, H, N, C]."""
    return x.stride(0), x.stride(1), x.stride(2)


def _padded(number: int) -> int:
    return max(16, 1 << (number - 1).bit_length())


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, IS_EMULATED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Multiply two matrices into float32."""
    if IS_EMULATED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)
