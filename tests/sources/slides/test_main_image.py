"""Which image of a file with several is read as the slide."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from slides import noise, write_zarr

import perf_vit.errors
from perf_vit.errors import DataWarning
from perf_vit.sources import open_source
from perf_vit.sources.slides.main_image import StoredImage, choose_image


@pytest.fixture(autouse=True)
def _all_warnings(monkeypatch) -> None:
    monkeypatch.setattr(perf_vit.errors, "_warned", set())


SLIDE = StoredImage("scan", (100, 80))
SIDE_NAMES = ["label", "Label image", "macro", "a.svs [macro]", "thumbnail", "thumb_1", "OVERVIEW", "barcode-2"]


@pytest.mark.parametrize("name", SIDE_NAMES)
def test_side_pictures_are_never_chosen_by_size_and_not_spoken_of(name, recwarn) -> None:
    assert choose_image("a", [StoredImage(name, (900, 900)), SLIDE]) == 1
    assert not recwarn.list


@pytest.mark.parametrize("name", ["labels_of_cells", "macrophages", "", "relabelled"])
def test_other_names_are_slides(name) -> None:
    with pytest.warns(DataWarning, match=r"a holds 2 images; .* of 900 x 900 px is read, not 'scan' of 100 x 80 px; "):
        assert choose_image("a", [SLIDE, StoredImage(name, (900, 900))]) == 1


@pytest.mark.parametrize("size", [(50, 40), (25, 20), (33, 27), (12, 10), (100 // 64, 80 // 64)])
def test_smaller_copies_are_levels(size, recwarn) -> None:
    assert choose_image("a", [StoredImage("level 1", size), SLIDE]) == 1
    assert not recwarn.list


def test_equal_images_are_ambiguous_and_the_first_is_read() -> None:
    with pytest.warns(DataWarning, match=r"holds 3 images; 'scan' .* is read, not 'x' of 100 x 80 px and 1 more"):
        assert choose_image("a", [SLIDE, StoredImage("x", (100, 80)), StoredImage("y", (40, 80))]) == 0


def test_a_file_whose_images_are_all_called_label_has_a_slide(recwarn) -> None:
    assert choose_image("a", [StoredImage("label.tif #1", (50, 40)), StoredImage("label.tif #2", (100, 80))]) == 1
    assert choose_image("b", [StoredImage("macro", (5, 5))]) == 0
    assert not recwarn.list


def write_series(path: Path, images: list[tuple[str, np.ndarray]]) -> Path:
    """An OME-TIFF with a pixel size of 1, 2, 3, ... in the order of its images."""
    with tifffile.TiffWriter(path, ome=True) as writer:
        for number, (name, pixels) in enumerate(images, 1):
            metadata = {"axes": "YXS", "Name": name, "PhysicalSizeX": float(number), "PhysicalSizeY": float(number)}
            writer.write(pixels, tile=(64, 64), photometric="rgb", metadata=metadata)
    return path


def write_images(path: Path, images: list[tuple[str, np.ndarray]], *, listed: bool) -> Path:
    """The folder that bioformats2raw writes: numbered images, named in a list or each by itself."""
    zarr.open_group(path, mode="w", zarr_format=2).attrs["bioformats2raw.layout"] = 3
    for number, (name, pixels) in enumerate(images):
        folder = path / str(number)
        write_zarr(folder, [np.ascontiguousarray(pixels.transpose(2, 0, 1))], "0.4", mpp=number + 1.0)
        if not listed:
            attributes = json.loads((folder / ".zattrs").read_text())
            attributes["multiscales"][0]["name"] = name
            (folder / ".zattrs").write_text(json.dumps(attributes))
    if listed:
        (path / "OME").mkdir()
        found = "".join(f'<Image Name="{name}"><Pixels SizeX="1" SizeY="1"/></Image>' for name, _ in images)
        (path / "OME" / "METADATA.ome.xml").write_text(f"<OME>{found}</OME>")
    return path


@pytest.mark.parametrize("kind", ["tiff", "zarr", "zarr-listed"])
def test_the_slide_is_read_with_its_own_pixel_size_whatever_comes_first(tmp_path, kind, recwarn) -> None:
    images = [("label", noise(200, 200, seed=1)), ("scan", noise(150, 130)), ("Macro image", noise(160, 140, seed=2))]
    path = (
        write_series(tmp_path / "a.ome.tif", images)
        if kind == "tiff"
        else write_images(tmp_path / "a.ome.zarr", images, listed=kind == "zarr-listed")
    )
    source = open_source(path)
    assert source.slide_mpp == (2.0, 2.0)
    assert np.array_equal(source.read(source.extent).pixels, images[1][1].transpose(2, 0, 1))
    assert not [each for each in recwarn if each.category is DataWarning]


@pytest.mark.parametrize("kind", ["tiff", "zarr"])
def test_a_second_scan_is_spoken_of(tmp_path, kind) -> None:
    images = [("region 1", noise(100, 130)), ("region 2", noise(150, 130))]
    path = (
        write_series(tmp_path / "a.ome.tif", images)
        if kind == "tiff"
        else write_images(tmp_path / "a.ome.zarr", images, listed=False)
    )
    with pytest.warns(DataWarning, match=r"'region 2' of 150 x 130 px is read, not 'region 1' of 100 x 130 px"):
        assert open_source(path).size == (150, 130)
