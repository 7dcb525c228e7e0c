"""Random projections: the rows on which the feature maps of linear attention are evaluated."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from perf_vit.ops.kernels import Kernel, get_kernel

__all__ = ["ProjectionNorms", "draw_projection"]

ProjectionNorms = Literal["chi", "sqrt"]


def draw_projection(
    num_features: int,
    head_dim: int,
    orthogonal: bool = True,
    norms: ProjectionNorms = "chi",
    generator: Generator | None = None,
    kernel: str | Kernel = "softmax+",
) -> Tensor:
    """Draw the rows w_1 .. w_R of a random feature map with M features.

    Orthogonal rows come in blocks of `head_dim`, each a Haar-distributed orthogonal matrix; the last block is truncated
    if R is not a multiple. Rows of different blocks are independent (Choromanski et al. 2020, "Rethinking Attention
    with Performers", section 2.4). Each row has a uniform direction, so with "chi" norms it is N(0, I) and the estimate
    of the feature map is unbiased. Rows are drawn in float64 on the CPU, so a seed gives the same rows on every device.

    Args:
        num_features: Number of features M; a kernel with l features per row draws R = M / l rows.
        head_dim: Length D of a row.
        orthogonal: Whether rows are orthogonal within a block; False draws independent directions.
        norms: "chi" for the norms of independent Gaussian vectors; "sqrt" for sqrt(D), which estimates the regularised
            softmax kernel (SMREG, ibid., theorem 1) instead of softmax.
        generator: CPU generator; None for torch's global one.
        kernel: Feature map or its name. A kernel with its own distribution draws from that and ignores `orthogonal` and
            `norms`.

    Returns:
        The projection, [R, D], float32.

    Raises:
        ValueError: a size is below 1 or not a multiple of the kernel's features per row, `norms` or `kernel` is
            unknown, or the generator is not on the CPU.
    """
    _check_arguments(num_features, head_dim, norms, generator)
    chosen = get_kernel(kernel)
    num_features = chosen.num_rows(num_features)
    if chosen.distribution is not None:
        return _draw_from(chosen, num_features, head_dim, generator)
    if orthogonal:
        directions_MD = _orthogonal_directions(num_features, head_dim, generator)
    else:
        directions_MD = F.normalize(_randn(num_features, head_dim, generator=generator), dim=-1)
    return (_NORMS[norms](num_features, head_dim, generator) * directions_MD).float()


def _draw_from(kernel: Kernel, num_rows: int, head_dim: int, generator: Generator | None) -> Tensor:
    assert kernel.distribution is not None
    rows = kernel.distribution(num_rows, head_dim, generator).float()
    if tuple(rows.shape) != (num_rows, head_dim):
        raise ValueError(
            f"the distribution of kernel {kernel.name!r} must give [{num_rows}, {head_dim}] rows, "
            f"got {list(rows.shape)}; it is called with (num_rows, head_dim, generator)"
        )
    return rows


def _orthogonal_directions(num_features: int, head_dim: int, generator: Generator | None) -> Tensor:
    num_blocks = -(-num_features // head_dim)
    q, r = torch.linalg.qr(_randn(num_blocks, head_dim, head_dim, generator=generator))
    # LAPACK fixes the signs in R, so Q is not Haar-distributed until its columns are multiplied by them
    # (Mezzadri 2007). `sign` would erase a column whose diagonal entry is exactly zero.
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    signs = torch.where(diagonal < 0, -torch.ones_like(diagonal), torch.ones_like(diagonal))
    return (q * signs.unsqueeze(-2)).reshape(-1, head_dim)[:num_features]


def _chi_norms(num_features: int, head_dim: int, generator: Generator | None) -> Tensor:
    return _randn(num_features, head_dim, generator=generator).norm(dim=-1, keepdim=True)


def _sqrt_norms(num_features: int, head_dim: int, generator: Generator | None) -> Tensor:
    return torch.full((num_features, 1), head_dim**0.5, dtype=torch.float64, device="cpu")


_NORMS: dict[str, Callable[[int, int, Generator | None], Tensor]] = {"chi": _chi_norms, "sqrt": _sqrt_norms}


def _randn(*shape: int, generator: Generator | None) -> Tensor:
    # The device is explicit: the rows must be materialised even if a model is built under `torch.device("meta")`.
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")


def _check_arguments(num_features: int, head_dim: int, norms: str, generator: Generator | None) -> None:
    if num_features < 1 or head_dim < 1:
        raise ValueError(
            f"num_features and head_dim must be at least 1, got {num_features} and {head_dim}; "
            "256 features suit heads of 64 channels"
        )
    if norms not in _NORMS:
        raise ValueError(f"norms must be one of {', '.join(_NORMS)}, got {norms!r}; use 'chi' to estimate softmax")
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(
            f"generator must be on the CPU, got one on {generator.device}; pass torch.Generator().manual_seed(seed)"
        )
