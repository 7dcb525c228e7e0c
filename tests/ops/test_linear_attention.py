import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perf_vit.ops import draw_projection, favor_attention
from perf_vit.ops.kernels import kernel_names
from perf_vit.ops.naive import naive_favor_attention, softmax_attention

KERNELS = kernel_names()


def make(n_q: int, n_k: int, head_dim: int = 16, num_features: int = 32, value_dim: int | None = None, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n_q, head_dim), (n_k, head_dim), (n_k, value_dim or head_dim)]
    q, k, v = (torch.randn(2, 2, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v, draw_projection(num_features, head_dim, generator=generator)


def transcription(q, k, v, w, kernel: str):
    """The paper's equations, written anew in float64; softmax+ by log-sum-exp over features, so nothing overflows."""
    d, m = q.shape[-1], w.shape[0]
    wq = torch.einsum("bhnd,md->bhnm", q / d**0.25, w.double())
    wk = torch.einsum("bhnd,md->bhnm", k / d**0.25, w.double())
    if kernel == "relu":
        a = torch.einsum("bhim,bhjm->bhij", wq.clamp(min=0) + 1e-3, wk.clamp(min=0) + 1e-3) / m
        return torch.einsum("bhij,bhje->bhie", a / a.sum(-1, keepdim=True), v)
    log_q = wq - (q**2).sum(-1, keepdim=True) / (2 * d**0.5)
    log_k = wk - (k**2).sum(-1, keepdim=True) / (2 * d**0.5)
    # log A'_ij = log sum_m phi_m(q_i) phi_m(k_j)
    log_a = torch.logsumexp(log_q.unsqueeze(-2) + log_k.unsqueeze(-3), dim=-1)
    return torch.einsum("bhij,bhje->bhie", log_a.softmax(-1), v)


def value_and_gradients(attention, q, k, v, *args, **kwargs) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, *args, **kwargs)
    # Other weights for every output, lest errors cancel in a plain sum.
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape).sin()
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


def assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-10) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("n_q", "n_k"), [(197, 197), (63, 1000), (1000, 63), (1, 1)])
def test_value_and_gradient_match_an_independent_transcription(n_q: int, n_k: int, kernel: str) -> None:
    q, k, v, w = make(n_q, n_k, num_features=12, value_dim=5)
    actual = value_and_gradients(favor_attention, q, k, v, w, kernel, chunk_size=128)
    assert_same(actual, value_and_gradients(transcription, q, k, v, w, kernel))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    head_dim=st.integers(8, 256),
    num_features=st.integers(1, 80),
    n_q=st.integers(1, 40),
    n_k=st.integers(1, 40),
    chunk_size=st.integers(1, 50),
    kernel=st.sampled_from(KERNELS),
)
def test_any_shape_matches_the_transcription(head_dim, num_features, n_q, n_k, chunk_size, kernel) -> None:
    q, k, v, w = make(n_q, n_k, head_dim, num_features)
    actual = value_and_gradients(favor_attention, q, k, v, w, kernel, chunk_size=chunk_size)
    assert_same(actual, value_and_gradients(transcription, q, k, v, w, kernel))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_naive_reference_matches_the_transcription(kernel: str) -> None:
    q, k, v, w = make(63, 197)
    actual = value_and_gradients(naive_favor_attention, q, k, v, w, kernel)
    assert_same(actual, value_and_gradients(transcription, q, k, v, w, kernel))


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_match_finite_differences(kernel: str) -> None:
    q, k, v, w = (x.double() for x in make(3, 5, head_dim=4, num_features=6, seed=1))
    leaves = [x[:1, :1].clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda q, k, v: favor_attention(q, k, v, w, kernel, chunk_size=2), leaves)


@pytest.mark.parametrize("kernel", KERNELS)
def test_chunk_size_does_not_change_the_result(kernel: str) -> None:
    q, k, v, w = make(197, 1000)
    whole = value_and_gradients(favor_attention, q, k, v, w, kernel, chunk_size=4096)
    for chunk_size in (1000, 197, 64):
        assert_same(value_and_gradients(favor_attention, q, k, v, w, kernel, chunk_size=chunk_size), whole, 1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_lose_only_the_rounding_of_the_result(dtype: torch.dtype, kernel: str) -> None:
    q, k, v, w = make(197, 1000)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    out = favor_attention(q, k, v, w, kernel, chunk_size=300)
    assert out.dtype == dtype
    expected = favor_attention(q.double(), k.double(), v.double(), w, kernel)
    torch.testing.assert_close(out.double(), expected, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=2e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_touch_features_or_sums(dtype: torch.dtype, kernel: str) -> None:
    q, k, v, w = make(63, 197)
    q, k, v = (x.float() for x in (q, k, v))
    with torch.autocast("cpu", dtype=dtype):
        inside = favor_attention(q, k, v, w, kernel, chunk_size=50)
    assert torch.equal(inside, favor_attention(q, k, v, w, kernel, chunk_size=50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_long_keys_and_queries_give_finite_values_and_gradients(dtype: torch.dtype) -> None:
    q, k, v, w = make(63, 197, head_dim=64, num_features=256)
    q, k = (30 * x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    for result in value_and_gradients(favor_attention, *(x.to(dtype) for x in (q, k, v)), w, chunk_size=50):
        assert result.isfinite().all()


def test_long_keys_and_queries_still_match_the_transcription() -> None:
    q, k, v, w = make(30, 40, head_dim=64, num_features=24)
    q, k = (30 * x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    actual = value_and_gradients(favor_attention, q, k, v, w, chunk_size=16)
    assert_same(actual, value_and_gradients(transcription, q, k, v, w, "softmax+"))


@pytest.mark.parametrize("kernel", KERNELS)
def test_samples_of_a_batch_do_not_couple(kernel: str) -> None:
    q, k, v, w = make(63, 197)
    before = favor_attention(q, k, v, w, kernel, chunk_size=50)
    k[1] *= 30
    assert torch.equal(favor_attention(q, k, v, w, kernel, chunk_size=50)[0], before[0])


@pytest.mark.parametrize("kernel", KERNELS)
def test_equal_values_pass_through(kernel: str) -> None:
    q, k, v, w = make(63, 197)
    same = v[:, :, :1].expand_as(v)
    torch.testing.assert_close(favor_attention(q, k, same, w, kernel), same[:, :, :63])


def test_more_features_approach_exact_softmax() -> None:
    q, k, v, _ = make(63, 197)
    q, k = q / 2, k / 2
    exact = softmax_attention(q, k, v)
    torch.testing.assert_close(exact, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    errors = []
    for num_features in (16, 512, 16_384):
        w = draw_projection(num_features, 16, generator=torch.Generator().manual_seed(0))
        errors.append(float((favor_attention(q, k, v, w) - exact).norm() / exact.norm()))
    # Monte Carlo: 32 times the features, 5.7 times less error.
    assert errors[0] > 2 * errors[1] > 8 * errors[2]
    assert errors[2] < 0.05


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_compiled_graph_is_whole_and_takes_any_length(kernel: str) -> None:
    compiled = torch.compile(favor_attention, backend="eager", fullgraph=True, dynamic=True)
    for n_q, n_k in [(63, 197), (197, 64)]:
        q, k, v, w = make(n_q, n_k)
        actual = compiled(q, k, v, w, kernel, chunk_size=100)
        assert torch.equal(actual, favor_attention(q, k, v, w, kernel, chunk_size=100))


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_exported_graph_takes_any_length_up_to_a_chunk(kernel: str) -> None:
    class Wrapped(torch.nn.Module):
        def forward(self, q, k, v, w):
            return favor_attention(q, k, v, w, kernel)

    length = torch.export.Dim("length", min=2, max=2048)
    dynamic = {name: {2: length} for name in "qkv"}
    exported = torch.export.export(Wrapped(), make(63, 63), dynamic_shapes={**dynamic, "w": None}).module()
    for n in (2, 197, 2048):
        arguments = make(n, n)
        assert torch.equal(exported(*arguments), favor_attention(*arguments, kernel))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "softmax"}, r"did you mean 'softmax\+'"),
        ({"chunk_size": 0}, "at least 1, got 0"),
        ({"q": torch.zeros(2, 2, 5, 8)}, r"D = 16, got \[2, 2, 5, 8\]"),
        ({"k": torch.zeros(2, 2, 0, 16), "v": torch.zeros(2, 2, 0, 16)}, "N >= 1"),
        ({"v": torch.zeros(2, 2, 6, 16)}, "same B, H and N"),
        ({"projection": torch.zeros(32, 8)}, r"head_dim=16"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    q, k, v, w = make(5, 7)
    with pytest.raises(ValueError, match=message):
        favor_attention(**{"q": q, "k": k, "v": v, "projection": w, **change})


def test_training_keeps_nothing_of_size_tokens_times_features() -> None:
    q, k, v, w = make(300, 300, num_features=64)
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    leaves = [x.requires_grad_() for x in (q, k, v)]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        favor_attention(*leaves, w, chunk_size=50)
    assert max(kept) <= max(x.numel() for x in leaves)
    assert max(kept) < 300 * 64 * 4


@pytest.mark.parametrize("kernel", KERNELS)
def test_training_compiles_whole(kernel: str) -> None:
    compiled = torch.compile(favor_attention, backend="aot_eager", fullgraph=True)
    q, k, v, w = make(63, 40)
    actual = value_and_gradients(compiled, q, k, v, w, kernel)
    assert_same(actual, value_and_gradients(favor_attention, q, k, v, w, kernel), 1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_low_precision_inputs_are_close_to_float64(kernel: str, dtype: torch.dtype) -> None:
    q, k, v, w = (x.to(dtype) for x in make(120, 90))
    exact = value_and_gradients(favor_attention, *(x.double() for x in (q, k, v)), w.float(), kernel)
    actual = value_and_gradients(favor_attention, q, k, v, w.float(), kernel)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
    for a, e in zip(actual, exact, strict=True):
        assert a.dtype == dtype
        assert (a.double() - e).norm() / e.norm() < tolerance
