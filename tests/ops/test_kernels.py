import math
import pickle

import pytest
import torch
from attention_cases import (
    FIXED_OPRF,
    KERNELS,
    SOFTMAX,
    assert_same,
    favor,
    kernel_id,
    transcription,
    value_and_gradients,
)
from attention_cases import make as make_attention

from perf_vit.ops import draw_projection, favor_attention, make_kernel, oprf_kernel, register_kernel
from perf_vit.ops.favor import optimal_parameter
from perf_vit.ops.features import FeatureMap
from perf_vit.ops.kernels import KERNELS as REGISTERED
from perf_vit.ops.kernels import get_kernel
from perf_vit.ops.naive import kernel_matrix, naive_favor_attention

HEAD_DIM = 8


def inputs(num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, HEAD_DIM, generator=generator, dtype=torch.float64) / 3
    return x, draw_projection(num_rows, HEAD_DIM, generator=generator).double()


def phi(kernel, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    values = kernel.features(x, w)
    values = values.exp() if kernel.log_domain else values
    return values if kernel.log_amplitude is None else values * kernel.log_amplitude(x, w.shape[0]).exp()


@pytest.mark.parametrize(
    ("kernel", "formula"),
    [
        ("softmax+", lambda w, x, r: [math.exp(w.dot(x) - x.norm() ** 2 / 2)]),
        ("relu", lambda w, x, r: [max(w.dot(x).item(), 0) + 1e-3]),
        (
            "softmax-hyp+",
            lambda w, x, r: [math.exp(s * w.dot(x) - x.norm() ** 2 / 2) / math.sqrt(2) for s in (1, -1)],
        ),
        (
            "softmax-trig",
            lambda w, x, r: [f(w.dot(x)) * math.exp(x.norm() ** 2 / 2) for f in (math.cos, math.sin)],
        ),
        (
            FIXED_OPRF,
            lambda w, x, r: [
                1.2 ** (HEAD_DIM / 4) * math.exp(-0.05 * w.norm() ** 2 + 1.2**0.5 * w.dot(x) - x.norm() ** 2 / 2)
            ],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_features_are_those_of_the_papers(kernel, formula) -> None:
    kernel = get_kernel(kernel)
    x, w = inputs(12)
    features = phi(kernel, x, w)
    assert features.shape == (5, 12 * kernel.features_per_row)
    for n in range(5):
        for m in range(12):
            for part, expected in enumerate(formula(w[m], x[n], 12)):
                assert features[n, m + 12 * part].item() == pytest.approx(expected / math.sqrt(12), rel=1e-12)


@pytest.mark.parametrize("kernel", SOFTMAX, ids=kernel_id)
def test_softmax_kernels_estimate_the_exponential_of_the_dot_product(kernel) -> None:
    x, w = inputs(num_rows=80_000)
    q = x * HEAD_DIM**0.25
    estimate = kernel_matrix(q, q, w, kernel)
    torch.testing.assert_close(estimate, (x @ x.T).exp(), rtol=0.05, atol=0)


def test_oprf_with_a_parameter_of_zero_is_softmax_plus() -> None:
    x, w = inputs(12)
    torch.testing.assert_close(phi(oprf_kernel(0.0), x, w), phi(get_kernel("softmax+"), x, w), rtol=1e-12, atol=0)


def second_moment(a: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean over pairs of log E (phi(x) phi(y))^2, by the Gaussian integral, up to what does not depend on A."""
    square = (x.unsqueeze(-2) + y.unsqueeze(-3)).square().sum(-1).mean()
    d = x.shape[-1]
    return d * torch.log(1 - 4 * a) - d / 2 * torch.log(1 - 8 * a) + 2 * (1 - 4 * a) * square / (1 - 8 * a)


def test_the_parameter_of_oprf_minimises_the_second_moment() -> None:
    q, k, _, w = make_attention(30, 50, head_dim=8)
    best = optimal_parameter(FeatureMap(get_kernel("oprf"), w), q, k, chunk_size=7)
    assert best.shape == (2, 2, 1, 1)
    x, y = q[1, 0] / 8**0.25, k[1, 0] / 8**0.25
    at_best = second_moment(best[1, 0], x, y)
    for other in (best[1, 0] * 0.98, best[1, 0] * 1.02):
        assert at_best < second_moment(other, x, y)


def test_oprf_takes_its_parameter_from_the_data() -> None:
    q, k, v, w = make_attention(30, 50)
    parameter = optimal_parameter(FeatureMap(get_kernel("oprf"), w), q, k)
    fixed = favor(q, k, v, w, oprf_kernel(parameter))
    assert_same(favor(q, k, v, w, "oprf", chunk_size=16), fixed)
    assert_same(fixed, value_and_gradients(naive_favor_attention, q, k, v, w, oprf_kernel(parameter)))
    with pytest.raises(ValueError, match="future under causal=True; expected it fixed"):
        favor_attention(q, q, q, w, "oprf", causal=True)
    with pytest.raises(ValueError, match=r"below 1/8, got 0\.2"):
        oprf_kernel(0.2)


def angular(num_rows: int, head_dim: int, generator: torch.Generator | None) -> torch.Tensor:
    return torch.randn(num_rows, head_dim, generator=generator)


@pytest.mark.parametrize(
    "kernel",
    [
        make_kernel("arc-cosine", [torch.relu], distribution=angular),
        make_kernel("two", [torch.sigmoid, lambda products: products.cos() + 2]),
        make_kernel(
            "regularised",
            [lambda products: products, torch.tanh],
            log_h=lambda x: -x.square().sum(-1, keepdim=True) / 3,
            log_domain=True,
        ),
    ],
    ids=kernel_id,
)
@pytest.mark.parametrize("causal", [False, True])
def test_kernels_of_ones_own_match_the_naive_reference_in_value_and_gradient(kernel, causal: bool) -> None:
    q, k, v, w = make_attention(37, 37, kernel=kernel)
    assert w.shape == (32, 16)
    actual = favor(q, k, v, w, kernel, causal=causal, chunk_size=11)
    assert_same(actual, value_and_gradients(naive_favor_attention, q, k, v, w, kernel, causal=causal), 1e-9)


def test_a_kernel_of_ones_own_that_repeats_a_shipped_one_equals_it() -> None:
    kernel = make_kernel(
        "mine",
        [lambda products: products.clone()],
        log_h=lambda x: -x.square().sum(-1, keepdim=True) / 2,
        log_domain=True,
        estimates_softmax=True,
    )
    q, k, v, w = make_attention(20, 30)
    assert_same(favor(q, k, v, w, kernel), value_and_gradients(transcription, q, k, v, w, "softmax+"))


def test_a_registered_kernel_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REGISTERED, "_objects", dict(REGISTERED))
    mine = register_kernel(make_kernel("mine", [torch.relu]))
    assert get_kernel("mine") is mine
    with pytest.raises(ValueError, match="'mine' is registered already"):
        register_kernel(mine)


def test_the_shipped_kernels() -> None:
    assert tuple(REGISTERED) == ("softmax+", "softmax-hyp+", "softmax-trig", "relu", "oprf")


@pytest.mark.parametrize("kernel", KERNELS, ids=kernel_id)
def test_features_leave_their_inputs_alone_and_kernels_travel(kernel) -> None:
    x, w = inputs(12)
    x_before, w_before = x.clone(), w.clone()
    features = phi(pickle.loads(pickle.dumps(kernel)), x, w)
    assert torch.equal(features, phi(kernel, x, w))
    assert torch.equal(x, x_before)
    assert torch.equal(w, w_before)


def test_the_number_of_features_must_suit_the_kernel() -> None:
    assert draw_projection(12, 8, kernel="softmax-hyp+").shape == (6, 8)
    with pytest.raises(ValueError, match=r"multiple of 2 for kernel 'softmax-trig'.*got 13; try 14"):
        draw_projection(13, 8, kernel="softmax-trig")
    with pytest.raises(ValueError, match=r"must give \[4, 8\] rows, got \[8, 4\]"):
        draw_projection(4, 8, kernel=make_kernel("odd", [torch.relu], distribution=lambda r, d, _: torch.ones(d, r)))
    with pytest.raises(ValueError, match="at least one f"):
        make_kernel("empty", [])


def test_a_misspelt_kernel_gets_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"one of softmax\+, .*, oprf, got 'softmaxx'; did you mean 'softmax\+'\?"):
        get_kernel("softmaxx")
    with pytest.raises(ValueError, match=r"got 'zzz'$"):
        get_kernel("zzz")
