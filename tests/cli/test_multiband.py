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
        geometry=[
            box(*(PLACE @ (32 * c + 3.7, 32 * r + 28.3)), *(PLACE @ (32 * c + 28.3, 32 * r + 3.7))) for r, c in cells
        ],
        crs=CRS,
    )
    frame.to_file(tmp_path / "samples.geojson")
    return tmp_path


@pytest.mark.parametrize(
    ("labels", "options", "num_labelled"),
    [
        ("classes.tif", ["data.values=[11,40]"], 128 * 128),
        pytest.param(
            "samples.geojson", ["data.attribute=kind", "data.background=ignore"], 16 * 24 * 24, marks=pytest.mark.slow
        ),
        (
            "samples.geojson",
            ["data.attribute=kind", "data.background=ignore", "data.all_touched=true"],
            16 * 26 * 26,
        ),
    ],
)
def test_training_and_evaluation_read_labels_alike(
    seven_bands, labels: str, options: list[str], num_labelled: int
) -> None:
    files = [f"data.{p}.image={seven_bands / 'seven.tif'}" for p in ("train", "val")]
    files += [f"data.{p}.labels={seven_bands / labels}" for p in ("train", "val")]
    run = seven_bands / "run"
    args = [
        "configs/segmentation/demo.yaml",
        *files,
        f"out={run}",
        *SMALL,
        "data.classes=[water,forest]",
        "data.background=null",
        *options,
    ]
    # One of the runs is long enough to learn.
    longer = ["trainer.max_epochs=4", "data.tiles_per_epoch=40", "optim.lr=0.005"] if "tif" in labels else []
    assert call(["train", *args, *longer]) == 0
    base = ["--checkpoint", run / "checkpoints" / "last.ckpt", "--input", seven_bands / "seven.tif"]

    def evaluated(*options: str) -> dict:
        files = ["--labels", seven_bands / labels, "--json", seven_bands / "scores.json", "--overwrite"]
        assert call(["evaluate", *base, *files, *options]) == 0
        return json.loads((seven_bands / "scores.json").read_text())

    scores = evaluated()
    assert sum(entry["num_pixels"] for entry in scores["classes"]) == num_labelled
    if "tif" in labels:
        assert scores["mean"]["iou"] > 0.7
    else:
        for option, side in (("--all-touched", 26), ("--no-all-touched", 24)):
            assert sum(entry["num_pixels"] for entry in evaluated(option)["classes"]) == 16 * side**2
