"""Triton kernels of FAVOR+ against the N x N reference: on a GPU, or in Triton's interpreter."""

import os

import pytest
import torch

from perf_vit.ops import KERNELS, attention_backend, draw_projection, favor_attention, fit_balancing, make_kernel
from perf_vit.ops.naive import naive_favor_attention

pytest.importorskip("triton", reason="triton comes with torch for GPUs")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="neither a GPU nor Triton's interpreter"
)
SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
# Only the output is rounded to the dtype; the interpreter truncates to bfloat16.
ERRORS = {SINGLE: 1e-5, HALF: torch.finfo(HALF).eps / 2 + 1e-5, BRAIN: torch.finfo(BRAIN).eps + 1e-5}


def make(batch: int, num_tokens: int, head_dim: int, dtype: torch.dtype, kernel: str, num_features: int = 40):
    generator = torch.Generator().manual_seed(num_tokens * head_dim)
    qkv = torch.randn(batch, num_tokens, 3, 1, head_dim, generator=generator).to(DEVICE, dtype)
    projection = draw_projection(num_features, head_dim, generator=generator, kernel=kernel).to(DEVICE)
    return *qkv.permute(2, 0, 3, 1, 4).unbind(0), projection


def triton(*arguments, **options):
    with attention_backend("triton"), torch.no_grad():
        return favor_attention(*arguments, **options)


def check(batch, num_tokens, head_dim, dtype, kernel, masked, balanced) -> None:
    q, k, v, projection = make(batch, num_tokens, head_dim, dtype, kernel)
    mask = None
    if masked:
        mask = (torch.rand(batch, num_tokens, generator=torch.Generator().manual_seed(0)) > 0.3).to(DEVICE)
    balancing = fit_balancing(q, k, mask) if balanced else None
    exact = [x.double() for x in (q, k, v)]
    exact_balancing = fit_balancing(*exact[:2], mask) if balanced else None
    expected = naive_favor_attention(*exact, projection.double(), kernel, mask, balancing=exact_balancing)
    if masked:
        k, v = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (k, v))
    out = triton(q, k, v, projection, kernel, mask, balancing=balancing)
    assert (out.dtype, out.shape) == (dtype, q.shape)
    assert (out.double() - expected).norm() / expected.norm() < ERRORS[dtype]


CASES = [
    (1, 37, 16, SINGLE, "softmax+", False, False),
    (3, 20, 32, BRAIN, "relu", True, False),
    (1, 70, 64, HALF, "softmax-hyp+", False, True),
    (3, 33, 80, SINGLE, "softmax+", True, True),
    (1, 40, 128, HALF, "relu", False, False),
    (1, 65, 128, BRAIN, "softmax+", True, False),
]


@pytest.mark.parametrize(("batch", "num_tokens", "head_dim", "dtype", "kernel", "masked", "balanced"), CASES)
def test_values_match_the_dense_definition(batch, num_tokens, head_dim, dtype, kernel, masked, balanced) -> None:
    check(batch, num_tokens, head_dim, dtype, kernel, masked, balanced)


@pytest.mark.parametrize("kernel", ["softmax+", "relu"])
def test_chunks_of_keys_join(monkeypatch, kernel: str) -> None:
    q, k, v, projection = make(2, 75, 16, SINGLE, kernel)
    mask = torch.ones(2, 75, dtype=torch.bool, device=DEVICE)
    # A chunk without a visible key.
    mask[0, 32:64] = False
    whole = triton(q, k, v, projection, kernel, mask)
    monkeypatch.setattr("perf_vit.ops.fused.triton_favor._CHUNK", 32)
    torch.testing.assert_close(triton(q, k, v, projection, kernel, mask), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["transposed", "every second", "shared by all tokens"])
def test_key_masks_of_any_strides(layout: str) -> None:
    q, k, v, projection = make(2, 37, 16, SINGLE, "softmax+")
    drawn = torch.rand(37, 4, generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.4
    mask = {
        "transposed": drawn[:, :2].T,
        "every second": drawn.T.repeat_interleave(2, dim=1)[:2, ::2],
        "shared by all tokens": torch.tensor([[True], [False]], device=DEVICE).expand(2, 37),
    }[layout]
    assert not mask.is_contiguous()
    expected = triton(q, k, v, projection, "softmax+", mask.clone(memory_format=torch.contiguous_format))
    assert torch.equal(triton(q, k, v, projection, "softmax+", mask), expected)


@pytest.mark.parametrize("kernel", ["softmax+", "relu"])
def test_long_keys_stay_finite_and_a_sample_without_keys_gets_zeros(kernel: str) -> None:
    q, k, v, projection = make(2, 20, 16, SINGLE, kernel)
    mask = torch.ones(2, 20, dtype=torch.bool, device=DEVICE)
    mask[0] = False
    out = triton(30 * q, 30 * k, v, projection, kernel, mask)
    assert not out[0].any()
    torch.testing.assert_close(out, favor_attention(30 * q, 30 * k, v, projection, kernel, mask), rtol=1e-3, atol=1e-4)


def test_queries_may_be_fewer_than_keys_and_values_wider() -> None:
    q, k, v, projection = make(1, 30, 16, SINGLE, "softmax+")
    v = torch.cat([v, v[..., :8]], dim=-1)
    expected = favor_attention(q[:, :, :7], k, v, projection)
    torch.testing.assert_close(triton(q[:, :, :7], k, v, projection), expected, rtol=1e-5, atol=1e-6)


def test_a_kernel_that_only_has_the_name_of_a_shipped_one_is_computed_as_defined() -> None:
    q, k, v, projection = make(1, 30, 16, SINGLE, "relu")
    other = make_kernel("relu", [torch.sigmoid])
    assert other is not KERNELS["relu"]
    assert torch.equal(triton(q, k, v, projection, other), favor_attention(q, k, v, projection, other))


@pytest.mark.slow
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kernel", ["softmax+", "softmax-hyp+", "relu"])
@pytest.mark.parametrize("dtype", [SINGLE, HALF, BRAIN], ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 128])
def test_values_match_the_dense_definition_everywhere(head_dim, dtype, kernel, masked, balanced) -> None:
    check(3, 67, head_dim, dtype, kernel, masked, balanced and kernel != "relu")
