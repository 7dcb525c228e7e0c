"""FAVOR+ attention, and the optimal parameter of its optimal positive random features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from perf_vit.ops.balancing import Balancing, moment_tokens
from perf_vit.ops.causal import causal_favor
from perf_vit.ops.features import FeatureMap, invert_key_mask, join_chunks, token_slices, without_autocast
from perf_vit.ops.fused.dispatch import fused_attention
from perf_vit.ops.kernels import Kernel
from perf_vit.ops.state import KVState, check_keys, make_feature_map, masked_values, sum_keys
from perf_vit.ops.stripes import Reduce, sum_together

__all__ = ["favor_attention", "optimal_parameter"]

# Tokens whose features fit in a processor's cache. Elsewhere chunks only limit memory: features of a chunk, 1 GiB in
# float32.
_CPU_TOKENS, _DEVICE_FEATURES = 512, 2**28


@torch.no_grad()
def optimal_parameter(
    feature_map: FeatureMap, q: Tensor, k: Tensor, key_mask: Tensor | None = None, chunk_size: int | None = None
) -> Tensor:
    """Return the A that minimises the log second moment of the estimator at the mean |x + y|^2 over all pairs.

    With phi = E |x + y|^2, x = D^(-1/4) q and y = D^(-1/4) k (centred and balanced if the feature map has a balancing),
    A = (1 - u) / 8 with u = ((D + 2 phi) + sqrt((D + 2 phi)^2 + 8 D phi)) / (2 D): Likhosherstov et al. 2022, "Chefs'
    Random Tables", whose rho is 1 / u. The mean over pairs follows from the means of x, y, |x|^2 and |y|^2.

    Args:
        feature_map: Feature map that scales the inputs; its kernel is not used.
        q: Queries, [B, H, N_q, D].
        k: Keys, [B, H, N_k, D].
        key_mask: [B, N_k] bool, False for keys to ignore; applied to the queries too where N_q = N_k.
        chunk_size: Number of tokens processed at once; None for 2,048, and on GPUs for all.

    Returns:
        A <= 0 per sample and head, [B, H, 1, 1].
    """
    # With as many queries as keys, both come from the same tokens and share the mask.
    query_mask = key_mask if q.shape[2] == k.shape[2] else None
    mean_x, square_x = _means(feature_map.query_inputs, q, query_mask, chunk_size)
    mean_y, square_y = _means(feature_map.key_inputs, k, key_mask, chunk_size)
    mean_square = square_x + square_y + 2 * (mean_x * mean_y).sum(dim=-1, keepdim=True)
    head_dim = q.shape[-1]
    b = head_dim + 2 * mean_square
    u = (b + (b.square() + 8 * head_dim * mean_square).sqrt()) / (2 * head_dim)
    return (1 - u) / 8


def _means(
    inputs: Callable[[Tensor], Tensor], tokens: Tensor, mask: Tensor | None, chunk_size: int | None
) -> tuple[Tensor, Tensor]:
    """Return the means of x, [B, H, 1, D], and of |x|^2, [B, H, 1, 1]."""
    sums, squares = [], []
    chunk_size = chunk_size or moment_tokens(tokens)
    for start in range(0, tokens.shape[2], chunk_size):
        x = inputs(tokens[:, :, start : start + chunk_size])
        if mask is not None:
            x = x.masked_fill(~mask[:, None, start : start + chunk_size, None], 0.0)
        sums.append(x.sum(dim=2, keepdim=True))
        squares.append(x.square().sum(dim=(2, 3), keepdim=True))
    count = tokens.shape[2] if mask is None else mask.sum(dim=1).clamp(min=1).reshape(-1, 1, 1, 1)
    return torch.stack(sums).sum(dim=0) / count, torch.stack(squares).sum(dim=0) / count


def favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    kernel: str | Kernel = "softmax+",
    key_mask: Tensor | None = None,
    causal: bool = False,
    balancing: Balancing | None = None,
    chunk_size: int | None = None,
    reduce: Reduce | None = None,
) -> Tensor:
    """Attention through random features (FAVOR+).

    out_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j), Choromanski et al. 2020, "Rethinking Attention with
    Performers", equation 4, in O(N M D) time; j runs over all keys, or up to i if `causal`. A softmax kernel estimates
    softmax(q k^T / sqrt(D)) v. Keys and then queries are processed in chunks, and the backward pass recomputes their
    features, so no buffer has size N x M in either direction. The operation is differentiable once with respect to q, k
    and v. `perf_vit.ops.naive.naive_favor_attention` is the N x N reference.

    Features and sums are float32 for float32, half and bfloat16 inputs and under autocast, float64 for float64.

    Args:
        q: Queries, [B, H, N_q, D].
        k: Keys, [B, H, N_k, D].
        v: Values, [B, H, N_k, Dv].
        projection: Rows of the feature map, [R, D], from `draw_projection`.
        kernel: Feature map or its name: "softmax+", "softmax-hyp+", "softmax-trig", "relu" or "oprf". "oprf" fits its
            parameter to the queries and keys; `oprf_kernel` fixes it.
        key_mask: [B, N_k] bool, False for keys to ignore, as if they were absent; the output of a query without a
            visible key is 0.
        causal: Whether query i attends to keys 0 .. i only; N_q must equal N_k. Later tokens don't affect its result.
        balancing: Constants from `fit_balancing` that centre and balance q and k first; the estimate of softmax
            attention improves. With `causal` they must not be fitted to this call's tokens, which would leak future
            tokens.
        chunk_size: Number of tokens per sample and head whose features are in memory at once; changes the result by
            rounding only. None for 512, and on GPUs for as many as have 1 GiB of features.
        reduce: Sum or maximum over the processes that hold the other keys and queries of the samples, see `Stripe`; for
            bidirectional attention with a fixed parameter. All must call this function, also in the backward pass.

    Returns:
        Attended values, [B, H, N_q, Dv], in the dtype of `q`.

    Raises:
        ValueError: The kernel is unknown, there are no keys, or the shapes are inconsistent.
    """
    feature_map = make_feature_map(kernel, projection, balancing)
    if reduce is not None and (causal or feature_map.kernel.needs_parameter):
        raise ValueError("reduce needs causal=False and a kernel without a fitted parameter; leave reduce out")
    chunk_size = _tokens_at_once(q, feature_map) if chunk_size is None else chunk_size
    _check(q, k, v, feature_map, key_mask, causal, chunk_size)
    if torch.compiler.is_exporting() and not causal:
        # A single chunk exports as one graph for any number of tokens, with the features of all of them in memory.
        chunk_size = max(q.shape[2], k.shape[2])
    if causal:
        return causal_favor(q, k, v, feature_map, key_mask, chunk_size)
    feature_map = _with_parameter(feature_map, q, k, key_mask, chunk_size)
    if reduce is None:
        with without_autocast(q):
            found = fused_attention(f"FAVOR+ ({feature_map.kernel.name})", q, k, v, feature_map, key_mask)
        if found is not None:
            return found
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        constants = () if balancing is None else balancing.tensors()
        kernel_, parameter = feature_map.kernel, feature_map.kernel.parameter
        return _FavorAttention.apply(q, k, v, projection, key_mask, kernel_, parameter, chunk_size, reduce, *constants)
    state = _accumulate(k, v, feature_map, key_mask, chunk_size, reduce).normalized()
    with without_autocast(q):
        return join_chunks((_attend(state, q[tokens])[0] for tokens in token_slices(q, chunk_size)), q.shape[2])


def _accumulate(
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    key_mask: Tensor | None,
    chunk_size: int,
    reduce: Reduce | None,
) -> KVState:
    state: KVState | None = None
    with without_autocast(k):
        for tokens in token_slices(k, chunk_size):
            keys = feature_map.keys(feature_map.key_inputs(k[tokens]), invert_key_mask(key_mask, tokens[-1]))
            part = sum_keys(keys, v[tokens], feature_map)
            state = part if state is None else state.merge(part)
    assert state is not None
    return state if reduce is None else state.reduced(reduce)


def _attend(state: KVState, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention of queries, [B, H, N, Dv], and its denominators, [B, H, N, 1], given a normalised state."""
    feature_map = state.feature_map
    values = feature_map.queries(feature_map.query_inputs(q))
    features, _ = feature_map.scaled_queries(values, state.log_scale)
    denominator = state.denominators(features)
    if not feature_map.kernel.log_domain:
        denominator = denominator.masked_fill(denominator == 0, 1.0)
    return (features @ state.S).div_(denominator).to(q.dtype), denominator


class _FavorAttention(torch.autograd.Function):
    """Attention whose backward pass recomputes features chunk by chunk.

    Saved for the backward pass: the inputs, the output, one denominator per query, and the state. The stabilisers are
    constants: they cancel in the quotient, so their gradient is 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        projection: Tensor,
        key_mask: Tensor | None,
        kernel: Kernel,
        parameter: float | Tensor | None,
        chunk_size: int,
        reduce: Reduce | None,
        *constants: Tensor,
    ) -> Tensor:
        feature_map = _rebuild(kernel, parameter, projection, constants)
        state = _accumulate(k, v, feature_map, key_mask, chunk_size, reduce).normalized()
        denominator = q.new_empty(*q.shape[:-1], 1, dtype=state.z.dtype)

        def attended() -> Iterator[Tensor]:
            for tokens in token_slices(q, chunk_size):
                out, denominator[tokens] = _attend(state, q[tokens])
                yield out

        with without_autocast(q):
            out = join_chunks(attended(), q.shape[2])
        ctx.is_tensor = isinstance(parameter, Tensor)
        kept = (parameter,) if isinstance(parameter, Tensor) else ()
        ctx.save_for_backward(
            q, k, v, projection, key_mask, state.S, state.z, state.log_scale, out, denominator, *constants, *kept
        )
        ctx.kernel, ctx.parameter, ctx.chunk_size = kernel, None if ctx.is_tensor else parameter, chunk_size
        ctx.reduce = reduce
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, projection, key_mask, s, z, log_scale, out, denominator, *rest = ctx.saved_tensors
        parameter = rest.pop() if ctx.is_tensor else ctx.parameter
        state = KVState(s, z, log_scale, _rebuild(ctx.kernel, parameter, projection, tuple(rest)))
        with without_autocast(q):
            grad_q, grad_s, grad_z = _query_gradients(state, q, grad_out, out, denominator, ctx.chunk_size)
            if ctx.reduce is not None:
                grad_s, grad_z = sum_together(ctx.reduce, grad_s, grad_z)
            grad_k, grad_v = _key_gradients(state, k, v, key_mask, grad_s, grad_z, ctx.chunk_size)
        return grad_q, grad_k, grad_v, *(None for _ in range(6 + len(rest)))


def _query_gradients(
    state: KVState, q: Tensor, grad_out: Tensor, out: Tensor, denominator: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients with respect to the queries, to S, [B, H, M, Dv], and to z, [B, H, 1, M]."""
    feature_map, s, z = state.feature_map, state.S, state.z.unsqueeze(-2)
    grad_s, grad_z, grad_q = torch.zeros_like(s), torch.zeros_like(z), torch.empty_like(q)
    for tokens in token_slices(q, chunk_size):
        x = feature_map.query_inputs(q[tokens])
        values = feature_map.queries(x)
        features, _ = feature_map.scaled_queries(values, state.log_scale)
        # With o = num / den: d num = d o / den and d den = -(d o . o) / den.
        grad_num = grad_out[tokens].to(s.dtype) / denominator[tokens]
        grad_den = -(grad_num * out[tokens]).sum(dim=-1, keepdim=True)
        grad_s += features.mT @ grad_num
        # A row times a matrix is several times as fast as a matrix times a column.
        grad_z += grad_den.mT @ features
        grad_features = grad_num @ s.mT
        if feature_map.kernel.log_domain:
            grad_features = grad_features.add_(grad_den).mul_(features)
        else:
            grad_features = grad_features.addcmul_(grad_den, z)
        grad_q[tokens] = feature_map.query_gradient(q, x, values, grad_features)
    return grad_q, grad_s, grad_z


def _key_gradients(
    state: KVState,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    grad_s: Tensor,
    grad_z: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients with respect to keys and values, given those with respect to S and z."""
    feature_map = state.feature_map
    grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
    for tokens in token_slices(k, chunk_size):
        x = feature_map.key_inputs(k[tokens])
        keys = feature_map.keys(x, invert_key_mask(key_mask, tokens[-1]))
        features = keys.scaled(state.log_scale)
        grad_v[tokens] = (features @ grad_s).to(v.dtype)
        grad_features = (masked_values(v[tokens], keys) @ grad_s.mT).add_(grad_z)
        if keys.mask is not None:
            grad_features = grad_features.masked_fill_(keys.mask, 0.0)
        gradients = keys.gradient(grad_features, state.log_scale, features)
        grad_k[tokens] = feature_map.key_gradient(k, x, keys.values, *gradients)
        if keys.mask is not None:
            # A masked key may be NaN, and 0 * NaN is NaN.
            grad_k[tokens].masked_fill_(keys.mask, 0.0)
    return grad_k, grad_v


def _with_parameter(
    feature_map: FeatureMap, q: Tensor, k: Tensor, key_mask: Tensor | None, chunk_size: int
) -> FeatureMap:
    if not feature_map.kernel.needs_parameter:
        return feature_map
    assert feature_map.kernel.bind is not None
    with without_autocast(q):
        parameter = optimal_parameter(feature_map, q, k, key_mask, chunk_size)
    return replace(feature_map, kernel=feature_map.kernel.bind(parameter))


def _rebuild(
    kernel: Kernel, parameter: float | Tensor | None, projection: Tensor, constants: tuple[Tensor, ...]
) -> FeatureMap:
    """Build the feature map from the arguments of an autograd function, which takes tensors separately."""
    if kernel.bind is not None and parameter is not None:
        kernel = kernel.bind(parameter)
    return FeatureMap(kernel, projection, Balancing(*constants) if constants else None)


def _tokens_at_once(q: Tensor, feature_map: FeatureMap) -> int:
    if q.device.type == "cpu":
        return _CPU_TOKENS
    num_features = feature_map.projection.shape[0] * feature_map.kernel.features_per_row
    return max(1, _DEVICE_FEATURES // max(1, math.prod(q.shape[:2]) * num_features))


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    key_mask: Tensor | None,
    causal: bool,
    chunk_size: int,
) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}; 512 suits most machines")
    check_keys(k, v, feature_map.projection, key_mask)
    if q.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q must be [B, H, N, D] with the keys' B = {k.shape[0]}, H = {k.shape[1]} and D = {k.shape[3]}, "
            f"got {list(q.shape)}"
        )
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"causal attention needs as many queries as keys, got {q.shape[2]} and {k.shape[2]}")
    if causal and feature_map.kernel.needs_parameter:
        raise ValueError(
            f"kernel {feature_map.kernel.name!r} would fit its parameter to the future under causal=True; "
            "expected it fixed: kernel=oprf_kernel(-0.05)"
        )
