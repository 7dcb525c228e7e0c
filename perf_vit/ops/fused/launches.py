"""What launches of Triton kernels share: sizes of tiles, strides, and products of matrices."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

__all__ = ["LOG2_E", "LOWEST", "Tiles", "dot", "fold", "in_rows", "load_rows", "store_rows", "strides"]

# Logits are to the base 2, whose powers GPUs compute faster. Keys with the lowest one have no weight.
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)
_HIDDEN = tl.constexpr(-1e29)


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
    def of(cls, k: Tensor, v: Tensor, most_queries: int, num_bytes: int) -> Tiles:
        """Return sizes for keys and values of `num_bytes` each, with at most `most_queries` queries together."""
        k_channels, v_channels = (_padded(x.shape[-1]) for x in (k, v))
        # Compiled for heads of 128 channels in float32, a program takes 115 KiB of the 163 KiB of an A100.
        row = max(k_channels, v_channels) * num_bytes
        return cls(
            queries=min(_padded(most_queries), 128 if row <= 128 else 64 if row <= 256 else 32),
            keys=32,
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
def dot(a, b, PRECISION: tl.constexpr, IS_EMULATED: tl.constexpr):
    """Multiply two matrices into float32."""
    if IS_EMULATED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load_rows(x, place, counts, stride, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Load rows of C channels, 0 where they don't count, [n, BLOCK_C]."""
    c = tl.arange(0, BLOCK_C)
    there = counts[:, None] & (c[None, :] < C)
    return tl.load(x + place.to(tl.int64)[:, None] * stride + c[None, :], there, other=0.0)


@triton.jit
def store_rows(x, rows, place, counts, stride, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Store those of rows of C channels, [n, BLOCK_C], that count."""
    c = tl.arange(0, BLOCK_C)
    there = counts[:, None] & (c[None, :] < C)
    tl.store(x + place.to(tl.int64)[:, None] * stride + c[None, :], rows.to(x.dtype.element_ty), there)


@triton.jit
def fold(q, keys, values, bias, out, top, total, scale, PRECISION: tl.constexpr, IS_EMULATED: tl.constexpr):
    """Add keys to running sums of attention; return these, the weights of the keys, and the factor of older sums."""
    logits = dot(q, tl.trans(keys), PRECISION, IS_EMULATED) * scale + bias[None, :]
    largest = tl.maximum(top, tl.max(logits, 1))
    weights = tl.where(logits > _HIDDEN, tl.exp2(logits - largest[:, None]), 0.0)
    factor = tl.exp2(top - largest)
    out = out * factor[:, None] + dot(weights.to(values.dtype), values, PRECISION, IS_EMULATED)
    return out, largest, total * factor + tl.sum(weights, 1), weights, factor
