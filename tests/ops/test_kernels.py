import math

import pytest
import torch

from perf_vit.ops import draw_projection
from perf_vit.ops.kernels import get_kernel, kernel_names


def inputs(num_features: int, head_dim: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, head_dim, generator=generator, dtype=torch.float64) / 3
    return x, draw_projection(num_features, head_dim, generator=generator).double()


def test_softmax_plus_is_the_logarithm_of_the_positive_features() -> None:
    x, w = inputs(num_features=12)
    features = get_kernel("softmax+").features(x, w).exp()
    for n in range(5):
        for m in range(12):
            expected = math.exp(w[m].dot(x[n]) - x[n].norm() ** 2 / 2) / math.sqrt(12)
            assert features[n, m].item() == pytest.approx(expected, rel=1e-12)


def test_relu_is_rectified_and_positive() -> None:
    x, w = inputs(num_features=12)
    features = get_kernel("relu").features(x, w)
    for n in range(5):
        for m in range(12):
            expected = (max(w[m].dot(x[n]).item(), 0) + 1e-3) / math.sqrt(12)
            assert features[n, m].item() == pytest.approx(expected, rel=1e-12)


def test_softmax_plus_estimates_the_exponential_of_the_dot_product() -> None:
    x, w = inputs(num_features=80_000)
    features = get_kernel("softmax+").features(x, w).exp()
    torch.testing.assert_close(features @ features.T, (x @ x.T).exp(), rtol=0.05, atol=0)


def test_only_relu_works_outside_the_log_domain() -> None:
    assert {name: get_kernel(name).log_domain for name in kernel_names()} == {"softmax+": True, "relu": False}


@pytest.mark.parametrize("name", kernel_names())
def test_features_leave_their_inputs_alone(name: str) -> None:
    x, w = inputs(num_features=12)
    x_before, w_before = x.clone(), w.clone()
    get_kernel(name).features(x, w)
    assert torch.equal(x, x_before)
    assert torch.equal(w, w_before)


def test_a_misspelt_kernel_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"one of softmax\+, relu, got 'softmax'; did you mean 'softmax\+'\?"):
        get_kernel("softmax")
    with pytest.raises(ValueError, match=r"got 'zzz'$"):
        get_kernel("zzz")
