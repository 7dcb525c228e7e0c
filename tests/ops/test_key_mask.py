import pytest
import torch
from attention_cases import KERNELS, assert_same, favor, kernel_id, make
from hypothesis import given, settings
from hypothesis import strategies as st

from perf_vit.ops import KVState, favor_attention
from perf_vit.ops.naive import naive_favor_attention

each_kernel = pytest.mark.parametrize("kernel", [*KERNELS, "oprf"], ids=kernel_id)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n_q=st.integers(1, 30),
    n_k=st.integers(1, 40),
    chunk_size=st.integers(1, 50),
    kernel=st.sampled_from([*KERNELS, "oprf"]),
    seed=st.integers(0, 99),
)
def test_a_mask_equals_dropping_the_keys_in_value_and_gradient(n_q, n_k, chunk_size, kernel, seed) -> None:
    if kernel == "oprf" and n_q == n_k:
        # Queries of masked tokens are left out of the parameter then.
        n_q += 1
    q, k, v, w = make(n_q, n_k, 8, 12, batch=1, seed=seed, **({} if kernel == "oprf" else {"kernel": kernel}))
    kept = torch.rand(n_k, generator=torch.Generator().manual_seed(seed)) > 0.4
    kept[seed % n_k] = True
    # Whatever lies in masked places, NaN included, must not show.
    v[:, :, ~kept] = torch.nan
    k[:, :, ~kept] = torch.nan
    masked = favor(q, k, v, w, kernel, key_mask=kept[None], chunk_size=chunk_size)
    k_kept, v_kept = k[:, :, kept], v[:, :, kept]
    dropped = favor(q, k_kept, v_kept, w, kernel)
    assert_same(masked[:2], dropped[:2], 1e-9)
    for with_mask, without in zip(masked[2:], dropped[2:], strict=True):
        torch.testing.assert_close(with_mask[:, :, kept], without, rtol=1e-9, atol=1e-9)
        assert (with_mask[:, :, ~kept] == 0).all()
    if kernel != "oprf":
        assert_same(masked[:1], [naive_favor_attention(q, k_kept, v_kept, w, kernel)], 1e-9)


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_sample_without_keys_gets_zeros_and_leaves_the_others_alone(kernel, dtype: torch.dtype) -> None:
    q, k, v, w = make(9, 21)
    q, k, v = (x.to(dtype) / 8 for x in (q, k, v))
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[1] = False
    out, *grads = favor(q, k, v, w, kernel, key_mask=mask, chunk_size=8)
    assert (out[1] == 0).all()
    assert all((grad[1] == 0).all() for grad in grads)
    assert all(grad.isfinite().all() for grad in grads)
    alone = favor(q[:1], k[:1], v[:1], w, kernel, chunk_size=8)
    # To rounding: a matrix library may sum a batch of two in another order than a batch of one.
    torch.testing.assert_close(out[:1], alone[0])


@each_kernel
def test_masked_tokens_change_no_other_in_self_attention(kernel) -> None:
    q, k, v, w = make(21, 21, scale=1 / 8)
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[0, 5:9], mask[1, 15:] = False, False
    clean = favor_attention(q, k, v, w, kernel, key_mask=mask)
    for x in (q, k, v):
        x.masked_fill_(~mask[:, None, :, None], torch.nan)
    poisoned = favor_attention(q, k, v, w, kernel, key_mask=mask)
    kept = mask[:, None].expand(clean.shape[:3])
    torch.testing.assert_close(poisoned[kept], clean[kept], rtol=1e-12, atol=1e-12)


@each_kernel
def test_a_chunk_of_masked_keys_between_others_changes_nothing(kernel) -> None:
    q, k, v, w = make(5, 30, scale=1 / 8)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[:, 10:20] = False
    k[:, :, 10:20] *= 1e3
    masked = favor_attention(q, k, v, w, kernel, key_mask=mask, chunk_size=10)
    kept = mask[0]
    expected = favor_attention(q, k[:, :, kept], v[:, :, kept], w, kernel)
    torch.testing.assert_close(masked, expected, rtol=1e-12, atol=1e-12)


def test_a_state_of_masked_keys_is_neutral_in_a_merge() -> None:
    q, k, v, w = make(5, 12)
    nothing = torch.zeros(2, 12, dtype=torch.bool)
    empty = KVState.from_keys(k, v, w, key_mask=nothing)
    full = KVState.from_keys(k, v, w)
    for merged in (empty.merge(full), full.merge(empty), full.update(k, v, nothing)):
        assert torch.equal(merged.attend(q), full.attend(q))


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 11, dtype=torch.bool), torch.ones(12, dtype=torch.bool), torch.ones(2, 12)]
)
def test_a_mask_of_another_shape_or_dtype_is_named(mask: torch.Tensor) -> None:
    q, k, v, w = make(5, 12)
    with pytest.raises(ValueError, match=r"key_mask must be bool \[B, N_k\] = \[2, 12\].*got"):
        favor_attention(q, k, v, w, key_mask=mask)
