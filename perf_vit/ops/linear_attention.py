"""FAVOR+ attention at a cost linear in the number of tokens, in chunks that keep its memory small."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from perf_vit.ops.kernels import Kernel, get_kernel
from perf_vit.ops.state import KVState, masked_features, without_autocast

__all__ = ["favor_attention"]


def favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    kernel: str = "softmax+",
    key_mask: Tensor | None = None,
    chunk_size: int = 2048,
) -> Tensor:
    """Bidirectional attention through random features (FAVOR+).

    out_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j), Choromanski et al. 2020, "Rethinking Attention with
    Performers", equation 4, in O(N M D) time. With the kernel "softmax+" it estimates softmax(q k^T / sqrt(D)) v.
    Keys, then queries, go through in chunks, and the backward pass computes their features again: no buffer of size
    N x M ever exists, in either direction. It can be differentiated once, with respect to q, k and v.
    `perf_vit.ops.naive.naive_favor_attention` is the same estimator as an N x N matrix.

    Features and sums are float32 for float32, half and bfloat16 inputs and under autocast, float64 for float64.

    Args:
        q: queries, [B, H, N_q, D].
        k: keys, [B, H, N_k, D].
        v: values, [B, H, N_k, Dv].
        projection: rows of the feature map, [M, D], from `draw_projection`.
        kernel: name of the feature map, "softmax+" or "relu".
        key_mask: [B, N_k] bool, False for keys that are left out, exactly as if they weren't there; a sample whose
            keys are all left out gets zeros.
        chunk_size: tokens whose features are in memory at once; it changes the result by rounding only.

    Returns:
        The attended values, [B, H, N_q, Dv], in the dtype of `q`.

    Raises:
        ValueError: an unknown kernel, no key, or shapes that don't fit together.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}; 2048 suits most machines")
    chosen = get_kernel(kernel)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _FavorAttention.apply(q, k, v, projection, key_mask, chosen, chunk_size)
    state = _accumulate(k, v, projection, key_mask, chosen, chunk_size)
    return _join((state.attend(q_chunk) for q_chunk in _chunks(q, chunk_size)), q.shape[-2])


def _accumulate(
    k: Tensor, v: Tensor, projection: Tensor, key_mask: Tensor | None, kernel: Kernel, chunk_size: int
) -> KVState:
    state: KVState | None = None
    for k_chunk, v_chunk, mask in zip(*_key_chunks(k, v, key_mask, chunk_size), strict=True):
        if state is None:
            state = KVState.from_keys(k_chunk, v_chunk, projection, kernel.name, mask)
        else:
            state = state.update(k_chunk, v_chunk, mask)
    assert state is not None
    return state


class _FavorAttention(torch.autograd.Function):
    """The op with a backward pass that recomputes features chunk by chunk.

    Kept between the passes: the inputs, the output, one denominator a query, and the state. The stabilisers are
    constants: they cancel in the quotient, so the derivative with respect to them is 0.
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
        chunk_size: int,
    ) -> Tensor:
        state = _accumulate(k, v, projection, key_mask, kernel, chunk_size)
        denominators: list[Tensor] = []
        chunks = (_attend(state, q_chunk, denominators) for q_chunk in _chunks(q, chunk_size))
        out = _join(chunks, q.shape[-2])
        ctx.save_for_backward(
            q, k, v, projection, key_mask, state.S, state.z, state.log_scale, out, torch.cat(denominators, dim=-2)
        )
        ctx.kernel, ctx.chunk_size = kernel, chunk_size
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, projection, key_mask, s, z, log_scale, out, denominator = ctx.saved_tensors
        state = KVState(s, z, log_scale, projection, ctx.kernel)
        with without_autocast(q):
            grad_q, grad_state = _query_gradients(state, q, grad_out, out, denominator, ctx.chunk_size)
            grad_k, grad_v = _key_gradients(state, k, v, key_mask, grad_state, ctx.chunk_size)
        return grad_q, grad_k, grad_v, None, None, None, None


def _attend(state: KVState, q: Tensor, denominators: list[Tensor]) -> Tensor:
    """`state.attend` that leaves its denominators, [B, H, N, 1], in a list."""
    numerator, denominator = state.sums(q)
    denominators.append(denominator.masked_fill(denominator == 0, 1.0))
    return (numerator / denominators[-1]).to(q.dtype)


def _query_gradients(
    state: KVState, q: Tensor, grad_out: Tensor, out: Tensor, denominator: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to the queries and to [S, z]."""
    sums = torch.cat([state.S, state.z.unsqueeze(-1)], dim=-1)
    grad_state, grad_q = torch.zeros_like(sums), torch.empty_like(q)
    for tokens in _slices(q, chunk_size):
        features = state.query_features(masked_features(q[tokens], state.projection, state.kernel))
        # With o = num / den: d num = d o / den and d den = -(d o . o) / den, side by side as S and z are.
        grad_num = grad_out[tokens].to(sums.dtype) / denominator[tokens]
        grad_den = -(grad_num * out[tokens]).sum(dim=-1, keepdim=True)
        grad_sums = torch.cat([grad_num, grad_den], dim=-1)
        grad_state += features.mT @ grad_sums
        grad_q[tokens] = _input_gradient(state, q[tokens], features, grad_sums @ sums.mT)
    return grad_q, grad_state


def _key_gradients(
    state: KVState, k: Tensor, v: Tensor, key_mask: Tensor | None, grad_state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to keys and values, from that with respect to [S, z]."""
    grad_s, grad_z = grad_state[..., :-1], grad_state[..., -1].unsqueeze(-2)
    grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
    for tokens in _slices(k, chunk_size):
        mask = None if key_mask is None else key_mask[:, tokens[-1]]
        features = state.key_features(masked_features(k[tokens], state.projection, state.kernel, mask))
        grad_v[tokens] = (features @ grad_s).to(v.dtype)
        grad_features = (v[tokens].to(features.dtype) @ grad_s.mT).add_(grad_z)
        if mask is not None:
            grad_features = grad_features.masked_fill_(~mask[:, None, :, None], 0.0)
        grad_k[tokens] = _input_gradient(state, k[tokens], features, grad_features)
    return grad_k, grad_v


def _input_gradient(state: KVState, x: Tensor, features: Tensor, grad_features: Tensor) -> Tensor:
    """Back through the exponential, where the kernel has one, the kernel itself and D^(-1/4): [B, H, N, D]."""
    scale = x.shape[-1] ** -0.25
    if state.kernel.log_domain:
        grad_features = grad_features.mul_(features)
    scaled = x.to(features.dtype) * scale
    grad = state.kernel.gradient(scaled, state.projection.to(features.dtype), features, grad_features)
    return (grad * scale).to(x.dtype)


def _key_chunks(
    k: Tensor, v: Tensor, key_mask: Tensor | None, chunk_size: int
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor | None]]:
    k_chunks = _chunks(k, chunk_size)
    if key_mask is None:
        return k_chunks, _chunks(v, chunk_size), (None,) * len(k_chunks)
    if k.shape[-2] <= chunk_size:
        return k_chunks, _chunks(v, chunk_size), (key_mask,)
    return k_chunks, _chunks(v, chunk_size), torch.split(key_mask, chunk_size, dim=-1)


def _slices(x: Tensor, chunk_size: int) -> list[tuple[slice, slice, slice]]:
    """Indices of the chunks of [B, H, N, ...]."""
    every = slice(None)
    return [(every, every, slice(start, start + chunk_size)) for start in range(0, x.shape[-2], chunk_size)]


def _join(chunks: Iterator[Tensor], num_tokens: int) -> Tensor:
    """Put chunks of tokens together as they come, so that they are never all there twice."""
    first = next(chunks)
    if first.shape[-2] == num_tokens:
        return first
    out = first.new_empty(*first.shape[:-2], num_tokens, first.shape[-1])
    start = 0
    for chunk in itertools.chain([first], chunks):
        out[..., start : start + chunk.shape[-2], :] = chunk
        start += chunk.shape[-2]
    return out


def _chunks(x: Tensor, chunk_size: int) -> tuple[Tensor, ...]:
    # Not split where it need not be: an exported graph then takes any number of tokens up to a chunk.
    return (x,) if x.shape[-2] <= chunk_size else torch.split(x, chunk_size, dim=-2)
