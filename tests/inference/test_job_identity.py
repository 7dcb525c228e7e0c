"""A map is resumed or skipped only where everything that changes a pixel of it is as it was."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import rasterio
from dicom_slides import write_dicom_slide
from rasterio.shutil import copy as copy_raster
from slides import levels_of, planes, write_pyramid, write_zarr
from stub_segmenter import StubSegmenter

from perf_vit.errors import OutputError
from perf_vit.inference import SegmentationPredictOptions, SegmentationPredictor
from perf_vit.inference.jobs.identity import SourceIdentity, content_of, newer_than
from perf_vit.sources import open_source
from perf_vit.types import Source
from perf_vit.writers import check_outputs


class KilledError(BaseException):
    pass


def make(source: Source, out: Path, *, stop: bool = False) -> None:
    """Map a source of three bands in rows of windows; stop after half of them if asked to."""

    def on_window(done: int, total: int) -> None:
        if stop and done > total // 2:
            raise KilledError

    options = SegmentationPredictOptions(kind="probabilities", window_size=16, overlap=0, device="cpu")
    SegmentationPredictor(StubSegmenter(), options).run(source, out, on_progress=on_window)


@dataclass(frozen=True)
class Case:
    """Two sources that have other pixels, or another place, under one name.

    Attributes:
        first: opens the one that the map was made of.
        second: opens the other.
    """

    first: Callable[[Path], Source]
    second: Callable[[Path], Source]


def write_raster(path: Path, seed: int = 0, **profile) -> Path:
    pixels = np.random.default_rng(seed).integers(1, 3000, (3, 64, 48)).astype(np.uint16)
    place = {"crs": "EPSG:32637", "transform": rasterio.Affine(2, 0, 4e5, 0, -2, 4.5e6)}
    shape = {"driver": "GTiff", "count": 3, "height": 64, "width": 48, "dtype": "uint16"}
    with rasterio.open(path, "w", **{**shape, **place, **profile}) as file:
        file.write(pixels)
        file.scales = (0.5, 0.5, 0.5)
    return path


def options(first: dict, second: dict) -> Case:
    """One raster, opened in two ways."""

    def opened(given: dict) -> Callable[[Path], Source]:
        def _open(folder: Path) -> Source:
            path = folder / "scene.tif"
            return open_source(path if path.exists() else write_raster(path), **given)

        return _open

    return Case(opened(first), opened(second))


def slide_options(first: dict, second: dict) -> Case:
    """One slide, opened in two ways."""

    def opened(given: dict) -> Callable[[Path], Source]:
        def _open(folder: Path) -> Source:
            path = folder / "slide.svs"
            if not path.exists():
                write_pyramid(path, levels_of(64, 48, 1), aperio_mpp=0.5)
            return open_source(path, **given)

        return _open

    return Case(opened(first), opened(second))


def through_vrt(seed: int) -> Callable[[Path], Source]:
    """A virtual raster whose member is written by this call."""

    def _open(folder: Path) -> Source:
        write_raster(folder / "member.tif", seed)
        vrt = folder / "scene.vrt"
        if not vrt.exists():
            copy_raster(folder / "member.tif", vrt, driver="VRT")
        return open_source(vrt)

    return _open


def mosaic(seed: int) -> Callable[[Path], Source]:
    """A mosaic of two tiles, one of them written by this call."""

    def _open(folder: Path) -> Source:
        tiles = folder / "tiles"
        tiles.mkdir(exist_ok=True)
        if not (tiles / "a.tif").exists():
            write_raster(tiles / "a.tif")
        write_raster(tiles / "b.tif", seed, transform=rasterio.Affine(2, 0, 4e5 + 96, 0, -2, 4.5e6))
        return open_source(tiles)

    return _open


def placed(**place) -> Callable[[Path], Source]:
    """A raster with a CRS and place of its own."""
    return lambda folder: open_source(write_raster(folder / "scene.tif", **place))


def placed_beside(shift: float) -> Callable[[Path], Source]:
    """A raster placed by a world file, whose own bytes never change."""

    def _open(folder: Path) -> Source:
        path = folder / "scene.png"
        if not path.exists():
            pixels = np.random.default_rng(0).integers(1, 255, (3, 64, 48)).astype(np.uint8)
            with rasterio.open(path, "w", driver="PNG", count=3, height=64, width=48, dtype="uint8") as file:
                file.write(pixels)
        path.with_suffix(".pgw").write_text(f"2\n0\n0\n-2\n{4e5 + shift}\n4500000\n")
        return open_source(path)

    return _open


CASES = {
    "bands in another order": options({"bands": [1, 2, 3]}, {"bands": [3, 2, 1]}),
    "another band": options({"bands": [1, 2, 2]}, {"bands": [1, 2, 3]}),
    "nodata": options({}, {"nodata": 77}),
    "another nodata": options({"nodata": 66}, {"nodata": 77}),
    "resampling": options({"resolution": 3}, {"resolution": 3, "resampling": "nearest"}),
    "resolution": options({"resolution": 3}, {"resolution": 4}),
    "bounds": options({"bounds": (4e5, 4.4999e6, 400064, 4.5e6)}, {"bounds": (400002, 4.4999e6, 400066, 4.5e6)}),
    "scale": options({}, {"apply_scale": True}),
    "CRS to read in": options({}, {"crs": "EPSG:32636"}),
    "tissue": slide_options({}, {"tissue": "otsu"}),
    "size of a slide's pixels": slide_options({"mpp": 1.0}, {"mpp": 1.0, "slide_mpp_override": 0.4}),
    "member of a VRT": Case(through_vrt(0), through_vrt(1)),
    "member of a mosaic": Case(mosaic(0), mosaic(1)),
    "place": Case(placed(), placed(transform=rasterio.Affine(2, 0, 5e5, 0, -2, 4.5e6))),
    "CRS": Case(placed(), placed(crs="EPSG:32636")),
    "world file": Case(placed_beside(0), placed_beside(100)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_finished_map_of_other_pixels_is_not_skipped(case, tmp_path) -> None:
    out = tmp_path / "map.tif"
    source = case.first(tmp_path)
    make(source, out)
    before = out.read_bytes()
    make(source, out)
    assert out.read_bytes() == before
    other = case.second(tmp_path)
    # So that times of change alone tell nothing.
    os.utime(out, (time.time() + 60,) * 2)
    with pytest.raises(OutputError, match="exists already, but not as this model's map of this input"):
        make(other, out)
    assert out.read_bytes() == before


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rows_of_other_pixels_are_not_gone_on_with(case, tmp_path) -> None:
    out = tmp_path / "map.tif"
    with pytest.raises(KilledError):
        make(case.first(tmp_path), out, stop=True)
    assert list(tmp_path.glob("map.tif.partial/rows_*"))
    with pytest.raises(OutputError, match=r"holds the unfinished map.tif, made with input_"):
        make(case.second(tmp_path), out)
    assert not out.exists()


def copied(path: Path) -> Path:
    """A copy with the times of the original, as `cp -p` makes it."""
    return Path(shutil.copytree(path, path.with_name("copy.ome.zarr")))


def test_a_chunked_array_is_one_input_whatever_is_in_it(tmp_path, monkeypatch) -> None:
    path = write_zarr(tmp_path / "a.ome.zarr", planes(), "0.4")
    num_files = sum(file.is_file() for file in path.rglob("*"))
    assert num_files > 100
    opened = []
    add_file = sys.modules["perf_vit.sources.files"]
    monkeypatch.setattr(add_file, "_add_file", lambda digest, file: opened.append(file))
    identity = SourceIdentity(open_source(path))
    assert identity.files == (str(path),)
    assert identity.tags
    assert 0 < len(opened) <= 64
    assert len(json.dumps(identity.settings)) < 1000


def test_a_chunk_that_is_lost_or_written_again_makes_another_input(tmp_path) -> None:
    path = write_zarr(tmp_path / "a.ome.zarr", planes(), "0.4")
    before, out = SourceIdentity(open_source(path)), tmp_path / "map.tif"
    same = SourceIdentity(open_source(copied(path)))
    assert same.tags == before.tags
    settings = before.settings
    out.touch()
    assert not before.changed_since(out)
    chunk = path / "0" / "1.2.3"
    chunk.write_bytes(chunk.read_bytes()[::-1])
    os.utime(chunk, (time.time() + 60,) * 2)
    after = SourceIdentity(open_source(path))
    assert after.changed_since(out)
    assert after.settings != settings
    chunk.unlink()
    assert SourceIdentity(open_source(path)).tags != before.tags


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"nodata": 77, "resolution": 3}, {"nodata": 77.0, "resolution": 3.0}),
        ({"bands": [1, 2, 3]}, {"bands": (1, 2, 3)}),
        ({"crs": "EPSG:32636"}, {"crs": rasterio.CRS.from_epsg(32636)}),
    ],
    ids=["number", "bands", "CRS"],
)
def test_options_that_mean_the_same_are_the_same(first, second, tmp_path) -> None:
    case = options(first, second)
    one, other = SourceIdentity(case.first(tmp_path)), SourceIdentity(case.second(tmp_path))
    assert one.tags == other.tags
    assert one.settings == other.settings


def test_outlines_of_tissue_count_by_what_they_hold_not_by_their_name(tmp_path, monkeypatch) -> None:
    write_pyramid(tmp_path / "slide.svs", levels_of(64, 48, 1), aperio_mpp=0.5)
    monkeypatch.chdir(tmp_path)

    def identity(name: str | Path) -> SourceIdentity:
        return SourceIdentity(open_source(tmp_path / "slide.svs", tissue=name))

    def outlines(side: int) -> str:
        ring = [[0, 0], [side, 0], [side, side], [0, side], [0, 0]]
        return json.dumps({"type": "Polygon", "coordinates": [ring]})

    Path("tissue.geojson").write_text(outlines(20))
    relative, absolute = identity("tissue.geojson"), identity(tmp_path / "tissue.geojson")
    assert relative.tags == absolute.tags
    assert relative.settings == absolute.settings
    Path("other.geojson").write_text(outlines(30))
    assert identity("other.geojson").tags != relative.tags
    assert identity("otsu").tags != relative.tags


def test_the_data_folder_of_a_mirax_slide_is_a_part_of_it(tmp_path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s.mrxs").write_bytes(b"x")
    data = tmp_path / "s" / "Data0000.dat"
    data.write_bytes(b"tiles")
    before = content_of([str(tmp_path / "s.mrxs")])
    data.write_bytes(b"other tiles")
    assert content_of([str(tmp_path / "s.mrxs")]) != before
    os.utime(tmp_path / "s.mrxs", ns=(1, 1))
    assert newer_than([str(tmp_path / "s.mrxs")], tmp_path / "s.mrxs")


def test_a_map_in_the_folder_of_its_dicom_slide_is_made_once(tmp_path) -> None:
    folder = write_dicom_slide(tmp_path / "case", levels_of(64, 48, 2))
    (folder / "label.jpg").write_bytes(b"photo")
    options = SegmentationPredictOptions(window_size=32, device="cpu", quicklook=True, report=True, polygons="geojson")
    predictor = SegmentationPredictor(StubSegmenter(), options)
    made = [predictor.run(str(folder), folder / "map.ome.tif").made for _ in range(2)]
    assert made == [True, False]
    assert b'Name="map.ome.tif"' in (folder / "map.ome.tif").read_bytes()
    level = next(folder.glob("*level-0.dcm"))
    level.write_bytes(level.read_bytes()[:-2] + b"zz")
    with pytest.raises(OutputError, match="not as this model's map of this input"):
        predictor.run(str(folder), folder / "map.ome.tif")
    for kept in (level, folder / "label.jpg"):
        with pytest.raises(OutputError, match="would replace a part of the input"):
            check_outputs([kept], [folder], overwrite=True)
