"""What other programs leave in folders is neither image nor label nor class."""

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image

from perf_vit.data import SegmentationDataConfig, SegmentationSplitConfig, build_segmentation_datamodule
from perf_vit.errors import DataWarning
from perf_vit.inference import find_inputs, find_paths
from perf_vit.labels.image_folder import find_label_pairs
from perf_vit.labels.objects import read_object_labels
from perf_vit.labels.tables import read_class_folders
from perf_vit.sources import files_below, find_images, image_suffixes, is_image_name, open_source
from perf_vit.sources.files import is_own

JUNK = ["._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", "0.png.aux.xml", "0.png.ovr", "0.png.msk", ".hidden.png",
        ".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/._0.png", "@eaDir/0.png", "old.partial/0.png", "0.png~",
        "._0.xml", "._0.txt", "._0.geojson", "0.tif.part"]  # fmt: skip


def _images(folder: Path, names=("0.png", "1.png")) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(rng.integers(0, 255, (64, 64, 3)).astype(np.uint8)).save(folder / name)
    return folder


def _litter(folder: Path) -> Path:
    for name in JUNK:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x00\x05\x16\x07junk")
    (folder / "loop").symlink_to(folder.resolve(), target_is_directory=True)
    return folder


def test_training_and_prediction_find_the_same_images(tmp_path) -> None:
    folder = _litter(_images(tmp_path / "a"))
    expected = [folder / "0.png", folder / "1.png"]
    assert find_images([folder]) == expected
    assert [Path(item.path) for item in find_inputs([folder], tmp_path / "maps")] == expected
    assert [Path(path) for path in find_paths([folder])] == expected


@pytest.mark.parametrize("suffix", image_suffixes())
def test_every_suffix_is_found_by_training_and_prediction(tmp_path, suffix) -> None:
    (tmp_path / f"a{suffix.upper()}").mkdir() if suffix.endswith(".zarr") else (tmp_path / f"a{suffix.upper()}").touch()
    assert len(find_images([tmp_path])) == len(find_paths([tmp_path])) == 1


def test_class_folders_are_those_of_images(tmp_path) -> None:
    for name in ("cat", "dog"):
        _litter(_images(tmp_path / "root" / name))
    _litter(tmp_path / "root")
    (tmp_path / "root" / "loop").unlink()
    found = read_class_folders(tmp_path / "root")
    assert found.names == ("cat", "dog")
    assert len(found.paths) == 4


def test_masks_and_images_of_folders_are_paired(tmp_path) -> None:
    images, masks = _litter(_images(tmp_path / "images")), tmp_path / "masks"
    masks.mkdir()
    for name in ("0.png", "1.png"):
        Image.fromarray(np.arange(4096).reshape(64, 64).astype(np.uint8) % 2).save(masks / name)
    _litter(masks)
    assert [pair[0].name for pair in find_label_pairs(images, masks)] == ["0.png", "1.png"]
    region = SegmentationSplitConfig(image=str(images), labels=str(masks))
    assert (
        len(
            build_segmentation_datamodule(
                SegmentationDataConfig(train=region, val=region, classes=["a", "b"], tile_px=64), seed=0
            ).val
        )
        == 2
    )


def _voc(folder: Path, name: str) -> None:
    box = "<xmin>11</xmin><ymin>11</ymin><xmax>40</xmax><ymax>30</ymax>"
    content = f"<annotation><object><name>t</name><bndbox>{box}</bndbox></object></annotation>"
    (folder / f"{name}.xml").write_text(content)


def _yolo(folder: Path, name: str) -> None:
    (folder / f"{name}.txt").write_text("0 .5 .5 .2 .2\n")


def _dota(folder: Path, name: str) -> None:
    (folder / f"{name}.txt").write_text("10 10 20 10 20 20 10 20 t 0\n")


def _instances(folder: Path, name: str) -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[10:30, 10:40] = 1
    Image.fromarray(mask).save(folder / f"{name}.png")


def _polygons(folder: Path, name: str) -> None:
    ring = [[10, 10], [40, 10], [40, 30], [10, 30], [10, 10]]
    shape = {"type": "Feature", "properties": {"class": "t"}, "geometry": {"type": "Polygon", "coordinates": [ring]}}
    (folder / f"{name}.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [shape]}))


@pytest.mark.parametrize("write", [_voc, _yolo, _dota, _instances, _polygons])
def test_labels_of_every_format_are_read_among_litter(tmp_path, write) -> None:
    images, labels = _litter(_images(tmp_path / "images")), tmp_path / "labels"
    labels.mkdir()
    for name in ("0", "1"):
        write(labels, name)
    _litter(labels)
    kind = write.__name__.removeprefix("_")
    index = read_object_labels(labels, images, label_format=kind, classes=["t"])
    assert [len(record) for record in index] == [1, 1]


@pytest.mark.parametrize("given", ["tiles", "tiles/*"])
def test_a_mosaic_has_the_rasters_alone(make_scene, tmp_path, monkeypatch, given) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiles").mkdir()
    path = make_scene()
    path.rename("tiles/a.tif")
    for name in ("._a.tif", "a.tif.aux.xml", ".DS_Store", "Thumbs.db"):
        Path("tiles", name).write_bytes(b"junk")
    Path("tiles/a.tif.aux.xml").write_text("<PAMDataset></PAMDataset>")
    assert list(map(str, open_source(given).paths)) == ["tiles/a.tif"]


def test_linked_folders_are_searched_once(tmp_path) -> None:
    _images(tmp_path / "store" / "x")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "store", target_is_directory=True)
    (tmp_path / "set" / "again").symlink_to(tmp_path / "store" / "x", target_is_directory=True)
    (tmp_path / "set" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert len(files_below(tmp_path / "set", is_image_name)) == 2


def test_previews_beside_rasters_are_no_members_of_a_mosaic(make_scene, tmp_path) -> None:
    (tmp_path / "m").mkdir()
    make_scene(num_bands=3).rename(tmp_path / "m" / "0.tif")
    _images(tmp_path / "m", names=["0.png"])
    with pytest.warns(DataWarning, match=r"1 of 2 files of the mosaic .* previews .*, the first .*0\.png"):
        mosaic = open_source(tmp_path / "m")
    assert mosaic.paths == (str(tmp_path / "m" / "0.tif"),)


@pytest.mark.parametrize("write", [_voc, _yolo, _dota, _instances, _polygons])
def test_labels_go_with_the_raster_not_its_preview(tmp_path, write) -> None:
    images = _images(tmp_path / "images", names=["0.tif", "0.png"])
    (tmp_path / "labels").mkdir()
    write(tmp_path / "labels", "0")
    with pytest.warns(DataWarning, match=r"1 of 2 images are taken as previews .*, unless .*, the first .*0\.png"):
        index = read_object_labels(tmp_path / "labels", images, label_format=write.__name__[1:], classes=["t"])
    assert [record.path for record in index] == [str(images / "0.tif")]
    table = tmp_path / "l.csv"
    table.write_text("image,xmin,ymin,xmax,ymax,label\n0.png,1,1,9,9,t\n")
    named = read_object_labels(table, images, label_format="csv", classes=["t"])
    assert [record.path for record in named] == [str(images / "0.png")]


@pytest.mark.parametrize("options", [{}, {"bigtiff": "YES"}, {"endianness": "BIG"}])
def test_maps_are_known_however_long_their_header_is(tmp_path, options) -> None:
    shape = {"driver": "GTiff", "width": 16, "height": 16, "count": 1, "dtype": "uint8", "crs": "EPSG:32636"}
    place = rasterio.Affine(1, 0, 5e5, 0, -1, 4e6)
    for name in ("PERF_VIT_VERSION", "OTHER"):
        with rasterio.open(tmp_path / f"{name}.tif", "w", transform=place, **shape, **options) as file:
            file.update_tags(A="x" * 10_000, **{name: "1"})
    assert is_own(tmp_path / "PERF_VIT_VERSION.tif")
    assert not is_own(tmp_path / "OTHER.tif")


def test_what_is_no_tiff_is_nothing_of_perf_vit(tmp_path) -> None:
    contents = [
        b"",
        b"II",
        b"II*\0\xff\xff\xff\x7f",
        b"II+\0\x08\0\0\0" + b"\xff" * 8,
        b"II*\0\x08\0\0\0\x05\0\x0e\x01",
    ]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.tif").write_bytes(content)
        assert not is_own(tmp_path / f"{number}.tif")
