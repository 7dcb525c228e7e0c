"""Pages of predictions."""

import re

import numpy as np
import pytest
from pages import parsed
from PIL import Image

from perf_vit.reporting.outputs import write_map_report, write_table_report
from perf_vit.sources import open_map, open_source
from perf_vit.sources.slides import SlideSource
from perf_vit.types import Window
from perf_vit.writers import CogWriter, RasterLayout, write_map_quicklook, write_ome_tiff


def test_classes_that_overlap_are_counted_each_with_one_threshold_for_all_parts(make_scene, tmp_path) -> None:
    source = open_source(make_scene(height=64, width=1100))
    probabilities = np.ones((2, 64, 1100), "uint8")
    # Left of it, no probability is larger than 1/254.
    probabilities[:, 32:, 880:] = 200
    probabilities[1, :32, 880:] = 128
    layout = {"height": 64, "width": 1100, "num_bands": 2, "dtype": "uint8", "nodata": 255, "scale": 1 / 254}
    with CogWriter(tmp_path / "p.tif", RasterLayout(crs=source.crs, transform=source.transform, **layout)) as writer:
        writer.write(0, probabilities)
    out = tmp_path / "p.html"
    write_map_report(out, source, tmp_path / "p.tif", ["wet", "built"], multilabel=True, scale=1 / 254, settings={})
    shares = dict(re.findall(r"(none|wet|built)\W*([01]\.\d{3})", parsed(out).text))
    assert shares == {"none": "0.800", "built": "0.200", "wet": "0.100"}


KINDS = ["classes", "several labels", "shares of several labels"]


@pytest.fixture(scope="module", params=KINDS)
def maps(request, tmp_path_factory):
    """A photo, its map as GeoTIFF and OME-TIFF of 600 x 900 px with overviews, its classes and what it holds."""
    folder, height, width = tmp_path_factory.mktemp("maps"), 600, 900
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(folder / "photo.png")
    several, scale = request.param != "classes", 1 / 254 if "shares" in request.param else 1.0
    true = np.uint8(200 if scale < 1 else 1)
    # Borders at odd columns are averaged by other resampling; the right third holds no data.
    labels = np.where(np.arange(width) // 7 % 2 == 0, 0, 2).astype(np.uint8)
    bands = np.stack([(labels == index) * true for index in range(4)] if several else [labels])
    pixels = np.repeat(bands[:, None], height, axis=1)
    pixels[..., 600:] = 255
    layout = {"num_bands": len(pixels), "dtype": "uint8", "nodata": 255, "overviews": "nearest", "scale": scale}
    layout = RasterLayout(height=height, width=width, tags={"PERF_VIT_VERSION": "1"}, **layout)
    with CogWriter(folder / "map.tif", layout) as writer:
        writer.write(0, pixels)
    write_ome_tiff(folder / "map.ome.tif", folder / "map.tif", mpp=0.5)
    return folder, {"multilabel": several, "scale": scale}, pixels


@pytest.mark.parametrize("suffix", [".tif", ".ome.tif"])
def test_maps_without_georeference_keep_their_values_and_nodata(maps, tmp_path, suffix) -> None:
    folder, options, pixels = maps
    source, path = open_source(folder / "photo.png"), folder / f"map{suffix}"
    with open_map(path) as opened:
        image = opened.read(Window(590, 580, 10, 40))
        assert np.array_equal(image.pixels, pixels[:, 590:, 580:620])
        assert np.array_equal(image.valid, np.broadcast_to(np.arange(580, 620) < 600, (10, 40)))
        assert set(np.unique(opened.read_reduced(333).pixels)) <= set(np.unique(pixels))
    write_map_report(tmp_path / "map.html", source, path, list("abcd"), settings={}, **options)
    shares = dict(re.findall(r"\b([abcd])\W*([01]\.\d{3})", parsed(tmp_path / "map.html").text))
    assert shares == {"a": "0.502", "b": "0.000", "c": "0.498", "d": "0.000"}
    write_map_quicklook(source, path, tmp_path / "map.png", list("abcd"), **options)
    write_map_quicklook(source, folder / "map.tif", tmp_path / "expected.png", list("abcd"), **options)
    assert (tmp_path / "map.png").read_bytes() == (tmp_path / "expected.png").read_bytes()


def test_a_map_with_the_bands_of_colours_is_no_slide(maps) -> None:
    folder, _, pixels = maps
    with open_source(folder / "map.tif") as source:
        assert not isinstance(source, SlideSource)
        assert source.num_bands == len(pixels)


def test_a_class_may_be_called_as_any_column_is(tmp_path) -> None:
    table = tmp_path / "t.csv"
    rows = ["image,prediction,error,prediction,error", "a.png,error,0.75,0.25,", "b.png,prediction,0.375,0.625,"]
    table.write_text("\n".join([*rows, "c.png,,,,no such file: c.png"]) + "\n")
    picture = np.zeros((8, 8, 3), np.uint8)
    write_table_report(
        tmp_path / "t.html",
        table,
        lambda _: lambda: {"image": picture},
        columns=["image", "prediction", "error", "prediction"],
        column="prediction",
        settings={},
    )
    found = parsed(tmp_path / "t.html")
    assert found.captions == ["a.png: error, 0.75", "b.png: prediction, 0.62"]
    assert "2 of 3 inputs" in found.text


def test_each_class_of_several_is_counted_by_its_name(tmp_path) -> None:
    rows = [["a.png", "open sea;ice", "1", "1"], ["b.png", "open sea", "1", "0"], ["c.png", "", "0", "0"]]
    table = tmp_path / "found.csv"
    columns = ["image", "predictions", "open sea", "ice"]
    table.write_text("\n".join(",".join(row) for row in [columns, *rows]))
    options = {"columns": columns, "column": "predictions", "settings": {}}
    picture = np.zeros((8, 8, 3), np.uint8)
    write_table_report(tmp_path / "found.html", table, lambda _: lambda: {"image": picture}, **options)
    counts = re.findall(r'<th scope="row">([^<]+)</th><td[^>]*>([12])</td>', (tmp_path / "found.html").read_text())
    assert counts == [("open sea", "2"), ("ice", "1"), ("none", "1")]
    assert parsed(tmp_path / "found.html").captions == ["a.png: open sea, ice", "b.png: open sea, 1.00", "c.png: none"]
