"""The feature maps phi of linear attention: phi(q) . phi(k) estimates the attention kernel of q and k.

All of them take x = D^(-1/4) q or D^(-1/4) k, [..., N, D], and a projection W, [M, D], and give [..., N, M]. A new
one is a function and an entry in the registry; nothing else asks for a kernel's name.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Kernel", "get_kernel", "kernel_names"]

_RELU_FLOOR = 1e-3

FeatureMap = Callable[[Tensor, Tensor], Tensor]
FeatureGradient = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Kernel:
    """A feature map.

    Attributes:
        name: what users call it.
        features: (x [..., N, D], projection [M, D]) -> [..., N, M]: log phi(x) where `log_domain`, else phi(x). The
            result is its caller's to overwrite.
        gradient: (x, projection, the result of `features`, a gradient with respect to it) -> the gradient with respect
            to x, [..., N, D]. Written out so that a backward pass can recompute features chunk by chunk.
        log_domain: whether `features` gives logarithms. Features that span many orders of magnitude must, so that
            they can be stabilised before they are exponentiated.
    """

    name: str
    features: FeatureMap
    gradient: FeatureGradient
    log_domain: bool


def get_kernel(name: str) -> Kernel:
    """Look a kernel up by its name.

    Raises:
        ValueError: no kernel of that name.
    """
    if name not in _KERNELS:
        near = difflib.get_close_matches(str(name), _KERNELS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"kernel must be one of {', '.join(_KERNELS)}, got {name!r}{hint}")
    return _KERNELS[name]


def kernel_names() -> tuple[str, ...]:
    """Names of all kernels."""
    return tuple(_KERNELS)


def _log_softmax_plus(x: Tensor, projection: Tensor) -> Tensor:
    """Positive features of the softmax kernel: log phi(x) = W x - |x|^2 / 2 - log(M) / 2.

    E phi(x) . phi(y) = exp(x . y) (Choromanski et al. 2020, lemma 1).
    """
    offset = x.square().sum(dim=-1, keepdim=True) / 2 + math.log(projection.shape[0]) / 2
    return (x @ projection.mT).sub_(offset)


def _log_softmax_plus_gradient(x: Tensor, projection: Tensor, features: Tensor, grad: Tensor) -> Tensor:
    return grad @ projection - grad.sum(dim=-1, keepdim=True) * x


def _relu(x: Tensor, projection: Tensor) -> Tensor:
    """Features of the generalised kernel "Performer-ReLU": phi(x) = (ReLU(W x) + 1e-3) / sqrt(M).

    Choromanski et al. 2020, section 4.2; the constant keeps every denominator positive.
    """
    return (torch.relu(x @ projection.mT) + _RELU_FLOOR) * projection.shape[0] ** -0.5


def _relu_gradient(x: Tensor, projection: Tensor, features: Tensor, grad: Tensor) -> Tensor:
    scale = projection.shape[0] ** -0.5
    # A feature above its floor came from a positive product; the margin is for the rounding of the floor itself.
    active = features > _RELU_FLOOR * scale * (1 + 1e-6)
    return torch.where(active, grad, 0.0) @ projection * scale


_KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("softmax+", _log_softmax_plus, _log_softmax_plus_gradient, log_domain=True),
        Kernel("relu", _relu, _relu_gradient, log_domain=False),
    )
}
