import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perf_vit.ops.sinks import sinks_for_size, spread_tokens


def test_small_images_get_sinks_and_large_ones_none() -> None:
    assert [sinks_for_size(side**2) for side in (1, 37, 50, 51, 73, 292)] == [256, 256, 256, 0, 0, 0]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(length=st.integers(1, 40), number=st.integers(1, 50), seed=st.integers(0, 5))
def test_spread_tokens_go_from_the_first_to_the_last_in_even_steps(length: int, number: int, seed: int) -> None:
    x = torch.arange(2 * length, dtype=torch.float64).view(2, 1, length, 1)
    mask = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask[:, seed % length] = True
    for key_mask in (None, mask):
        found = spread_tokens(x, number, key_mask)
        assert found.shape == (2, 1, min(number, length), 1)
        for sample in range(2):
            seen = x[sample, 0, :, 0] if key_mask is None else x[sample, 0, key_mask[sample], 0]
            places = torch.searchsorted(seen, found[sample, 0, :, 0])
            assert torch.equal(seen[places], found[sample, 0, :, 0])
            assert places[0] == 0
            assert len(places) == 1 or places[-1] == len(seen) - 1
            assert len(places) < 2 or places.diff().max() - places.diff().min() <= 1


def test_spread_tokens_of_a_sample_without_any_still_gives_as_many() -> None:
    assert spread_tokens(torch.zeros(1, 2, 7, 3), 4, torch.zeros(1, 7, dtype=torch.bool)).shape == (1, 2, 4, 3)
