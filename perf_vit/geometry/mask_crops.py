"""Masks of objects held inside their own rectangles: pairs of them, and their parts in a window."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from perf_vit.geometry.boxes import meeting_pairs
from perf_vit.types import BoolArray, Detections, MaskCrops, ObjectLabels, Window

__all__ = ["cropped_masks", "part_in", "shared_pixels"]

IndexArray = npt.NDArray[np.int64]


def cropped_masks(objects: Detections | ObjectLabels) -> MaskCrops | None:
    """The objects' masks, whichever way they are held; None without masks."""
    if objects.mask_crops is not None or objects.masks is None:
        return objects.mask_crops
    return MaskCrops.of(torch.as_tensor(objects.masks).cpu().numpy().astype(bool, copy=False))


def part_in(masks: MaskCrops, index: int, window: Window) -> tuple[tuple[slice, slice], BoolArray] | None:
    """Where in an array of a window's pixels a mask's rectangle lies, and the mask there; None where it doesn't."""
    crop, (row, col) = masks.crops[index], masks.corners[index].tolist()
    rectangle = Window(row, col, *crop.shape)
    shared = rectangle.intersect(window)
    return None if shared is None else (shared.slices_in(window), crop[shared.slices_in(rectangle)])


def shared_pixels(masks: MaskCrops, others: MaskCrops) -> tuple[IndexArray, IndexArray, IndexArray]:
    """Pairs of a mask and another that share pixels, in the order of both, and how many, [p] each."""
    first, second = meeting_pairs(masks.rectangles(), others.rectangles())
    counts = np.array(
        [_shared(masks, i, others, j) for i, j in zip(first.tolist(), second.tolist(), strict=True)], np.int64
    )
    met = counts > 0
    return first[met], second[met], counts[met]


def _shared(masks: MaskCrops, index: int, others: MaskCrops, other: int) -> int:
    crop, (row, col) = masks.crops[index], masks.corners[index].tolist()
    found = part_in(others, other, Window(row, col, *crop.shape))
    return 0 if found is None else int(np.count_nonzero(crop[found[0]] & found[1]))
