from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from perf_vit.ops.sinks import sinks_for_size


def test_small_images_get_four_times_the_sinks_of_large_ones() -> None:
    assert [sinks_for_size(side**2) for side in (1, 37, 71, 73, 145, 146, 292)] == [256, 256, 256, 245, 64, 64, 64]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 200_000), min_size=2))
def test_more_tokens_never_get_more_sinks_and_between_the_bounds_cost_no_more(sizes: list[int]) -> None:
    sizes.sort()
    numbers = [sinks_for_size(size) for size in sizes]
    assert all(fewer >= more for fewer, more in pairwise(numbers))
    for size, number in zip(sizes, numbers, strict=True):
        assert 64 <= number <= 256
        assert number in (64, 256) or 0 <= 5 * 2**18 - size * number < size
