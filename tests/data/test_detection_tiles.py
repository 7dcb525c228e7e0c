import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from label_cases import write_image, write_mask
from torch.utils.data import DataLoader

from perf_vit.data import collate_objects
from perf_vit.data.base import EpochSampler
from perf_vit.data.detection_tiles import DetectionGrid, DetectionImages, DetectionTiles
from perf_vit.data.samplers import make_sampler
from perf_vit.errors import ConfigError, InputError
from perf_vit.geometry.objects import crop_to_window
from perf_vit.labels.objects import ImageRecord, OutlineMasks, objects_in, read_object_labels
from perf_vit.labels.objects.masks import Rle
from perf_vit.sources import open_source
from perf_vit.transforms import Normalizer
from perf_vit.types import Window

NORMALIZER = Normalizer((100.0,) * 3, (50.0,) * 3)


def _record(boxes: list, path: str = "-", height: int = 100, width: int = 120, **changes) -> ImageRecord:
    boxes_xyxy = np.array(boxes, np.float64).reshape(-1, 4)
    values = {"labels": np.arange(len(boxes)) % 2, "ignored": np.zeros(len(boxes), bool), **changes}
    return ImageRecord(path=path, height=height, width=width, boxes_xyxy=boxes_xyxy, **values)


@pytest.fixture(scope="module")
def nuclei(tmp_path_factory):
    """Three images of different size with instance masks; the last holds nothing."""
    folder = tmp_path_factory.mktemp("nuclei")
    for name, height, width, seed in (("a", 150, 131, 1), ("b", 40, 200, 2), ("c", 64, 64, 3)):
        write_image(folder / "images" / f"{name}.png", height=height, width=width, seed=seed)
        mask = np.zeros((height, width), np.uint16)
        rng = np.random.default_rng(seed)
        for value in range(1, 1 + (name != "c") * 25):
            row, col = rng.integers(0, height - 9), rng.integers(0, width - 9)
            mask[row : row + rng.integers(2, 10), col : col + rng.integers(2, 10)] = value
        write_mask(folder / "masks" / f"{name}.png", mask)
    return read_object_labels(folder / "masks", folder / "images", label_format="instances", classes=["nucleus"])


def _windows(index, seed: int = 0, sampler: str = "objects", **changes) -> DetectionTiles:
    options = {"tile_px": 48, "tiles_per_epoch": 8, "scale": (0.7, 1.4), **changes}
    made = make_sampler(sampler, index.records, options["tile_px"])
    return DetectionTiles(DetectionImages(index.records), made, NORMALIZER, seed=seed, **options)


def test_objects_are_clipped_dropped_or_ignored_by_what_is_visible() -> None:
    record = _record([[10, 10, 20, 20], [35, 10, 55, 20], [45, 10, 55, 20], [50, 0, 60, 10], [39, 39, 80, 80]])
    objects = objects_in(record, Window(5, 5, 45, 45), min_visible=0.5)
    assert objects.boxes_xyxy.tolist() == [[5, 5, 15, 15], [30, 5, 45, 15], [40, 5, 45, 15], [34, 34, 45, 45]]
    assert objects.ignored.tolist() == [False, False, False, True]
    assert objects.labels.tolist() == [0, 1, 0, 0]
    assert objects.boxes_xyxy.dtype == np.float32


def test_a_window_past_the_edge_and_one_without_objects() -> None:
    record = _record([[0, 0, 10, 10]])
    assert objects_in(record, Window(-20, -30, 40, 40), min_visible=0.5).boxes_xyxy.tolist() == [[30, 20, 40, 30]]
    empty = objects_in(record, Window(50, 50, 10, 10), min_visible=0.5)
    assert len(empty) == 0
    assert empty.boxes_xyxy.shape == (0, 4)


def test_oriented_boxes_stay_whole_and_their_own_area_decides_what_is_visible() -> None:
    # A thin diagonal: half of its upright box lies in the window's corner, but only a quarter of its length.
    oriented = np.array([[50, 50, 80, 2, math.pi / 4]])
    half = 40 / math.sqrt(2) + 1 / math.sqrt(2)
    record = _record([[50 - half, 50 - half, 50 + half, 50 + half]], oriented_boxes=oriented)
    objects = objects_in(record, Window(0, 0, 36, 100), min_visible=0.25)
    assert objects.oriented_boxes[0] == pytest.approx([50, 50, 80, 2, math.pi / 4])
    share = (36 - (50 - half)) / (2 * half)
    assert objects.ignored.tolist() == [False]
    assert objects_in(record, Window(0, 0, 36, 100), min_visible=share + 0.02).ignored.tolist() == [True]
    # The upright boxes meet here, the oriented one does not.
    assert len(objects_in(record, Window(25, 60, 20, 20), min_visible=0.25)) == 0


@settings(deadline=None, max_examples=40)
@given(st.integers(-30, 140), st.integers(-30, 190), st.integers(1, 90), st.integers(0, 1))
def test_masks_and_boxes_of_any_window_are_those_of_the_whole_image(nuclei, row, col, size, image) -> None:
    record = nuclei.records[image]
    window = Window(row, col, size, size)
    whole = np.pad(record.masks.read(np.arange(len(record)), record.extent), ((0, 0), (240, 240), (240, 240)))
    expected = whole[:, row + 240 : row + 240 + size, col + 240 : col + 240 + size]
    expected = expected[expected.any(axis=(1, 2))]
    objects = objects_in(record, window, min_visible=0.3)
    assert objects.masks.shape == (len(expected), size, size)
    assert (objects.masks == expected).all()
    for mask, (left, top, right, bottom) in zip(objects.masks, objects.boxes_xyxy, strict=True):
        rows, cols = np.nonzero(mask)
        assert (left, top, right, bottom) == (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1)


@pytest.mark.parametrize("sampler", ["random", "objects", "balanced"])
def test_samples_depend_on_seed_and_index_whatever_the_workers(nuclei, sampler) -> None:
    options = {"batch_size": 2, "sampler": EpochSampler(8), "collate_fn": collate_objects}
    alone = list(DataLoader(_windows(nuclei, sampler=sampler), **options))
    workers = list(DataLoader(_windows(nuclei, sampler=sampler), num_workers=2, **options))
    assert len(alone) == 4
    for (images, objects, _), (other_images, other_objects, _) in zip(alone, workers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(images, other_images, strict=True))
        assert [o.boxes_xyxy.tolist() for o in objects] == [o.boxes_xyxy.tolist() for o in other_objects]
    assert not torch.equal(alone[0][0][0], _windows(nuclei, seed=1, sampler=sampler)[0][0])


def test_tiles_have_one_size_and_their_boxes_follow_their_masks(nuclei) -> None:
    dataset = _windows(nuclei, scale=(1.0, 1.0))
    for index in range(30):
        image, objects, _ = dataset[index]
        assert image.shape == (3, 48, 48)
        assert image.dtype == torch.float32
        assert objects.masks.shape[1:] == (48, 48)
        for mask, (left, top, right, bottom) in zip(objects.masks, objects.boxes_xyxy.astype(int), strict=True):
            assert mask[top:bottom, left:right].sum() == mask.sum() > 0
            assert mask[top].any()
            assert mask[:, right - 1].any()


def test_pixels_under_a_mask_move_with_it(tmp_path) -> None:
    pixels = np.zeros((50, 70), np.uint8)
    mask = np.zeros((50, 70), np.uint16)
    for value, (row, col) in enumerate([(3, 5), (20, 40), (30, 10)], 1):
        mask[row : row + 8, col : col + 13] = value
        pixels[mask == value] = 50 * value
    write_mask(tmp_path / "images" / "a.png", pixels)
    write_mask(tmp_path / "masks" / "a.png", mask)
    index = read_object_labels(tmp_path / "masks", tmp_path / "images", label_format="instances")
    sampler = make_sampler("objects", index.records, 40, random_share=0)
    plain = Normalizer((0.0,), (1.0,))
    dataset = DetectionTiles(DetectionImages(index.records), sampler, plain, tile_px=40, tiles_per_epoch=1, seed=0)
    for i in range(20):
        image, objects, _ = dataset[i]
        assert len(objects) > 0
        assert all(len(np.unique(image[0].numpy()[mask])) == 1 for mask in objects.masks)
        assert (objects.masks.any(0) == (image[0].numpy() > 0)).all()


@pytest.mark.parametrize("tile_px", [17, 64, 300])
def test_a_grid_counts_each_object_once(nuclei, tile_px) -> None:
    grid = DetectionGrid(DetectionImages(nuclei.records, min_visible=0.9), NORMALIZER, tile_px=tile_px)
    counted = sum(int((~grid[i][1].ignored).sum()) for i in range(len(grid)))
    # An object whose centre lies in a hole of its mask, cut by others drawn over it, may have no pixel at its owner.
    assert 0.9 * nuclei.counts["objects"] <= counted <= nuclei.counts["objects"]
    if tile_px == 300:
        assert counted == nuclei.counts["objects"]


def test_object_sampler_windows_hold_the_object_and_stay_inside_larger_images() -> None:
    rng = np.random.default_rng(0)
    boxes = [[0, 0, 3, 3], [117, 97, 120, 100], [50, 40, 60, 60]]
    sampler = make_sampler("objects", [_record([]), _record(boxes)], 32, random_share=0)
    held = np.zeros(3, int)
    for _ in range(300):
        image, window = sampler.draw(rng, 32)
        assert image == 1
        assert Window(0, 0, 100, 120).intersect(window) == window
        inside = [w for w in boxes if window.col <= w[0] and w[2] <= window.col_stop]
        held += [
            window.col <= left and right <= window.col_stop and window.row <= top and bottom <= window.row_stop
            for left, top, right, bottom in boxes
        ]
        assert inside
    assert held.sum() == 300
    assert held.min() > 60


def test_an_object_larger_than_the_window_has_its_middle_in_it() -> None:
    sampler = make_sampler("objects", [_record([[10, 10, 110, 90]])], 20, random_share=0)
    _, window = sampler.draw(np.random.default_rng(0), 20)
    assert (window.row, window.col) == (40, 50)


def test_a_window_larger_than_the_image_begins_at_its_corner() -> None:
    sampler = make_sampler("objects", [_record([[10, 10, 110, 90]])], 256, random_share=0)
    assert sampler.draw(np.random.default_rng(0), 256) == (0, Window(0, 0, 256, 256))


def test_balanced_sampler_draws_a_rare_class_as_often_as_a_common_one() -> None:
    boxes = [[5 * i, 5, 5 * i + 3, 9] for i in range(20)] + [[100, 80, 104, 84]]
    labels = np.array([0] * 20 + [1])
    shares = {}
    for sampler in ("objects", "balanced"):
        made = make_sampler(sampler, [_record(boxes, labels=labels)], 16, random_share=0)
        rng = np.random.default_rng(0)
        shares[sampler] = np.mean([made.draw(rng, 16)[1].row > 40 for _ in range(400)])
    assert shares["objects"] < 0.1
    assert 0.42 < shares["balanced"] < 0.58


def test_random_sampler_visits_images_by_their_size() -> None:
    sampler = make_sampler("random", [_record([], height=64, width=64), _record([], height=192, width=64)], 64)
    rng = np.random.default_rng(0)
    share = np.mean([sampler.draw(rng, 64)[0] for _ in range(400)])
    assert 0.68 < share < 0.82


def test_sampling_around_no_object_is_an_error() -> None:
    ignored = _record([[0, 0, 5, 5]], ignored=np.array([True]))
    with pytest.raises(InputError, match="expected objects to cut windows around, got none in 1 images"):
        make_sampler("objects", [ignored], 32)
    with pytest.raises(ConfigError, match="sampler must be one of random, objects, balanced, got grid"):
        make_sampler("grid", [ignored], 32)


def test_images_of_different_bands_are_an_error_but_grey_ones_become_colour(tmp_path) -> None:
    color = write_image(tmp_path / "a.png", num_bands=3)
    grey = write_image(tmp_path / "b.png", num_bands=1)
    records = [_record([], str(path), 40, 60) for path in (color, grey)]
    image, _ = DetectionImages(records).read(1, Window(0, 0, 40, 60))
    assert image.pixels.shape == (3, 40, 60)
    assert (image.pixels[0] == image.pixels[2]).all()
    assert len(image.pixels) == len(DetectionImages(records).read_reduced(1, 32).pixels)
    with pytest.raises(InputError, match="expected labelled images to cut tiles from, got none"):
        DetectionImages([])


def test_scenes_of_other_band_counts_are_an_error(make_scene) -> None:
    records = [_record([], str(make_scene(num_bands=count)), 70, 90) for count in (3, 4)]
    with pytest.raises(InputError, match=r"has 3 bands, .* 4; choose common ones with data\.bands"):
        DetectionImages(records)
    assert DetectionImages(records, open_input=partial(open_source, bands=[3, 1])).num_bands == 2


def test_invalid_pixels_become_zero_and_objects_on_them_are_ignored(make_scene) -> None:
    pixels = np.full((3, 64, 64), 200, np.float32)
    pixels[:, :, :20] = np.nan
    path = make_scene(pixels=pixels, nodata=None)
    record = _record([[2, 2, 12, 12], [18, 30, 30, 40]], str(path), 64, 64)
    grid = DetectionGrid(DetectionImages([record]), NORMALIZER, tile_px=80)
    image, objects, _ = grid[0]
    assert objects.ignored.tolist() == [True, False]
    assert (image[:, :, :20] == 0).all()
    assert (image[:, :64, 20:64] == 2).all()
    assert (image[:, 64:] == 0).all()


@pytest.mark.parametrize("labels", ["instances", "polygons", "run lengths"])
@pytest.mark.parametrize("window", [Window(0, 0, 150, 131), Window(20, 30, 48, 61), Window(100, 90, 60, 50)])
def test_cropped_masks_are_whole_ones_inside_their_rectangles(nuclei, labels, window) -> None:
    record = nuclei.records[0]
    if labels != "instances":
        masks = record.masks.read(np.arange(len(record)), record.extent)
        runs = [
            np.diff(np.flatnonzero(np.diff(mask.T.ravel(), prepend=~mask[0, 0], append=~mask[-1, -1])))
            for mask in masks
        ]
        outlines = [
            Rle(np.append(0, run) if mask[0, 0] else run, 150, 131) for run, mask in zip(runs, masks, strict=True)
        ]
        if labels == "polygons":
            outlines = [shapely.Point(xy).buffer(6) for xy in record.boxes_xyxy[:, :2].tolist()]
        record = dataclasses.replace(record, masks=OutlineMasks(outlines))
    whole = objects_in(record, window, min_visible=0.0)
    cropped = objects_in(record, window, min_visible=0.0, crop_masks=True)
    assert (cropped.labels, cropped.ignored) == (pytest.approx(whole.labels), pytest.approx(whole.ignored))
    assert cropped.boxes_xyxy.tolist() == whole.boxes_xyxy.tolist()
    assert cropped.masks is None
    assert len(cropped) == len(whole) > 0
    for index, mask in enumerate(whole.masks):
        pasted = np.zeros_like(mask)
        place, crop = crop_to_window(cropped.mask_crops, index, Window(0, 0, *window.shape))
        pasted[place] = crop
        assert (pasted == mask).all()


def test_masks_are_there_for_images_without_objects_too(nuclei) -> None:
    _, objects = DetectionImages(nuclei.records).read(2, Window(0, 0, 30, 30))
    assert objects.masks.shape == (0, 30, 30)
    assert dataclasses.is_dataclass(objects)
