import math
from collections.abc import Iterator

import pytest
import torch

from perf_vit.ops import draw_projection

D = 64
NUM_BLOCKS, NUM_DRAWS = 500, 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    # Thousands of small factorisations: on a busy machine threads wait for each other a hundred times longer than
    # they work.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uncorrected_projection(num_features: int, head_dim: int, generator: torch.Generator) -> torch.Tensor:
    """Orthogonal rows straight from QR, as is common: the signs that LAPACK chose stay in."""
    gaussian = torch.randn(num_features // head_dim, head_dim, head_dim, generator=generator, dtype=torch.float64)
    norms = torch.randn(num_features, head_dim, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    return norms * torch.linalg.qr(gaussian).Q.reshape(-1, head_dim)


def standard_errors_off(draw, sign: int) -> float:
    """How far the mean of exp(w.z) lies from e^(|z|^2 / 2), for |z| = 2, with blocks as the independent samples."""
    z = torch.full((D,), sign * 2 / math.sqrt(D), dtype=torch.float64)
    generator = seeded(5)
    draws = [draw(NUM_BLOCKS * D, D, generator=generator).double() for _ in range(NUM_DRAWS)]
    blocks = torch.cat([(w @ z).exp().reshape(NUM_BLOCKS, D).mean(1) for w in draws])
    return abs(float((blocks.mean() - math.exp(2)) / (blocks.std() / math.sqrt(len(blocks)))))


@pytest.mark.parametrize("sign", [1, -1])
def test_orthogonal_rows_estimate_softmax_without_bias(sign: int) -> None:
    assert standard_errors_off(draw_projection, sign) < 3


@pytest.mark.parametrize("sign", [1, -1])
def test_qr_without_sign_correction_fails_the_same_measure(sign: int) -> None:
    assert standard_errors_off(uncorrected_projection, sign) > 3


@pytest.mark.parametrize(("num_features", "head_dim"), [(256, 64), (100, 64), (7, 64), (130, 32), (5, 1)])
def test_rows_are_orthogonal_within_blocks_of_head_dim(num_features: int, head_dim: int) -> None:
    projection = draw_projection(num_features, head_dim, generator=seeded())
    assert projection.shape == (num_features, head_dim)
    assert projection.dtype == torch.float32
    for block in projection.double().split(head_dim):
        directions = block / block.norm(dim=1, keepdim=True)
        torch.testing.assert_close(directions @ directions.T, torch.eye(len(block), dtype=torch.float64))


def test_blocks_are_independent_of_each_other() -> None:
    projection = draw_projection(2 * D, D, generator=seeded())
    assert not torch.allclose(projection[:D], projection[D:])


def test_independent_rows_are_not_orthogonal() -> None:
    projection = draw_projection(D, D, orthogonal=False, generator=seeded())
    gram = projection @ projection.T
    assert (gram - gram.diagonal().diag()).abs().max() > 10


@pytest.mark.parametrize("orthogonal", [True, False])
def test_chi_norms_have_the_moments_of_gaussian_vectors(orthogonal: bool) -> None:
    squares = draw_projection(20_000, 16, orthogonal, generator=seeded()).double().square().sum(1)
    # chi-square with 16 degrees of freedom: mean 16, variance 32.
    assert abs(squares.mean() - 16) < 3 * math.sqrt(32 / 20_000)
    assert abs(squares.var() - 32) < 2


@pytest.mark.parametrize("orthogonal", [True, False])
def test_sqrt_norms_are_all_the_same(orthogonal: bool) -> None:
    norms = draw_projection(100, 48, orthogonal, norms="sqrt", generator=seeded()).norm(dim=1)
    torch.testing.assert_close(norms, torch.full((100,), math.sqrt(48)))


def test_a_seed_repeats_the_draw_and_leaves_global_randomness_alone() -> None:
    before = torch.random.get_rng_state()
    first, second = (draw_projection(100, 64, generator=seeded(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(first, draw_projection(100, 64, generator=seeded(4)))


def test_rows_are_real_under_a_meta_device() -> None:
    with torch.device("meta"):
        inside = draw_projection(100, 64, generator=seeded())
    assert torch.equal(inside, draw_projection(100, 64, generator=seeded()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_features": 0}, "at least 1, got 0 and 64"),
        ({"head_dim": 0}, "at least 1, got 256 and 0"),
        ({"norms": "unit"}, "one of chi, sqrt, got 'unit'"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_projection(**{"num_features": 256, "head_dim": 64, **arguments})
