"""The choice, for each call of attention, between PyTorch operations, Triton kernels and FlexAttention."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from perf_vit.errors import PerfVitError, warn_once

__all__ = ["BACKENDS", "Limits", "attention_backend", "backend_of", "fused_attention", "set_attention_backend"]

BACKENDS = ("torch", "triton", "flex", "auto")
"""Names that `set_attention_backend` takes."""

_VARIABLE = "PERF_VIT_ATTENTION_BACKEND"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Calls of attention that a backend computes.

    Attributes:
        functions: For each operation, the module and name of the function that computes it; it takes what
            `fused_attention` gets. Modules are imported at the first call.
        package: Package that must be installed.
        devices: Types of devices.
        dtypes: Dtypes of queries, keys and values.
        smallest_head_dim: Smallest number of channels of keys, and of values.
        largest_head_dim: Largest number of channels of keys, and of values.
        has_gradient: Whether it has a backward pass.
        is_captured: Whether it works in graphs that `torch.compile` and `torch.export` capture.
        most_heads: Largest number of samples x heads: a grid of blocks on a GPU has no more in its second dimension.
    """

    functions: dict[str, tuple[str, str]]
    package: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    smallest_head_dim: int
    largest_head_dim: int
    has_gradient: bool
    is_captured: bool
    most_heads: int = 2**16 - 1

    def refusal(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Return why a call can't be computed, as "needs .., got .."; None if it can."""
        head_dims = sorted((k.shape[-1], v.shape[-1]))
        dtypes = {x.dtype for x in (q, k, v)}
        if q.device.type not in self.devices:
            return f"needs a device of type {' or '.join(self.devices)}, got {q.device.type}"
        if q.is_cuda and not torch.version.hip and (found := torch.cuda.get_device_capability(q.device)) < _CAPABILITY:
            return f"needs a GPU of compute capability {_dotted(_CAPABILITY)}, got {_dotted(found)}"
        if not _is_installed(self.package):
            return f"needs the package {self.package}, which isn't installed"
        if not self.has_gradient and _needs_gradient(q, k, v):
            return "has no gradient; use torch.no_grad() or torch.inference_mode()"
        if not self.is_captured and torch.compiler.is_compiling():
            return "can't be part of an exported graph"
        if not dtypes <= set(self.dtypes):
            return f"needs {_names(self.dtypes)}, got {_names(dtypes)}"
        if head_dims[0] < self.smallest_head_dim:
            return f"needs heads of at least {self.smallest_head_dim} channels, got {head_dims[0]}"
        if q.shape[0] * q.shape[1] > self.most_heads:
            return f"needs at most {self.most_heads:,} samples x heads, got {q.shape[0] * q.shape[1]:,}"
        if head_dims[1] > self.largest_head_dim:
            return f"needs heads of at most {self.largest_head_dim} channels, got {head_dims[1]}"
        return None


# Ampere: the first with products of bfloat16, and what Triton supports.
_CAPABILITY = (8, 0)
_HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
# Under its interpreter, which needs this variable before the first import of triton, kernels run on processors.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TRITON_FAVOR = ("perf_vit.ops.fused.triton_favor", "triton_favor_attention")
LIMITS = {
    "triton": Limits(
        functions={
            "clustered": ("perf_vit.ops.fused.triton_clustered", "triton_clustered_attention"),
            "FAVOR+ (softmax+)": _TRITON_FAVOR,
            "FAVOR+ (softmax-hyp+)": _TRITON_FAVOR,
            "FAVOR+ (relu)": _TRITON_FAVOR,
        },
        package="triton",
        devices=("cuda", "cpu") if _INTERPRETED else ("cuda",),
        dtypes=_HALF_AND_SINGLE,
        smallest_head_dim=1,
        largest_head_dim=128,
        has_gradient=False,
        is_captured=False,
    ),
    "flex": Limits(
        functions={"clustered": ("perf_vit.ops.fused.flex_clustered", "flex_clustered")},
        package="torch",
        devices=("cuda",),
        dtypes=_HALF_AND_SINGLE,
        # Products of tiles need 16 channels; 128 and the further columns of values are rounded up to 256.
        smallest_head_dim=16,
        largest_head_dim=128,
        has_gradient=True,
        is_captured=True,
    ),
}


def set_attention_backend(name: str) -> str:
    """Choose what computes clustered and FAVOR+ attention in this process.

    - "torch": PyTorch operations, on every device. The default.
    - "triton": Triton kernels where no gradient is needed; their package comes with torch for GPUs.
    - "flex": FlexAttention, with and without gradients, in clustered attention.
    - "auto": on GPUs, "flex" where a gradient is needed or a graph is captured, and "triton" elsewhere.

    Calls outside the limits of a backend, such as its dtypes, are computed by PyTorch operations, which a warning says
    once. The environment variable PERF_VIT_ATTENTION_BACKEND sets the name at the start of a process.

    Args:
        name: One of `BACKENDS`.

    Returns:
        The name before.

    Raises:
        ValueError: The name is unknown.
    """
    global _chosen
    if name not in BACKENDS:
        raise PerfVitError(
            f"the attention backend must be one of {', '.join(BACKENDS)}, got {name!r}; see set_attention_backend and "
            f"the environment variable {_VARIABLE}"
        )
    before, _chosen = _chosen, name
    return before


@contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Choose what computes attention inside a `with` block, in all threads, as `set_attention_backend` does.

    Raises:
        ValueError: The name is unknown.
    """
    before = set_attention_backend(name)
    try:
        yield
    finally:
        set_attention_backend(before)


def fused_attention(operation: str, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor | None:
    """Return attention by the chosen backend; None where PyTorch operations are to compute it.

    Args:
        operation: "clustered" or, with the name of the kernel, "FAVOR+ (softmax+)".
        q: Queries, [B, H, N, D].
        k: Keys, [B, H, N, D].
        v: Values, [B, H, N, Dv].
        options: Further arguments of the backend's function.
    """
    name = backend_of(operation, q, k, v)
    if name == "torch":
        return None
    module, function = LIMITS[name].functions[operation]
    return getattr(import_module(module), function)(q, k, v, *options)


def backend_of(operation: str, q: Tensor, k: Tensor, v: Tensor) -> str:
    """Return the backend that computes a call: "torch", "triton" or "flex"; arguments as of `fused_attention`."""
    name = _chosen
    if name == "torch" or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "torch"
    is_captured = torch.compiler.is_compiling()
    if name == "auto":
        name = "flex" if is_captured or _needs_gradient(q, k, v) else "triton"
        if q.device.type != "cuda" or operation not in LIMITS[name].functions:
            return "torch"
    limits = LIMITS[name]
    reason = limits.refusal(q, k, v) if operation in limits.functions else f"doesn't compute {operation} attention"
    if reason is None:
        return name
    if not is_captured:
        message = f"the attention backend {name!r} {reason}; PyTorch operations compute it instead"
        warn_once(message, message, RuntimeWarning)
    return "torch"


@cache
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def _needs_gradient(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _names(dtypes: Any) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


_chosen = "torch"
set_attention_backend(os.environ.get(_VARIABLE, "torch"))
