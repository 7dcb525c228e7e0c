"""The gate before the clock of `gpu.py`: attention that differs from its N x N reference is not timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

import perf_vit.ops
from perf_vit.errors import PerfVitError
from perf_vit.ops import KERNELS, attention_backend, draw_projection, oprf_kernel
from perf_vit.ops.fused.dispatch import LIMITS, backend_of
from perf_vit.ops.naive import naive_clustered_attention, naive_favor_attention, softmax_attention
from perf_vit.ops.sinks import choose_sinks

__all__ = ["verify", "verify_backend"]

# Relative errors (of the largest entry) that rounding explains; a wrong term or factor is far above them.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}

_Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def verify(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Compare each attention with its reference on a device.

    In float64, values and gradients, whole and in chunks, with and without a key mask; in the dtype of the run, values,
    against the reference of the same inputs in float64.

    Args:
        device: Device to verify.
        dtype: Dtype of the run.

    Returns:
        Largest relative errors in float64 and in the dtype, whether deterministic mode repeats gradients bit for bit,
        and whether a call waits for the device; the latter is None on a CPU.

    Raises:
        PerfVitError: They disagree; says where and by how much.
    """
    double = [_compare_gradients(*case, device) for case in _cases((11, 13), device)]
    low = [_compare_values(*case, device, dtype) for case in _cases((24, 32), device)]
    attend = partial(perf_vit.ops.clustered_attention, grid=(24, 32), window_size=8, num_clusters=20)
    return {
        "float64": max(double),
        str(dtype).removeprefix("torch."): max(low),
        "repeats_gradients": _repeats(attend, device, dtype),
        "waits_for_device": _waits(attend, device, dtype),
    }


def verify_backend(name: str, device: str, dtype: torch.dtype) -> float:
    """Compare what a backend of attention computes with its references, in float32 and in the dtype of the run.

    Args:
        name: "triton" or "flex"; gradients are compared where it has them.
        device: Device to verify.
        dtype: Dtype of the run.

    Returns:
        Largest relative error.

    Raises:
        PerfVitError: They disagree, or PyTorch operations compute a call; says where and by how much or why.
    """
    found = []
    for each in dict.fromkeys((torch.float32, dtype)):
        refusal = LIMITS[name].refusal(*_draw(8, device, each)[:3])
        if refusal is not None:
            raise PerfVitError(f"the attention backend {name} {refusal}")
        for title, fast, naive, length in _cases((24, 32), device):
            if (operation := _operation(title)) in LIMITS[name].functions:
                attend = partial(_by_backend, name, operation, fast)
                compare = _compare_gradients if LIMITS[name].has_gradient else _compare_values
                found.append(compare(f"{title} by {name}", attend, naive, length, device, each))
    if not found:
        raise PerfVitError(f"the attention backend {name} computes no attention")
    return max(found)


def _operation(title: str) -> str:
    """Return the name by which backends know an attention of `_cases`."""
    kind, _, kernel = title.split(", chunk_size")[0].removesuffix(", masked").partition(", ")
    return f"FAVOR+ ({kernel})" if kind == "performer" else kind


def _by_backend(name: str, operation: str, attend: _Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with attention_backend(name):
        if backend_of(operation, q, k, v) != name:
            raise PerfVitError(f"the attention backend {name} left {operation} attention to PyTorch operations")
        return attend(q, k, v)


def _cases(grid: tuple[int, int], device: str) -> Iterator[tuple[str, _Attention, _Attention, int]]:
    """Yield name, attention, reference and number of tokens."""
    length = 1 + grid[0] * grid[1]
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(2, length, generator=generator) > 0.3).to(device)
    for key_mask in (None, mask):
        masked = "" if key_mask is None else ", masked"
        for chunk_size in (None, 61):
            name = f"clustered{masked}, chunk_size={chunk_size}"
            fast = partial(_clustered, grid, key_mask, chunk_size)
            yield name, fast, partial(_naive_clustered, grid, key_mask), length
        for kernel in (oprf_kernel(-0.05) if each == "oprf" else KERNELS[each] for each in KERNELS):
            w = draw_projection(64, 64, generator=generator, kernel=kernel).to(device)
            options: dict[str, Any] = {"projection": w, "kernel": kernel, "key_mask": key_mask}
            fast = partial(_favor, chunk_size=61, **options)
            yield f"performer, {kernel.name}{masked}", fast, partial(naive_favor_attention, **options), length
    yield "softmax", torch.nn.functional.scaled_dot_product_attention, softmax_attention, length


def _clustered(
    grid: tuple[int, int], key_mask: Tensor | None, chunk_size: int | None, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    return perf_vit.ops.clustered_attention(q, k, v, grid, 5, 6, 9, 1, key_mask, chunk_size)


def _naive_clustered(grid: tuple[int, int], key_mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys = k if key_mask is None else k.masked_fill(~key_mask[:, None, :, None], 0.0)
    sinks = choose_sinks(q, keys, 6, 1, key_mask)
    return naive_clustered_attention(q, keys, v, grid, 5, sinks, 9, 1, key_mask)


def _favor(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return perf_vit.ops.favor_attention(q, k, v, **options)


def _draw(length: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Draw queries, keys, values and a gradient, [2, 2, length, 64] each; short ones, as all kernels need."""
    generator = torch.Generator().manual_seed(length)
    return [0.5 * torch.randn(2, 2, length, 64, generator=generator).to(device, dtype) for _ in range(4)]


def _compare_gradients(
    name: str, fast: _Attention, naive: _Attention, length: int, device: str, dtype: torch.dtype = torch.float64
) -> float:
    inputs = _draw(length, device, dtype)
    found, expected = _with_gradients(fast, *inputs), _with_gradients(naive, *(x.double() for x in inputs))
    names = ("output", "dq", "dk", "dv")
    pairs = zip(names, found, expected, strict=True)
    return max(_check_equal(a, b, dtype, f"{what} of {name}") for what, a, b in pairs)


@torch.no_grad()
def _compare_values(
    name: str, fast: _Attention, naive: _Attention, length: int, device: str, dtype: torch.dtype
) -> float:
    q, k, v, _ = _draw(length, device, dtype)
    expected = naive(q.double(), k.double(), v.double())
    return _check_equal(fast(q, k, v), expected, dtype, f"output of {name} in {dtype}")


def _with_gradients(attend: _Attention, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad))


def _check_equal(found: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> float:
    error = float((found.double() - expected).abs().max() / expected.abs().max())
    # Written so that NaN fails.
    if not error <= TOLERANCES[dtype]:
        raise PerfVitError(
            f"attention disagrees with its reference, so nothing is timed: {what} differs by {error:.1e} of the "
            f"largest entry, at most {TOLERANCES[dtype]:.0e} is rounding; run `python -m pytest tests/ops`"
        )
    return error


def _repeats(attend: _Attention, device: str, dtype: torch.dtype) -> bool:
    """Return whether two calls in deterministic mode give the same values and gradients, bit for bit."""
    q, k, v, grad = _draw(1 + 24 * 32, device, dtype)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (_with_gradients(attend, q, k, v, grad) for _ in range(2))
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        return False
    finally:
        torch.use_deterministic_algorithms(before)
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _waits(attend: _Attention, device: str, dtype: torch.dtype) -> bool | None:
    """Return whether attention or its backward pass makes the processor wait for the device."""
    if torch.device(device).type != "cuda":
        return None
    q, k, v, grad = _draw(1 + 24 * 32, device, dtype)
    _with_gradients(attend, q, k, v, grad)
    try:
        with _waiting_refused():
            _with_gradients(attend, q, k, v, grad)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    return False


@contextmanager
def _waiting_refused() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
