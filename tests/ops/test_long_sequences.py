"""65,536 tokens, a tile of 4096 px in patches of 16: exact, finite and small in memory."""

import pytest
import torch

from perf_vit.ops import KVState, draw_projection, favor_attention

LENGTH, HEAD_DIM, NUM_FEATURES = 65_536, 64, 256


def make(norm: float) -> list[torch.Tensor]:
    """One head's queries, keys of lengths up to `norm` and values."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, LENGTH, HEAD_DIM, generator=generator).unbind(0)
    lengths = torch.rand(1, 1, LENGTH, 1, generator=generator) * norm
    lengths[:, :, 7] = norm
    return [q, k / k.norm(dim=-1, keepdim=True) * lengths, v]


def by_features(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Equation 4 of the paper in float64 with all N x M features at once, by log-sum-exp."""
    q, k, v, w = (x.double() for x in (q, k, v, w))
    x, y = q * HEAD_DIM**-0.25, k * HEAD_DIM**-0.25
    log_k = y @ w.mT - y.square().sum(-1, keepdim=True) / 2
    log_z = log_k.logsumexp(dim=-2)
    means = (log_k - log_z.unsqueeze(-2)).exp().mT @ v
    return (x @ w.mT + log_z.unsqueeze(-2)).softmax(dim=-1) @ means


@pytest.mark.parametrize("norm", [pytest.param(8.0, marks=pytest.mark.slow), 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_long_keys_stay_exact_in_any_dtype(norm: float, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in make(norm))
    w = draw_projection(NUM_FEATURES, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    out = favor_attention(q, k, v, w)
    assert out.isfinite().all()
    expected = by_features(q, k, v, w)
    # Nothing but the output is rounded to the dtype.
    assert (out.double() - expected).norm() / expected.norm() < torch.finfo(dtype).eps / 2 + 1e-5
    state = KVState.from_keys(k, v, w)
    numerator, denominator = state.sums(q[:, :, :4096])
    assert numerator.isfinite().all()
    assert denominator.min() >= 1


@pytest.mark.parametrize(
    "dtype", [torch.float16, *(pytest.param(each, marks=pytest.mark.slow) for each in (torch.float32, torch.bfloat16))]
)
def test_gradients_of_long_keys_are_finite(dtype: torch.dtype) -> None:
    leaves = [x.to(dtype).requires_grad_() for x in make(30.0)]
    w = draw_projection(NUM_FEATURES, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(favor_attention(*leaves, w).float().square().mean(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)
