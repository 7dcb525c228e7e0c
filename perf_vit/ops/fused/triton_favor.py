"""FAVOR+ attention without a gradient in two Triton kernels: sums over keys, and products with queries.

Both are softmax attention in the log domain: features attend to keys, then queries to features. No feature is written.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

from perf_vit.ops.features import FeatureMap
from perf_vit.ops.fused.launches import LOG2_E, LOWEST, Tiles, dot, fold, in_rows, load_rows, store_rows, strides
from perf_vit.ops.kernels import KERNELS, RELU_FLOOR

__all__ = ["triton_favor_attention"]

# Keys that one program sums, and features of a program.
_CHUNK, _FEATURES = 2048, 32


def triton_favor_attention(
    q: Tensor, k: Tensor, v: Tensor, feature_map: FeatureMap, key_mask: Tensor | None
) -> Tensor | None:
    """Compute bidirectional `perf_vit.ops.favor_attention` with "softmax+", "softmax-hyp+" or "relu".

    Features and sums are float32. All sums have a fixed order.

    Args:
        q: Queries, [B, H, N_q, D].
        k: Keys, [B, H, N_k, D].
        v: Values, [B, H, N_k, Dv].
        feature_map: Kernel, projection and balancing.
        key_mask: [B, N_k] bool, False for keys to ignore.

    Returns:
        Attended values, [B, H, N_q, Dv], in the dtype of `q`; None for another kernel with one of these names.
    """
    if KERNELS[feature_map.kernel.name] is not feature_map.kernel:
        return None
    q, k, v = in_rows(q), in_rows(k), in_rows(v)
    rows = feature_map.projection.float().contiguous()
    if feature_map.kernel.name == "softmax-hyp+":
        rows = torch.cat([rows, -rows])
    by_query, by_key = _scaling(feature_map, k)
    is_relu = not feature_map.kernel.log_domain
    tiles, numbers = Tiles.of(k, v, q.shape[2], 4), _numbers(k, rows)
    options = {
        "D": k.shape[3],
        "DV": v.shape[3],
        "BLOCK_F": _FEATURES,
        "IS_RELU": is_relu,
        "IS_BALANCED": feature_map.balancing is not None,
    }
    key_mask = None if key_mask is None else key_mask.contiguous()
    parts = _sums(k, v, key_mask, rows, by_key, numbers, {**options, **tiles.options(queries=False)})
    state = _joined(parts, is_relu)
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    attend_features[(triton.cdiv(q.shape[2], tiles.queries), q.shape[0] * q.shape[1])](
        q,
        out,
        rows,
        by_query,
        state,
        *strides(q),
        *strides(out),
        q.shape[2],
        *numbers,
        **options,
        **tiles.options(queries=True),
    )
    return out


def _sums(
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    rows: Tensor,
    scaling: Tensor,
    numbers: tuple[float, ...],
    options: dict[str, Any],
) -> Tensor:
    """Return the sums of `sum_features` over chunks of keys, [B, H, chunks, M, Dv + 2]."""
    chunks, blocks = triton.cdiv(k.shape[2], _CHUNK), triton.cdiv(rows.shape[0], _FEATURES)
    parts = torch.empty(*k.shape[:2], chunks, rows.shape[0], v.shape[3] + 2, device=k.device)
    sum_features[(chunks * blocks, k.shape[0] * k.shape[1])](
        k,
        v,
        rows if key_mask is None else key_mask,
        rows,
        scaling,
        parts,
        *strides(k),
        *strides(v),
        0 if key_mask is None else key_mask.stride(0),
        k.shape[2],
        *numbers,
        CHUNK=_CHUNK,
        IS_MASKED=key_mask is not None,
        **options,
    )
    return parts


def _numbers(k: Tensor, rows: Tensor) -> tuple[float, ...]:
    """Return what both kernels take: numbers of heads and features, and factors of inputs and features."""
    return k.shape[1], rows.shape[0], k.shape[3] ** -0.25, rows.shape[0] ** -0.5, RELU_FLOOR


def _scaling(feature_map: FeatureMap, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return (a, b, u) such that inputs are a x + b, and u . input is a bias, of queries and of keys, [B, H, 3, D]."""
    if feature_map.balancing is None:
        nothing = k.new_empty(0, dtype=torch.float32)
        return nothing, nothing
    query_center, key_center, scale = (x.float() for x in feature_map.balancing.tensors())
    by, factor = scale * k.shape[-1] ** -0.25, k.shape[-1] ** -0.5
    u = query_center * by
    # As keys are divided by `scale`.
    by_key = factor / by
    found = torch.cat([by, -u, u], dim=2), torch.cat([by_key, -key_center * by_key, u], dim=2)
    size = (*k.shape[:2], 3, k.shape[3])
    return found[0].expand(size).contiguous(), found[1].expand(size).contiguous()


def _joined(parts: Tensor, is_relu: bool) -> Tensor:
    """Join the sums of chunks, [B, H, chunks, M, Dv + 2], to mean values and log weights, or sums, [.., M, Dv + 1]."""
    sums, largest = parts[..., :-1], parts[..., -1:]
    if is_relu:
        return sums.sum(dim=2)
    highest = largest.amax(dim=2, keepdim=True)
    sums = (sums * (largest - highest).exp2_()).sum(dim=2)
    weight = sums[..., -1:].clamp(min=torch.finfo(torch.float32).tiny)
    return torch.cat([sums[..., :-1] / weight, highest.squeeze(2) + weight.log2()], dim=-1)


@triton.jit
def _inputs(
    x, scaling, place, counts, stride, factor, D: tl.constexpr, BLOCK_D: tl.constexpr, IS_BALANCED: tl.constexpr
):
    """Load queries or keys and scale them to inputs of the feature map, [n, BLOCK_D]."""
    found = load_rows(x, place, counts, stride, D, BLOCK_D).to(tl.float32)
    if IS_BALANCED:
        d = tl.arange(0, BLOCK_D)
        found = found * tl.load(scaling + d, d < D, other=0.0)[None, :]
        found += tl.load(scaling + D + d, d < D, other=0.0)[None, :]
        found = tl.where(counts[:, None], found, 0.0)
    else:
        found *= factor
    return found


@triton.jit
def sum_features(
    k, v, key_mask, rows, scaling, parts, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, mask_sb, N, H, R, factor, relu_factor,
    floor, CHUNK: tl.constexpr, IS_MASKED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_F: tl.constexpr,
    IS_RELU: tl.constexpr, IS_BALANCED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr, IS_EMULATED: tl.constexpr,
):  # fmt: skip
    """Sum values and weights over a chunk of keys for a block of features: [sum of values, of weights, log scale]."""
    bh, blocks = tl.program_id(1).to(tl.int64), tl.cdiv(R, BLOCK_F)
    b, h, chunk = bh // H, bh % H, tl.program_id(0) // blocks
    m = (tl.program_id(0) % blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
    w, scaling = load_rows(rows, m, m < R, D, D, BLOCK_D), scaling + bh * 3 * D
    found, weight = tl.zeros((BLOCK_F, BLOCK_DV), tl.float32), tl.zeros((BLOCK_F,), tl.float32)
    highest = tl.full((BLOCK_F,), LOWEST, tl.float32)
    for start in range(chunk * CHUNK, tl.minimum(N, (chunk + 1) * CHUNK), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        counts = (n < N) & (n < (chunk + 1) * CHUNK)
        if IS_MASKED:
            counts &= tl.load(key_mask + b * mask_sb + n, counts, other=0) != 0
        keys = _inputs(k + b * k_sb + h * k_sh, scaling, n, counts, k_sn, factor, D, BLOCK_D, IS_BALANCED)
        values = load_rows(v + b * v_sb + h * v_sh, n, counts, v_sn, DV, BLOCK_DV).to(tl.float32)
        if IS_RELU:
            features = tl.maximum(dot(w, tl.trans(keys), PRECISION, IS_EMULATED) * relu_factor, 0.0)
            features = tl.where(counts[None, :], features + floor * relu_factor, 0.0)
            found += dot(features, values, PRECISION, IS_EMULATED)
            weight += tl.sum(features, 1)
        else:
            bias = tl.sum(keys * keys, 1) * -0.5
            if IS_BALANCED:
                d = tl.arange(0, BLOCK_D)
                bias += tl.sum(keys * tl.load(scaling + 2 * D + d, d < D, other=0.0)[None, :], 1)
            bias = tl.where(counts, bias * LOG2_E, LOWEST)
            found, highest, weight, _, _ = fold(
                w, keys, values, bias, found, highest, weight, LOG2_E, PRECISION, IS_EMULATED
            )  # fmt: skip
    parts += (bh * tl.cdiv(N, CHUNK) + chunk) * R * (DV + 2)
    store_rows(parts, found, m, m < R, DV + 2, DV, BLOCK_DV)
    tl.store(parts + m * (DV + 2) + DV, weight, m < R)
    tl.store(parts + m * (DV + 2) + DV + 1, highest, m < R)


@triton.jit
def attend_features(
    q, out, rows, scaling, state, q_sb, q_sh, q_sn, out_sb, out_sh, out_sn, N, H, R, factor, relu_factor, floor,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_F: tl.constexpr, IS_RELU: tl.constexpr, IS_BALANCED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr, IS_EMULATED: tl.constexpr,
):  # fmt: skip
    """Attend with a block of queries to all features."""
    bh = tl.program_id(1).to(tl.int64)
    b, h, n = bh // H, bh % H, tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    asked = _inputs(
        q + b * q_sb + h * q_sh, scaling + bh * 3 * D, n, n < N, q_sn, factor, D, BLOCK_D, IS_BALANCED
    )  # fmt: skip
    state += bh * R * (DV + 1)
    found, weight = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    highest = tl.full((BLOCK_M,), LOWEST, tl.float32)
    for start in range(0, R, BLOCK_F):
        m = start + tl.arange(0, BLOCK_F)
        w, values = load_rows(rows, m, m < R, D, D, BLOCK_D), load_rows(state, m, m < R, DV + 1, DV, BLOCK_DV)
        if IS_RELU:
            features = tl.maximum(dot(asked, tl.trans(w), PRECISION, IS_EMULATED) * relu_factor, 0.0)
            features += floor * relu_factor
            # Sums of features outside are 0.
            found += dot(features, values, PRECISION, IS_EMULATED)
            weight += tl.sum(features * tl.load(state + m * (DV + 1) + DV, m < R, other=0.0)[None, :], 1)
        else:
            bias = tl.load(state + m * (DV + 1) + DV, m < R, other=LOWEST)
            found, highest, weight, _, _ = fold(
                asked, w, values, bias, found, highest, weight, LOG2_E, PRECISION, IS_EMULATED
            )  # fmt: skip
    found = found / tl.where(weight > 0.0, weight, 1.0)[:, None]
    store_rows(out + b * out_sb + h * out_sh, found, n, n < N, out_sn, DV, BLOCK_DV)
