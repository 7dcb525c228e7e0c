"""Attention as explicit N x N matrices: the references that the linear operations are compared with.

Meant for float64 and small N. Nothing is stabilised, so long queries and keys overflow in lower precision.
"""

from torch import Tensor

from perf_vit.ops.kernels import get_kernel

__all__ = ["naive_favor_attention", "softmax_attention"]


def naive_favor_attention(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, kernel: str = "softmax+") -> Tensor:
    """The estimator of `favor_attention`: row-normalised phi(q) phi(k)^T, times v.

    Choromanski et al. 2020, equation 4, with the matrix A' of its section 2.2 written out.

    Args:
        q: queries, [B, H, N_q, D].
        k: keys, [B, H, N_k, D].
        v: values, [B, H, N_k, Dv].
        projection: rows of the feature map, [M, D].
        kernel: name of the feature map.

    Returns:
        [B, H, N_q, Dv] in the dtype of `q`.

    Raises:
        ValueError: an unknown kernel.
    """
    weights = _features(q, projection, kernel) @ _features(k, projection, kernel).mT
    return weights / weights.sum(dim=-1, keepdim=True) @ v


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Exact attention, softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017, equation 1).

    Args:
        q: queries, [B, H, N_q, D].
        k: keys, [B, H, N_k, D].
        v: values, [B, H, N_k, Dv].

    Returns:
        [B, H, N_q, Dv].
    """
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


def _features(x: Tensor, projection: Tensor, kernel: str) -> Tensor:
    chosen = get_kernel(kernel)
    features = chosen.features(x * x.shape[-1] ** -0.25, projection.to(x.dtype))
    return features.exp() if chosen.log_domain else features
