"""Attention operations with a cost linear in the number of tokens, and random projections.

The N x N references are in `perf_vit.ops.naive`, which is imported explicitly.
"""

from perf_vit.ops.balancing import Balancing, fit_balancing
from perf_vit.ops.clustered import clustered_attention
from perf_vit.ops.favor import favor_attention
from perf_vit.ops.fused.dispatch import attention_backend, set_attention_backend
from perf_vit.ops.kernels import KERNELS, Kernel, make_kernel, oprf_kernel, register_kernel
from perf_vit.ops.projection import draw_projection
from perf_vit.ops.state import KVState

__all__ = [
    "KERNELS",
    "Balancing",
    "KVState",
    "Kernel",
    "attention_backend",
    "clustered_attention",
    "draw_projection",
    "favor_attention",
    "fit_balancing",
    "make_kernel",
    "oprf_kernel",
    "register_kernel",
    "set_attention_backend",
]
