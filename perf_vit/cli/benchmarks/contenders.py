"""The attentions that are measured side by side, each as a function of queries, keys and values."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import perf_vit.ops
from perf_vit.cli.benchmarks.settings import AttentionBenchmark

__all__ = ["FLOOR", "INSTALL_HINT", "OURS", "POPULAR", "SDPA", "Contender", "attention_contenders"]

OURS, SDPA, POPULAR, FLOOR = "perf_vit", "torch SDPA", "performer-pytorch", "floor"
INSTALL_HINT = f"{POPULAR} is not installed, so it is left out; `pip install {POPULAR}` brings it in"


@dataclass(frozen=True)
class Contender:
    """An attention to be measured.

    Attributes:
        name: what the table calls it.
        attend: (q, k, v), each [B, H, L, D], -> [B, H, L, D].
        growth: exponent of its time in L; 1 for linear attention, 2 for softmax.
        prepare_values: applied to v, [B, H, L, D], before the clock starts.
    """

    name: str
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    growth: int = 1
    prepare_values: Callable[[Tensor], Tensor] = lambda v: v


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
    contenders.append(Contender(FLOOR, lambda q, k, v: _floor(q, k, v, projection), prepare_values=_append_ones))
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


def _floor(q: Tensor, k: Tensor, v_and_ones: Tensor, projection: Tensor) -> Tensor:
    """The four matrix products of linear attention and nothing between them: no exponential, no quotient.

    Args:
        q: queries, [B, H, L, D].
        k: keys, [B, H, L, D].
        v_and_ones: values and a column of ones, [B, H, L, D + 1].
        projection: [M, D].

    Returns:
        [B, H, L, D + 1], which estimates nothing.
    """
    state = torch.matmul(torch.matmul(k, projection.mT).mT, v_and_ones)
    return torch.matmul(torch.matmul(q, projection.mT), state)


def _append_ones(v: Tensor) -> Tensor:
    return torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
