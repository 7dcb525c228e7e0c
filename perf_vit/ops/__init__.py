"""Pure tensor functions: random projections and attention whose cost is linear in the number of tokens.

Every fast operation has an N x N reference in `perf_vit.ops.naive`, which is imported by that name.
"""

from perf_vit.ops.balancing import Balancing, fit_balancing
from perf_vit.ops.clustered import clustered_attention
from perf_vit.ops.favor import favor_attention
from perf_vit.ops.kernels import Kernel, make_kernel, oprf_kernel, register_kernel
from perf_vit.ops.projection import draw_projection
from perf_vit.ops.state import KVState

__all__ = [
    "Balancing",
    "KVState",
    "Kernel",
    "clustered_attention",
    "draw_projection",
    "favor_attention",
    "fit_balancing",
    "make_kernel",
    "oprf_kernel",
    "register_kernel",
]
