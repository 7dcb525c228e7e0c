import pytest
import torch
from attention_cases import (
    KERNELS,
    POSITIVE,
    CountElements,
    assert_same,
    favor,
    kept_by_training,
    kernel_id,
    make,
    transcription,
    value_and_gradients,
)

from perf_vit.ops import KVState, favor_attention, fit_balancing

each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=kernel_id)


@each_kernel
@pytest.mark.parametrize(("length", "chunk_size"), [(1, 8), (2, 8), (63, 768), (197, 50), (300, 256), (600, 999)])
def test_value_and_gradient_match_an_independent_transcription(kernel, length: int, chunk_size: int) -> None:
    q, k, v, w = make(length, length, head_dim=8, num_features=6, value_dim=5, kernel=kernel)
    actual = favor(q, k, v, w, kernel, causal=True, chunk_size=chunk_size)
    assert_same(actual, value_and_gradients(transcription, q, k, v, w, kernel, causal=True), 1e-9)
    with torch.no_grad():
        untracked = favor_attention(q, k, v, w, kernel, causal=True, chunk_size=chunk_size)
    torch.testing.assert_close(untracked, actual[0], rtol=1e-12, atol=1e-12)


@each_kernel
def test_each_token_gets_what_the_state_of_its_past_gives(kernel) -> None:
    q, k, v, w = make(40, 40, kernel=kernel)
    out = favor_attention(q, k, v, w, kernel, causal=True, chunk_size=16)
    state = KVState.from_keys(k[:, :, :1], v[:, :, :1], w, kernel)
    for i in range(40):
        token = slice(i, i + 1)
        state = state.update(k[:, :, token], v[:, :, token]) if i else state
        torch.testing.assert_close(out[:, :, token], state.attend(q[:, :, token]), rtol=1e-9, atol=1e-9)


@each_kernel
@pytest.mark.parametrize("chunk_size", [32, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_future_changes_no_bit(kernel, dtype: torch.dtype, chunk_size: int) -> None:
    q, k, v, w = make(210, 210, kernel=kernel)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    before = favor_attention(q, k, v, w, kernel, causal=True, chunk_size=chunk_size)
    for first in (1, 33, 64, 99, 150, 209):
        later_k, later_v = k.clone(), v.clone()
        # Scales that would leave nothing of the past, were they shared with it.
        later_k[:, :, first:] *= 50
        later_v[:, :, first:] += 1
        changed = favor_attention(q, later_k, later_v, w, kernel, causal=True, chunk_size=chunk_size)
        assert torch.equal(changed[:, :, :first], before[:, :, :first])
        assert not torch.equal(changed[:, :, first:], before[:, :, first:])


@each_kernel
def test_keys_above_their_reference_match_an_independent_transcription(kernel, monkeypatch) -> None:
    monkeypatch.setattr("perf_vit.ops.causal._LARGEST_LOG", {torch.float64: 0.5})
    q, k, v, w = make(300, 300, head_dim=8, num_features=6, value_dim=5, kernel=kernel)
    mask = torch.rand(2, 300, generator=torch.Generator().manual_seed(0)) < 0.8
    actual = favor(q, k, v, w, kernel, mask, causal=True, chunk_size=128)
    assert_same(actual, value_and_gradients(transcription, q, k, v, w, kernel, mask, True), 1e-9)


@each_kernel
def test_masked_keys_leave_no_trace_whatever_they_hold(kernel) -> None:
    q, k, v, w = make(300, 300, head_dim=8, num_features=6, kernel=kernel)
    # The first key that counts lies in another group of chunks in each sample.
    mask = torch.arange(300) >= torch.tensor([[20], [210]])
    expected = value_and_gradients(transcription, q, k, v, w, kernel, mask, True)
    hidden = ~mask[:, None, :, None]
    k, v = k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.nan)
    assert_same(favor(q, k, v, w, kernel, mask, causal=True, chunk_size=128), expected, 1e-9)


@pytest.mark.parametrize("kernel", POSITIVE, ids=kernel_id)
def test_growing_keys_stay_exact(kernel) -> None:
    q, k, v, w = make(120, 120, head_dim=64, num_features=24, kernel=kernel)
    k = k / k.norm(dim=-1, keepdim=True) * torch.linspace(0, 30, 120, dtype=k.dtype).unsqueeze(-1)
    expected = transcription(q, k, v, w, kernel, causal=True)
    torch.testing.assert_close(favor_attention(q, k, v, w, kernel, causal=True), expected, rtol=1e-9, atol=1e-9)
    low = favor_attention(q.float(), k.float(), v.float(), w, kernel, causal=True, chunk_size=32)
    assert (low.double() - expected).norm() / expected.norm() < 1e-5


def test_tokens_without_a_visible_key_get_zeros() -> None:
    q, k, v, w = make(40, 40)
    mask = torch.arange(40).expand(2, 40) >= 20
    out, *gradients = favor(q, k, v, w, key_mask=mask, causal=True, chunk_size=8)
    assert (out[:, :, :20] == 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert_same([out, *gradients], value_and_gradients(transcription, q, k, v, w, "softmax+", mask, True), 1e-9)


def test_constants_of_other_tokens_go_with_causal_order() -> None:
    q, k, v, w = make(40, 40)
    constants = fit_balancing(*make(90, 90, seed=1)[:2])
    out = favor_attention(q, k, v, w, causal=True, balancing=constants, chunk_size=8)
    for i in (0, 17, 39):
        seen = favor_attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], w, balancing=constants)
        torch.testing.assert_close(out[:, :, i : i + 1], seen, rtol=1e-9, atol=1e-9)


def test_training_keeps_one_state_a_group_and_nothing_of_tokens_times_features() -> None:
    q, k, v, w = make(300, 300, num_features=256)
    kept = kept_by_training(q, k, v, w, causal=True, chunk_size=128)
    tokens, states = 4 * q.numel() + 4 * 300, 4 * 4 * 256 * (16 + 1 + 1)
    assert sum(kept) == tokens + states + w.numel()
    assert max(kept) < 300 * 256


@pytest.mark.parametrize(("training", "bound"), [(False, 2.5), (True, 4.0)])
def test_it_writes_little_more_than_bidirectional_attention(training: bool, bound: float) -> None:
    q, k, v, w = make(1000, 1000, head_dim=32, num_features=128, batch=1)
    written = []
    for causal in (False, True):
        with CountElements() as count:
            if training:
                favor(q, k, v, w, causal=causal)
            else:
                favor_attention(q, k, v, w, causal=causal)
        written.append(count.elements)
    assert written[1] < bound * written[0]


@pytest.mark.slow
def test_it_compiles_whole() -> None:
    torch._dynamo.reset()
    q, k, v, w = make(63, 63)
    compiled = torch.compile(favor_attention, backend="aot_eager", fullgraph=True)
    expected = favor(q, k, v, w, causal=True, chunk_size=32)
    assert_same(value_and_gradients(compiled, q, k, v, w, causal=True, chunk_size=32), expected, 1e-10)
