import pytest
import torch
from attention_cases import POSITIVE, SOFTMAX, assert_same, favor, kernel_id, make, value_and_gradients

from perf_vit.ops import Balancing, favor_attention, fit_balancing
from perf_vit.ops.naive import naive_favor_attention, softmax_attention

FORMS = [{"balance": False}, {"center": False}, {}]


def uneven(n_q: int = 60, n_k: int = 90, batch: int = 2, scale: float = 1.0):
    """Queries and keys like a pretrained ViT's: mostly a mean, their channels of very unequal size."""
    q, k, v, w = make(n_q, n_k, head_dim=16, num_features=64, batch=batch)
    sizes = torch.linspace(0.2, 2, 16, dtype=torch.float64)
    return (q * sizes + 1) * scale, (k * sizes.flip(0) + 2) * scale, v, w


def balanced_softmax(q, k, v, balancing: Balancing):
    """Exact attention of the inputs that `Balancing` describes, by its docstring."""
    query_center, key_center, g = balancing.tensors()
    bias = (k - key_center) @ query_center.mT / q.shape[-1] ** 0.5
    return softmax_attention((q - query_center) * g, (k - key_center) / g, v, bias.mT)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_exact_softmax_stays_as_it_is_in_value_and_gradient(form: dict) -> None:
    q, k, v, _ = uneven()
    balancing = fit_balancing(q, k, **form)
    assert balancing.scale.shape == (2, 2, 1, 16)
    changed = value_and_gradients(balanced_softmax, q, k, v, balancing)
    assert_same(changed, value_and_gradients(softmax_attention, q, k, v), 1e-11)


def test_statistics_are_those_that_the_docstring_says() -> None:
    q, k, _, _ = uneven()
    balancing = fit_balancing(q, k, chunk_size=7)
    torch.testing.assert_close(balancing.query_center, q.mean(2, keepdim=True))
    torch.testing.assert_close(balancing.key_center, k.mean(2, keepdim=True))
    expected = (k.var(2, keepdim=True, correction=0) / q.var(2, keepdim=True, correction=0)) ** 0.25
    torch.testing.assert_close(balancing.scale, expected)
    mask = torch.rand(2, 90, generator=torch.Generator().manual_seed(0)) > 0.4
    masked = fit_balancing(q[:1], k[:1].where(mask[:1, None, :, None], 1e3), mask[:1], chunk_size=7)
    torch.testing.assert_close(masked.key_center, k[:1, :, mask[0]].mean(2, keepdim=True))


def test_constant_channels_and_samples_without_keys_are_left_alone() -> None:
    q, k, _, _ = uneven()
    k[..., 3] = 5
    balancing = fit_balancing(q, k, torch.zeros(2, 90, dtype=torch.bool))
    assert all(x.isfinite().all() for x in balancing.tensors())
    assert (fit_balancing(q, k).scale[..., 3] == 1).all()


@pytest.mark.parametrize("kernel", SOFTMAX, ids=kernel_id)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_value_and_gradient_match_the_naive_reference(kernel, form: dict, causal: bool) -> None:
    q, k, v, w = uneven(60, 60, scale=0.2 if kernel.name == "softmax-trig" else 1.0)
    mask = torch.rand(2, 60, generator=torch.Generator().manual_seed(0)) > 0.3
    arguments = (q, k, v, w, kernel, mask, causal, fit_balancing(q, k, **form))
    actual = favor(*arguments, chunk_size=17)
    assert_same(actual, value_and_gradients(naive_favor_attention, *arguments), 1e-8)


@pytest.mark.parametrize("kernel", [kernel for kernel in POSITIVE if kernel.estimates_softmax], ids=kernel_id)
def test_the_estimate_gets_closer_with_each_of_them(kernel) -> None:
    q, k, v, w = uneven()
    exact = softmax_attention(q, k, v)

    def error(balancing: Balancing | None) -> float:
        return float((favor_attention(q, k, v, w, kernel, balancing=balancing) - exact).norm() / exact.norm())

    plain = error(None)
    centred, both = error(fit_balancing(q, k, balance=False)), error(fit_balancing(q, k))
    assert both < centred < plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_keep_float32_statistics(dtype: torch.dtype) -> None:
    q, k, v, w = (x.to(dtype) for x in uneven())
    balancing = fit_balancing(q, k)
    assert {x.dtype for x in balancing.tensors()} == {torch.float32}
    exact = fit_balancing(q.double(), k.double())
    assert_same([x.double() for x in balancing.tensors()], list(exact.tensors()), 1e-5)
    out = favor_attention(q, k, v, w.float(), balancing=balancing)
    expected = favor_attention(q.double(), k.double(), v.double(), w.float(), balancing=exact)
    assert (out.double() - expected).norm() / expected.norm() < max(2e-5, torch.finfo(dtype).eps)


def test_oprf_finds_its_parameter_after_balancing() -> None:
    q, k, v, w = uneven()
    balancing = fit_balancing(q, k)
    exact = softmax_attention(q, k, v)
    errors = [
        float((favor_attention(q, k, v, w, "oprf", balancing=b) - exact).norm() / exact.norm())
        for b in (None, balancing)
    ]
    assert errors[1] < errors[0]


def test_misshapen_inputs_are_named() -> None:
    q, k, _, _ = uneven()
    with pytest.raises(ValueError, match=r"same B, H and D, got \[2, 2, 60, 8\] and \[2, 2, 90, 16\]"):
        fit_balancing(q[..., :8], k)
