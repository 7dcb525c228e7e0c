"""Triton kernels of clustered attention; a program works on one sample and head, and on one window or block of keys."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc"

from __future__ import annotations

import triton
from triton import language as tl

from perf_vit.ops.fused.launches import LOG2_E, LOWEST, dot, fold, load_rows, store_rows

__all__ = ["assign", "attend", "sum_clusters"]


@triton.jit
def _window(w, rows, columns, height, width, across):
    """Return the first row and column of a window, its number of columns and its number of tokens."""
    top, left = (w // across) * height, (w % across) * width
    wide = tl.minimum(width, columns - left)
    return top, left, wide, tl.minimum(height, rows - top) * wide


@triton.jit
def _load_keys(k, mean, place, counts, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, IS_CENTERED: tl.constexpr):
    """Load keys less their mean, 0 where they don't count, [n, BLOCK_D]."""
    keys = load_rows(k, place, counts, stride, D, BLOCK_D)
    if IS_CENTERED:
        d = tl.arange(0, BLOCK_D)
        keys = tl.where(counts[:, None], keys - tl.load(mean + d, d < D, other=0.0)[None, :], 0.0)
    return keys


@triton.jit
def assign(
    k, mean, columns, valid, labels, k_sb, k_sh, k_sn, valid_sb, valid_sh, H, P, N, M,
    IS_MASKED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, IS_CENTERED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr, IS_EMULATED: tl.constexpr,
):  # fmt: skip
    """Find the nearest cluster of a block of keys, as `nearest_cluster`; M for keys that don't count."""
    bh = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    counts = n < N
    if IS_MASKED:
        counts &= tl.load(valid + (bh // H) * valid_sb + (bh % H) * valid_sh + n, counts, other=0) != 0
    keys = _load_keys(
        k + (bh // H) * k_sb + (bh % H) * k_sh, mean + bh * D, n + P, counts, k_sn, D, BLOCK_D, IS_CENTERED
    )
    keys = keys.to(tl.float32)
    best, label = tl.full((BLOCK_N,), float("-inf"), tl.float32), tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, M, BLOCK_N):
        m = start + tl.arange(0, BLOCK_N)
        centers = load_rows(columns + bh * M * (D + 1), m, m < M, D + 1, D, BLOCK_D)
        offset = tl.load(columns + (bh * M + m) * (D + 1) + D, m < M, other=float("-inf"))
        closeness = dot(keys, tl.trans(centers), PRECISION, IS_EMULATED) + offset[None, :]
        nearest = tl.max(closeness, 1)
        label = tl.where(nearest > best, start + tl.argmax(closeness, 1).to(tl.int32), label)
        best = tl.maximum(nearest, best)
    tl.store(labels + bh * N + n, tl.where(counts, label, M), n < N)


@triton.jit
def sum_clusters(
    k, v, mean, labels, own, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, H, P, rows, columns, height, width, across, W, M,
    SUMMED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, IS_CENTERED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr, IS_EMULATED: tl.constexpr,
):  # fmt: skip
    """Sum [k, 1, v] over the keys of a window for a block of clusters, as products with rows of 0 and 1."""
    bh, blocks = tl.program_id(1).to(tl.int64), tl.cdiv(M, SUMMED)
    w = tl.program_id(0) // blocks
    m = (tl.program_id(0) % blocks) * SUMMED + tl.arange(0, SUMMED)
    top, left, wide, size = _window(w, rows, columns, height, width, across)
    k += (bh // H) * k_sb + (bh % H) * k_sh
    v += (bh // H) * v_sb + (bh % H) * v_sh
    sum_k = tl.zeros((SUMMED, BLOCK_D), tl.float32)
    sum_v, number = tl.zeros((SUMMED, BLOCK_DV), tl.float32), tl.zeros((SUMMED,), tl.float32)
    for start in range(0, size, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        place = (top + i // wide) * columns + left + i % wide
        label = tl.load(labels + bh * rows * columns + place, i < size, other=M)
        keys = _load_keys(k, mean + bh * D, place + P, label < M, k_sn, D, BLOCK_D, IS_CENTERED)
        values = load_rows(v, place + P, label < M, v_sn, DV, BLOCK_DV)
        member = ((label[None, :] == m[:, None]) & (label < M)[None, :]).to(tl.float32)
        sum_k += dot(member.to(keys.dtype), keys, PRECISION, IS_EMULATED)
        sum_v += dot(member.to(values.dtype), values, PRECISION, IS_EMULATED)
        number += tl.sum(member, 1)
    own += (bh * W + w) * M * (D + 1 + DV)
    store_rows(own, sum_k, m, m < M, D + 1 + DV, D, BLOCK_D)
    tl.store(own + m * (D + 1 + DV) + D, number, m < M)
    store_rows(own + D + 1, sum_v, m, m < M, D + 1 + DV, DV, BLOCK_DV)


@triton.jit
def _far(
    own, total, spread, m, M, dtype: tl.constexpr, EXACT_NEAR: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Return mean keys, mean values and log weights of clusters without the keys of a window."""
    C: tl.constexpr = D + 1 + DV
    number = tl.load(total + m * C + D, m < M, other=0.0)
    keys, values = load_rows(total, m, m < M, C, D, BLOCK_D), load_rows(total + D + 1, m, m < M, C, DV, BLOCK_DV)
    if EXACT_NEAR:
        number -= tl.load(own + m * C + D, m < M, other=0.0)
        keys -= load_rows(own, m, m < M, C, D, BLOCK_D)
        values -= load_rows(own + D + 1, m, m < M, C, DV, BLOCK_DV)
    # Counts are exact: a cluster that lies within the window has weight 0, whatever its variance.
    some = tl.maximum(number, 1.0)
    bias = tl.log2(some) + tl.load(spread + m, m < M, other=0.0) * LOG2_E
    keys, values = (keys / some[:, None]).to(dtype), (values / some[:, None]).to(dtype)
    return keys, values, tl.where(number > 0.5, bias, LOWEST)


@triton.jit
def _corrected(
    out, mass, q, covariance, scale, NUM_GROUPS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr, IS_EMULATED: tl.constexpr,
):  # fmt: skip
    """Add the first-order change of the values of clusters, given the weight of each group, [n, 16]."""
    d, group = tl.arange(0, BLOCK_D), tl.arange(0, 16)
    for g in tl.static_range(NUM_GROUPS):
        matrix = load_rows(covariance + g * D * DV, d, d < D, DV, DV, BLOCK_DV).to(q.dtype)
        weight = tl.sum(tl.where(group[None, :] == g, mass, 0.0), 1) * scale
        out += weight[:, None] * dot(q, matrix, PRECISION, IS_EMULATED)
    return out


@triton.jit
def _attend_near(
    q, k, v, labels, mean, out, highest, weight, scale, top, left, wide, size, columns, P, M, k_sn, v_sn,
    HAS_LABELS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, IS_CENTERED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr, IS_EMULATED: tl.constexpr,
):  # fmt: skip
    """Add the keys of a window to running sums; sinks and masked keys have the label M."""
    for start in range(0, size, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        place, counts = (top + j // wide) * columns + left + j % wide, j < size
        if HAS_LABELS:
            counts &= tl.load(labels + place, counts, other=M) < M
        keys = _load_keys(k, mean, place + P, counts, k_sn, D, BLOCK_D, IS_CENTERED)
        values, bias = load_rows(v, place + P, counts, v_sn, DV, BLOCK_DV), tl.where(counts, 0.0, LOWEST)
        out, highest, weight, _, _ = fold(
            q, keys, values, bias, out, highest, weight, scale, PRECISION, IS_EMULATED
        )  # fmt: skip
    return out, highest, weight


@triton.jit
def _attend_shared(
    q, k, v, sinks, key_mask, mean, out, highest, weight, scale, P, num_sinks, k_sn, v_sn, IS_MASKED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, IS_CENTERED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr, IS_EMULATED: tl.constexpr,
):  # fmt: skip
    """Add prefix tokens and sinks to running sums."""
    for start in range(0, P + num_sinks, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        counts = j < P + num_sinks
        place = tl.where(j < P, j, tl.load(sinks + j - P, (j >= P) & counts, other=0))
        if IS_MASKED:
            counts &= tl.load(key_mask + place, counts, other=0) != 0
        keys = _load_keys(k, mean, place, counts, k_sn, D, BLOCK_D, IS_CENTERED)
        values, bias = load_rows(v, place, counts, v_sn, DV, BLOCK_DV), tl.where(counts, 0.0, LOWEST)
        out, highest, weight, _, _ = fold(
            q, keys, values, bias, out, highest, weight, scale, PRECISION, IS_EMULATED
        )  # fmt: skip
    return out, highest, weight


@triton.jit
def _attend_far(
    q, own, total, spread, groups, highest, weight, scale, M, NUM_GROUPS: tl.constexpr,
    EXACT_NEAR: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr, IS_EMULATED: tl.constexpr,
):  # fmt: skip
    """Begin running sums with the clusters outside a window; return also the weight of each group, [n, 16]."""
    out, mass = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32), tl.zeros((BLOCK_M, 16), tl.float32)
    for start in range(0, M, BLOCK_N):
        m = start + tl.arange(0, BLOCK_N)
        keys, values, bias = _far(own, total, spread, m, M, q.dtype, EXACT_NEAR, D, DV, BLOCK_D, BLOCK_DV)
        out, highest, weight, p, factor = fold(
            q, keys, values, bias, out, highest, weight, scale, PRECISION, IS_EMULATED
        )  # fmt: skip
        members = load_rows(groups, m, m < M, NUM_GROUPS, NUM_GROUPS, 16).to(q.dtype)
        mass = mass * factor[:, None] + dot(p.to(q.dtype), members, PRECISION, IS_EMULATED)
    return out, highest, weight, mass


@triton.jit
def attend(
    q, k, v, out, mean, labels, sinks, key_mask, own, total, spread, groups, covariance, q_sb, q_sh, q_sn, k_sb, k_sh,
    k_sn, v_sb, v_sh, v_sn, out_sb, out_sh, out_sn, H, P, rows, columns, height, width, across, W, M, num_sinks,
    mask_sb, scale, NUM_GROUPS: tl.constexpr, EXACT_NEAR: tl.constexpr, HAS_LABELS: tl.constexpr,
    IS_MASKED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, IS_CENTERED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
    IS_EMULATED: tl.constexpr,
):  # fmt: skip
    """Attend with a block of queries of a window, in one loop over clusters, shared keys and the keys of the window."""
    bh, blocks = tl.program_id(1).to(tl.int64), tl.cdiv(height * width, BLOCK_M)
    b, h, w, C = bh // H, bh % H, tl.program_id(0) // blocks, D + 1 + DV
    top, left, wide, size = _window(w, rows, columns, height, width, across)
    k, v, mean = k + b * k_sb + h * k_sh, v + b * v_sb + h * v_sh, mean + bh * D
    i = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = P + (top + i // wide) * columns + left + i % wide
    asked = load_rows(q + b * q_sb + h * q_sh, place, i < size, q_sn, D, BLOCK_D)
    weight, highest = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), LOWEST, tl.float32)
    found, highest, weight, mass = _attend_far(
        asked, own + (bh * W + w) * M * C, total + bh * M * C, spread + bh * M, groups + bh * M * NUM_GROUPS,
        highest, weight, scale, M, NUM_GROUPS, EXACT_NEAR, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
        IS_EMULATED,
    )  # fmt: skip
    # Sums of values don't depend on the factor that later keys bring: the correction is added first.
    found = _corrected(
        found, mass, asked, covariance + bh * NUM_GROUPS * D * DV, scale / LOG2_E, NUM_GROUPS, D, DV, BLOCK_D,
        BLOCK_DV, PRECISION, IS_EMULATED,
    )  # fmt: skip
    found, highest, weight = _attend_shared(
        asked, k, v, sinks + bh * num_sinks, key_mask + b * mask_sb, mean, found, highest, weight, scale, P, num_sinks,
        k_sn, v_sn, IS_MASKED, D, DV, IS_CENTERED, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION, IS_EMULATED,
    )  # fmt: skip
    if EXACT_NEAR:
        found, highest, weight = _attend_near(
            asked, k, v, labels + bh * rows * columns, mean, found, highest, weight, scale, top, left, wide, size,
            columns, P, M, k_sn, v_sn, HAS_LABELS, D, DV, IS_CENTERED, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
            IS_EMULATED,
        )  # fmt: skip
    found = found / tl.where(weight > 0.0, weight, 1.0)[:, None]
    store_rows(out + b * out_sb + h * out_sh, found, place, i < size, out_sn, DV, BLOCK_DV)
