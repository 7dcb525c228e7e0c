"""`perf-vit predict` on what isn't one raster: slides and mosaics, with polygons beside the map."""

import json
from pathlib import Path
from types import SimpleNamespace

import geopandas
import numpy as np
import openslide
import pytest
import rasterio
import tifffile
import torch
from command_line import call
from rasterio.windows import Window
from synthetic_slide import make_slide

from perf_vit.models import (
    CHECKPOINT_KEY,
    SegmentationModelConfig,
    SegmentationSpec,
    build_segmenter,
    checkpoint_metadata,
)
from perf_vit.sources import open_source
from perf_vit.transforms import Normalizer


@pytest.fixture(scope="module")
def slide_model(tmp_path_factory) -> SimpleNamespace:
    """A model of three bands with random weights."""
    torch.manual_seed(0)
    spec = SegmentationSpec(
        classes=("other", "gland", "stroma"), normalizer=Normalizer((200,) * 3, (40,) * 3), tile_px=64
    )
    config = SegmentationModelConfig(backbone="performer_vit_tiny_patch16_224")
    model = build_segmenter(config, spec)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    path = tmp_path_factory.mktemp("model") / "slides.ckpt"
    torch.save({CHECKPOINT_KEY: checkpoint_metadata(config, model), "state_dict": state}, path)
    return SimpleNamespace(checkpoint=path)


def _predict(trained, image: Path, output: Path, *extra: object) -> int:
    return call(["predict", "--checkpoint", trained.checkpoint, "--input", image, "--output", output, *extra])


def test_a_slide_becomes_a_pyramid_and_polygons_for_qupath(slide_model, tmp_path) -> None:
    slide = tmp_path / "slide.tif"
    make_slide(slide, 1400, 1700, mpp=0.5)
    out = tmp_path / "map.ome.tif"
    assert (
        _predict(
            slide_model, slide, out, "--window-size", "256", "--mpp", "1", "--tissue", "otsu", "--polygons", "geojson"
        )
        == 0
    )
    with tifffile.TiffFile(out) as tiff:
        assert tiff.is_ome
        assert [level.shape for level in tiff.series[0].levels] == [(700, 850), (350, 425)]
        labels = tiff.asarray()
    mapped = open_source(out)
    assert mapped.mpp == pytest.approx(1.0)
    # Off the tissue there is no class.
    assert np.array_equal(labels == 255, ~open_source(slide, mpp=1, tissue="otsu").read(mapped.extent).valid)
    assert openslide.OpenSlide(out).dimensions == (850, 700)
    assert float(openslide.OpenSlide(out).properties["openslide.mpp-x"]) == pytest.approx(1.0)
    features = json.loads((tmp_path / "map.ome.geojson").read_text())["features"]
    assert {feature["properties"]["objectType"] for feature in features} == {"annotation"}
    for feature in features:
        # In pixels of level 0, of which the map has half as many a side.
        x, y = np.array(feature["geometry"]["coordinates"][0] if feature["geometry"]["type"] == "Polygon" else
                        feature["geometry"]["coordinates"][0][0])[0]  # fmt: skip
        assert x % 2 == 0
        assert y % 2 == 0
    assert not (tmp_path / "map.ome.tif.partial").exists()


@pytest.mark.slow
def test_a_map_of_a_slide_is_made_once(slide_model, tmp_path) -> None:
    (tmp_path / "slides").mkdir()
    make_slide(tmp_path / "slides" / "a.tif", 600, 700)
    table = tmp_path / "list.csv"
    table.write_text("path,output\nslides/a.tif,a.ome.tif\n")
    args = ["predict", "--checkpoint", slide_model.checkpoint, "--input", table, "--output", tmp_path / "maps"]
    for status in ("done", "skipped-existing"):
        assert call(args) == 0
        report = json.loads((tmp_path / "maps" / "report.json").read_text())
        assert [item["status"] for item in report["inputs"]] == [status]


def test_a_url_reaches_the_reader_as_it_is(trained, tmp_path) -> None:
    url = trained.scene.image.absolute().as_uri()
    args = ["predict", "--checkpoint", trained.checkpoint, "--input", url, "--output", tmp_path / "map.tif"]
    assert call(args) == 0
    assert (tmp_path / "map.tif").exists()


def test_pieces_of_a_scene_read_as_one_give_the_scenes_own_map(trained, tmp_path) -> None:
    pieces = tmp_path / "pieces"
    pieces.mkdir()
    with rasterio.open(trained.scene.image) as scene:
        for row in (0, 100):
            window = Window(0, row, scene.width, min(100, scene.height - row))
            place = {"height": window.height, "transform": scene.window_transform(window), "driver": "GTiff"}
            with rasterio.open(pieces / f"{row}.tif", "w", **{**scene.profile, **place}) as piece:
                piece.write(scene.read(window=window))
    assert _predict(trained, trained.scene.image, tmp_path / "whole.tif", "--polygons", "gpkg") == 0
    assert _predict(trained, pieces, tmp_path / "mosaic.tif", "--mosaic") == 0
    with rasterio.open(tmp_path / "whole.tif") as whole, rasterio.open(tmp_path / "mosaic.tif") as mosaic:
        labels = whole.read(1)
        assert np.array_equal(labels, mosaic.read(1))
        assert whole.transform == mosaic.transform
        pixel_area = abs(whole.transform.a * whole.transform.e)
    areas = geopandas.read_file(tmp_path / "whole.gpkg")
    assert areas.area.sum() == pytest.approx((labels == 1).sum() * pixel_area)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["--output", "m.ome.tif"], "an OME-TIFF tells the size of its pixels"),
        (["--output", "m.tif", "--mpp", "1"], "mpp can't be used with"),
        (["--output", "m.tif", "--kind", "probabilities", "--polygons", "gpkg"], "--polygons must be one of"),
        (["--output", "m.tif", "--mosaic", "--input", "other.tif"], "--mosaic reads one folder"),
    ],
)
def test_options_that_do_not_fit_are_one_line(trained, tmp_path, capsys, monkeypatch, args, match) -> None:
    monkeypatch.chdir(tmp_path)
    base = ["predict", "--checkpoint", trained.checkpoint, "--input", trained.scene.image]
    assert call([*base, *args]) == 2
    assert match in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
