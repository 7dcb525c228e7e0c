"""Attention in parts equals attention over all tokens at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perf_vit.ops import clustered_attention, draw_projection, favor_attention
from perf_vit.ops.streaming import AttentionStream, ClusteredStream, LinearStream, Part, sampled_places
from perf_vit.ops.windows import WindowGrid

HEADS, DIM = 2, 8


def draw(num_tokens: int, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, HEADS, num_tokens, DIM, generator=generator, dtype=dtype) for _ in range(3)]


def parts_of(valid: Tensor, rows: int) -> list[tuple[Part, Tensor]]:
    """Parts of some rows each, with the indices of their tokens in the grid."""
    found = []
    for first in range(0, valid.shape[0], rows):
        places = valid[first : first + rows].flatten().nonzero().flatten()
        found.append((Part(first, min(rows, valid.shape[0] - first), places), places + first * valid.shape[1]))
    return [each for each in found if len(each[1])]


def run(stream: AttentionStream, tensors: list[Tensor], parts: list[tuple[Part, Tensor]], num_prefix: int) -> Tensor:
    """Attended values of the prefix and of the valid tokens, in their order."""
    q, k, v = (x[:, :, num_prefix:] for x in tensors)
    # The order of parts doesn't matter.
    for part, at in reversed(parts):
        stream.collect(q[:, :, at], k[:, :, at], v[:, :, at], part)
    attended = [stream.attend(q[:, :, at], k[:, :, at], v[:, :, at], part) for part, at in parts]
    return torch.cat([stream.attend_prefix(), *attended], dim=2)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 23),
    columns=st.integers(1, 23),
    window_size=st.sampled_from([0, 3, 5, 16]),
    num_clusters=st.integers(1, 9),
    num_prefix=st.sampled_from([0, 1, 5]),
    share=st.sampled_from([1.0, 0.7, 0.2]),
    at_once=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_clusters_in_parts_equal_clusters_at_once(
    rows: int, columns: int, window_size: int, num_clusters: int, num_prefix: int, share: float, at_once: int, seed: int
) -> None:
    tensors = draw(num_prefix + rows * columns, seed)
    valid = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < share
    valid[rows // 2, columns // 2] = True
    height = WindowGrid.of((rows, columns), window_size).height if window_size else 4
    parts = parts_of(valid, at_once * height)
    on_grid = valid.flatten().nonzero().flatten()
    prefix = tuple(x[:, :, :num_prefix] for x in tensors)
    sample = tuple(x[:, :, num_prefix + on_grid[sampled_places(len(on_grid))]] for x in tensors)
    stream = ClusteredStream(sample, prefix, (rows, columns), window_size, num_clusters)
    found = run(stream, tensors, parts, num_prefix)

    mask = torch.cat([torch.ones(num_prefix, dtype=torch.bool), valid.flatten()])[None]
    expected = clustered_attention(*tensors, (rows, columns), window_size, 0, num_clusters, num_prefix, mask)
    torch.testing.assert_close(found, expected[:, :, mask[0]], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kernel", ["softmax+", "softmax-hyp+", "softmax-trig", "relu"])
@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_features_in_parts_equal_features_at_once(kernel: str, num_prefix: int) -> None:
    grid = (29, 41)
    tensors = draw(num_prefix + grid[0] * grid[1], seed=3)
    projection = draw_projection(16, DIM, generator=torch.Generator().manual_seed(0), kernel=kernel)
    valid = torch.rand(grid, generator=torch.Generator().manual_seed(1)) < 0.8
    prefix = tuple(x[:, :, :num_prefix] for x in tensors)
    found = run(LinearStream(prefix, projection, kernel), tensors, parts_of(valid, 6), num_prefix)

    mask = torch.cat([torch.ones(num_prefix, dtype=torch.bool), valid.flatten()])[None]
    expected = favor_attention(*tensors, projection, kernel, mask)
    torch.testing.assert_close(found, expected[:, :, mask[0]], rtol=1e-9, atol=1e-11)


def test_a_kernel_that_is_fitted_to_all_tokens_is_refused() -> None:
    prefix = tuple(draw(2, seed=0))
    with pytest.raises(ValueError, match="expected it fixed: kernel=oprf_kernel"):
        LinearStream(prefix, draw_projection(16, DIM, kernel="oprf"), "oprf")


def test_large_logits_do_not_overflow() -> None:
    grid = (9, 11)
    tensors = draw(1 + 99, seed=1, dtype=torch.float32)
    tensors[0][:, :, 0] *= 1e3
    on_grid = torch.arange(99)
    prefix = tuple(x[:, :, :1] for x in tensors)
    sample = tuple(x[:, :, 1 + on_grid[sampled_places(99)]] for x in tensors)
    parts = parts_of(torch.ones(grid, dtype=torch.bool), 3)
    found = run(ClusteredStream(sample, prefix, grid, 3, 4), tensors, parts, 1)
    expected = clustered_attention(*tensors, grid, 3, 0, 4, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
