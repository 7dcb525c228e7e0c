"""The estimators' mean and variance against their closed forms, on many independent draws of the projection."""

import math

import pytest
import torch
from attention_cases import FIXED_OPRF, SOFTMAX, A, kernel_id

from perf_vit.ops import draw_projection, make_kernel
from perf_vit.ops.kernels import get_kernel

D = 16
# |z| = |x + y| and the angle between x and y, where the variances are finite enough to be measured.
POINTS = [(0.6, 0.4), (1.0, 1.2), (1.3, 2.0)]


def pair(z_norm: float, angle: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of one length, at an angle, with |x + y| = z_norm, along random axes."""
    axes = torch.linalg.qr(torch.randn(D, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0].mT
    length = z_norm / (2 * math.cos(angle / 2))
    x = length * axes[0]
    return x, length * (math.cos(angle) * axes[0] + math.sin(angle) * axes[1])


def estimates(kernel, x, y, num_features: int, num_draws: int, orthogonal: bool) -> torch.Tensor:
    """phi(x) . phi(y) of independent projections, [num_draws]."""
    generator = torch.Generator().manual_seed(0)
    if orthogonal:
        draws = (draw_projection(num_features, D, generator=generator, kernel=kernel) for _ in range(num_draws))
        w = torch.cat(list(draws))
    else:
        w = draw_projection(num_features * num_draws, D, orthogonal=False, generator=generator, kernel=kernel)
    rows = kernel.num_rows(num_features)
    phi_x, phi_y = (features(kernel, u.unsqueeze(0), w.double(), rows).squeeze(0) for u in (x, y))
    # The features that come from one row stand a whole block of rows apart.
    return (phi_x * phi_y).reshape(kernel.features_per_row, num_draws, rows).sum(dim=(0, 2))


def features(kernel, x: torch.Tensor, w: torch.Tensor, num_rows: int) -> torch.Tensor:
    values = kernel.features(x, w)
    return (values.exp() if kernel.log_domain else values) * kernel.log_amplitude(x, num_rows).exp()


def closed_form(kernel_name: str, x, y, num_features: int) -> float:
    """Choromanski et al. 2020, lemma 2, for R independent rows."""
    z2, difference2 = (x + y).square().sum().item(), (x - y).square().sum().item()
    softmax = math.exp(x.dot(y).item())
    rows = num_features if kernel_name == "softmax+" else num_features // 2
    plus = math.exp(z2) * softmax**2 * (1 - math.exp(-z2)) / rows
    if kernel_name == "softmax+":
        return plus
    if kernel_name == "softmax-hyp+":
        return (1 - math.exp(-z2)) / 2 * plus
    return math.exp(z2) * softmax**-2 * (1 - math.exp(-difference2)) ** 2 / (2 * rows)


@pytest.mark.parametrize("point", [*(pytest.param(each, marks=pytest.mark.slow) for each in POINTS[:2]), POINTS[2]])
@pytest.mark.parametrize("name", ["softmax+", "softmax-hyp+", "softmax-trig"])
def test_the_error_of_independent_rows_is_that_of_the_closed_form(name: str, point: tuple[float, float]) -> None:
    x, y = pair(*point)
    measured = estimates(get_kernel(name), x, y, num_features=16, num_draws=60_000, orthogonal=False)
    mse = (measured - x.dot(y).exp()).square().mean().item()
    assert mse == pytest.approx(closed_form(name, x, y, 16), rel=0.05)


def test_the_second_moment_of_oprf_is_that_of_the_gaussian_integral() -> None:
    x, y = pair(1.3, 2.0)
    measured = estimates(FIXED_OPRF, x, y, num_features=1, num_draws=60_000, orthogonal=False).square().mean().item()
    z2 = (x + y).square().sum().item()
    log_moment = D * math.log(1 - 4 * A) - D / 2 * math.log(1 - 8 * A) + 2 * (1 - 4 * A) * z2 / (1 - 8 * A)
    expected = math.exp(log_moment - x.square().sum().item() - y.square().sum().item())
    assert measured == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("kernel", SOFTMAX, ids=kernel_id)
@pytest.mark.parametrize(
    ("num_features", "sign"),
    [(32, -1), (40, 1), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((32, 1), (40, -1)))],
)
def test_orthogonal_draws_are_unbiased(kernel, sign: int, num_features: int) -> None:
    # Where uncorrected factors of QR fail: |z| = 2 along the diagonal, on either side.
    z = sign * 2 * torch.full((D,), D**-0.5, dtype=torch.float64)
    measured = estimates(kernel, 3 * z / 4, z / 4, num_features, num_draws=4_000, orthogonal=True)
    standard_error = measured.std().item() / math.sqrt(len(measured))
    assert abs(measured.mean().item() - math.exp(3 / 4)) < 3 * standard_error


def uncorrected(num_rows: int, head_dim: int, generator: torch.Generator | None) -> torch.Tensor:
    """Gaussian rows of orthogonal directions as public implementations draw them: Q as LAPACK leaves it."""
    q = torch.linalg.qr(torch.randn(num_rows // head_dim, head_dim, head_dim, generator=generator))[0]
    norms = torch.randn(num_rows, head_dim, generator=generator).norm(dim=-1, keepdim=True)
    return q.mT.reshape(-1, head_dim) * norms


def test_uncorrected_factors_of_qr_are_biased() -> None:
    kernel = make_kernel(
        "uncorrected",
        [lambda products: products.clone()],
        log_h=lambda x: -x.square().sum(-1, keepdim=True) / 2,
        log_domain=True,
        distribution=uncorrected,
    )
    z = 2 * torch.full((D,), D**-0.5, dtype=torch.float64)
    for sign in (1, -1):
        measured = estimates(kernel, sign * 3 * z / 4, sign * z / 4, 32, num_draws=4_000, orthogonal=True)
        standard_error = measured.std().item() / math.sqrt(len(measured))
        assert abs(measured.mean().item() - math.exp(3 / 4)) > 10 * standard_error


@pytest.mark.parametrize("name", ["softmax+", "softmax-hyp+"])
def test_orthogonal_rows_lower_the_variance(name: str) -> None:
    x, y = pair(1.3, 2.0)
    kernel = get_kernel(name)
    variances = [
        estimates(kernel, x, y, 16 * kernel.features_per_row, num_draws=8_000, orthogonal=orthogonal).var()
        for orthogonal in (False, True)
    ]
    assert variances[1] < variances[0]
