"""The gate before the clock: an attention that disagrees with its reference gets no speed."""

from __future__ import annotations

import itertools

import torch
from settings import AttentionBenchmark
from torch import Tensor

import perf_vit.ops
from perf_vit.errors import PerfVitError
from perf_vit.ops.naive import naive_favor_attention

__all__ = ["draw_inputs", "verify_linear_attention"]

# Relative errors (of the largest entry) that rounding explains; a wrong term or factor is far above them.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
_SMALL_LENGTH = 197
_ODD_LENGTHS = (1, 63, 1000)


def verify_linear_attention(settings: AttentionBenchmark, projection: Tensor) -> None:
    """Compare `favor_attention` with its N x N reference and with itself in other chunks.

    In float64 at a small length, outputs and gradients against `perf_vit.ops.naive`; in the benchmark's dtype, on its
    device and with its sizes, at odd lengths against the same reference and against a small odd chunk size.

    Args:
        settings: sizes, dtype and device.
        projection: rows of the feature map, [M, D].

    Raises:
        PerfVitError: they disagree; says where and by how much.
    """
    _verify_values_and_gradients(settings, projection)
    for length in _ODD_LENGTHS:
        _verify_odd_length(settings, projection, length)


def draw_inputs(settings: AttentionBenchmark, length: int, dtype: torch.dtype, num_tensors: int = 3) -> list[Tensor]:
    """Queries, keys, values (and more) from N(0, 1), each [B, H, length, D]; the same length gives the same ones."""
    generator = torch.Generator().manual_seed(length)
    shape = (settings.batch_size, settings.num_heads, length, settings.head_dim)
    return [torch.randn(shape, generator=generator).to(settings.device, dtype) for _ in range(num_tensors)]


def _verify_values_and_gradients(settings: AttentionBenchmark, projection: Tensor) -> None:
    q, k, v, grad_output = draw_inputs(settings, _SMALL_LENGTH, torch.float64, num_tensors=4)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    projection = projection.double()
    # Three chunks and a rest: the merging of chunks is a part of what is verified.
    ours = perf_vit.ops.favor_attention(q, k, v, projection, chunk_size=63)
    reference = naive_favor_attention(q, k, v, projection)
    ours_all = (ours, *torch.autograd.grad(ours, inputs, grad_output))
    reference_all = (reference, *torch.autograd.grad(reference, inputs, grad_output))
    for name, mine, expected in zip(("output", "dq", "dk", "dv"), ours_all, reference_all, strict=True):
        _require_equal(mine, expected, torch.float64, f"{name} at L = {_SMALL_LENGTH} in float64")


@torch.no_grad()
def _verify_odd_length(settings: AttentionBenchmark, projection: Tensor, length: int) -> None:
    q, k, v = draw_inputs(settings, length, settings.torch_dtype)
    reference = naive_favor_attention(q.double(), k.double(), v.double(), projection.double())
    whole = perf_vit.ops.favor_attention(q, k, v, projection)
    chunked = perf_vit.ops.favor_attention(q, k, v, projection, chunk_size=61)
    names = ("the reference", "itself in one chunk", "itself in chunks of 61")
    outputs = zip(names, (reference, whole, chunked), strict=True)
    for (name_a, a), (name_b, b) in itertools.combinations(outputs, 2):
        _require_equal(b, a, settings.torch_dtype, f"{name_b} against {name_a} at L = {length} in {settings.dtype}")


def _require_equal(output: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    error = (output.double() - expected.double()).abs().max() / expected.double().abs().max()
    # Written so that NaN fails.
    if not error.item() <= _TOLERANCES[dtype]:
        raise PerfVitError(
            f"favor_attention disagrees with its reference, so no speed is reported: {what} differs by "
            f"{error.item():.1e} of the largest entry, at most {_TOLERANCES[dtype]:.0e} is rounding; "
            "run `python -m pytest tests/ops`"
        )
