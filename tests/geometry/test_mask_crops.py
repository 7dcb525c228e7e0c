"""Masks inside their rectangles against whole ones."""

import numpy as np
import pytest

from perf_vit.geometry.boxes import intersecting_pairs
from perf_vit.geometry.objects import crop_to_window, mask_intersections
from perf_vit.types import MaskCrops, Window


def discs(num: int, seed: int, height: int = 47, width: int = 63) -> np.ndarray:
    """Discs that may overlap and be cut by the image's edges, and a mask without a pixel."""
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[:height, :width]
    places = rng.uniform([0, 0, 1], [height, width, 9], (num, 3))
    masks = [(rows - y) ** 2 + (cols - x) ** 2 < radius**2 for y, x, radius in places]
    return np.stack([*masks, np.zeros((height, width), bool)])


def test_shared_pixels_are_those_of_whole_masks() -> None:
    masks, others = discs(12, 0), discs(9, 1)
    first, second, counts = mask_intersections(MaskCrops.from_masks(masks), MaskCrops.from_masks(others))
    expected = np.einsum("nhw,mhw->nm", masks.astype(int), others.astype(int))
    assert (first.tolist(), second.tolist()) == tuple(index.tolist() for index in np.nonzero(expected))
    assert counts.tolist() == expected[expected > 0].tolist()
    assert len(counts) > 5


def test_areas_and_parts_in_windows_are_those_of_whole_masks() -> None:
    masks = discs(12, 2)
    crops = MaskCrops.from_masks(masks)
    assert crops.areas().tolist() == masks.sum(axis=(1, 2)).tolist()
    assert crops.take(masks.any(axis=(1, 2))).areas().tolist() == [area for area in crops.areas() if area]
    window = Window(-3, 20, 31, 25)
    for index, mask in enumerate(masks):
        seen = np.zeros(window.shape, bool)
        part = crop_to_window(crops, index, window)
        if part is not None:
            seen[part[0]] = part[1]
        assert (seen[3:] == mask[:28, 20:45]).all()
        assert not seen[:3].any()


@pytest.mark.parametrize("num", [0, 1, 40])
def test_pairs_that_meet_are_those_of_all_pairs(num) -> None:
    rng = np.random.default_rng(num)
    boxes, others = (np.tile(rng.integers(0, 60, (count, 2)), 2) for count in (num, 25))
    boxes[:, 2:] += rng.integers(0, 20, (num, 2))
    others[:, 2:] += rng.integers(1, 20, (25, 2))
    low, high = boxes[:, None, :2] <= others[:, 2:], boxes[:, None, 2:] >= others[:, :2]
    first, second = intersecting_pairs(boxes, others)
    assert [first.tolist(), second.tolist()] == [index.tolist() for index in np.nonzero((low & high).all(-1))]
