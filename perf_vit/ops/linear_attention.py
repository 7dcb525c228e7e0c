"""FAVOR+ attention at a cost linear in the number of tokens, in chunks that keep its memory small."""

import torch
from torch import Tensor

from perf_vit.ops.state import KVState

__all__ = ["favor_attention"]


def favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    kernel: str = "softmax+",
    chunk_size: int = 2048,
) -> Tensor:
    """Bidirectional attention through random features (FAVOR+).

    out_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j), Choromanski et al. 2020, "Rethinking Attention with
    Performers", equation 4, in O(N M D) time. With the kernel "softmax+" it estimates softmax(q k^T / sqrt(D)) v.
    Keys, then queries, go through in chunks; without gradients no buffer of size N x M ever exists.
    `perf_vit.ops.naive.naive_favor_attention` is the same estimator as an N x N matrix.

    Features and sums are float32 for float32, half and bfloat16 inputs and under autocast, float64 for float64.

    Args:
        q: queries, [B, H, N_q, D].
        k: keys, [B, H, N_k, D].
        v: values, [B, H, N_k, Dv].
        projection: rows of the feature map, [M, D], from `draw_projection`.
        kernel: name of the feature map, "softmax+" or "relu".
        chunk_size: tokens whose features are in memory at once; it changes the result by rounding only.

    Returns:
        The attended values, [B, H, N_q, Dv], in the dtype of `q`.

    Raises:
        ValueError: an unknown kernel, no key, or shapes that don't fit together.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}; 2048 suits most machines")
    state: KVState | None = None
    for k_chunk, v_chunk in zip(_chunks(k, chunk_size), _chunks(v, chunk_size), strict=True):
        if state is None:
            state = KVState.from_keys(k_chunk, v_chunk, projection, kernel)
        else:
            state = state.update(k_chunk, v_chunk)
    assert state is not None
    return torch.cat([state.attend(q_chunk) for q_chunk in _chunks(q, chunk_size)], dim=-2)


def _chunks(x: Tensor, chunk_size: int) -> tuple[Tensor, ...]:
    # Not split where it need not be: an exported graph then takes any number of tokens up to a chunk.
    return (x,) if x.shape[-2] <= chunk_size else torch.split(x, chunk_size, dim=-2)
