"""Kernels (feature maps phi) of linear attention: phi(q) . phi(k) estimates the attention kernel of q and k.

All have the form of Choromanski et al. 2020, equation 5, phi(x) = h(x) / sqrt(R) [f_1(W x), ..., f_l(W x)], with R
random rows W and x = D^(-1/4) q or D^(-1/4) k. Add a kernel with `make_kernel` and `register_kernel`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from perf_vit.registry import Registry

__all__ = ["KERNELS", "RELU_FLOOR", "Kernel", "get_kernel", "make_kernel", "oprf_kernel", "register_kernel"]

RELU_FLOOR = 1e-3
"""What "relu" adds to each feature, before the division by the square root of their number."""

Features = Callable[[Tensor, Tensor], Tensor]
FeatureGradient = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
LogAmplitude = Callable[[Tensor, int], Tensor]
AmplitudeGradient = Callable[[Tensor, Tensor], Tensor]
Distribution = Callable[[int, int, Generator | None], Tensor]


@dataclass(frozen=True, eq=False)
class Kernel:
    """Feature map of linear attention.

    Attributes:
        name: Name in configs.
        features: (x [..., N, D], projection [R, D]) -> [..., N, M] with M = R * `features_per_row`: f(W x), or its
            logarithm if `log_domain`. The caller may overwrite the result.
        log_domain: Whether `features` returns logarithms; needed by positive features that span many orders of
            magnitude, which are stabilised before the exponential.
        log_amplitude: (x [..., N, D], R) -> [..., N, 1], log(h(x) / sqrt(R)); None if constant. Separate from
            `features` because the amplitude of a query cancels in the quotient and is never computed.
        gradient: (x, projection, result of `features`, gradient with respect to it) -> gradient with respect to x; None
            to differentiate `features` by autograd, which is slightly slower.
        amplitude_gradient: (x, gradient with respect to `log_amplitude`) -> gradient with respect to x; None for
            autograd.
        features_per_row: l, number of features per row of the projection.
        estimates_softmax: Whether phi(q) . phi(k) estimates exp(q . k / sqrt(D)).
        distribution: (R, D, generator) -> rows [R, D]; None for the Gaussian rows of `draw_projection`.
        parameter: Fixed constant of the feature map, float or [B, H, 1, 1]; None if it has none.
        bind: Parameter -> this kernel with that parameter; None for kernels without one.
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

    @property
    def needs_parameter(self) -> bool:
        """Whether a parameter must be bound before use."""
        return self.bind is not None and self.parameter is None

    def is_compatible(self, other: Kernel) -> bool:
        """Return whether both are the same map with the same parameter, so that products of features are valid."""
        if self is other:
            return True
        mine, theirs = self.parameter, other.parameter
        if self.name != other.name or (mine is None) != (theirs is None):
            return False
        return mine is None or theirs is None or torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs))

    def num_rows(self, num_features: int) -> int:
        """Return the number of rows of the projection for M = `num_features` features.

        Raises:
            ValueError: M is not a multiple of `features_per_row`.
        """
        if num_features % self.features_per_row:
            below = num_features - num_features % self.features_per_row
            raise ValueError(
                f"num_features must be a multiple of {self.features_per_row} for kernel {self.name!r} "
                f"({self.features_per_row} features per row), got {num_features}; try {below + self.features_per_row}"
            )
        return num_features // self.features_per_row


def get_kernel(kernel: str | Kernel) -> Kernel:
    """Return the kernel with a name, or the argument itself if it is a `Kernel`.

    Raises:
        ValueError: No kernel has that name.
    """
    return kernel if isinstance(kernel, Kernel) else KERNELS[kernel]


def register_kernel(kernel: Kernel) -> Kernel:
    """Register a kernel, so that models and configs can select it by name.

    Raises:
        ValueError: The name is taken.
    """
    KERNELS.add(kernel.name, kernel)
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
    """Make a custom kernel, phi(x) = h(x) / sqrt(R) [f_1(W x), ..., f_l(W x)] (Choromanski et al. 2020, equation 5).

    Args:
        name: Name of the kernel.
        functions: f_1 .. f_l, elementwise and differentiable, [..., N, R] -> [..., N, R].
        log_h: Differentiable function x, [..., N, D] -> log h(x), [..., N, 1]; None for h = 1.
        log_domain: Whether the functions return log f; use it for positive features with a wide range.
        distribution: (R, D, generator) -> rows of W, [R, D]; None for N(0, I), orthogonal or independent.
        estimates_softmax: Whether phi(q) . phi(k) estimates exp(q . k / sqrt(D)), so that inputs may be centred and
            balanced.

    Raises:
        ValueError: `functions` is empty.
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
    """Make optimal positive random features with parameter A (Likhosherstov et al. 2022, "Chefs' Random Tables").

    phi(x) = (1 - 4A)^(D/4) exp(A |w|^2 + sqrt(1 - 4A) w . x - |x|^2 / 2) / sqrt(M); A = 0 gives "softmax+".

    Args:
        parameter: A < 1/8, float or [B, H, 1, 1]; the variance is infinite above. `optimal_parameter` in
            `perf_vit.ops.favor` returns the best value for given queries and keys.
        name: Name of the kernel.

    Raises:
        ValueError: a float is 1/8 or more.
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
    # Faster than squaring and summing, which copies x.
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

    Their products may be negative, so denominators can vanish: meant for comparison only.
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
    return F.linear(x, projection * scale).relu_().add(RELU_FLOOR * scale)


def _relu_gradient(x: Tensor, projection: Tensor, features: Tensor, grad: Tensor) -> Tensor:
    scale = projection.shape[0] ** -0.5
    # A feature above the floor has a positive product; the margin covers the rounding of the floor.
    active = features > RELU_FLOOR * scale * (1 + 1e-6)
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
    raise ValueError("kernel 'oprf' needs a fixed parameter here, got none; use oprf_kernel(-0.05)")


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
)
_OPRF = replace(_SOFTMAX_PLUS, name="oprf", features=_unbound, bind=oprf_kernel)
KERNELS: Registry[Kernel] = Registry("kernel")
"""Feature maps by name."""

for _kernel in (
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
):
    register_kernel(_kernel)
