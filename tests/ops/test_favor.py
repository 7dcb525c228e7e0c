import pytest
import torch
from attention_cases import (
    KERNELS,
    POSITIVE,
    assert_same,
    kept_by_training,
    kernel_id,
    make,
    transcription,
    value_and_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from perf_vit.ops import draw_projection, favor_attention, fit_balancing
from perf_vit.ops.naive import naive_favor_attention, softmax_attention

each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=kernel_id)
# Each kernel takes seconds to compile.
each_compiled_kernel = pytest.mark.parametrize(
    "kernel",
    [pytest.param(kernel, marks=() if kernel == "softmax+" else pytest.mark.slow) for kernel in KERNELS],
    ids=kernel_id,
)
each_positive_kernel = pytest.mark.parametrize("kernel", POSITIVE, ids=kernel_id)


@each_kernel
@pytest.mark.parametrize(("n_q", "n_k"), [(197, 197), (63, 1000), (1000, 63), (1, 1)])
def test_value_and_gradient_match_an_independent_transcription(n_q: int, n_k: int, kernel) -> None:
    q, k, v, w = make(n_q, n_k, num_features=12, value_dim=5, kernel=kernel)
    actual = value_and_gradients(favor_attention, q, k, v, w, kernel, chunk_size=128)
    assert_same(actual, value_and_gradients(transcription, q, k, v, w, kernel))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    head_dim=st.integers(8, 256),
    num_features=st.integers(1, 80),
    n_q=st.integers(1, 40),
    n_k=st.integers(1, 40),
    chunk_size=st.integers(1, 50),
    kernel=st.sampled_from(KERNELS),
    causal=st.booleans(),
    masked=st.booleans(),
    layout=st.sampled_from(["contiguous", "permuted", "expanded", "strided"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_input_matches_the_naive_reference_and_the_transcription(
    head_dim, num_features, n_q, n_k, chunk_size, kernel, causal, masked, layout, dtype
) -> None:
    n_k = n_q if causal else n_k
    *qkv, w = make(n_q, n_k, head_dim, num_features, kernel=kernel, scale=0.5)
    q, k, v = (lay_out(x, layout).to(dtype) for x in qkv)
    mask = torch.rand(2, n_k, generator=torch.Generator().manual_seed(n_k)) > 0.3 if masked else None
    expected = naive_favor_attention(q.double(), k.double(), v.double(), w, kernel, mask, causal)
    if dtype == torch.float64:
        arguments = (q, k, v, w, kernel, mask, causal)
        actual = value_and_gradients(favor_attention, *arguments, chunk_size=chunk_size)
        assert_same(actual, value_and_gradients(naive_favor_attention, *arguments), 1e-9)
        assert_same(actual, value_and_gradients(transcription, *arguments), 1e-9)
    actual = favor_attention(q, k, v, w, kernel, mask, causal, chunk_size=chunk_size)
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-9 if dtype == torch.float64 else 2e-5)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same shape with other strides; "expanded" repeats the first head and token."""
    if layout == "permuted":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":
        return torch.stack([x, -x], dim=-1)[..., 0]
    return x[:, :1].expand_as(x) if layout == "expanded" else x


@each_kernel
def test_the_naive_reference_matches_the_transcription(kernel) -> None:
    q, k, v, w = make(63, 197, kernel=kernel)
    actual = value_and_gradients(naive_favor_attention, q, k, v, w, kernel)
    assert_same(actual, value_and_gradients(transcription, q, k, v, w, kernel))


@each_kernel
def test_gradients_match_finite_differences(kernel) -> None:
    q, k, v, w = (x.double() for x in make(3, 5, head_dim=4, num_features=6, seed=1, kernel=kernel))
    leaves = [x[:1, :1].clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda q, k, v: favor_attention(q, k, v, w, kernel, chunk_size=2), leaves)


@each_kernel
def test_chunk_size_does_not_change_the_result(kernel) -> None:
    q, k, v, w = make(197, 1000, kernel=kernel)
    whole = value_and_gradients(favor_attention, q, k, v, w, kernel, chunk_size=4096)
    for chunk_size in (1000, 197, 64):
        assert_same(value_and_gradients(favor_attention, q, k, v, w, kernel, chunk_size=chunk_size), whole, 1e-12)


@each_positive_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_lose_only_the_rounding_of_the_result(dtype: torch.dtype, kernel) -> None:
    q, k, v, w = make(197, 1000, kernel=kernel)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    out = favor_attention(q, k, v, w, kernel, chunk_size=300)
    assert out.dtype == dtype
    expected = favor_attention(q.double(), k.double(), v.double(), w, kernel)
    torch.testing.assert_close(out.double(), expected, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=2e-5)


@each_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_touch_features_or_sums(dtype: torch.dtype, kernel) -> None:
    q, k, v, w = make(63, 197, kernel=kernel)
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


@each_kernel
def test_samples_of_a_batch_do_not_couple(kernel) -> None:
    q, k, v, w = make(63, 197, kernel=kernel)
    before = favor_attention(q, k, v, w, kernel, chunk_size=50)
    k[1] *= 30
    assert torch.equal(favor_attention(q, k, v, w, kernel, chunk_size=50)[0], before[0])


@each_kernel
def test_equal_values_pass_through(kernel) -> None:
    q, k, v, w = make(63, 197, kernel=kernel)
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


@each_compiled_kernel
def test_a_compiled_graph_is_whole_and_takes_any_length(kernel) -> None:
    # Each kernel and length compiles anew, and Dynamo counts them over the whole process.
    torch._dynamo.reset()
    compiled = torch.compile(favor_attention, backend="eager", fullgraph=True, dynamic=True)
    for n_q, n_k in [(63, 197), (197, 64)]:
        q, k, v, w = make(n_q, n_k, kernel=kernel)
        actual = compiled(q, k, v, w, kernel, chunk_size=100)
        assert torch.equal(actual, favor_attention(q, k, v, w, kernel, chunk_size=100))


@each_kernel
def test_an_exported_graph_takes_any_length(kernel) -> None:
    class Wrapped(torch.nn.Module):
        def forward(self, q, k, v, w):
            return favor_attention(q, k, v, w, kernel)

    dynamic = {name: {2: torch.export.Dim("length", min=2)} for name in "qkv"}
    example = make(63, 63, kernel=kernel)
    exported = torch.export.export(Wrapped(), example, dynamic_shapes={**dynamic, "w": None}).module()
    for n in (2, 197, 2500):
        arguments = make(n, n, kernel=kernel)
        torch.testing.assert_close(exported(*arguments), favor_attention(*arguments, kernel), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "softmax"}, r"did you mean 'softmax\+'"),
        ({"chunk_size": 0}, "at least 1, got 0"),
        ({"q": torch.zeros(2, 2, 5, 8)}, r"D = 16, got \[2, 2, 5, 8\]"),
        ({"k": torch.zeros(2, 2, 0, 16), "v": torch.zeros(2, 2, 0, 16)}, "N >= 1"),
        ({"v": torch.zeros(2, 2, 6, 16)}, "same B, H and N"),
        ({"projection": torch.zeros(32, 8)}, r"head_dim=16"),
        ({"projection": torch.zeros(32)}, r"\[R, D\] with R, D >= 1, got \[32\]"),
        ({"key_mask": torch.ones(2, 5, dtype=torch.bool)}, r"\[B, N_k\] = \[2, 7\].*got torch.bool \[2, 5\]"),
        ({"causal": True}, "as many queries as keys, got 5 and 7"),
        (
            {"kernel": "relu", "balancing": fit_balancing(*make(5, 7)[:2])},
            "got 'relu'; use balancing=None",
        ),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    q, k, v, w = make(5, 7)
    with pytest.raises(ValueError, match=message):
        favor_attention(**{"q": q, "k": k, "v": v, "projection": w, **change})


def test_training_keeps_nothing_of_size_tokens_times_features() -> None:
    q, k, v, w = make(300, 300, num_features=64)
    kept = kept_by_training(q, k, v, w, chunk_size=50)
    assert max(kept) <= max(x.numel() for x in (q, k, v))
    assert max(kept) < 300 * 64 * 4


@each_compiled_kernel
def test_training_compiles_whole(kernel) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(favor_attention, backend="aot_eager", fullgraph=True)
    q, k, v, w = make(63, 40, kernel=kernel)
    actual = value_and_gradients(compiled, q, k, v, w, kernel)
    assert_same(actual, value_and_gradients(favor_attention, q, k, v, w, kernel), 1e-12)


@each_positive_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_low_precision_inputs_are_close_to_float64(kernel, dtype: torch.dtype) -> None:
    q, k, v, w = (x.to(dtype) for x in make(120, 90, kernel=kernel))
    exact = value_and_gradients(favor_attention, *(x.double() for x in (q, k, v)), w.float(), kernel)
    actual = value_and_gradients(favor_attention, q, k, v, w.float(), kernel)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
    for a, e in zip(actual, exact, strict=True):
        assert a.dtype == dtype
        assert (a.double() - e).norm() / e.norm() < tolerance
