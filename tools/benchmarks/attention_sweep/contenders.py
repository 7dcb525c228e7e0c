"""The attentions that are measured side by side, each as a function of queries, keys and values."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from settings import FORWARD, PASSES, AttentionBenchmark
from torch import Tensor
from torch.nn import functional as F

import perf_vit.ops

__all__ = ["CHUNKED_FLOOR", "FLOOR", "INSTALL_HINT", "OURS", "POPULAR", "SDPA", "Contender", "attention_contenders"]

OURS, SDPA, POPULAR, CHUNKED_FLOOR, FLOOR = "perf_vit", "torch SDPA", "performer-pytorch", "floor, chunked", "floor"
_FLOOR_CHUNK = 512
INSTALL_HINT = f"{POPULAR} is not installed, so it is left out; `pip install {POPULAR}` brings it in"


@dataclass(frozen=True)
class Contender:
    """An attention to be measured.

    Attributes:
        name: what the table calls it.
        attend: (q, k, v), each [B, H, L, D], -> [B, H, L, D].
        growth: exponent of its time in L; 1 for linear attention, 2 for softmax.
        passes: the directions it is measured in.
    """

    name: str
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    growth: int = 1
    passes: tuple[str, ...] = PASSES


def attention_contenders(settings: AttentionBenchmark, projection: Tensor) -> list[Contender]:
    """Ours, torch's softmax attention, the popular Performer where it is installed, and the floor.

    Args:
        settings: sizes, dtype and device.
        projection: rows of the feature map, [M, D], in that dtype on that device.
    """
    contenders = [
        Contender(OURS, lambda q, k, v: perf_vit.ops.favor_attention(q, k, v, projection)),
        Contender(SDPA, F.scaled_dot_product_attention, growth=2),
    ]
    popular = _popular_attention(settings, projection)
    if popular is not None:
        contenders.append(Contender(POPULAR, popular))
    contenders.append(Contender(CHUNKED_FLOOR, lambda q, k, v: _chunked_floor(q, k, v, projection), passes=(FORWARD,)))
    contenders.append(Contender(FLOOR, lambda q, k, v: _floor(q, k, v, projection)))
    return contenders


def _popular_attention(
    settings: AttentionBenchmark, projection: Tensor
) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module("performer_pytorch")
    except ImportError:
        return None
    attention = module.FastAttention(dim_heads=settings.head_dim, nb_features=settings.num_features)
    attention.projection_matrix = projection
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = attention.to(settings.device, settings.torch_dtype).eval()
    return attend


def _floor(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Tensor:
    """The four matrix products of linear attention and nothing between them: no exponential, no sum, no quotient.

    Args:
        q: queries, [B, H, L, D].
        k: keys, [B, H, L, D].
        v: values, [B, H, L, D].
        projection: [M, D].

    Returns:
        [B, H, L, D], which estimates nothing.
    """
    # `linear` takes half the time of a product with the transposed projection.
    return F.linear(q, projection) @ (F.linear(k, projection).mT @ v)


def _chunked_floor(q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> Tensor:
    """The same products, chunk by chunk, so that what lies between them stays in the cache: a lower floor."""
    chunks = zip(_split(k), _split(v), strict=True)
    products = (F.linear(k_chunk, projection).mT @ v_chunk for k_chunk, v_chunk in chunks)
    state = functools.reduce(Tensor.add_, products)
    out = torch.empty_like(q)
    for q_chunk, out_chunk in zip(_split(q), _split(out), strict=True):
        out_chunk.copy_(F.linear(q_chunk, projection) @ state)
    return out


def _split(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, _FLOOR_CHUNK, dim=2)
