"""Causal FAVOR+ attention by recursion: keys of any scale, and compiled graphs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from perf_vit.ops.features import (
    LOWEST_SCALE,
    FeatureMap,
    KeyFeatures,
    exp_,
    halves,
    invert_key_mask,
    join_chunks,
    token_slices,
    without_autocast,
)
from perf_vit.ops.state import KVState, masked_values, sum_keys

__all__ = ["State", "attend_recursively", "recursive_causal_favor"]

# The cost of products within a chunk grows with its size squared; the cost of products with the state falls with it.
_MAX_CHUNK = 256

# Numerator, [..., N, Dv], denominator, [..., N, 1], and the log of the factor taken out of both, [..., N, 1].
_Sums = tuple[Tensor, Tensor, Tensor]
# S, z and log_scale of a `KVState`.
State = tuple[Tensor, Tensor, Tensor]


def recursive_causal_favor(
    q: Tensor, k: Tensor, v: Tensor, feature_map: FeatureMap, key_mask: Tensor | None, chunk_size: int
) -> Tensor:
    """Compute `causal_favor` in a graph that doesn't depend on values.

    Within a chunk, the tokens are split recursively: the queries in the second half of a block attend to all keys of
    its first half, so they share one stabiliser, and no query depends on the stabiliser of a later key. This takes
    log2(chunk_size) levels of matrix products.

    The backward pass recomputes each chunk from the state before it. One state per chunk is stored.
    """
    chunk_size = min(chunk_size, _MAX_CHUNK)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    with without_autocast(q):
        chunks = _chunks_in_order(q, k, v, feature_map, key_mask, chunk_size, needs_grad)
        # Writing chunks into one tensor would give each of them a gradient of the size of that tensor.
        return torch.cat(list(chunks), dim=2) if needs_grad else join_chunks(chunks, q.shape[2])


def attend_recursively(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    key_mask: Tensor | None,
    before: State,
    chunk_size: int,
) -> tuple[Tensor, State]:
    """Return the attended values, [B, H, N, Dv], given the state of the keys before, and the state after the tokens."""
    parts = []
    for tokens in token_slices(q, chunk_size):
        mask = None if key_mask is None else key_mask[:, tokens[-1]]
        part, before = _step(q[tokens], k[tokens], v[tokens], feature_map, mask, before)
        parts.append(part)
    return torch.cat(parts, dim=2), before


def _chunks_in_order(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    key_mask: Tensor | None,
    chunk_size: int,
    needs_grad: bool,
) -> Iterator[Tensor]:
    before: State | None = None
    slices = token_slices(q, chunk_size)
    # `split` instead of slices: the gradient of a slice has the size of the whole tensor.
    lengths = [len(range(q.shape[2])[tokens[-1]]) for tokens in slices]
    parts = [torch.split(x, lengths, dim=2) for x in (q, k, v)]
    for tokens, q_chunk, k_chunk, v_chunk in zip(slices, *parts, strict=True):
        mask = None if key_mask is None else key_mask[:, tokens[-1]]
        arguments = (q_chunk, k_chunk, v_chunk, feature_map, mask, before)
        if needs_grad:
            out, before = checkpoint(_step, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            out, before = _step(*arguments)
        yield out


def _step(
    q: Tensor, k: Tensor, v: Tensor, feature_map: FeatureMap, key_mask: Tensor | None, before: State | None
) -> tuple[Tensor, State]:
    """Return the attention of one chunk and the state of all keys up to its end."""
    length, padding = q.shape[2], _to_power_of_two(q.shape[2])
    # The padding comes last, so no real query attends to it.
    queries = feature_map.queries(feature_map.query_inputs(F.pad(q, padding)))
    mask = None if key_mask is None else F.pad(key_mask, padding[2:], value=False)
    keys = feature_map.keys(feature_map.key_inputs(F.pad(k, padding)), invert_key_mask(mask))
    sums = _within_chunk(queries, keys, masked_values(F.pad(v, padding), keys), feature_map)
    state = sum_keys(keys.first(length), v, feature_map)
    if before is not None:
        past = KVState(*before, feature_map)
        sums = _add(sums, _from_state(queries, past))
        state = past.merge(state)
    numerator, denominator, _ = sums
    out = (numerator / denominator.masked_fill(denominator == 0, 1.0))[:, :, :length]
    return out.to(q.dtype), (state.S, state.z, state.log_scale)


def _within_chunk(queries: Tensor, keys: KeyFeatures, v: Tensor, feature_map: FeatureMap) -> _Sums:
    """Attend within a chunk: to each query's own key, then at each level from second halves to first halves of blocks.

    Args:
        queries: Unscaled features of the queries, [B, H, T, M], T a power of two.
        keys: Features of the keys, [B, H, T, M].
        v: Values, [B, H, T, Dv].
        feature_map: Feature map of both.
    """
    sums = _own_token(queries, keys, v)
    half = 1
    while half < queries.shape[2]:
        first_keys, first_v = keys.first_halves(half), halves(v, half)[0]
        log_scale = first_keys.scale()
        features, log_factor = feature_map.scaled_queries(halves(queries, half)[1].clone(), log_scale)
        weights = features @ first_keys.scaled(log_scale).mT
        level = weights @ first_v, weights.sum(dim=-1, keepdim=True), log_factor
        sums = _add_to_second_halves(sums, level, half)
        half *= 2
    return sums


def _own_token(queries: Tensor, keys: KeyFeatures, v: Tensor) -> _Sums:
    if keys.log_domain:
        logs = queries + keys.values
        log_factor = logs.detach().amax(dim=-1, keepdim=True).clamp(min=LOWEST_SCALE)
        weights = exp_(logs - log_factor).sum(dim=-1, keepdim=True)
        if keys.mask is not None:
            weights = weights.masked_fill(keys.mask, 0.0)
    else:
        weights = (queries * keys.values).sum(dim=-1, keepdim=True)
        log_factor = torch.zeros_like(weights.detach())
        if keys.log_amplitude is not None:
            log_factor = keys.log_amplitude.detach().clamp(min=LOWEST_SCALE)
            weights = weights * (keys.log_amplitude - log_factor).exp()
    return weights * v, weights, log_factor


def _from_state(queries: Tensor, state: KVState) -> _Sums:
    state = state.normalized()
    features, log_factor = state.feature_map.scaled_queries(queries.clone(), state.log_scale)
    return features @ state.S, state.denominators(features), log_factor


def _add_to_second_halves(sums: _Sums, level: _Sums, half: int) -> _Sums:
    first, second = zip(*(halves(x, half) for x in sums), strict=True)
    joined = _add(second, level)
    numerator, denominator, log_factor = (
        torch.stack([a, b.expand_as(a)], dim=3).flatten(2, 4) for a, b in zip(first, joined, strict=True)
    )
    return numerator, denominator, log_factor


def _add(a: _Sums, b: _Sums) -> _Sums:
    log_factor = torch.maximum(a[2], b[2])
    by_a, by_b = (a[2] - log_factor).exp(), (b[2] - log_factor).exp()
    return a[0] * by_a + b[0] * by_b, a[1] * by_a + b[1] * by_b, log_factor


def _to_power_of_two(length: int) -> tuple[int, int, int, int]:
    """Return the padding for `F.pad` that extends [..., length, D] to the next power of two."""
    return 0, 0, 0, (1 << (length - 1).bit_length()) - length
