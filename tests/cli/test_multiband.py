"""Seven bands, class values that are no indices, sparse polygons: the label options travel in the checkpoint."""

import json

import geopandas as gpd
import numpy as np
import pytest
import rasterio
from affine import Affine
from command_line import SMALL, call
from shapely import box

CRS = "EPSG:32622"
PLACE = Affine(30, 0, 650_010, 0, -30, 9_480_000)


@pytest.fixture
def seven_bands(tmp_path):
    rng = np.random.default_rng(0)
    truth = np.repeat(np.repeat(rng.integers(0, 2, (4, 4)), 32, 0), 32, 1)
    pixels = rng.normal(60 + 40 * truth, 8, (7, 128, 128)).clip(1, 255).astype(np.uint8)
    profile = {"driver": "GTiff", "height": 128, "width": 128, "crs": CRS, "transform": PLACE, "dtype": "uint8"}
    with rasterio.open(tmp_path / "seven.tif", "w", count=7, **profile) as dataset:
        dataset.write(pixels)
    with rasterio.open(tmp_path / "classes.tif", "w", count=1, nodata=0, **profile) as dataset:
        dataset.write(np.where(truth == 1, 40, 11).astype(np.uint8), 1)
    cells = [(r, c) for r in range(4) for c in range(4)]
    frame = gpd.GeoDataFrame(
        {"kind": ["forest" if truth[32 * r, 32 * c] else "water" for r, c in cells]},
        geometry=[box(*(PLACE @ (32 * c + 4, 32 * r + 28)), *(PLACE @ (32 * c + 28, 32 * r + 4))) for r, c in cells],
        crs=CRS,
    )
    frame.to_file(tmp_path / "samples.geojson")
    return tmp_path


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        ("classes.tif", ["data.values=[11,40]"]),
        ("samples.geojson", ["data.attribute=kind", "data.background=null"]),
    ],
)
def test_training_and_evaluation_read_labels_alike(seven_bands, labels: str, options: list[str]) -> None:
    files = [f"data.{p}.image={seven_bands / 'seven.tif'}" for p in ("train", "val")]
    files += [f"data.{p}.labels={seven_bands / labels}" for p in ("train", "val")]
    run = seven_bands / "run"
    args = ["configs/segmentation/demo.yaml", *files, f"out={run}", *SMALL, "data.classes=[water,forest]", *options]
    longer = ["trainer.max_epochs=4", "data.tiles_per_epoch=64", "optim.lr=0.005"]
    assert call(["train", *args, *longer]) == 0
    base = ["--checkpoint", run / "checkpoints" / "last.ckpt", "--input", seven_bands / "seven.tif"]
    assert call(["evaluate", *base, "--labels", seven_bands / labels, "--json", seven_bands / "scores.json"]) == 0
    scores = json.loads((seven_bands / "scores.json").read_text())
    assert sum(entry["num_pixels"] for entry in scores["classes"]) == (128 * 128 if "tif" in labels else 16 * 24 * 24)
    assert scores["mean"]["iou"] > 0.7
