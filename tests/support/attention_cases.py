"""What the tests of linear attention share: inputs, kernels and the paper's equations written anew."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from perf_vit.ops import Kernel, draw_projection, favor_attention, oprf_kernel
from perf_vit.ops.kernels import KERNELS as REGISTERED

A = -0.05
FIXED_OPRF = oprf_kernel(A)
# Every shipped kernel; the one that takes its parameter from the data has tests of its own.
KERNELS = [FIXED_OPRF if name == "oprf" else kernel for name, kernel in REGISTERED.items()]
POSITIVE = [kernel for kernel in KERNELS if kernel.name != "softmax-trig"]
SOFTMAX = [kernel for kernel in KERNELS if kernel.estimates_softmax]


def kernel_id(kernel: object) -> str | None:
    return kernel.name if isinstance(kernel, Kernel) else None


def make(
    n_q: int,
    n_k: int,
    head_dim: int = 16,
    num_features: int = 32,
    value_dim: int | None = None,
    seed: int = 0,
    batch: int = 2,
    kernel: Kernel = FIXED_OPRF,
    scale: float = 1.0,
):
    """q, k, v in float64 and a projection; short queries and keys for a kernel whose denominators could vanish."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n_q, head_dim), (n_k, head_dim), (n_k, value_dim or head_dim)]
    q, k, v = (torch.randn(batch, 2, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    if kernel.name == "softmax-trig":
        scale /= 8
    w = draw_projection(num_features * kernel.features_per_row, head_dim, generator=generator, kernel=kernel)
    return q * scale, k * scale, v, w


def transcription(q, k, v, w, kernel, key_mask=None, causal: bool = False):
    """Attention by the formulas of the papers, in float64; sums of exponentials in logarithms, so nothing overflows."""
    d, r, w = q.shape[-1], w.shape[0], w.double()
    x, y = q.unsqueeze(-2) / d**0.25, k.unsqueeze(-3) / d**0.25
    wx, wy = torch.einsum("...d,md->...m", x, w), torch.einsum("...d,md->...m", y, w)
    x2, y2 = (x**2).sum(-1), (y**2).sum(-1)
    visible = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
    visible = visible.tril() if causal else visible
    visible = visible if key_mask is None else visible & key_mask[:, None, None, :]
    name = kernel if isinstance(kernel, str) else kernel.name
    if name in ("relu", "softmax-trig"):
        if name == "relu":
            a = ((wx.clamp(min=0) + 1e-3) * (wy.clamp(min=0) + 1e-3)).sum(-1) / r
        else:
            a = torch.exp((x2 + y2) / 2) * torch.cos(wx - wy).sum(-1) / r
        a = a * visible
        return torch.einsum("bhij,bhje->bhie", a, v) / a.sum(-1, keepdim=True).where(visible.any(-1, keepdim=True), 1.0)
    if name == "softmax+":
        log_terms = wx + wy
    elif name == "softmax-hyp+":
        log_terms = torch.cat([wx + wy, -(wx + wy)], dim=-1)
    else:
        log_terms = (1 - 4 * A) ** 0.5 * (wx + wy) + 2 * A * (w**2).sum(-1) + d / 2 * torch.log(torch.tensor(1 - 4 * A))
    log_a = torch.logsumexp(log_terms, dim=-1) - (x2 + y2) / 2
    weights = log_a.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bhje->bhie", weights.where(visible, 0.0), v)


@contextlib.contextmanager
def few_tokens_at_a_time(tokens: int) -> Iterator[None]:
    """Attention with windows and clusters goes through this many tokens at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("perf_vit.ops.clustered_call._CPU_TOKENS", tokens)
        patch.setattr("perf_vit.ops.windows._ROW_TOKENS", tokens)
        yield


def value_and_gradients(attention, q, k, v, *args, **kwargs) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, *args, **kwargs)
    # Other weights for every output, lest errors cancel in a plain sum.
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape).sin()
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def favor(q, k, v, *args, **kwargs) -> list[torch.Tensor]:
    return value_and_gradients(favor_attention, q, k, v, *args, **kwargs)


def kept_by_training(q, k, v, *args, **kwargs) -> list[int]:
    """Numbers in each tensor that a forward pass keeps for the backward one."""
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        favor_attention(*leaves, *args, **kwargs)
    return kept


def assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-10) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


class CountElements(TorchDispatchMode):
    """Counts the elements of all tensors that operations return, backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # A view is not written.
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.elements += out.numel()
        return out
