"""No class is background unless the config says so: areas of maps, colours, and pixels under no polygon."""

import json

import geopandas as gpd
import numpy as np
import pytest
import rasterio
from command_line import SMALL, call
from PIL import Image
from shapely import box

from perf_vit.models import load_segmenter
from perf_vit.plotting import default_colormap
from perf_vit.sources import open_source


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A tumour in the left half, stroma in the right, as mask and as polygons."""
    folder = tmp_path_factory.mktemp("tissue")
    truth = np.zeros((64, 96), np.uint8)
    truth[:, 48:] = 1
    rng = np.random.default_rng(0)
    pixels = rng.normal(60 + 120 * truth, 8, (3, 64, 96)).clip(1, 255).astype(np.uint8)
    profile = {"driver": "GTiff", "height": 64, "width": 96, "crs": "EPSG:32633", "dtype": "uint8"}
    profile["transform"] = rasterio.Affine(2, 0, 500_000, 0, -2, 5_000_000)
    for name, bands in (("scene.tif", pixels), ("mask.tif", truth[None])):
        with rasterio.open(folder / name, "w", count=len(bands), **profile) as dataset:
            dataset.write(bands)
    shapes = [box(500_000, 4_999_872, 500_096, 5_000_000), box(500_096, 4_999_872, 500_192, 5_000_000)]
    gpd.GeoDataFrame({"kind": ["Tumor", "Stroma"]}, geometry=shapes, crs="EPSG:32633").to_file(folder / "areas.gpkg")
    return folder


def train(scene, labels: str, *extra: str) -> int:
    files = [f"data.{part}={{image: {scene / 'scene.tif'}, labels: {scene / labels}}}" for part in ("train", "val")]
    options = ["data.classes=[Tumor,Stroma]", "data.attribute=kind", "data.tiles_per_epoch=32", "optim.lr=0.005"]
    return call(["train", "configs/segmentation/demo.yaml", *files, *SMALL, *options, *extra])


@pytest.fixture(scope="module", params=[("mask.tif", "null"), ("areas.gpkg", "ignore"), ("areas.gpkg", "Stroma")])
def trained(request, scene):
    labels, background = request.param
    run = scene / f"run_{background}"
    assert train(scene, labels, f"data.background={background}", f"out={run}") == 0
    return run / "checkpoints" / "last.ckpt", None if background != "Stroma" else 1


def areas(path, source) -> dict[str, float]:
    """Pixels by class in a file of polygons."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        names = {category["id"]: category["name"] for category in content["categories"]}
        items = [(names[each["category_id"]], each["area"]) for each in content["annotations"]]
    else:
        frame = gpd.read_parquet(path) if path.suffix == ".parquet" else gpd.read_file(path)
        items = zip(frame["class"], frame.to_crs(source.crs.to_wkt()).area / 4, strict=True)
    found: dict[str, float] = {}
    for name, area in items:
        found[name] = found.get(name, 0) + area
    return found


@pytest.mark.parametrize("place", [0, 1])
def test_areas_of_all_classes_but_the_named_background_are_written(scene, trained, tmp_path, place: int) -> None:
    checkpoint, background = trained
    suffix = (("gpkg", "parquet") if background is None else ("geojson", "json"))[place]
    out = tmp_path / "map.tif"
    args = ["--checkpoint", checkpoint, "--input", scene / "scene.tif", "--output", out, "--polygons", suffix]
    assert call(["predict", *args]) == 0
    with rasterio.open(out) as dataset:
        counts = np.bincount(dataset.read(1).ravel(), minlength=2)[:2]
        colors = dataset.colormap(1)
    assert min(counts) > 1000
    expected = {name: n for i, (name, n) in enumerate(zip(["Tumor", "Stroma"], counts, strict=True)) if i != background}
    assert areas(tmp_path / f"map.{suffix}", open_source(out)) == pytest.approx(expected, rel=1e-3)
    wanted = default_colormap(2, background)
    assert [colors[0], colors[1]] == [wanted[0], wanted[1]]
    picture = np.asarray(Image.open(tmp_path / "map.png"))[..., :3]
    assert (picture == wanted[0][:3]).all(-1).any()


def test_the_background_is_part_of_the_checkpoint_and_of_a_maps_identity(trained) -> None:
    checkpoint, background = trained
    spec = load_segmenter(checkpoint).spec
    assert spec.background_index == background
    assert "background" in spec.to_dict()


def test_polygons_without_a_word_about_the_rest_are_refused(scene, tmp_path, capsys) -> None:
    assert train(scene, "areas.gpkg", f"out={tmp_path / 'run'}", "data.background=null") == 2
    assert "one of Tumor, Stroma, ignore, got nothing" in capsys.readouterr().err
    assert train(scene, "areas.gpkg", f"out={tmp_path / 'run'}", "data.background=0") == 2
    assert "data.background must be one of Tumor, Stroma, ignore, or left out" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_model_of_masks_is_not_scored_on_polygons_by_a_guess(scene, trained, capsys) -> None:
    checkpoint, _ = trained
    background = load_segmenter(checkpoint).spec.background
    args = ["--checkpoint", checkpoint, "--input", scene / "scene.tif", "--labels", scene / "areas.gpkg"]
    assert call(["evaluate", *args]) == (2 if background is None else 0)
    assert ("got nothing" in capsys.readouterr().err) is (background is None)
