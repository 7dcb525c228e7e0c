"""Feature maps applied to queries and keys, and helpers that process tokens in chunks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from perf_vit.ops.balancing import Balancing
from perf_vit.ops.kernels import Kernel

__all__ = [
    "LOWEST_SCALE",
    "FeatureMap",
    "KeyFeatures",
    "exp_",
    "halves",
    "invert_key_mask",
    "join_chunks",
    "token_slices",
    "without_autocast",
]


def token_slices(x: Tensor, chunk_size: int) -> list[tuple[slice, slice, slice]]:
    """Return indices into [B, H, N, ...] of the fewest chunks of at most `chunk_size` tokens, of nearly equal size."""
    every, length = slice(None), x.shape[2]
    if length <= chunk_size:
        # A single chunk has no fixed bounds, so an exported graph takes any number of tokens.
        return [(every, every, every)]
    num_chunks = -(-length // chunk_size)
    even = -(-length // num_chunks)
    return [(every, every, slice(start, start + even)) for start in range(0, length, even)]


def join_chunks(chunks: Iterator[Tensor], num_tokens: int) -> Tensor:
    """Concatenate chunks of tokens, [B, H, n, ...], as they arrive, without holding all of them twice."""
    first = next(chunks)
    if first.shape[2] == num_tokens:
        return first
    out = first.new_empty(*first.shape[:2], num_tokens, *first.shape[3:])
    start = 0
    for chunk in itertools.chain([first], chunks):
        out[:, :, start : start + chunk.shape[2]] = chunk
        start += chunk.shape[2]
    return out


def halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Split [B, H, T, ...] into blocks of 2 * `half` tokens; return both halves, [B, H, T / (2 half), half, ...]."""
    blocks = x.reshape(*x.shape[:2], -1, 2, half, *x.shape[3:])
    return blocks[:, :, :, 0], blocks[:, :, :, 1]


# Below any log feature of an unmasked key, and far enough above the lowest float32 that sums with it stay finite.
LOWEST_SCALE = -1e30


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """Feature map of queries and keys: kernel, projection and optional balancing.

    Attributes:
        kernel: Form of the feature map.
        projection: Rows, [R, D].
        balancing: Centring and balancing of the inputs, or None.
    """

    kernel: Kernel
    projection: Tensor
    balancing: Balancing | None = None

    def is_compatible(self, other: FeatureMap) -> bool:
        """Return whether products of features of both maps are valid; does not compare the values of projections."""
        if self.projection.shape != other.projection.shape or not self.kernel.is_compatible(other.kernel):
            return False
        if self.balancing is None or other.balancing is None:
            return self.balancing is other.balancing
        return self.balancing.is_compatible(other.balancing)

    def query_inputs(self, q: Tensor) -> Tensor:
        """Scale queries to x = D^(-1/4) q', [B, H, N, D], in at least float32."""
        if self.balancing is None:
            return _scaled(q)
        return _scaled(q, self.balancing.query_center, self.balancing.scale)

    def key_inputs(self, k: Tensor) -> Tensor:
        """Scale keys to x = D^(-1/4) k', [B, H, N, D], in at least float32."""
        if self.balancing is None:
            return _scaled(k)
        return _scaled(k, self.balancing.key_center, 1 / self.balancing.scale)

    def queries(self, x: Tensor) -> Tensor:
        """Apply the kernel to `query_inputs`, [B, H, N, M], without the amplitude, which cancels."""
        return self.kernel.features(x, self.projection.to(x.dtype))

    def keys(self, x: Tensor, masked: Tensor | None = None) -> KeyFeatures:
        """Apply the kernel to `key_inputs`, including amplitude and bias.

        Args:
            x: Inputs, [B, H, N, D].
            masked: True for keys to ignore, bool [B, 1, N, 1] or [B, H, N, 1].
        """
        if masked is not None:
            # Masked keys may hold any value, including NaN.
            x = x.masked_fill(masked, 0.0)
        values, log_amplitude = self.kernel.features(x, self.projection.to(x.dtype)), self.key_log_amplitude(x)
        if masked is not None:
            if self.kernel.log_domain or log_amplitude is not None:
                log_amplitude = torch.zeros_like(x[..., :1]) if log_amplitude is None else log_amplitude
                log_amplitude = log_amplitude.masked_fill(masked, -math.inf)
            else:
                values = values.masked_fill_(masked, 0.0)
        if self.kernel.log_domain and log_amplitude is not None:
            values, log_amplitude = values.add_(log_amplitude), None
        return KeyFeatures(self.kernel.log_domain, values, log_amplitude, masked)

    def scaled_queries(self, values: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Scale the features of queries (overwritten) to match key sums with scale `log_scale`, [B, H, M].

        Returns:
            phi(q_i) exp(log_scale - s_i), [B, H, N, M], and s, [B, H, N, 1] or [B, H, 1, 1]. In the log domain, s makes
            the largest feature of each query 1.
        """
        if not self.kernel.log_domain:
            # Outside the log domain all features share one scale.
            return values, log_scale[..., :1].unsqueeze(-1)
        logs = values.add_(log_scale.unsqueeze(-2))
        largest = logs.detach().amax(dim=-1, keepdim=True)
        return exp_(logs.sub_(largest)), largest

    def query_gradient(self, q: Tensor, x: Tensor, values: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient with respect to q, given that with respect to `queries(x)`."""
        factor = q.shape[-1] ** -0.25
        grad_x = self._features_gradient(x, values, grad)
        if self.balancing is not None:
            return (grad_x * (self.balancing.scale * factor)).to(q.dtype)
        return grad_x.mul_(factor).to(q.dtype)

    def key_gradient(
        self, k: Tensor, x: Tensor, values: Tensor, grad: Tensor, grad_log_amplitude: Tensor | None
    ) -> Tensor:
        """Return the gradient with respect to k, given those with respect to the features and the log amplitude."""
        factor = k.shape[-1] ** -0.25
        grad_x = self._features_gradient(x, values, grad)
        if grad_log_amplitude is not None:
            grad_x = grad_x.add_(self._amplitude_gradient(x, grad_log_amplitude))
        if self.balancing is not None:
            return (grad_x * (factor / self.balancing.scale)).to(k.dtype)
        return grad_x.mul_(factor).to(k.dtype)

    def key_log_amplitude(self, x: Tensor) -> Tensor | None:
        """Return log(h / sqrt(R)) of `key_inputs` plus the bias of the balancing, [B, H, N, 1]; None if constant."""
        log_amplitude = None
        if self.kernel.log_amplitude is not None:
            log_amplitude = self.kernel.log_amplitude(x, self.projection.shape[0])
        if self.balancing is not None:
            bias = x @ self._bias_direction(x).mT
            log_amplitude = bias if log_amplitude is None else log_amplitude + bias
        return log_amplitude

    def _bias_direction(self, x: Tensor) -> Tensor:
        """Return u, [B, H, 1, D], such that x . u = (k - c_k) . c_q / sqrt(D)."""
        assert self.balancing is not None
        return (self.balancing.query_center * self.balancing.scale * x.shape[-1] ** -0.25).to(x.dtype)

    def _features_gradient(self, x: Tensor, values: Tensor, grad: Tensor) -> Tensor:
        projection = self.projection.to(x.dtype)
        if self.kernel.gradient is not None:
            return self.kernel.gradient(x, projection, values, grad)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            features = self.kernel.features(leaf, projection)
        return torch.autograd.grad(features, leaf, grad)[0]

    def _amplitude_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        total = grad * self._bias_direction(x) if self.balancing is not None else torch.zeros_like(x[..., :1])
        if self.kernel.amplitude_gradient is not None:
            return total + self.kernel.amplitude_gradient(x, grad)
        if self.kernel.log_amplitude is None:
            return total
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            log_amplitude = self.kernel.log_amplitude(leaf, self.projection.shape[0])
        if not log_amplitude.requires_grad:
            return total
        return total + torch.autograd.grad(log_amplitude, leaf, grad)[0]


@dataclass(frozen=True, eq=False)
class KeyFeatures:
    """Unscaled features of keys.

    Attributes:
        log_domain: Whether `values` are logarithms.
        values: log phi(k), [B, H, N, M], -inf for masked keys; outside the log domain f(W x), 0 for masked keys.
        log_amplitude: log(h / sqrt(R)), [B, H, N, 1], outside the log domain; None if constant.
        mask: True for masked keys, [B, 1, N, 1].
    """

    log_domain: bool
    values: Tensor
    log_amplitude: Tensor | None
    mask: Tensor | None

    def first(self, num_tokens: int) -> KeyFeatures:
        """Return the first `num_tokens` keys."""
        return self._map(lambda part: part[:, :, :num_tokens])

    def first_visible(self) -> KeyFeatures:
        """Return the first key of each sample that isn't masked, or a masked one if all are."""
        if self.mask is None:
            return self.first(1)
        index = (~self.mask).byte().argmax(dim=2, keepdim=True)
        return self._map(lambda part: part.take_along_dim(index, dim=2))

    def first_halves(self, half: int) -> KeyFeatures:
        """Copy the first halves of the blocks of 2 * `half` keys, [B, H, N / (2 half), half, M]."""
        return self._map(lambda part: halves(part, half)[0].clone())

    def scale(self) -> Tensor:
        """Return c, the largest log phi(k_j) over the tokens for each feature, [B, H, M], without gradient.

        If all keys are masked, c is so low that the scale of any other keys replaces it.
        """
        if self.log_domain:
            return self.values.detach().amax(dim=-2).clamp(min=LOWEST_SCALE)
        if self.log_amplitude is None:
            return torch.zeros_like(self.values[..., 0, :].detach())
        largest = self.log_amplitude.detach().amax(dim=-2).clamp(min=LOWEST_SCALE)
        return largest.repeat_interleave(self.values.shape[-1], dim=-1)

    def scaled(self, log_scale: Tensor) -> Tensor:
        """Return phi(k_j) exp(-log_scale), [B, H, N, M]; overwrites `values` in the log domain."""
        if self.log_domain:
            features = exp_(self.values.sub_(log_scale.unsqueeze(-2)))
            if self.mask is None:
                return features
            # Autograd keeps the exponentials.
            return (
                features.masked_fill(self.mask, 0.0) if features.requires_grad else features.masked_fill_(self.mask, 0)
            )
        if self.log_amplitude is None:
            return self.values
        return self.values * self._factor(log_scale)

    def gradient(self, grad: Tensor, log_scale: Tensor, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of the kernel's features and of the log amplitude, given that of `scaled` (overwritten).

        Args:
            grad: Gradient with respect to the result of `scaled`, [B, H, N, M].
            log_scale: Argument of `scaled`.
            features: Result of `scaled`.
        """
        if self.log_domain:
            grad_logs = grad.mul_(features)
            return grad_logs, grad_logs.sum(dim=-1, keepdim=True)
        if self.log_amplitude is None:
            return grad, None
        return grad * self._factor(log_scale), (grad * features).sum(dim=-1, keepdim=True)

    def _factor(self, log_scale: Tensor) -> Tensor:
        assert self.log_amplitude is not None
        return (self.log_amplitude - log_scale[..., :1].unsqueeze(-2)).exp()

    def _map(self, part: Callable[[Tensor], Tensor]) -> KeyFeatures:
        log_amplitude = None if self.log_amplitude is None else part(self.log_amplitude)
        mask = None if self.mask is None else part(self.mask)
        return KeyFeatures(self.log_domain, part(self.values), log_amplitude, mask)


def invert_key_mask(key_mask: Tensor | None, tokens: slice = slice(None)) -> Tensor | None:
    """Return the mask of the keys to ignore, [B, 1, N, 1], given the mask of the keys to use, [B, N]."""
    return None if key_mask is None else ~key_mask[:, None, tokens, None]


def exp_(logs: Tensor) -> Tensor:
    """Exponentiate logarithms in place, with a floor of e^-40 (e^-300 in float64).

    The largest logarithm is near 0, so smaller terms are negligible. Exponentials that underflow, and products of their
    results, take processors 30 times as long.
    """
    return logs.clamp_(min=-300.0 if logs.dtype == torch.float64 else -40.0).exp_()


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context that disables autocast, or an empty one if autocast is off."""
    # An exported graph must not hold the context where autocast is off.
    # The meta device has no autocast state to query.
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _scaled(x: Tensor, center: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    factor = x.shape[-1] ** -0.25
    if center is None or scale is None:
        return x.to(dtype) * factor
    scale = scale.to(dtype) * factor
    return torch.addcmul(-center.to(dtype) * scale, x.to(dtype), scale)
