"""Attention as explicit N x N matrices: the references that the linear operations are compared with.

Meant for float64 and small N. Nothing is stabilised, so long queries and keys overflow in lower precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perf_vit.ops.balancing import Balancing
from perf_vit.ops.kernels import Kernel, get_kernel

__all__ = ["kernel_matrix", "naive_favor_attention", "softmax_attention"]


def naive_favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    kernel: str | Kernel = "softmax+",
    key_mask: Tensor | None = None,
    causal: bool = False,
    balancing: Balancing | None = None,
) -> Tensor:
    """The estimator of `favor_attention`: row-normalised phi(q) phi(k)^T, times v.

    Choromanski et al. 2020, equation 4, with the matrix A' of its section 2.2 written out.

    Args:
        q: queries, [B, H, N_q, D].
        k: keys, [B, H, N_k, D].
        v: values, [B, H, N_k, Dv].
        projection: rows of the feature map, [R, D].
        kernel: the feature map or its name; "oprf" with its parameter fixed.
        key_mask: [B, N_k] bool, False for keys that are left out.
        causal: query i sees keys 0 .. i only.
        balancing: centres and factors of queries and keys.

    Returns:
        [B, H, N_q, Dv] in the dtype of `q`; 0 for queries that see no key.

    Raises:
        ValueError: an unknown kernel.
    """
    bias = torch.zeros_like(k[..., :1])
    if balancing is not None:
        query_center, key_center, scale = balancing.tensors()
        bias = ((k - key_center) * query_center).sum(dim=-1, keepdim=True) * q.shape[-1] ** -0.5
        q, k = (q - query_center) * scale, (k - key_center) / scale
    weights = kernel_matrix(q, k, projection, kernel) * bias.exp().mT
    weights = weights * _visible(weights, key_mask, causal)
    total = weights.sum(dim=-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0) @ v


def kernel_matrix(q: Tensor, k: Tensor, projection: Tensor, kernel: str | Kernel = "softmax+") -> Tensor:
    """A' = phi(q) phi(k)^T, [..., N_q, N_k], for q, [..., N_q, D], and k, [..., N_k, D].

    For a softmax kernel it estimates exp(q k^T / sqrt(D)) without bias, where the rows have "chi" norms.

    Raises:
        ValueError: an unknown kernel.
    """
    return _features(q, projection, get_kernel(kernel)) @ _features(k, projection, get_kernel(kernel)).mT


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Exact attention, softmax(q k^T / sqrt(D) + bias) v (Vaswani et al. 2017, equation 1).

    Args:
        q: queries, [B, H, N_q, D].
        k: keys, [B, H, N_k, D].
        v: values, [B, H, N_k, Dv].
        bias: added to the logits, [B, H, N_q, N_k] or what expands to it.

    Returns:
        [B, H, N_q, Dv].
    """
    logits = q @ k.mT * q.shape[-1] ** -0.5
    return (logits if bias is None else logits + bias).softmax(dim=-1) @ v


def _visible(weights: Tensor, key_mask: Tensor | None, causal: bool) -> Tensor:
    visible = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device)
    visible = visible.tril() if causal else visible
    return visible if key_mask is None else visible & key_mask[:, None, None, :]


def _features(x: Tensor, projection: Tensor, kernel: Kernel) -> Tensor:
    x, projection = x * x.shape[-1] ** -0.25, projection.to(x.dtype)
    features = kernel.features(x, projection)
    features = features.exp() if kernel.log_domain else features
    return features if kernel.log_amplitude is None else features * kernel.log_amplitude(x, projection.shape[0]).exp()
