"""Sparse + low-rank attention: exact where it matters, linear everywhere else, under one denominator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perf_vit.ops.balancing import Balancing
from perf_vit.ops.features import LOWEST_SCALE, FeatureMap, exp_, without_autocast
from perf_vit.ops.kernels import Kernel
from perf_vit.ops.linear_attention import favor_attention
from perf_vit.ops.oprf import optimal_parameter
from perf_vit.ops.state import check_keys, make_feature_map
from perf_vit.ops.window_attention import (
    Call,
    StandIns,
    Windows,
    attend_joined,
    check_grid,
    means_of_others,
    with_columns,
)
from perf_vit.ops.windows import split_dim

__all__ = ["scatterbrain_attention"]


def scatterbrain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    grid: tuple[int, int],
    window_size: int = 8,
    num_sinks: int = 64,
    num_prefix_tokens: int = 1,
    kernel: str | Kernel = "softmax-hyp+",
    key_mask: Tensor | None = None,
    balancing: Balancing | None = None,
) -> Tensor:
    """Attention that is exact over a token's neighbourhood and linear over the rest.

    out_i = (sum_{j in S(i)} exp(q_i.k_j / sqrt(D)) v_j + sum_{j not in S(i)} phi(q_i).phi(k_j) v_j) / (the same sums of
    1): sparse and low-rank attention under one denominator (after Chen et al. 2021, "Scatterbrain"). S(i) holds the
    tokens of i's 2-D window, the prefix tokens and the head's sinks, the keys that most queries look at. Prefix tokens
    attend exactly. Time and memory are linear in the number of tokens, forward and backward.
    `perf_vit.ops.naive.naive_scatterbrain_attention` is the same as an N x N matrix.

    Args:
        q: queries, [B, H, N, D]: first the prefix tokens, then the grid's, row by row.
        k: keys, [B, H, N, D].
        v: values, [B, H, N, Dv].
        projection: rows of the feature map, [R, D], from `draw_projection` with this kernel.
        grid: rows and columns of tokens; N = num_prefix_tokens + rows x columns.
        window_size: rows and columns of a window, at most; the grid is cut into the fewest such, of nearly equal size.
            0 for none.
        num_sinks: keys of each sample and head that every query sees exactly; 0 for none.
        num_prefix_tokens: class and register tokens, which come first.
        kernel: a positive kernel that estimates softmax, or its name.
        key_mask: [B, N] bool, False for keys that are left out.
        balancing: constants that centre and balance the inputs of the linear part, from `fit_balancing`.

    Returns:
        [B, H, N, Dv] in the dtype of `q`; 0 for queries that see no key.

    Raises:
        ValueError: shapes that don't fit together, or a kernel that doesn't estimate softmax by positive features.
    """
    feature_map = make_feature_map(kernel, projection, balancing)
    check_keys(k, v, projection, key_mask)
    check_grid(q, k, grid, window_size, num_sinks, num_prefix_tokens)
    if not (feature_map.kernel.estimates_softmax and feature_map.kernel.log_linear):
        raise ValueError(
            "the linear part must estimate the exponential of the exact one by positive features: expected "
            f"softmax+, softmax-hyp+ or oprf, got {feature_map.kernel.name!r}"
        )
    if window_size == 0 and num_sinks == 0:
        return favor_attention(q, k, v, projection, kernel, key_mask, balancing=balancing)
    with without_autocast(q):
        if feature_map.kernel.needs_parameter:
            assert feature_map.kernel.bind is not None
            fixed = feature_map.kernel.bind(optimal_parameter(feature_map, q, k, key_mask))
            feature_map = FeatureMap(fixed, projection, balancing)

        def make(_: Tensor, keys: Tensor, log_mask: Tensor) -> _Features:
            return _Features(feature_map, keys.shape[-1], log_mask.dtype)

        return attend_joined(q, k, v, grid, window_size, num_sinks, num_prefix_tokens, key_mask, make).to(q.dtype)


class _Features(StandIns):
    """Random features as stand-ins.

    An estimate is a softmax too: that of a query's logits with the rows of the projection, and its values are the means
    that the features of the keys weight: row r has the weight z_r = sum_j phi_r(k_j) and the value
    sum_j phi_r(k_j) v_j / z_r. Queries add log h(q), which the exact weights don't share.
    """

    def __init__(self, feature_map: FeatureMap, head_dim: int, dtype: torch.dtype) -> None:
        self.feature_map = feature_map
        (query_rows, query_offset), (key_rows, key_offset) = (
            rows(dtype) for rows in (feature_map.query_rows, feature_map.key_rows)
        )
        self.rows = query_rows * head_dim**0.5
        self.key_rows = with_columns(key_rows, head_dim + 1, 1.0)
        self.offset = query_offset + key_offset

    def collect(self, windows: list[Windows], call: Call) -> list[tuple[Tensor, ...]]:
        """Of each group: sums over all windows and over each, what scales these, and what is added to log z."""
        sums = [call(self._sum_windows, each) for each in windows]
        total, log_scale = sums[0][0].sum(dim=2), sums[0][1]
        for s, c in sums[1:]:
            larger = torch.maximum(log_scale, c)
            mine_by, its_by = exp_(log_scale - larger).unsqueeze(-1), exp_(c - larger).unsqueeze(-1)
            total, log_scale = total * mine_by + s.sum(dim=2) * its_by, larger
        offset = (log_scale.unsqueeze(-2) + self.offset).mT.unsqueeze(2)
        return [(total.unsqueeze(2), s, exp_(c - log_scale)[:, :, None, :, None], offset) for s, c in sums]

    def weigh(self, own: Windows | None, *collected: Tensor) -> tuple[Tensor, Tensor]:
        total, sums, own_by, offset = collected
        others = total if own is None else torch.addcmul(total, sums, own_by, value=-1.0)
        log_z, means = means_of_others(others[..., :-1], others[..., -1:], total[..., -1:])
        return log_z + offset, means

    def query_log_amplitude(self, q: Tensor) -> Tensor:
        """Log h(q), beside exact weights."""
        log_amplitude = self.feature_map.query_log_amplitude(self.feature_map.query_inputs(q))
        if self.feature_map.balancing is None:
            return log_amplitude
        # Exact weights are those of keys as they came, estimated ones those of centred keys.
        center = self.feature_map.balancing.key_center.to(q.dtype) * q.shape[-1] ** -0.5
        return log_amplitude + q @ center.mT

    def _sum_windows(self, own: Windows) -> tuple[Tensor, Tensor]:
        """[S, z] of each window, [B, H, W, M, Dv + 1], and their common logarithmic scale, [B, H, M]."""
        log_mask, keys = own.tokens(own.log_mask), own.tokens(own.k).flatten(2, 3)
        log_amplitude: Any = self.feature_map.key_log_amplitude(self.feature_map.key_inputs(keys))
        logs = torch.cat([keys, log_amplitude + log_mask.flatten(2, 3)], dim=-1) @ self.key_rows.mT
        log_scale = logs.detach().amax(dim=-2).clamp(min=LOWEST_SCALE)
        # The e^-40 that is left of a masked key, beside 1, is nothing.
        features = split_dim(exp_(logs.sub_(log_scale.unsqueeze(-2))), 2, *log_mask.shape[2:4])
        return features.mT @ with_columns(own.tokens(own.v), own.v.shape[-1] + 1, 1.0), log_scale
