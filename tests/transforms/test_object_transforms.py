import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perf_vit.geometry.boxes import oriented_box_corners
from perf_vit.transforms import resize_with_objects, turn_with_objects
from perf_vit.types import ObjectLabels


def _sample(height: int, width: int, num_objects: int, seed: int) -> tuple[np.ndarray, ObjectLabels]:
    """Rectangles of whole pixels, drawn into masks too, and oriented boxes of any angle."""
    rng = np.random.default_rng(seed)
    tops, lefts = rng.integers(0, height, num_objects), rng.integers(0, width, num_objects)
    bottoms = [int(rng.integers(top + 1, height + 1)) for top in tops]
    rights = [int(rng.integers(left + 1, width + 1)) for left in lefts]
    boxes = np.stack([lefts, tops, rights, bottoms], axis=1).astype(np.float32).reshape(-1, 4)
    masks = np.zeros((num_objects, height, width), bool)
    for mask, top, left, bottom, right in zip(masks, tops, lefts, bottoms, rights, strict=True):
        mask[top:bottom, left:right] = True
    sides = np.sort(rng.uniform(1, 9, (num_objects, 2)))[:, ::-1]
    angles = rng.choice([-math.pi / 2, 0, *rng.uniform(-math.pi / 2, math.pi / 2, 8)], (num_objects, 1))
    oriented = np.concatenate([rng.uniform(0, 30, (num_objects, 2)), sides, angles], axis=1).astype(np.float32)
    objects = ObjectLabels(
        labels=rng.integers(0, 3, num_objects),
        boxes_xyxy=boxes,
        ignored=rng.random(num_objects) < 0.5,
        oriented_boxes=oriented,
        masks=masks,
    )
    return rng.random((2, height, width), np.float32), objects


def _drawn(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    rows, cols = np.arange(height)[:, None] + 0.5, np.arange(width) + 0.5
    left, top, right, bottom = boxes.T[:, :, None, None]
    return (cols > left) & (cols < right) & (rows > top) & (rows < bottom)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 23), st.integers(1, 23), st.integers(0, 4), st.integers(0, 7), st.integers(0, 10_000))
def test_boxes_and_masks_turn_with_the_image(height, width, num_objects, symmetry, seed) -> None:
    image, objects = _sample(height, width, num_objects, seed)
    turned, moved = turn_with_objects(image, objects, symmetry)
    mirrored = image[:, :, ::-1] if symmetry >= 4 else image
    assert (turned == np.rot90(mirrored, symmetry % 4, axes=(1, 2))).all()
    assert moved.masks.shape == (num_objects, *turned.shape[1:])
    assert (_drawn(moved.boxes_xyxy, *turned.shape[1:]) == moved.masks).all()
    assert (moved.labels == objects.labels).all()
    assert (moved.ignored == objects.ignored).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 7), st.integers(0, 10_000))
def test_oriented_boxes_turn_as_their_corners_do_and_keep_their_angle_in_range(symmetry, seed) -> None:
    image, objects = _sample(17, 29, 5, seed)
    _, moved = turn_with_objects(image, objects, symmetry)
    xy = oriented_box_corners(objects.oriented_boxes.astype(np.float64))
    width = 29
    if symmetry >= 4:
        xy = np.stack([width - xy[..., 0], xy[..., 1]], -1)
    height = 17
    for _ in range(symmetry % 4):
        xy = np.stack([xy[..., 1], width - xy[..., 0]], -1)
        height, width = width, height
    got = oriented_box_corners(moved.oriented_boxes.astype(np.float64))
    distances = np.abs(xy[:, :, None] - got[:, None]).max(-1).min(-1)
    assert distances.max() < 1e-3
    angles = moved.oriented_boxes[:, 4]
    assert (angles >= np.float32(-math.pi / 2)).all()
    assert (angles < np.float32(math.pi / 2)).all()


def test_four_quarters_and_two_mirrorings_give_back_the_sample() -> None:
    image, objects = _sample(7, 12, 3, seed=1)
    turned, moved = image, objects
    for symmetry in (1, 1, 1, 1, 4, 4):
        turned, moved = turn_with_objects(turned, moved, symmetry)
    assert (turned == image).all()
    assert (moved.boxes_xyxy == objects.boxes_xyxy).all()
    assert np.allclose(moved.oriented_boxes, objects.oriented_boxes, atol=1e-5)
    assert (moved.masks == objects.masks).all()


def test_a_resize_by_two_scales_objects_exactly() -> None:
    image, objects = _sample(10, 14, 4, seed=3)
    everywhere = np.ones((1, *image.shape[1:]), bool)
    larger, mask, scaled = resize_with_objects(image, everywhere, objects, 20, 28)
    assert mask.all()
    assert larger.shape == (2, 20, 28)
    assert (scaled.boxes_xyxy == 2 * objects.boxes_xyxy).all()
    assert scaled.oriented_boxes[:, :4] == pytest.approx(2 * objects.oriented_boxes[:, :4], rel=1e-5)
    assert (scaled.oriented_boxes[:, 4] == objects.oriented_boxes[:, 4]).all()
    assert (scaled.masks == objects.masks.repeat(2, 1).repeat(2, 2)).all()
    back, _, _ = resize_with_objects(np.full((13, 8, 8), 2, np.float32), np.ones((1, 8, 8), bool), objects, 5, 5)
    assert np.allclose(back, 2)
