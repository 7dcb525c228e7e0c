"""Attention to clusters of far keys, beside windows and sinks."""

import pytest
import torch
from attention_cases import CountElements, assert_same, few_tokens_at_a_time, value_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from perf_vit.ops import clustered_attention
from perf_vit.ops.naive import naive_clustered_attention, softmax_attention
from perf_vit.ops.sinks import choose_sinks


def make(grid: tuple[int, int], num_prefix: int, batch: int = 2, head_dim: int = 16):
    generator = torch.Generator().manual_seed(grid[0] * 100 + grid[1])
    shape = (3, batch, 3, num_prefix + grid[0] * grid[1], head_dim)
    return torch.randn(shape, generator=generator, dtype=torch.float64).unbind(0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 14),
    columns=st.integers(1, 14),
    window_size=st.sampled_from([0, 1, 3, 4, 8, 20]),
    num_sinks=st.sampled_from([0, 1, 6, 500]),
    num_clusters=st.sampled_from([1, 2, 7, 500]),
    num_prefix=st.sampled_from([0, 1, 5]),
    masked=st.booleans(),
    at_a_time=st.sampled_from([5, 60, 4096]),
)
def test_value_and_gradient_match_the_dense_definition(
    rows, columns, window_size, num_sinks, num_clusters, num_prefix, masked, at_a_time
) -> None:
    grid = (rows, columns)
    q, k, v = make(grid, num_prefix)
    # Values of other size than keys.
    v = torch.cat([v, v[..., :8].flip(-1)], dim=-1)
    mask = torch.rand(q.shape[0], q.shape[2], generator=torch.Generator().manual_seed(rows)) > 0.3 if masked else None
    keys = k if mask is None else k.masked_fill(~mask[:, None, :, None], 0.0)
    sinks = choose_sinks(q, keys, num_sinks, num_prefix, mask)
    options = (num_prefix, mask)
    with few_tokens_at_a_time(at_a_time):
        actual = value_and_gradients(clustered_attention, q, k, v, grid, window_size, num_sinks, num_clusters, *options)
        with torch.no_grad():
            untracked = clustered_attention(q, k, v, grid, window_size, num_sinks, num_clusters, *options)
    naive = value_and_gradients(naive_clustered_attention, q, keys, v, grid, window_size, sinks, num_clusters, *options)
    assert_same(actual, naive, 1e-9)
    torch.testing.assert_close(untracked, actual[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("window_size", "num_sinks", "num_clusters"), [(16, 0, 3), (0, 500, 3), (4, 0, 500)], ids=["window", "sinks", "own"]
)
def test_it_is_softmax_where_no_key_shares_a_cluster(window_size: int, num_sinks: int, num_clusters: int) -> None:
    q, k, v = make((11, 13), 2)
    out = clustered_attention(q, k, v, (11, 13), window_size, num_sinks, num_clusters, num_prefix_tokens=2)
    torch.testing.assert_close(out, softmax_attention(q, k, v), rtol=1e-9, atol=1e-9)


def test_equal_keys_cost_nothing() -> None:
    # Thirty different keys and values, each 20 times: as many clusters lose nothing.
    q, _, _ = make((20, 30), 0)
    k, v = (x[:, :, :30].repeat(1, 1, 20, 1) for x in make((20, 30), 0)[1:])
    out = clustered_attention(q, k, v, (20, 30), window_size=5, num_sinks=0, num_clusters=600, num_prefix_tokens=0)
    torch.testing.assert_close(out, softmax_attention(q, k, v), rtol=1e-9, atol=1e-9)


def test_clusters_windows_and_sinks_each_bring_it_closer_to_softmax() -> None:
    q, k, v = make((24, 24), 1)
    # Keys and values of twelve kinds, as of a textured image, and forty that most queries attend to.
    kinds = torch.randint(0, 12, (577,), generator=torch.Generator().manual_seed(0))
    k, v = (0.5 * x + 1.5 * x[:, :, kinds] for x in (k, v))
    k[:, :, 5::14] += 2 * q.mean(dim=2, keepdim=True).sign()
    q = q + q.mean(dim=2, keepdim=True).sign()
    exact = softmax_attention(q, k, v)

    def error(window_size: int, num_sinks: int, num_clusters: int) -> float:
        out = clustered_attention(q, k, v, (24, 24), window_size, num_sinks, num_clusters)
        return float((out - exact).norm() / exact.norm())

    assert error(0, 0, 128) < error(0, 0, 64) < error(0, 0, 1)
    assert error(8, 0, 16) < error(0, 0, 16)
    assert error(8, 64, 16) < error(8, 0, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", [2.0, 30.0])
@pytest.mark.parametrize("head_dim", [64, 72])
def test_low_precision_and_long_keys_stay_exact(dtype: torch.dtype, norm: float, head_dim: int) -> None:
    q, k, v = make((20, 30), 1, head_dim=head_dim)
    k = norm * k / k.norm(dim=-1, keepdim=True)
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    out = clustered_attention(q, k, v, (20, 30), 8, 16, 32)
    assert out.dtype == dtype
    with torch.no_grad():
        expected = clustered_attention(q.double(), k.double(), v.double(), (20, 30), 8, 16, 32)
    # Nothing but the output is rounded to the dtype.
    assert (out.double() - expected).norm() / expected.norm() < torch.finfo(dtype).eps / 2 + 1e-5
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.float().square().mean(), (q, k, v)))


def test_a_sample_without_keys_gets_zeros_and_masked_keys_may_hold_anything() -> None:
    q, k, v = make((9, 11), 1)
    mask = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool)
    mask[0] = False
    mask[1, 40:60] = False
    clean = value_and_gradients(clustered_attention, q, k, v, (9, 11), 4, 6, 7, key_mask=mask)
    assert not clean[0][0].any()
    k[:, :, 40:60], v[:, :, 40:60] = torch.nan, torch.nan
    poisoned = value_and_gradients(clustered_attention, q, k, v, (9, 11), 4, 6, 7, key_mask=mask)
    assert all(torch.equal(found, expected) for found, expected in zip(poisoned, clean, strict=True))
    assert not any(gradient[1, :, 40:60].any() for gradient in poisoned[2:])


@pytest.mark.parametrize(("window_size", "num_sinks"), [(0, 0), (0, 5)], ids=["clusters", "sinks"])
def test_padding_does_not_change_what_an_image_sees(window_size: int, num_sinks: int) -> None:
    q, k, v = (x.float() for x in make((32, 12), 0))
    mask = torch.zeros(q.shape[0], q.shape[2], dtype=torch.bool)
    mask[:, : 9 * 12] = True
    options = {"window_size": window_size, "num_sinks": num_sinks, "num_clusters": 20, "num_prefix_tokens": 0}
    q[:, :, 9 * 12 :] = torch.nan
    padded = clustered_attention(q, k, v, (32, 12), **options, key_mask=mask)[:, :, : 9 * 12]
    cropped = clustered_attention(*(x[:, :, : 9 * 12] for x in (q, k, v)), (9, 12), **options)
    torch.testing.assert_close(padded, cropped, rtol=1e-5, atol=1e-6)


def test_work_grows_with_the_number_of_tokens_alone() -> None:
    def elements(side: int) -> int:
        q, k, v = (x.float() for x in make((side, side), 1, batch=1))
        with CountElements() as counted:
            out = clustered_attention(q.requires_grad_(), k, v, (side, side), 8, 16, 32)
            out.sum().backward()
        return counted.elements

    assert elements(192) < 4.05 * elements(96)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_clusters": 0}, "num_clusters must be 1 or more"),
        ({"grid": (3, 4)}, "1 prefix tokens and a grid of 3 x 4 are 13 tokens, got 21"),
        ({"window_size": -1}, "0 or more"),
        ({"key_mask": torch.ones(2, 20, dtype=torch.bool)}, "key_mask must be bool"),
        ({"v": torch.zeros(2, 3, 20, 16)}, "k and v must be"),
        ({"k": torch.zeros(2, 3, 21, 8)}, "q and k must have one shape"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    q, k, v = make((4, 5), 1)
    arguments = {"q": q, "k": k, "v": v, "grid": (4, 5), **change}
    with pytest.raises(ValueError, match=message):
        clustered_attention(**arguments)


def test_clusters_that_a_window_holds_weigh_nothing_however_far_their_keys_spread() -> None:
    q, k, v = (x.float() for x in make((6, 6), 0))
    out = clustered_attention(
        30 * q, 30 * k, v, (6, 6), window_size=6, num_sinks=0, num_clusters=2, num_prefix_tokens=0
    )
    torch.testing.assert_close(out, softmax_attention(30 * q, 30 * k, v), rtol=1e-4, atol=1e-4)


def test_neither_the_scale_nor_an_offset_of_keys_changes_what_is_attended() -> None:
    q, k, v = make((30, 30), 1)
    sizes = {"grid": (30, 30), "window_size": 5, "num_clusters": 20}
    expected = clustered_attention(q, k, v, **sizes)
    torch.testing.assert_close(clustered_attention(50 * q, k / 50, v, **sizes), expected, rtol=1e-6, atol=1e-6)
    offset = torch.linspace(-3, 3, 16, dtype=torch.float64)
    torch.testing.assert_close(clustered_attention(q, k + offset, v, **sizes), expected, rtol=1e-6, atol=1e-6)


def test_queries_and_keys_may_be_more_precise_than_values() -> None:
    q, k, v = (x.float() for x in make((9, 9), 1))
    out = clustered_attention(q, k, v.bfloat16(), (9, 9), window_size=4)
    assert out.dtype == torch.float32
    expected = clustered_attention(q, k, v, (9, 9), window_size=4)
    assert (out - expected).norm() < 0.02 * expected.norm()
