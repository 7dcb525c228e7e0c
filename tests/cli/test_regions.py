"""Parts of a raster that are scored or trained on alone."""

import json

import numpy as np
import pytest
from command_line import call, train_args

from perf_vit.labels import open_labels
from perf_vit.sources import open_raster
from perf_vit.types import Window
from perf_vit.workflows.evaluate import evaluate

HALVES = ([0, 0, 100, 192], [100, 0, 92, 192])


def counted(evaluation) -> list[int]:
    return [row["num_pixels"] for row in evaluation.table]


def test_scores_of_a_region_count_its_pixels_alone(trained, tmp_path) -> None:
    source = open_raster(trained.scene.image)
    labels = open_labels(trained.scene.labels, source, classes=("water_or_land", "ship"), background="water_or_land")
    for region in (*HALVES, [37, 51, 64, 1]):
        path = tmp_path / "scores.json"
        args = ["--input", trained.scene.image, "--labels", trained.scene.labels, "--json", path, "--overwrite"]
        assert call(["evaluate", "--checkpoint", trained.checkpoint, *args, "--region", *map(str, region)]) == 0
        window = Window(*region)
        truth = labels.read(window)[source.read(window).valid]
        confusion = np.array(json.loads(path.read_bytes())["confusion"])
        assert confusion.sum(1).tolist() == [(truth == 0).sum(), (truth == 1).sum()]


def test_regions_that_share_a_raster_out_count_all_of_it(trained) -> None:
    files = (trained.checkpoint, trained.scene.image, trained.scene.labels)
    whole = evaluate(*files)
    parts = [counted(evaluate(*files, region=region)) for region in HALVES]
    assert np.sum(parts, axis=0).tolist() == counted(whole)


EMPTY = [[0, 0, 0, 10], [0, 0, 10, 0], [0, 0, -10, -10]]
OUTSIDE = [[-1, 0, 10, 10], [0, -1, 10, 10], [190, 0, 3, 10], [500, 500, 9, 9]]


@pytest.mark.parametrize("region", [*EMPTY, *OUTSIDE], ids=str)
def test_regions_outside_the_raster_or_without_pixels_are_refused_everywhere(region, trained, tmp_path, capsys) -> None:
    args = ["--input", trained.scene.image, "--labels", trained.scene.labels]
    assert call(["evaluate", "--checkpoint", trained.checkpoint, *args, "--region", *map(str, region)]) == 2
    assert capsys.readouterr().err.startswith("Error: --region [row, col, height, width]")
    for part in ("train", "val"):
        assert call(train_args(trained.scene, tmp_path / "run", f"data.{part}.region={region}")) == 2
        assert capsys.readouterr().err.startswith(f"Error: data.{part}.region [row, col, height, width]")
    assert not (tmp_path / "run").exists()
