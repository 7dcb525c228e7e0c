"""Folders of images, each with a label file of its own."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from PIL import Image
from synthetic_slide import make_slide
from torch.utils.data import DataLoader

from perf_vit.data import (
    SegmentationDataConfig,
    SegmentationSplitConfig,
    build_segmentation_datamodule,
    count_class_pixels,
)
from perf_vit.data.segmentation_tiles import LabelledSource
from perf_vit.errors import ConfigError, DataWarning, InputError
from perf_vit.labels import open_labels
from perf_vit.labels.image_folder import find_label_pairs
from perf_vit.sources import open_raster
from perf_vit.types import IGNORE_INDEX

SIZES = {"a": (40, 70), "b.v1": (64, 64), "sub/c": (20, 15)}
CRS = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32622"}}


def write_photo(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_polygons(path: Path, boxes: list[tuple[float, float, float, float]], crs: dict | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rings = [[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]] for x0, y0, x1, y1 in boxes]
    features = [
        {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [ring]}} for ring in rings
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features, **({"crs": crs} if crs else {})}))


@pytest.fixture
def photos(tmp_path) -> SegmentationSplitConfig:
    """Photos without georeference of three sizes, and masks as PNG."""
    rng = np.random.default_rng(0)
    for name, size in SIZES.items():
        write_photo(tmp_path / "images" / f"{name}.jpg", rng.integers(0, 255, (*size, 3), np.uint8))
        write_photo(tmp_path / "masks" / f"{name}.png", (rng.random(size) < 0.3).astype(np.uint8))
    return SegmentationSplitConfig(image=str(tmp_path / "images"), labels=str(tmp_path / "masks"))


def config(
    train: SegmentationSplitConfig, val: SegmentationSplitConfig | None = None, **options
) -> SegmentationDataConfig:
    given = {
        "classes": ["rest", "thing"],
        "background": "rest",
        "tile_px": 32,
        "tiles_per_epoch": 12,
        "batch_size": 2,
        **options,
    }
    return SegmentationDataConfig(train=train, val=val or train, **given)


def masks_of(region: SegmentationSplitConfig) -> dict[str, np.ndarray]:
    return {name: np.asarray(Image.open(Path(region.labels) / f"{name}.png")) for name in SIZES}


def test_pairs_are_found_by_name_in_folders_and_subfolders(photos) -> None:
    pairs = find_label_pairs(photos.image, photos.labels)
    names = [(str(a.relative_to(photos.image)), str(b.relative_to(photos.labels))) for a, b in pairs]
    assert names == [("a.jpg", "a.png"), ("b.v1.jpg", "b.v1.png"), ("sub/c.jpg", "sub/c.png")]


def test_one_folder_may_lie_in_the_other_or_be_the_same(tmp_path, monkeypatch) -> None:
    for name in ("a", "b"):
        write_photo(tmp_path / "all" / f"{name}.png", np.zeros((4, 4, 3), np.uint8))
        write_photo(tmp_path / "all" / "masks" / f"{name}.png", np.zeros((4, 4), np.uint8))
        write_polygons(tmp_path / "all" / f"{name}.geojson", [])
    assert [b.suffix for _, b in find_label_pairs(tmp_path / "all", tmp_path / "all" / "masks")] == [".png"] * 2
    monkeypatch.chdir(tmp_path)
    assert [a.name for a, _ in find_label_pairs("all", tmp_path / "all" / "masks")] == ["a.png", "b.png"]
    (tmp_path / "all" / "masks").rename(tmp_path / "masks")
    pairs = find_label_pairs(tmp_path / "all", tmp_path / "all")
    assert [(a.name, b.name) for a, b in pairs] == [("a.png", "a.geojson"), ("b.png", "b.geojson")]


def test_what_has_no_partner_is_told_with_names_and_counts(photos, tmp_path) -> None:
    masks = Path(photos.labels)
    (masks / "a.png").rename(masks / "mask_a.png")
    with pytest.raises(InputError, match=r"1 of 3 label files .* no image of their name among the 3 .*mask_a\.png"):
        build_segmentation_datamodule(config(photos), seed=0)
    (masks / "mask_a.png").unlink()
    with pytest.warns(DataWarning, match=r"1 of 3 images have no labels .* are left out, the first .*a\.jpg"):
        assert len(find_label_pairs(photos.image, masks)) == 2
    write_polygons(masks / "b.v1.geojson", [])
    with pytest.raises(InputError, match=r"b\.v1\.jpg has two label files, .*b\.v1\.geojson and .*b\.v1\.png"):
        find_label_pairs(photos.image, masks)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no label files in .*empty; expected masks"):
        find_label_pairs(photos.image, tmp_path / "empty")
    with pytest.raises(InputError, match=r"no images in .*empty"):
        find_label_pairs(tmp_path / "empty", masks)


def test_other_bands_and_regions_of_folders_are_refused(photos) -> None:
    write_photo(Path(photos.image) / "sub" / "c.jpg", np.zeros(SIZES["sub/c"], np.uint8))
    message = r"1 of 3 images of data.train have another number of bands than .*a\.jpg, 3: the first, .*c\.jpg, has 1"
    with pytest.raises(ConfigError, match=message):
        build_segmentation_datamodule(config(photos), seed=0)
    photos.region = [0, 0, 5, 5]
    with pytest.raises(ConfigError, match=r"data\.train\.region is a part of one raster, and .*images is a folder"):
        build_segmentation_datamodule(config(photos), seed=0)


def test_validation_sees_each_pixel_of_each_image_once(photos) -> None:
    data = build_segmentation_datamodule(config(photos), seed=0)
    truth = masks_of(photos)
    seen = torch.cat([labels.flatten() for _, labels, _ in data.val])
    assert int((seen == 1).sum()) == sum(int((mask == 1).sum()) for mask in truth.values())
    assert int((seen != IGNORE_INDEX).sum()) == sum(mask.size for mask in truth.values())
    # The last image is smaller than a tile: the rest is padded and ignored.
    image, labels, valid = data.val[len(data.val) - 1]
    assert image.shape == (3, 32, 32)
    assert np.array_equal(labels[:20, :15], truth["sub/c"])
    assert (labels[20:] == IGNORE_INDEX).all()
    assert (image[:, 20:] == 0).all()
    assert valid[:20, :15].all()
    assert int(valid.sum()) == 20 * 15
    assert count_class_pixels(data.train.sources, 2)[1] == int((seen == 1).sum())
    assert len(data.normalizer.mean) == 3


@pytest.mark.parametrize("sampler", ["random", "balanced", "grid"])
def test_training_tiles_come_from_all_images_whatever_the_workers(photos, sampler) -> None:
    def tiles(num_workers: int):
        data = build_segmentation_datamodule(config(photos, sampler=sampler, num_workers=num_workers), seed=0)
        return list(data.train_dataloader())

    alone, shared = tiles(0), tiles(2)
    assert all(
        torch.equal(a, b)
        for one, other in zip(alone, shared, strict=True)
        for a, b in zip(one, other, strict=True)
        if a is not None
    )
    # The grid comes to the image that is smaller than a tile.
    padded = any(bool((labels == IGNORE_INDEX).any()) for _, batch, _ in alone for labels in batch)
    assert padded or sampler != "grid"


def test_extra_folders_and_single_rasters_go_together(photos, make_scene, tmp_path) -> None:
    scene = make_scene(dtype="uint8", nodata=None)
    write_polygons(tmp_path / "scene.geojson", [(401_000, 4_510_000, 401_100, 4_509_900)], _crs_of(scene))
    single = SegmentationSplitConfig(image=str(scene), labels=str(tmp_path / "scene.geojson"))
    mixed = build_segmentation_datamodule(config(single, val=photos, extra_train=[photos]), seed=0)
    assert [one.keep_open for one in mixed.train.sources] == [True, False, False, False]
    assert len(build_segmentation_datamodule(config(photos, val=single), seed=0).val.windows) == 9


def _crs_of(scene: Path) -> dict:
    with rasterio.open(scene) as dataset:
        return {"type": "name", "properties": {"name": f"urn:ogc:def:crs:EPSG::{dataset.crs.to_epsg()}"}}


def test_polygons_of_photos_are_in_their_pixels_and_empty_files_are_background(photos, tmp_path) -> None:
    labels = tmp_path / "outlines"
    write_polygons(labels / "a.geojson", [(10, 5, 30, 25)])
    write_polygons(labels / "b.v1.geojson", [])
    write_polygons(labels / "sub" / "c.geojson", [])
    region = SegmentationSplitConfig(image=photos.image, labels=str(labels))
    with pytest.warns(
        DataWarning, match=r"2 of 3 label files checked have warnings, the first: .* holds no polygons"
    ) as told:
        data = build_segmentation_datamodule(config(region), seed=0)
    assert len([each for each in told if "have warnings" in str(each.message)]) == 2
    assert count_class_pixels(data.train.sources, 2) == [40 * 70 + 64 * 64 + 20 * 15 - 400, 400]
    write_polygons(labels / "a.geojson", [(401_000, 4_510_000, 401_100, 4_509_900)])
    with pytest.raises(InputError, match=r"a\.geojson don't overlap .*a\.jpg: .* it has no CRS"):
        build_segmentation_datamodule(config(region), seed=0)


def test_chips_with_a_crs_take_polygons_in_any_and_masks_without(tmp_path) -> None:
    rng = np.random.default_rng(0)
    for number in range(3):
        path = tmp_path / "chips" / f"chip{number}.tif"
        path.parent.mkdir(exist_ok=True)
        place = Affine(0.5, 0, 650_000 + 32 * number, 0, -0.5, 9_480_000)
        with rasterio.open(
            path, "w", driver="GTiff", count=3, height=48, width=64, dtype="uint8", crs="EPSG:32622", transform=place
        ) as dataset:
            dataset.write(rng.integers(1, 255, (3, 48, 64), np.uint8))
        left, top = place @ (8, 8)
        write_polygons(tmp_path / "outlines" / f"chip{number}.geojson", [(left, top, left + 8, top - 4)], CRS)
        mask = np.zeros((48, 64), np.uint8)
        mask[8:16, 8:24] = 1
        write_photo(tmp_path / "masks" / f"chip{number}.png", mask)
    for labels in ("outlines", "masks"):
        region = SegmentationSplitConfig(image=str(tmp_path / "chips"), labels=str(tmp_path / labels))
        data = build_segmentation_datamodule(config(region), seed=0)
        assert count_class_pixels(data.train.sources, 2)[1] == 3 * 8 * 16
        if labels == "outlines":
            sources = build_segmentation_datamodule(config(region, resolution=1.0), seed=0).train.sources
            assert [one.region.shape for one in sources] == 3 * [(24, 32)]


def test_a_folder_with_one_label_file_is_still_one_mosaic(tmp_path) -> None:
    rng = np.random.default_rng(0)
    for number in range(2):
        place = Affine(0.5, 0, 650_000 + 32 * number, 0, -0.5, 9_480_000)
        (tmp_path / "chips").mkdir(exist_ok=True)
        with rasterio.open(
            tmp_path / "chips" / f"{number}.tif", "w", driver="GTiff", count=1, height=64, width=64, dtype="uint8",
            crs="EPSG:32622", transform=place,
        ) as dataset:  # fmt: skip
            dataset.write(rng.integers(1, 255, (1, 64, 64), np.uint8))
    write_polygons(tmp_path / "all.geojson", [(650_028, 9_479_980, 650_036, 9_479_972)], CRS)
    data = build_segmentation_datamodule(
        config(SegmentationSplitConfig(image=str(tmp_path / "chips"), labels=str(tmp_path / "all.geojson"))), seed=0
    )
    (source,) = data.train.sources
    assert source.source.size == (64, 128)
    assert count_class_pixels([source], 2)[1] == 16 * 16


def test_values_that_are_no_class_come_to_light_before_training(photos) -> None:
    write_photo(Path(photos.labels) / "sub" / "c.png", np.full(SIZES["sub/c"], 255, np.uint8))
    with pytest.raises(InputError, match=r"c\.png .*255"):
        build_segmentation_datamodule(config(photos), seed=0)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files where the system tells them")
def test_many_images_are_not_held_open(tmp_path) -> None:
    for number in range(150):
        write_photo(tmp_path / "images" / f"{number}.png", np.full((16, 16, 3), number, np.uint8))
        write_photo(tmp_path / "masks" / f"{number}.png", np.eye(16, dtype=np.uint8))
    region = SegmentationSplitConfig(image=str(tmp_path / "images"), labels=str(tmp_path / "masks"))
    before = len(os.listdir("/proc/self/fd"))
    data = build_segmentation_datamodule(config(region, tile_px=16, sampler="grid"), seed=0)
    assert sum(len(images) for images, *_ in DataLoader(data.train, batch_size=10)) == 150
    assert len(os.listdir("/proc/self/fd")) - before <= 3 * 16


def test_of_many_images_some_are_looked_at_until_one_has_labels(tmp_path) -> None:
    for number in range(70):
        write_photo(tmp_path / "images" / f"{number:02}.png", np.full((8, 8, 3), number, np.uint8))
        write_photo(tmp_path / "masks" / f"{number:02}.png", np.full((8, 8), 9, np.uint8))
    region = SegmentationSplitConfig(image=str(tmp_path / "images"), labels=str(tmp_path / "masks"))
    with pytest.raises(InputError, match=r"data\.train has no pixel .*png and 69 more"):
        build_segmentation_datamodule(config(region, tile_px=8, ignore_values=[9]), seed=0)
    last = np.random.default_rng(0).permutation(70)[-1]
    write_photo(tmp_path / "masks" / f"{last:02}.png", np.eye(8, dtype=np.uint8))
    with pytest.warns(DataWarning, match="64 of 64 checked rasters to train on have no pixel"):
        build_segmentation_datamodule(config(region, tile_px=8, ignore_values=[9]), seed=0)


def test_paired_labels_of_one_raster_are_asked_for(make_scene, tmp_path) -> None:
    source = open_raster(make_scene(nodata=None))
    write_photo(tmp_path / "mask.png", np.eye(70, 90, dtype=np.uint8))
    with pytest.raises(InputError, match="have no CRS"):
        open_labels(tmp_path / "mask.png", source)
    labels = open_labels(tmp_path / "mask.png", source, paired=True)
    assert LabelledSource(source, labels, source.extent).read_labels(source.extent).sum() == 70


def test_slides_of_a_folder_go_with_their_annotations(tmp_path) -> None:
    for name in ("a", "b"):
        make_slide(tmp_path / f"{name}.svs", 200, 256, mpp=0.5, tile_px=64, tissue_share=1.0)
        write_polygons(tmp_path / f"{name}.geojson", [(20, 40, 120, 100)])
    region = SegmentationSplitConfig(image=str(tmp_path), labels=str(tmp_path))
    data = build_segmentation_datamodule(config(region, mpp=1.0, sampler="balanced"), seed=0)
    assert [one.source.mpp for one in data.train.sources] == [1.0, 1.0]
    assert count_class_pixels(data.train.sources, 2) == [2 * (100 * 128 - 50 * 30), 2 * 50 * 30]


@pytest.mark.parametrize("suffix", ["tif", "geojson"])
def test_classes_that_do_not_exclude_each_other_are_read_from_folders(photos, tmp_path, suffix) -> None:
    for name, (height, width) in SIZES.items():
        path = tmp_path / "layers" / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix == "geojson":
            write_polygons(path, [(0, 0, 5, 4), (2, 2, 5, 4)])
            continue
        with rasterio.open(path, "w", driver="GTiff", count=1, height=height, width=width, dtype="uint8") as dataset:
            layer = np.zeros((1, height, width), np.uint8)
            layer[:, :4, :5] = 1
            dataset.write(layer)
    region = SegmentationSplitConfig(image=photos.image, labels=str(tmp_path / "layers"))
    data = build_segmentation_datamodule(
        config(region, classes=["thing"], background="none", multilabel=True, sampler="balanced"), seed=0
    )
    assert count_class_pixels(data.train.sources, 1) == [3 * 20]
    assert [len(group) for group in data.train.sampler.groups] == [60, 4096]
