import math

import pytest
import torch
from attention_cases import FIXED_OPRF, CountElements, assert_same, few_tokens_at_a_time, value_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from perf_vit.ops import draw_projection, favor_attention, fit_balancing, scatterbrain_attention
from perf_vit.ops.kernels import get_kernel
from perf_vit.ops.naive import naive_scatterbrain_attention, softmax_attention
from perf_vit.ops.sinks import choose_sinks
from perf_vit.ops.windows import from_windows, group_windows, to_windows, window_numbers

KERNELS = [get_kernel("softmax+"), get_kernel("softmax-hyp+"), FIXED_OPRF]


def make(grid: tuple[int, int], num_prefix: int, kernel="softmax-hyp+", batch: int = 2, head_dim: int = 16):
    generator = torch.Generator().manual_seed(grid[0] * 100 + grid[1])
    shape = (3, batch, 3, num_prefix + grid[0] * grid[1], head_dim)
    q, k, v = torch.randn(shape, generator=generator, dtype=torch.float64).unbind(0)
    return q, k, v, draw_projection(24, head_dim, generator=generator, kernel=kernel)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 14),
    columns=st.integers(1, 14),
    window_size=st.sampled_from([0, 1, 3, 4, 8, 20]),
    num_sinks=st.sampled_from([0, 1, 6, 500]),
    num_prefix=st.sampled_from([0, 1, 5]),
    kernel=st.sampled_from(KERNELS),
    masked=st.booleans(),
    balanced=st.booleans(),
    at_a_time=st.sampled_from([5, 60, 4096]),
)
def test_value_and_gradient_match_the_dense_definition(
    rows, columns, window_size, num_sinks, num_prefix, kernel, masked, balanced, at_a_time
) -> None:
    if window_size == num_sinks == 0:
        num_sinks = 1
    grid = (rows, columns)
    q, k, v, w = make(grid, num_prefix, kernel)
    mask = torch.rand(q.shape[0], q.shape[2], generator=torch.Generator().manual_seed(rows)) > 0.3 if masked else None
    balancing = fit_balancing(q, k, mask) if balanced else None
    sinks = choose_sinks(q, k, num_sinks, num_prefix, mask)
    options = (num_prefix, kernel, mask, balancing)
    with few_tokens_at_a_time(at_a_time):
        actual = value_and_gradients(scatterbrain_attention, q, k, v, w, grid, window_size, num_sinks, *options)
        with torch.no_grad():
            untracked = scatterbrain_attention(q, k, v, w, grid, window_size, num_sinks, *options)
    naive = value_and_gradients(naive_scatterbrain_attention, q, k, v, w, grid, window_size, sinks, *options)
    assert_same(actual, naive, 1e-9)
    torch.testing.assert_close(untracked, actual[0], rtol=1e-12, atol=1e-12)


def test_work_grows_with_the_number_of_tokens_alone() -> None:
    def elements(side: int) -> int:
        q, k, v, w = (x.float() for x in make((side, side), 1, batch=1))
        with CountElements() as counted:
            out = scatterbrain_attention(q.requires_grad_(), k, v, w, (side, side), window_size=8, num_sinks=16)
            out.sum().backward()
        return counted.elements

    # Four times the tokens; gradients of slices of the whole would make it 5.5 here.
    assert elements(192) < 4.2 * elements(96)


def test_groups_of_windows_join_seamlessly() -> None:
    grid = (61, 83)
    q, k, v, w = make(grid, 1, batch=1)
    sinks = choose_sinks(q, k, 16, 1, None)
    actual = scatterbrain_attention(q, k, v, w, grid, window_size=8, num_sinks=16)
    expected = naive_scatterbrain_attention(q, k, v, w, grid, 8, sinks)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("window_size", "num_sinks"), [(16, 0), (0, 500), (4, 500)])
def test_it_is_exact_where_every_key_is(window_size: int, num_sinks: int) -> None:
    q, k, v, w = make((11, 13), 2)
    out = scatterbrain_attention(q, k, v, w, (11, 13), window_size, num_sinks, num_prefix_tokens=2)
    torch.testing.assert_close(out, softmax_attention(q, k, v), rtol=1e-9, atol=1e-9)


def test_without_windows_and_sinks_it_is_favor_bit_for_bit() -> None:
    q, k, v, w = make((11, 13), 2)
    mask = torch.rand(2, 145, generator=torch.Generator().manual_seed(0)) > 0.3
    plain = scatterbrain_attention(q, k, v, w, (11, 13), 0, 0, 2, key_mask=mask)
    assert torch.equal(plain, favor_attention(q, k, v, w, "softmax-hyp+", mask))


def test_windows_and_sinks_each_bring_it_closer_to_softmax() -> None:
    q, k, v, w = make((24, 24), 1)
    # Some keys that all queries look at, and neighbours that look at each other.
    k[:, :, 100:104] += 3 * q.mean(2, keepdim=True).sign()
    exact = softmax_attention(q, k, v)

    def error(window_size: int, num_sinks: int) -> float:
        out = scatterbrain_attention(q, k, v, w, (24, 24), window_size, num_sinks)
        return float((out - exact).norm() / exact.norm())

    assert error(8, 32) < error(8, 0) < error(0, 0)
    assert error(8, 32) < error(0, 32) < error(0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", [2.0, 30.0])
def test_low_precision_and_long_keys_stay_exact(dtype: torch.dtype, norm: float) -> None:
    q, k, v, w = make((20, 30), 1, head_dim=64)
    k = norm * k / k.norm(dim=-1, keepdim=True)
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    out = scatterbrain_attention(q, k, v, w, (20, 30), 8, 16)
    assert out.dtype == dtype
    with torch.no_grad():
        expected = scatterbrain_attention(q.double(), k.double(), v.double(), w, (20, 30), 8, 16)
    # Nothing but the output is rounded to the dtype.
    assert (out.double() - expected).norm() / expected.norm() < torch.finfo(dtype).eps / 2 + 1e-5
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.float().square().mean(), (q, k, v)))


@pytest.mark.parametrize(("grid", "num_prefix"), [((3, 5), 0), ((61, 83), 1), ((40, 52), 4)])
def test_sinks_have_the_largest_mean_root_of_a_softmax_weight(grid: tuple[int, int], num_prefix: int) -> None:
    q, k, _, _ = make(grid, num_prefix)
    q = 3 * q
    mask = torch.rand(q.shape[0], q.shape[2], generator=torch.Generator().manual_seed(0)) > 0.3
    asking = []
    for sample, seen in zip(q, mask, strict=True):
        places = num_prefix + seen[num_prefix:].nonzero().flatten()
        number = min(128, q.shape[2] - num_prefix)
        steps = [step * (len(places) - 1) // (number - 1) for step in range(number)]
        asking.append(sample[:, places[steps]])
    asking = torch.stack(asking)
    weights = (asking @ k.mT / 4).masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    mass = weights.sqrt().mean(2)[..., num_prefix:]
    expected = mass.topk(7).indices + num_prefix
    actual = choose_sinks(q, k, 7, num_prefix, mask)
    assert torch.equal(actual.sort().values, expected.sort().values)


def test_sinks_are_the_keys_that_most_queries_look_at() -> None:
    q, k, _, _ = make((9, 9), 1)
    k[0, 1, 40] = 5 * q[0, 1].mean(0)
    q[0, 1] += 2 * k[0, 1, 40]
    sinks = choose_sinks(q, k, 3, 1, None)
    assert sinks.shape == (2, 3, 3)
    assert 40 in sinks[0, 1]
    assert sinks.min() >= 1
    mask = torch.ones(2, 82, dtype=torch.bool)
    mask[0, 40] = False
    assert 40 not in choose_sinks(q, k, 3, 1, mask)[0, 1]


def test_a_sample_without_keys_gets_zeros_and_masked_keys_may_hold_anything() -> None:
    q, k, v, w = make((9, 9), 1)
    mask = torch.ones(2, 82, dtype=torch.bool)
    mask[1] = False
    mask[0, 30:50] = False
    clean = value_and_gradients(scatterbrain_attention, q, k, v, w, (9, 9), 4, 6, key_mask=mask)
    assert (clean[0][1] == 0).all()
    k[0, :, 30:50], v[0, :, 30:50] = torch.nan, torch.nan
    poisoned = value_and_gradients(scatterbrain_attention, q, k, v, w, (9, 9), 4, 6, key_mask=mask)
    assert_same(poisoned, clean, 1e-12)
    assert not any(gradient[0, :, 30:50].any() for gradient in poisoned[2:])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9))
def test_groups_of_windows_hold_each_token_once(rows: int, columns: int, largest: int, max_windows: int) -> None:
    grid = (rows, columns)
    window = (largest, largest)
    tokens = torch.arange(1, rows * columns + 1).reshape(1, 1, -1, 1)
    numbers = window_numbers(grid, window).reshape(1, 1, -1, 1)
    seen, seen_numbers = [], []
    groups = group_windows(grid, window, max_windows)
    for group, windows, owners in zip(
        groups, to_windows(tokens, grid, groups), to_windows(numbers, grid, groups), strict=True
    ):
        assert math.prod(group.shape) <= max_windows
        assert max(group.window) <= largest
        rectangle = tokens.reshape(grid)[group.rows, group.columns]
        assert torch.equal(from_windows(windows.reshape(1, 1, -1, 1), group)[0, :, :, 0, 0], rectangle)
        seen += rectangle.flatten().tolist()
        for own in owners.reshape(math.prod(group.shape), -1).tolist():
            (number,) = set(own)
            seen_numbers.append(number)
    assert sorted(seen) == list(range(1, rows * columns + 1))
    assert sorted(seen_numbers) == sorted(set(seen_numbers))


def test_windows_are_as_equal_as_they_can_be() -> None:
    windows = [group.window for group in group_windows((37, 146), (16, 12), max_windows=4)]
    assert [rows for rows, _ in dict.fromkeys((rows, 0) for rows, _ in windows)] == [13, 12]
    assert {columns for _, columns in windows} == {12, 11}
    assert {group.window for group in group_windows((5, 16), (16, 16), max_windows=9)} == {(5, 16)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (9, 10)}, r"grid of 9 x 10 are 91 tokens, got 82; pass grid=\(rows, columns\)"),
        ({"window_size": -1}, "0 or more, got -1, 64 and 1"),
        ({"kernel": "relu"}, r"softmax\+, softmax-hyp\+ or oprf, got 'relu'"),
        ({"projection": torch.zeros(12, 8)}, "head_dim=16"),
        ({"key_mask": torch.ones(2, 81, dtype=torch.bool)}, r"\[2, 82\].*got torch.bool \[2, 81\]"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    q, k, v, w = make((9, 9), 1)
    with pytest.raises(ValueError, match=message):
        scatterbrain_attention(**{"q": q, "k": k, "v": v, "projection": w, "grid": (9, 9), **change})
