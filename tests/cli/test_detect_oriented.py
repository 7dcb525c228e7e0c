"""Train, evaluate and predict oriented boxes through the real entry point."""

import json
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from command_line import call

from perf_vit.geometry.boxes import oriented_box_corners

CONFIG = """
out: ???
task: detection
data:
  train: {image: "???", labels: "???", label_format: dota}
  classes: [ship]
  tile_px: 64
  tiles_per_epoch: 32
  batch_size: 4
  val_share: 0.25
model:
  backbone: test_resnet
  strides: [4, 8]
  channels: 16
  head: oriented_fcos
  head_kwargs: {num_convs: 1, detections_per_tile: 100}
optim: {lr: 0.005}
trainer: {max_epochs: 6, accelerator: cpu, val_every_epochs: 9, report: false}
"""


def make_harbours(folder: Path) -> list[np.ndarray]:
    """Four rasters with bright ships of 18 x 6 px at any angle, one of them difficult, and DOTA's labels."""
    rng, outlines = np.random.default_rng(0), []
    for name in ("images", "labelTxt", "yolo"):
        (folder / name).mkdir(parents=True)
    for number in range(4):
        x, y = (grid.ravel() for grid in np.meshgrid(np.arange(16, 140, 32), np.arange(16, 100, 32)))
        ships = np.column_stack([x, y, np.full((len(x), 2), [18, 6]), rng.uniform(-1.5, 1.5, len(x))])
        corners = oriented_box_corners(ships)
        pixels = rng.normal(0, 0.3, (3, 96, 128)).astype(np.float32)
        burnt = rasterio.features.rasterize(shapely.polygons(corners), (96, 128))
        profile = {"driver": "GTiff", "height": 96, "width": 128, "count": 3, "dtype": "float32", "crs": "EPSG:32636"}
        transform = Affine(0.5, 0, 500_000, 0, -0.5, 4_000_000)
        with rasterio.open(folder / "images" / f"{number}.tif", "w", transform=transform, **profile) as file:
            file.write(pixels + 2 * burnt)
        lines = [
            " ".join(f"{value:.2f}" for value in outline.ravel()) + f" ship {int(index == 0)}"
            for index, outline in enumerate(corners)
        ]
        (folder / "labelTxt" / f"{number}.txt").write_text("\n".join(["gsd:0.5", *lines]))
        shares = corners / [128, 96]
        lines = ["0 " + " ".join(f"{value:.6f}" for value in outline.ravel()) for outline in shares]
        (folder / "yolo" / f"{number}.txt").write_text("\n".join(lines))
        outlines.append(corners)
    return outlines


@pytest.mark.parametrize(
    ("folder", "label_format", "num_ships"),
    [("labelTxt", "dota", 11), pytest.param("yolo", "yolo", 12, marks=pytest.mark.slow)],
)
def test_oriented_ships_go_from_labels_to_outlines_on_the_map(
    tmp_path, capsys, folder, label_format, num_ships
) -> None:
    outlines = make_harbours(tmp_path)
    images, labels = tmp_path / "images", tmp_path / folder
    (tmp_path / "ships.yaml").write_text(CONFIG)
    files = [f"data.train.image={images}", f"data.train.labels={labels}", f"out={tmp_path / 'run'}"]
    files += [f"data.train.label_format={label_format}"]
    assert call(["train", str(tmp_path / "ships.yaml"), *files]) == 0
    checkpoint = ["--checkpoint", tmp_path / "run" / "checkpoints" / "best.ckpt"]

    assert call(["evaluate", *checkpoint, "--input", images, "--labels", labels, "--json", tmp_path / "s.json"]) == 0
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["classes"][0]["num_objects"] == 4 * num_ships
    assert scores["ap50"] > 0.5
    assert set(scores["dota"]["classes"]) == {"ship"}
    assert scores["dota"]["ap50_area"] == pytest.approx(scores["ap50"], abs=0.05)
    assert "AP50 by DOTA's rules" in capsys.readouterr().out

    assert call(["predict", *checkpoint, "--input", images / "0.tif", "--output", tmp_path / "ships.gpkg"]) == 0
    found = geopandas.read_file(tmp_path / "ships.gpkg")
    assert found.crs == "EPSG:32636"
    truth = shapely.polygons(outlines[0] * [0.5, -0.5] + [500_000, 4_000_000])
    shared = shapely.area(shapely.intersection(truth[:, None], found.geometry.values))
    assert (shared.max(1) > 0.5 * 27).mean() > 0.5
    assert found.geometry.area.to_numpy() == pytest.approx(
        found.geometry.minimum_rotated_rectangle().area.to_numpy(), rel=1e-3
    )
