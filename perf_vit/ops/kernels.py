"""The feature maps phi of linear attention: phi(q) . phi(k) estimates the attention kernel of q and k.

All have the form of Choromanski et al. 2020, equation 5, phi(x) = h(x) / sqrt(R) [f_1(W x), ..., f_l(W x)], with the R
rows of W drawn from some distribution and x = D^(-1/4) q or D^(-1/4) k. A new one is `make_kernel` and
`register_kernel`; nothing else asks for a kernel's name.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

__all__ = ["Kernel", "get_kernel", "kernel_names", "make_kernel", "oprf_kernel", "register_kernel"]

_RELU_FLOOR = 1e-3

Features = Callable[[Tensor, Tensor], Tensor]
FeatureGradient = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
LogAmplitude = Callable[[Tensor, int], Tensor]
AmplitudeGradient = Callable[[Tensor, Tensor], Tensor]
Distribution = Callable[[int, int, Generator | None], Tensor]


@dataclass(frozen=True, eq=False)
class Kernel:
    """A feature map.

    Attributes:
        name: what users call it.
        features: (x [..., N, D], projection [R, D]) -> [..., N, M], M = `features_per_row` R: f(W x), or its logarithm
            where `log_domain`. The result is its caller's to overwrite.
        log_domain: whether `features` gives logarithms. Positive features that span many orders of magnitude must, so
            that they can be stabilised before they are exponentiated.
        log_amplitude: (x [..., N, D], R) -> [..., N, 1], log(h(x) / sqrt(R)); None for a constant. It is apart from
            the features because a query's amplitude cancels in the quotient and is never computed.
        gradient: (x, projection, the result of `features`, a gradient with respect to it) -> the gradient with respect
            to x; None to differentiate `features` by autograd, which costs a little more.
        amplitude_gradient: (x, a gradient with respect to `log_amplitude`) -> the gradient with respect to x; None as
            above.
        features_per_row: l, features that come from one row of the projection.
        estimates_softmax: whether phi(q) . phi(k) estimates exp(q . k / sqrt(D)).
        distribution: (R, D, generator) -> rows [R, D]; None for the Gaussian of `draw_projection`.
        parameter: a constant of the feature map that has been fixed, float or [B, H, 1, 1].
        bind: parameter -> this kernel with it; for kernels that can't be used without one.
        log_linear: whether `features` gives logarithms that are linear in x, up to a constant.
    """

    name: str
    features: Features
    log_domain: bool
    log_amplitude: LogAmplitude | None = None
    gradient: FeatureGradient | None = None
    amplitude_gradient: AmplitudeGradient | None = None
    features_per_row: int = 1
    estimates_softmax: bool = False
    distribution: Distribution | None = None
    parameter: float | Tensor | None = None
    bind: Callable[[float | Tensor], Kernel] | None = None
    log_linear: bool = False

    @property
    def needs_parameter(self) -> bool:
        """Whether a parameter must be bound first."""
        return self.bind is not None and self.parameter is None

    def same_as(self, other: Kernel) -> bool:
        """Whether features of both may be multiplied: the same map with the same parameter."""
        if self is other:
            return True
        mine, theirs = self.parameter, other.parameter
        if self.name != other.name or (mine is None) != (theirs is None):
            return False
        return mine is None or theirs is None or torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs))

    def num_rows(self, num_features: int) -> int:
        """Rows of the projection that give M = `num_features`.

        Raises:
            ValueError: M is no multiple of the features per row.
        """
        if num_features % self.features_per_row:
            below = num_features - num_features % self.features_per_row
            raise ValueError(
                f"num_features must be a multiple of {self.features_per_row} for kernel {self.name!r}, which makes so "
                f"many of each row, got {num_features}; try {below + self.features_per_row}"
            )
        return num_features // self.features_per_row


def get_kernel(kernel: str | Kernel) -> Kernel:
    """Look a kernel up by its name; a `Kernel` is itself.

    Raises:
        ValueError: no kernel of that name.
    """
    if isinstance(kernel, Kernel):
        return kernel
    if kernel not in _KERNELS:
        near = difflib.get_close_matches(str(kernel), _KERNELS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "; register_kernel adds your own"
        raise ValueError(f"kernel must be one of {', '.join(_KERNELS)}, got {kernel!r}{hint}")
    return _KERNELS[kernel]


def kernel_names() -> tuple[str, ...]:
    """Names of all kernels."""
    return tuple(_KERNELS)


def register_kernel(kernel: Kernel) -> Kernel:
    """Make a kernel known by its name, so that models and configs can ask for it.

    Raises:
        ValueError: the name is taken.
    """
    if kernel.name in _KERNELS:
        raise ValueError(f"kernel {kernel.name!r} is registered already; give yours another name")
    _KERNELS[kernel.name] = kernel
    return kernel


def make_kernel(
    name: str,
    functions: Sequence[Callable[[Tensor], Tensor]],
    *,
    log_h: Callable[[Tensor], Tensor] | None = None,
    log_domain: bool = False,
    distribution: Distribution | None = None,
    estimates_softmax: bool = False,
) -> Kernel:
    """A kernel of one's own, phi(x) = h(x) / sqrt(R) [f_1(W x), ..., f_l(W x)] (Choromanski et al. 2020, equation 5).

    Args:
        name: what to call it.
        functions: f_1 .. f_l, elementwise and differentiable, [..., N, R] -> [..., N, R].
        log_h: x, [..., N, D] -> log h(x), [..., N, 1], differentiable; None for h = 1.
        log_domain: the functions give log f instead of f; for positive features of a wide range.
        distribution: (R, D, generator) -> rows of W, [R, D]; None for N(0, I), in orthogonal blocks or not.
        estimates_softmax: phi(q) . phi(k) estimates exp(q . k / sqrt(D)), so that inputs may be centred and balanced.

    Raises:
        ValueError: no function.
    """
    if not functions:
        raise ValueError("functions must hold at least one f, got none; [torch.relu] is the simplest")
    return Kernel(
        name,
        partial(_stack_functions, tuple(functions)),
        log_domain,
        log_amplitude=partial(_user_log_amplitude, log_h),
        features_per_row=len(functions),
        estimates_softmax=estimates_softmax,
        distribution=distribution,
    )


def oprf_kernel(parameter: float | Tensor, name: str = "oprf") -> Kernel:
    """Optimal positive random features of one parameter A (Likhosherstov et al. 2022, "Chefs' Random Tables").

    phi(x) = (1 - 4A)^(D/4) exp(A |w|^2 + sqrt(1 - 4A) w . x - |x|^2 / 2) / sqrt(M); A = 0 gives "softmax+".

    Args:
        parameter: A, below 1/8, lest the variance be infinite; a float or [B, H, 1, 1]. `optimal_parameter` in
            `perf_vit.ops.favor` finds the best one for queries and keys.
        name: what to call it.

    Raises:
        ValueError: a float of 1/8 or more.
    """
    if isinstance(parameter, float | int) and parameter >= 1 / 8:
        raise ValueError(f"the parameter of {name!r} must be below 1/8, got {parameter}; the best ones are negative")
    return replace(
        _OPRF,
        name=name,
        features=partial(_log_oprf, parameter),
        gradient=partial(_oprf_gradient, parameter),
        parameter=parameter,
    )


def _half_square(x: Tensor) -> Tensor:
    # Faster than squaring and summing, which passes over a copy of x.
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square().div(2)


def _softmax_log_amplitude(features_per_row: int, x: Tensor, num_rows: int) -> Tensor:
    return -_half_square(x) - math.log(num_rows * features_per_row) / 2


def _softmax_amplitude_gradient(x: Tensor, grad: Tensor) -> Tensor:
    return -grad * x


def _log_softmax_plus(x: Tensor, projection: Tensor) -> Tensor:
    """Positive features of the softmax kernel: phi(x) = exp(W x - |x|^2 / 2) / sqrt(M).

    E phi(x) . phi(y) = exp(x . y) (Choromanski et al. 2020, lemma 1).
    """
    return F.linear(x, projection)


def _softmax_plus_gradient(x: Tensor, projection: Tensor, features: Tensor, grad: Tensor) -> Tensor:
    return grad @ projection


def _log_softmax_hyperbolic(x: Tensor, projection: Tensor) -> Tensor:
    """Hyperbolic features: phi(x) = exp(-|x|^2 / 2) [exp(W x), exp(-W x)] / sqrt(M) (ibid., lemma 1)."""
    products = F.linear(x, projection)
    return torch.cat([products, -products], dim=-1)


def _softmax_hyperbolic_gradient(x: Tensor, projection: Tensor, features: Tensor, grad: Tensor) -> Tensor:
    plus, minus = grad.chunk(2, dim=-1)
    return (plus - minus) @ projection


def _trigonometric(x: Tensor, projection: Tensor) -> Tensor:
    """Trigonometric features: phi(x) = exp(|x|^2 / 2) [cos W x, sin W x] / sqrt(R) (Rahimi and Recht 2007).

    Their products may be negative, so a denominator can vanish: for comparison, not for use.
    """
    products = F.linear(x, projection)
    return torch.cat([products.cos(), products.sin()], dim=-1)


def _trigonometric_gradient(x: Tensor, projection: Tensor, features: Tensor, grad: Tensor) -> Tensor:
    cos, sin = features.chunk(2, dim=-1)
    grad_cos, grad_sin = grad.chunk(2, dim=-1)
    return (grad_sin * cos - grad_cos * sin) @ projection


def _trigonometric_log_amplitude(x: Tensor, num_rows: int) -> Tensor:
    return _half_square(x) - math.log(num_rows) / 2


def _trigonometric_amplitude_gradient(x: Tensor, grad: Tensor) -> Tensor:
    return grad * x


def _relu(x: Tensor, projection: Tensor) -> Tensor:
    """Features of the generalised kernel "Performer-ReLU": phi(x) = (ReLU(W x) + 1e-3) / sqrt(M).

    Choromanski et al. 2020, section 4.2; the constant keeps every denominator positive.
    """
    scale = projection.shape[0] ** -0.5
    return F.linear(x, projection * scale).relu_().add(_RELU_FLOOR * scale)


def _relu_gradient(x: Tensor, projection: Tensor, features: Tensor, grad: Tensor) -> Tensor:
    scale = projection.shape[0] ** -0.5
    # A feature above its floor came from a positive product; the margin is for the rounding of the floor itself.
    active = features > _RELU_FLOOR * scale * (1 + 1e-6)
    return torch.where(active, grad, 0.0) @ projection * scale


def _log_oprf(parameter: float | Tensor, x: Tensor, projection: Tensor) -> Tensor:
    a = torch.as_tensor(parameter, dtype=x.dtype, device=x.device)
    square_norms = projection.square().sum(dim=-1)
    offset = a * square_norms + torch.log1p(-4 * a) * (x.shape[-1] / 4)
    return F.linear(x * (1 - 4 * a).sqrt(), projection).add_(offset)


def _oprf_gradient(parameter: float | Tensor, x: Tensor, projection: Tensor, features: Tensor, grad: Tensor) -> Tensor:
    a = torch.as_tensor(parameter, dtype=x.dtype, device=x.device)
    return grad @ projection * (1 - 4 * a).sqrt()


def _unbound(x: Tensor, projection: Tensor) -> Tensor:
    raise ValueError("kernel 'oprf' has no features until its parameter is fixed; use oprf_kernel(-0.05)")


def _stack_functions(functions: tuple[Callable[[Tensor], Tensor], ...], x: Tensor, projection: Tensor) -> Tensor:
    products = F.linear(x, projection)
    return torch.cat([function(products) for function in functions], dim=-1)


def _user_log_amplitude(log_h: Callable[[Tensor], Tensor] | None, x: Tensor, num_rows: int) -> Tensor:
    log_normaliser = math.log(num_rows) / 2
    return torch.full_like(x[..., :1], -log_normaliser) if log_h is None else log_h(x) - log_normaliser


_SOFTMAX_PLUS = Kernel(
    "softmax+",
    _log_softmax_plus,
    log_domain=True,
    log_amplitude=partial(_softmax_log_amplitude, 1),
    gradient=_softmax_plus_gradient,
    amplitude_gradient=_softmax_amplitude_gradient,
    estimates_softmax=True,
    log_linear=True,
)
_OPRF = replace(_SOFTMAX_PLUS, name="oprf", features=_unbound, bind=oprf_kernel)
_KERNELS = {
    kernel.name: kernel
    for kernel in (
        _SOFTMAX_PLUS,
        replace(
            _SOFTMAX_PLUS,
            name="softmax-hyp+",
            features=_log_softmax_hyperbolic,
            log_amplitude=partial(_softmax_log_amplitude, 2),
            gradient=_softmax_hyperbolic_gradient,
            features_per_row=2,
        ),
        Kernel(
            "softmax-trig",
            _trigonometric,
            log_domain=False,
            log_amplitude=_trigonometric_log_amplitude,
            gradient=_trigonometric_gradient,
            amplitude_gradient=_trigonometric_amplitude_gradient,
            features_per_row=2,
            estimates_softmax=True,
        ),
        Kernel("relu", _relu, log_domain=False, gradient=_relu_gradient),
        _OPRF,
    )
}
