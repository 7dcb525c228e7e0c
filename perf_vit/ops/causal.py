"""Causal FAVOR+ attention: products within chunks of tokens, and a running state of the tokens before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from perf_vit.ops.causal_recursion import State, attend_recursively, recursive_causal_favor
from perf_vit.ops.features import LOWEST_SCALE, FeatureMap, KeyFeatures, invert_key_mask, without_autocast
from perf_vit.ops.state import masked_values
from perf_vit.ops.windows import split_dim

__all__ = ["causal_favor"]

# Tokens of a chunk: the cost of products within it grows with its size, that of products with the state falls.
_CPU_CHUNK, _DEVICE_CHUNK = 64, 256

# Most tokens whose keys share one reference of their scale.
_MAX_GROUP = 4096

# Largest log of a scaled feature of a key: `exp_` raises features of queries to e^-40 (e^-300 in float64), which must
# stay negligible when multiplied by it.
_LARGEST_LOG = {torch.float32: 16.0, torch.float64: 260.0}


def causal_favor(
    q: Tensor, k: Tensor, v: Tensor, feature_map: FeatureMap, key_mask: Tensor | None, chunk_size: int
) -> Tensor:
    """Unidirectional attention (Choromanski et al. 2020, section 2.2 and appendix B.1).

    Within a chunk of tokens, the weights of all pairs are one product, of which those of later keys are set to 0. The
    keys before a chunk are summed in a state. No query may depend on the scale of a later key, so the keys of a group
    of chunks are scaled by the sums over the keys before the group (by the first key, if there is none). A key that is
    larger than this reference by e^16 (e^260 in float64) doesn't fit; the queries of its group that see it use
    `attend_recursively`, which takes about four times as long.

    The backward pass goes from the last group to the first and recomputes each from the state before it. One state per
    group is stored, and no buffer has size N x M. Graphs that are compiled or traced can't branch on values and are
    recursive.

    Args:
        q: Queries, [B, H, N, D].
        k: Keys, [B, H, N, D].
        v: Values, [B, H, N, Dv].
        feature_map: Kernel, projection and balancing.
        key_mask: [B, N] bool, False for keys to ignore.
        chunk_size: Number of tokens in a group, 4,096 at most.

    Returns:
        Attended values, [B, H, N, Dv], in the dtype of `q`; 0 for queries without a visible key.
    """
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if is_traced or q.is_meta or isinstance(q, FakeTensor):
        return recursive_causal_favor(q, k, v, feature_map, key_mask, chunk_size)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        attended: Tensor = _CausalFavor.apply(q, k, v, feature_map.projection, key_mask, feature_map, chunk_size)
        return attended
    return _attend(q, k, v, feature_map, key_mask, chunk_size, None)[0]


class _Before(NamedTuple):
    """State of the keys before a group.

    Attributes:
        sums: S and z of a `KVState` side by side, [B, H, M, Dv + 1]. In the log domain z is 1, or 0 without a key.
        log_scale: Its log-scale, [B, H, M].
    """

    sums: Tensor
    log_scale: Tensor

    @classmethod
    def normalized(cls, sums: Tensor, log_scale: Tensor, log_domain: bool) -> Self:
        if not log_domain:
            return cls(sums, log_scale)
        by = _divisor(sums)
        return cls(sums / by, log_scale + by.squeeze(-1).log())


class _CausalFavor(torch.autograd.Function):
    """Causal attention whose backward pass recomputes features group by group.

    Saved for the backward pass: the inputs, the output, one denominator per query, and the state before each group.
    Scales are constants: they cancel in the quotient, so their gradient is 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        projection: Tensor,
        key_mask: Tensor | None,
        feature_map: FeatureMap,
        chunk_size: int,
    ) -> Tensor:
        states: list[_Before] = []
        out, denominator = _attend(q, k, v, feature_map, key_mask, chunk_size, states)
        flat = (part for state in states for part in state)
        # The feature map holds the projection; saving it also reveals a change before the backward pass.
        ctx.save_for_backward(q, k, v, projection, key_mask, out, denominator, *flat)
        ctx.feature_map, ctx.chunk_size = feature_map, chunk_size
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, _, key_mask, out, denominator, *flat = ctx.saved_tensors
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        grad_after = torch.zeros_like(flat[0])
        with without_autocast(q):
            for tokens in reversed(_groups(q, ctx.chunk_size)):
                before = _Before(log_scale=flat.pop(), sums=flat.pop())
                group = _Group.of(q, k, v, ctx.feature_map, key_mask, tokens, before)
                if group.exceeding() is None:
                    of_group = (grad_out[:, :, tokens], out[:, :, tokens], denominator[:, :, tokens])
                    *parts, grad_after = _group_gradients(group, of_group, grad_after)
                else:
                    *parts, grad_after = _recursive_gradients(group, before, grad_out[:, :, tokens], grad_after)
                for whole, part in zip(gradients, parts, strict=True):
                    whole[:, :, tokens] = part
        return *gradients, None, None, None, None


@dataclass(frozen=True, eq=False)
class _Group:
    """Tokens that share one reference of the scale of keys, and their features.

    Attributes:
        q: Queries, [B, H, n, D].
        k: Keys, [B, H, n, D].
        v: Values, [B, H, n, Dv].
        feature_map: Kernel, projection and balancing.
        key_mask: [B, n] bool, False for keys to ignore.
        x_q: Inputs of the features of queries.
        x_k: Inputs of the features of keys.
        queries: Features of queries before scaling; in the log domain they have been overwritten by the scaled ones.
        keys: Features of keys, likewise.
        log_scale: Reference of the scale, [B, H, M].
        flat_q: Scaled features of queries, [B x H, n, M].
        flat_k: Scaled features of keys, [B x H, n, M].
        flat_v: Values and a column of ones, [B x H, n, Dv + 1].
        sums: State before the group, [B x H, M, Dv + 1].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    feature_map: FeatureMap
    key_mask: Tensor | None
    x_q: Tensor
    x_k: Tensor
    queries: Tensor
    keys: KeyFeatures
    log_scale: Tensor
    flat_q: Tensor
    flat_k: Tensor
    flat_v: Tensor
    sums: Tensor

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        feature_map: FeatureMap,
        key_mask: Tensor | None,
        tokens: slice,
        before: _Before,
    ) -> Self:
        """Compute the features of some tokens of q, k and v, [B, H, N, ...]."""
        q, k, v = (x[:, :, tokens] for x in (q, k, v))
        key_mask = None if key_mask is None else key_mask[:, tokens]
        x_q, x_k = feature_map.query_inputs(q), feature_map.key_inputs(k)
        keys, queries = feature_map.keys(x_k, invert_key_mask(key_mask)), feature_map.queries(x_q)
        is_empty = before.log_scale <= LOWEST_SCALE / 2
        log_scale = torch.where(is_empty, keys.first_visible().scale(), before.log_scale)
        flat_q = feature_map.scaled_queries(queries, log_scale)[0].flatten(0, 1)
        flat_k = keys.scaled(log_scale).flatten(0, 1)
        flat_v = F.pad(masked_values(v, keys), (0, 1), value=1.0).flatten(0, 1)
        sums = before.sums.flatten(0, 1)
        return cls(q, k, v, feature_map, key_mask, x_q, x_k, queries, keys, log_scale, flat_q, flat_k, flat_v, sums)

    def exceeding(self) -> Tensor | None:
        """Return which keys exceed the reference, [B, H, n, 1]; None if no key does."""
        bound = _LARGEST_LOG[self.flat_k.dtype]
        if self.keys.log_domain:
            if self.flat_k.amax() <= math.exp(bound):
                return None
            return self.keys.values.amax(dim=-1, keepdim=True) > math.exp(bound)
        if self.keys.log_amplitude is None:
            return None
        exceeding = self.keys.log_amplitude - self.log_scale[..., :1].unsqueeze(-2) > bound
        return exceeding if exceeding.any() else None

    def with_heads(self, flat: Tensor) -> Tensor:
        """Split [B x H, ...] into [B, H, ...]."""
        return split_dim(flat, 0, *self.q.shape[:2])

    def chunks(self) -> list[slice]:
        size = _chunk_tokens(self.q)
        return [slice(start, start + size) for start in range(0, self.q.shape[2], size)]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    key_mask: Tensor | None,
    chunk_size: int,
    states: list[_Before] | None,
) -> tuple[Tensor, Tensor]:
    """Return the attended values and denominators, [B, H, N, 1]; append the state before each group to `states`."""
    out, dtype = q.new_empty(*q.shape[:3], v.shape[3]), torch.promote_types(q.dtype, torch.float32)
    denominator = q.new_empty(*q.shape[:3], 1, dtype=dtype)
    num_features = feature_map.projection.shape[0] * feature_map.kernel.features_per_row
    sums = q.new_zeros(*q.shape[:2], num_features, v.shape[3] + 1, dtype=dtype)
    before = _Before(sums, torch.full_like(sums[..., 0], LOWEST_SCALE))
    with without_autocast(q):
        for tokens in _groups(q, chunk_size):
            if states is not None:
                states.append(before)
            group = _Group.of(q, k, v, feature_map, key_mask, tokens, before)
            out[:, :, tokens], denominator[:, :, tokens], before = _attend_group(group, before)
    return out, denominator


def _attend_group(group: _Group, before: _Before) -> tuple[Tensor, Tensor, _Before]:
    """Return the attended values of a group, their denominators and the state after it."""
    parts, sums = [], group.sums.clone()
    for tokens in group.chunks():
        queries, keys, values = group.flat_q[:, tokens], group.flat_k[:, tokens], group.flat_v[:, tokens]
        weights = torch.bmm(queries, keys.mT).tril_()
        parts.append(torch.bmm(queries, sums).baddbmm_(weights, values))
        sums.baddbmm_(keys.mT, values)
    attended = group.with_heads(torch.cat(parts, dim=1))
    denominator = attended[..., -1:]
    denominator = denominator.masked_fill(denominator == 0, 1.0)
    out = attended[..., :-1] / denominator
    after = _Before.normalized(sums.view_as(before.sums), group.log_scale, group.keys.log_domain)
    exceeding = group.exceeding()
    if exceeding is not None:
        is_past, is_any = exceeding.cummax(dim=2).values, exceeding.any(dim=2)
        other_out, other_after = _recurse(group.q, group.k, group.v, group, before)
        out = torch.where(is_past, other_out, out)
        after = _Before(
            torch.where(is_any.unsqueeze(-1), other_after.sums, after.sums),
            torch.where(is_any, other_after.log_scale, after.log_scale),
        )
    return out, denominator, after


def _recurse(q: Tensor, k: Tensor, v: Tensor, group: _Group, before: _Before) -> tuple[Tensor, _Before]:
    """Return the attended values of the tokens of a group and the state after it, whatever the scales of the keys."""
    state: State = before.sums[..., :-1], before.sums[..., -1], before.log_scale
    chunk_size = _chunk_tokens(q)
    out, state = attend_recursively(q, k, v, group.feature_map, group.key_mask, state, chunk_size)
    sums = torch.cat([state[0], state[1].unsqueeze(-1)], dim=-1)
    return out, _Before.normalized(sums, state[2], group.keys.log_domain)


def _group_gradients(
    group: _Group, of_group: tuple[Tensor, Tensor, Tensor], grad_after: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients with respect to queries, keys, values and the sums before the group.

    Args:
        group: Group of tokens.
        of_group: Gradient with respect to its output, the output, and its denominators.
        grad_after: Gradient with respect to the sums after the group.
    """
    grad_out, out, denominator = of_group
    # With o = num / den: d num = d o / den and d den = -(d o . o) / den.
    grad_num = grad_out.to(group.flat_v.dtype) / denominator
    grad_attended = torch.cat([grad_num, -(grad_num * out).sum(dim=-1, keepdim=True)], dim=-1).flatten(0, 1)
    chunks, sums = group.chunks(), [group.sums]
    for tokens in chunks[:-1]:
        sums.append(torch.baddbmm(sums[-1], group.flat_k[:, tokens].mT, group.flat_v[:, tokens]))
    grad_sums = grad_after.flatten(0, 1).clone()
    if group.keys.log_domain:
        last = sums[-1][..., -1:] + group.flat_k[:, chunks[-1]].sum(dim=1).unsqueeze(-1)
        grad_sums /= _divisor(last)
    grad_q, grad_k = torch.empty_like(group.flat_q), torch.empty_like(group.flat_k)
    grad_v = torch.empty_like(group.flat_v)
    for tokens in reversed(chunks):
        queries, keys, values = group.flat_q[:, tokens], group.flat_k[:, tokens], group.flat_v[:, tokens]
        grad, before = grad_attended[:, tokens], sums.pop()
        weights, grad_weights = torch.bmm(queries, keys.mT).tril_(), torch.bmm(grad, values.mT).tril_()
        grad_v[:, tokens] = torch.bmm(keys, grad_sums).baddbmm_(weights.mT, grad)
        grad_k[:, tokens] = torch.bmm(values, grad_sums.mT).baddbmm_(grad_weights.mT, queries)
        grad_q[:, tokens] = torch.bmm(grad, before.mT).baddbmm_(grad_weights, keys)
        grad_sums.baddbmm_(queries.mT, grad)
    of_inputs = _input_gradients(group, group.with_heads(grad_q), group.with_heads(grad_k))
    return *of_inputs, group.with_heads(grad_v)[..., :-1].to(group.v.dtype), grad_sums.view_as(grad_after)


def _input_gradients(group: _Group, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients with respect to queries and keys, given those of their scaled features (overwritten)."""
    feature_map, keys = group.feature_map, group.keys
    if keys.log_domain:
        grad_q = grad_q.mul_(group.queries)
    grad_q = feature_map.query_gradient(group.q, group.x_q, group.queries, grad_q)
    if keys.mask is not None:
        grad_k = grad_k.masked_fill_(keys.mask, 0.0)
    gradients = keys.gradient(grad_k, group.log_scale, group.flat_k.view_as(grad_k))
    grad_k = feature_map.key_gradient(group.k, group.x_k, keys.values, *gradients)
    # A masked key may be NaN, and 0 * NaN is NaN.
    return grad_q, grad_k if keys.mask is None else grad_k.masked_fill_(keys.mask, 0.0)


def _recursive_gradients(
    group: _Group, before: _Before, grad_out: Tensor, grad_after: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `_group_gradients` does, by autograd."""
    q, k, v, sums = (x.detach().requires_grad_() for x in (group.q, group.k, group.v, before.sums))
    with torch.enable_grad():
        out, after = _recurse(q, k, v, group, before._replace(sums=sums))
    grads = torch.autograd.grad([out, after.sums], [q, k, v, sums], [grad_out, grad_after])
    return grads[0], grads[1], grads[2], grads[3]


def _divisor(sums: Tensor) -> Tensor:
    """Return z, [..., M, 1], of sums, [..., M, Dv + 1], without gradient; 1 where no key was summed."""
    z = sums[..., -1:].detach()
    return z.masked_fill(z == 0, 1.0)


def _chunk_tokens(q: Tensor) -> int:
    return _CPU_CHUNK if q.device.type == "cpu" else _DEVICE_CHUNK


def _groups(q: Tensor, chunk_size: int) -> list[slice]:
    """Return the tokens of each group: one chunk, whose reference is a single key; groups of whole chunks; the rest."""
    length, chunk = q.shape[2], min(_chunk_tokens(q), chunk_size)
    size = max(1, min(chunk_size, _MAX_GROUP) // chunk) * chunk
    last = length - (length - chunk) % chunk if length > chunk else length
    starts = sorted({0, *range(chunk, last, size), *([last] if last < length else [])})
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], length], strict=True)]
