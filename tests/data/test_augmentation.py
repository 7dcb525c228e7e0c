"""What augmentation does to tiles of real files, for each task."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from label_cases import write_image
from synthetic_slide import make_slide
from torch.utils.data import DataLoader

from perf_vit.config import load_config
from perf_vit.data import (
    AugmentConfig,
    ClassificationDataConfig,
    ClassificationSplitConfig,
    DetectionDataConfig,
    DetectionSplitConfig,
    SegmentationDataConfig,
    SegmentationSplitConfig,
    build_classification_datamodule,
    build_detection_datamodule,
    build_segmentation_datamodule,
    collate_objects,
)
from perf_vit.data.segmentation import _placed
from perf_vit.errors import ConfigError
from perf_vit.types import IGNORE_INDEX

# A building of each raster: left, top, width and height in metres from its corner.
BUILDING = (22.0, 18.0, 16.0, 10.0)
EXTENT_M = 60.0


def raster(path: Path, pixels: np.ndarray, pixel_m: float, crs: str | None = "EPSG:32637") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    place = {} if crs is None else {"crs": crs, "transform": Affine(pixel_m, 0, 500_000, 0, -pixel_m, 6_000_000)}
    # Else a fourth band is taken as transparency.
    place |= {"photometric": "MINISBLACK", "alpha": "NO"}
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": pixels.dtype, **place}
    with rasterio.open(path, "w", **profile) as dataset:
        dataset.write(pixels)
    return path


def building_mask(pixel_m: float) -> np.ndarray:
    size = round(EXTENT_M / pixel_m)
    left, top, width, height = (round(side / pixel_m) for side in BUILDING)
    mask = np.zeros((size, size), np.uint8)
    mask[top : top + height, left : left + width] = 1
    return mask


def scene(
    folder: Path, name: str, pixel_m: float, num_bands: int = 3, crs: str | None = "EPSG:32637"
) -> SegmentationSplitConfig:
    """A raster that is bright where its building is, and the mask of it."""
    mask = building_mask(pixel_m)
    noise = np.random.default_rng(num_bands).integers(0, 20, (num_bands, *mask.shape)).astype(np.uint8)
    image = raster(folder / "images" / f"{name}.tif", noise + 200 * mask, pixel_m, crs)
    return SegmentationSplitConfig(
        image=str(image), labels=str(raster(folder / "masks" / f"{name}.tif", mask[None], pixel_m, crs))
    )


def maps(
    train: SegmentationSplitConfig, *more: SegmentationSplitConfig, augment: AugmentConfig, **changes
) -> SegmentationDataConfig:
    given = {
        "classes": ["ground", "building"],
        "background": "ground",
        "tile_px": 32,
        "batch_size": 2,
        "tiles_per_epoch": 6,
        **changes,
    }
    return SegmentationDataConfig(train=train, extra_train=list(more), val=train, augment=augment, **given)


def objects_of(folder: Path, augment: AugmentConfig, **changes) -> DetectionDataConfig:
    split = DetectionSplitConfig(image=str(folder / "images"), labels=str(folder / "masks"), label_format="instances")
    given = {"classes": ["building"], "tile_px": 32, "batch_size": 2, "tiles_per_epoch": 6, "random_share": 0.0}
    return DetectionDataConfig(train=split, val=split, augment=augment, **{**given, **changes})


def bright(tile: torch.Tensor, data) -> np.ndarray:
    """Where all bands of a tile are bright, in the units of its file."""
    mean, std = (np.array(values)[:, None, None] for values in (data.normalizer.mean, data.normalizer.std))
    return (tile.numpy() * std + mean > 110).all(axis=0)


@pytest.mark.parametrize("num_bands", [1, 4, 13])
@pytest.mark.parametrize("zoom", [{}, {"scale": (0.5, 1.5)}, {"resolution": (0.5, 1.6)}])
def test_labels_of_maps_follow_pixels(tmp_path, num_bands, zoom) -> None:
    data = build_segmentation_datamodule(
        maps(scene(tmp_path, "a", 1.0, num_bands), augment=AugmentConfig(**zoom)), seed=0
    )
    areas = []
    for index in range(40):
        tile, labels, _ = data.train[index]
        assert tile.shape == (num_bands, 32, 32)
        seen = labels.numpy() != IGNORE_INDEX
        # A pixel of blur on either side of an outline that crosses the tile.
        assert (bright(tile, data) != (labels.numpy() == 1))[seen].sum() <= 2 * 32
        areas.append(int((labels == 1).sum()))
    assert max(areas) > 100


@pytest.mark.parametrize("num_bands", [1, 4, 13])
@pytest.mark.parametrize("zoom", [{}, {"scale": (0.5, 1.5)}, {"resolution": (0.5, 1.6)}])
def test_boxes_and_masks_of_objects_follow_pixels(tmp_path, num_bands, zoom) -> None:
    scene(tmp_path, "a", 1.0, num_bands)
    data = build_detection_datamodule(objects_of(tmp_path, AugmentConfig(**zoom)), seed=0)
    for index in range(40):
        tile, objects, _ = data.train[index]
        assert tile.shape == (num_bands, 32, 32)
        rows, cols = np.nonzero(bright(tile, data))
        box = (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1)
        assert objects.boxes_xyxy[0] == pytest.approx(box, abs=1.01)
        assert (objects.masks[0] != bright(tile, data)).sum() <= 2 * 32


def test_oriented_boxes_follow_pixels_through_flips_and_sizes(tmp_path) -> None:
    # A thin bar from left top to right bottom, 2 units long for each unit down.
    corners = np.array([[20.0, 20], [60, 40], [58, 44], [18, 24]])
    rows, cols = np.mgrid[:80, :80] + 0.5
    ahead, aside = np.array([2, 1]) / math.sqrt(5), np.array([-1, 2]) / math.sqrt(5)
    along = (cols - 20) * ahead[0] + (rows - 20) * ahead[1]
    across = (cols - 20) * aside[0] + (rows - 20) * aside[1]
    bar = (along > 0) & (along < math.hypot(40, 20)) & (across > 0) & (across < math.hypot(2, 4))
    raster(tmp_path / "images" / "a.tif", np.where(bar, 220, 10).astype(np.uint8)[None], 0.5)
    (tmp_path / "labels").mkdir()
    line = " ".join(f"{value:g}" for value in corners.ravel())
    (tmp_path / "labels" / "a.txt").write_text(f"{line} ship 0\n")
    split = DetectionSplitConfig(image=str(tmp_path / "images"), labels=str(tmp_path / "labels"), label_format="dota")
    given = {"classes": ["ship"], "tile_px": 64, "batch_size": 2, "tiles_per_epoch": 6, "random_share": 0.0}
    augment = AugmentConfig(resolution=(0.4, 0.6))
    data = build_detection_datamodule(DetectionDataConfig(train=split, val=split, augment=augment, **given), seed=0)
    angles = []
    for index in range(40):
        tile, objects, _ = data.train[index]
        rows, cols = np.nonzero(bright(tile, data))
        x, y, _, _, angle = objects.oriented_boxes[0]
        assert (x, y) == pytest.approx((cols.mean() + 0.5, rows.mean() + 0.5), abs=1.5)
        slope = np.linalg.eigh(np.cov(cols, rows))[1][:, 1]
        assert abs(slope @ (math.cos(angle), math.sin(angle))) > 0.995
        angles.append(round(math.degrees(angle)))
    assert len(set(angles)) == 4


def test_a_tile_shows_the_same_size_of_pixel_whatever_the_image_has(tmp_path) -> None:
    for name, pixel_m in (("a", 0.5), ("b", 1.0), ("c", 2.0)):
        scene(tmp_path, name, pixel_m)
    data = build_detection_datamodule(objects_of(tmp_path, AugmentConfig(flips=False, resolution=(1.0, 1.0))), seed=0)
    for index in range(20):
        _, objects, _ = data.train[index]
        left, top, right, bottom = objects.boxes_xyxy[0]
        assert (right - left, bottom - top) == BUILDING[2:]


def test_pixel_sizes_are_drawn_between_both_bounds_and_maps_show_more_of_the_scene(tmp_path) -> None:
    train = scene(tmp_path, "a", 1.0)
    config = maps(train, augment=AugmentConfig(flips=False, resolution=(0.5, 1.8)), tile_px=33)
    data = build_segmentation_datamodule(config, seed=0)
    areas = []
    for index in range(60):
        _, labels, _ = data.train[index]
        # Windows of up to 59 pixels lie inside the scene of 60: nothing is uncovered.
        assert (labels != IGNORE_INDEX).all()
        inner = labels[1:-1, 1:-1] == 1
        if inner.any() and not (labels[[0, -1]] == 1).any() and not (labels[:, [0, -1]] == 1).any():
            areas.append(int(inner.sum()))
    sides = np.sqrt(BUILDING[2] * BUILDING[3] / np.array(areas))
    assert 0.48 < sides.min() < 1
    assert 1.5 < sides.max() < 1.9


@pytest.mark.parametrize("kind", ["map", "objects"])
def test_samples_depend_on_seed_and_index_whatever_the_workers(tmp_path, kind) -> None:
    train = scene(tmp_path, "a", 1.0)
    augment = AugmentConfig(resolution=(0.5, 1.5), gain=0.2, offset=0.2, stain=0.2)
    if kind == "map":
        first, other = (build_segmentation_datamodule(maps(train, augment=augment), seed=seed).train for seed in (0, 1))
        options = {}
    else:
        config = objects_of(tmp_path, augment)
        first, other = (build_detection_datamodule(config, seed=seed).train for seed in (0, 1))
        options = {"collate_fn": collate_objects}
    alone, shared = (list(DataLoader(first, batch_size=2, num_workers=number, **options)) for number in (0, 2))
    for (tiles, labels, _), (other_tiles, other_labels, _) in zip(alone, shared, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tiles, other_tiles, strict=True))
        if kind == "map":
            assert torch.equal(labels, other_labels)
            continue
        for one, another in zip(labels, other_labels, strict=True):
            assert all(
                np.array_equal(getattr(one, x), getattr(another, x)) for x in ("boxes_xyxy", "labels", "ignored")
            )
    assert not torch.equal(first[0][0], other[0][0])
    assert not torch.equal(first[0][0], first[1][0])


@pytest.fixture(scope="module")
def slide(tmp_path_factory) -> SegmentationSplitConfig:
    """A slide of 0.5 micrometres per pixel with one annotation of 80 x 60 micrometres."""
    path = make_slide(tmp_path_factory.mktemp("slide") / "a.svs", 512, 512, mpp=0.5, tile_px=64, tissue_share=1.0)
    ring = [[128, 192], [288, 192], [288, 312], [128, 312], [128, 192]]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    properties = {"objectType": "annotation", "classification": {"name": "building"}}
    feature = {"type": "Feature", "geometry": geometry, "properties": properties}
    path.with_suffix(".geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    return SegmentationSplitConfig(image=str(path), labels=str(path.with_suffix(".geojson")), region=[16, 24, 230, 220])


def slide_maps(slide: SegmentationSplitConfig, resolution: tuple[float, float]) -> SegmentationDataConfig:
    given = {"attribute": "classification", "mpp": 1.0}
    return maps(slide, augment=AugmentConfig(flips=False, resolution=resolution), **given)


def test_slides_are_read_at_the_finest_size_that_is_shown_and_has_pixels(slide) -> None:
    data = build_segmentation_datamodule(slide_maps(slide, (0.25, 2.0)), seed=0)
    (train,) = data.train.sources
    assert train.source.mpp == pytest.approx(0.5)
    assert (train.region.row, train.region.col, train.region.height, train.region.width) == (32, 48, 460, 440)
    assert data.val.source.source.mpp == pytest.approx(1.0)
    plain = build_segmentation_datamodule(slide_maps(slide, (1.0, 2.0)), seed=0)
    assert plain.train.sources[0].source.mpp == pytest.approx(1.0)


def test_a_region_lies_on_the_same_tissue_at_a_level_near_the_size_asked_for(tmp_path) -> None:
    region = [16, 24, 230, 220]
    image = make_slide(tmp_path / "a.svs", 512, 512, mpp=0.5, tile_px=64, tissue_share=1.0)
    split = SegmentationSplitConfig(image=str(image), labels="unused.geojson", region=region)
    source, found = _placed(slide_maps(split, (0.504, 2.0)), image, region, "data.train", train=True)
    # A level is read as it is: its pixels are 0.8 % smaller than those that were asked for.
    assert source.mpp == pytest.approx(0.5)
    assert (found.row, found.col, found.row_stop, found.col_stop) == (32, 48, 492, 488)


def test_tiles_of_a_slide_at_its_own_size_are_its_pixels(slide) -> None:
    data = build_segmentation_datamodule(slide_maps(slide, (0.5, 0.5)), seed=0)
    (train,) = data.train.sources
    whole = data.normalizer(train.source.read(train.source.extent))
    tile = data.train[3][0].numpy()
    views = np.lib.stride_tricks.sliding_window_view(whole[0], tile.shape[1:])
    assert (views == tile[0]).all(axis=(2, 3)).sum() >= 1


@pytest.mark.parametrize(("sizes", "side"), [((0.5, 0.5), 0.5), ((2.0, 2.0), 2.0), ((0.25, 0.25), 0.25)])
def test_objects_of_slides_have_their_size_in_micrometres(slide, sizes, side) -> None:
    split = DetectionSplitConfig(image=slide.image, labels=slide.labels, label_format="polygons")
    given = {"classes": ["building"], "attribute": "classification", "batch_size": 2, "tiles_per_epoch": 4}
    augment = AugmentConfig(flips=False, resolution=sizes)
    config = DetectionDataConfig(
        train=split, mpp=1.0, tile_px=352, random_share=0.0, augment=augment, val=split, **given
    )
    data = build_detection_datamodule(config, seed=0)
    left, top, right, bottom = data.train[0][1].boxes_xyxy[0]
    assert (right - left, bottom - top) == pytest.approx((80 / side, 60 / side), abs=0.6)
    box = data.val[0][1].boxes_xyxy[0]
    assert box.tolist() == [64, 96, 144, 156]


def test_stains_change_the_colours_of_every_task_alone(tmp_path) -> None:
    train = scene(tmp_path, "a", 1.0)
    still, stained = (AugmentConfig(flips=False, stain=stain) for stain in (0.0, 0.3))
    for number in range(4):
        write_image(tmp_path / "classes" / "ab"[number % 2] / f"{number}.png", height=32, width=32, seed=number)
    split = ClassificationSplitConfig(image=str(tmp_path / "classes"))
    changed = {}
    for augment in (still, stained):
        scenes = ClassificationDataConfig(train=split, val=split, tile_px=32, batch_size=2, augment=augment)
        for name, data in (
            ("map", build_segmentation_datamodule(maps(train, augment=augment, tile_px=60), seed=0)),
            ("objects", build_detection_datamodule(objects_of(tmp_path, augment, tile_px=60), seed=0)),
            ("scenes", build_classification_datamodule(scenes, seed=0)),
        ):
            changed.setdefault(name, []).append([data.train[index] for index in range(4)])
    for name, (plain, jittered) in changed.items():
        differences = [float((a[0] - b[0]).abs().max()) for a, b in zip(plain, jittered, strict=True)]
        assert min(differences) > 0.05, name
        for (_, target, _), (_, same, _) in zip(plain, jittered, strict=True):
            assert torch.equal(target, same) if name != "objects" else (target.masks == same.masks).all()


def test_a_classifier_takes_shuffled_bands(tmp_path) -> None:
    for number in range(4):
        write_image(tmp_path / "ab"[number % 2] / f"{number}.png", height=32, width=32, seed=number)
    split = ClassificationSplitConfig(image=str(tmp_path))
    given = {"train": split, "val": split, "tile_px": 32, "batch_size": 2}
    plain, shuffled = (
        build_classification_datamodule(
            ClassificationDataConfig(augment=AugmentConfig(flips=False, shuffle=shuffle), **given), seed=0
        ).train
        for shuffle in (0.0, 1.0)
    )
    orders = [
        [band for one in shuffled[i][0] for band in range(3) if torch.equal(one, plain[i][0][band])] for i in range(12)
    ]
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    assert len({tuple(order) for order in orders}) > 2


def test_a_tile_of_a_classifier_has_gain_and_offset(tmp_path) -> None:
    for number in range(4):
        write_image(tmp_path / "ab"[number % 2] / f"{number}.png", height=32, width=32, seed=number)
    split = ClassificationSplitConfig(image=str(tmp_path))
    plain, jittered = (
        build_classification_datamodule(
            ClassificationDataConfig(
                train=split, val=split, tile_px=32, batch_size=2, augment=AugmentConfig(flips=False, offset=offset)
            ),
            seed=0,
        ).train
        for offset in (0.0, 0.5)
    )
    shifts = [(plain[index][0] - jittered[index][0]).mean((1, 2)) for index in range(12)]
    assert all(shift.abs().max() <= 0.5 for shift in shifts)
    assert torch.stack(shifts).std() > 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": (0.5, 1.0), "scale": (0.5, 2.0)}, r"scale and data\.augment\.resolution are alternatives"),
        ({"resolution": (2.0, 1.0)}, r"data\.augment\.resolution must be \[smallest, largest\] above 0, got \[2, 1\]"),
        ({"resolution": (0.5, 40.0)}, r"factor of 16 from the pixel size .* 1 units of EPSG:32637"),
        ({"scale": (0.0, 1.0)}, r"data\.augment\.scale must be \[smallest, largest\] above 0"),
        ({"gain": -1.0}, r"data\.augment\.gain must be at least 0, got -1"),
        ({"stain": 2.0}, r"data\.augment\.stain must lie between 0 and 1, got 2"),
    ],
)
def test_values_that_do_not_fit_are_errors(tmp_path, options, message) -> None:
    train = scene(tmp_path, "a", 1.0)
    augment = AugmentConfig(**options)
    with pytest.raises(ConfigError, match=message):
        build_segmentation_datamodule(maps(train, augment=augment), seed=0)
    with pytest.raises(ConfigError, match=message):
        build_detection_datamodule(objects_of(tmp_path, augment), seed=0)


def test_images_without_a_pixel_size_and_classifiers_refuse_sizes_of_pixels(tmp_path) -> None:
    for name in ("images/a.png", "images/b.png"):
        write_image(tmp_path / name)
    split = ClassificationSplitConfig(image=str(tmp_path))
    augment = AugmentConfig(resolution=(0.5, 1.0))
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("image,xmin,ymin,xmax,ymax,label\na.png,1,1,20,20,car\nb.png,1,1,20,20,car\n")
    cars = DetectionSplitConfig(image=str(tmp_path / "images"), labels=str(boxes), label_format="csv")
    config = DetectionDataConfig(train=cars, classes=["car"], tile_px=32, augment=augment)
    with pytest.raises(ConfigError, match=r"needs the pixel size, which .*png doesn't have; .* data\.augment\.scale"):
        build_detection_datamodule(config, seed=0)
    with pytest.raises(ConfigError, match=r"is for segmentation and detection; use data\.augment\.scale"):
        build_classification_datamodule(ClassificationDataConfig(train=split, augment=augment), seed=0)


@pytest.mark.parametrize("num_bands", [1, 4, 13])
def test_stains_of_other_bands_are_an_error_before_training(tmp_path, num_bands) -> None:
    augment = AugmentConfig(stain=0.2)
    train = scene(tmp_path, "a", 1.0, num_bands)
    with pytest.raises(ConfigError, match=rf"3 bands of uint8 .*a\.tif has {num_bands} of uint8; .*data\.bands"):
        build_segmentation_datamodule(maps(train, augment=augment), seed=0)
    with pytest.raises(ConfigError, match=rf"a\.tif has {num_bands} of uint8"):
        build_detection_datamodule(objects_of(tmp_path, augment), seed=0)


def test_sizes_of_pixels_load_from_yaml(tmp_path) -> None:
    (tmp_path / "a.yaml").write_text("{train: {image: a, labels: b}, classes: [x], augment: {resolution: [0.25, 1]}}")
    config = load_config(tmp_path / "a.yaml", DetectionDataConfig, ["augment.stain=0.2"])
    assert config.augment == AugmentConfig(resolution=(0.25, 1.0), stain=0.2)


@pytest.mark.parametrize("sampler", ["random", "balanced", "grid"])
def test_a_zoom_out_reads_more_of_the_scene_instead_of_black(tmp_path, sampler) -> None:
    data = build_segmentation_datamodule(
        maps(scene(tmp_path, "a", 1.0, 3), augment=AugmentConfig(scale=(0.5, 1.0)), sampler=sampler), seed=0
    )
    for index in range(40):
        tile, labels, valid = data.train[index]
        assert valid.all()
        assert (labels != IGNORE_INDEX).all()
        assert not (tile == 0).all(0).any()


def test_the_pixel_that_a_tile_was_drawn_for_stays_in_it(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(1, 200, (3, 300, 300)).astype(np.uint8)
    raster(tmp_path / "a.tif", pixels, 1.0)
    labels = np.zeros((1, 300, 300), np.uint8)
    labels[0, 200:204, 100:104] = 1
    raster(tmp_path / "labels.tif", labels, 1.0)
    split = SegmentationSplitConfig(image=str(tmp_path / "a.tif"), labels=str(tmp_path / "labels.tif"))
    keys = {
        "classes": ["rest", "rare"],
        "tile_px": 32,
        "sampler": "balanced",
        "augment": AugmentConfig(scale=(0.6, 1.6)),
    }
    train = build_segmentation_datamodule(SegmentationDataConfig(train=split, val=split, **keys), seed=0).train
    # Half of the tiles are drawn for the rare class, which chance alone puts into few.
    assert sum(bool((train[index][1] == 1).any()) for index in range(200)) >= 90
