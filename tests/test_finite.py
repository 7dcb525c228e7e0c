"""One gate for values that are no numbers, in front of caches, scores and outputs of every task."""

import csv
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from rasterio import Affine
from small_models import save_classifier, save_segmenter, save_small_detector
from torch import nn

from perf_vit.errors import InputError, NotFiniteError
from perf_vit.finite import check_finite, finite_items, finite_outputs
from perf_vit.inference import (
    ClassificationPredictOptions,
    ClassificationPredictor,
    DetectionPredictOptions,
    DetectionPredictor,
    SegmentationPredictOptions,
    SegmentationPredictor,
    StripMaker,
    find_inputs,
    predict_many,
    predict_strips,
)
from perf_vit.sources import open_source


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 7)])
def test_the_first_bad_item_is_named_and_others_are_counted(kind, shape, value: float) -> None:
    values = np.zeros(shape, np.float32)
    check_finite(kind(values), "scores", str)
    assert finite_items(kind(values)).all()
    values[3].flat[-1:] = value
    values.reshape(5, -1)[3, -1] = value
    with pytest.raises(NotFiniteError, match=r"^scores of image 3 are not finite numbers \(NaN or inf\); the network"):
        check_finite(kind(values), "scores", lambda index: f"image {index}")
    values.reshape(5, -1)[1, 0] = value
    with pytest.raises(NotFiniteError, match=r"of image 1 are .*, and those of 1 more of 5; delete it"):
        check_finite(kind(values), "scores", lambda index: f"image {index}", "delete it")
    assert finite_items(kind(values)).tolist() == [True, False, True, False, True]


def test_nothing_and_whole_numbers_are_finite() -> None:
    check_finite(np.zeros((0, 4)), "scores", str)
    check_finite(np.arange(4), "scores", str)
    check_finite(torch.zeros(0, 4), "scores", str)


def test_layers_are_looked_at_inside_the_block_only() -> None:
    layer = nn.Linear(2, 2)
    bad = torch.full((1, 2), torch.nan)
    layer(bad)
    with pytest.raises(NotFiniteError, match=r"features of a\.tif are not finite"), finite_outputs([layer], "a.tif"):
        layer(bad)
    with finite_outputs([layer], "a.tif"):
        layer(torch.zeros(1, 2))
    assert not layer._forward_hooks


def write_image(path: Path, height: int, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    place = {"crs": "EPSG:32636", "transform": Affine(1, 0, 5e5, 0, -1, 4e6)}
    with rasterio.open(path, "w", driver="GTiff", height=height, width=64, count=3, dtype="uint8", **place) as file:
        file.write(np.random.default_rng(seed).integers(1, 255, (3, height, 64)).astype(np.uint8))
    return path


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    return write_image(tmp_path / "scene.tif", 300, 0)


def damaged(checkpoint: Path, part: str) -> Path:
    """A checkpoint whose weights of a part overflow."""
    content = torch.load(checkpoint, weights_only=False)
    names = [name for name in content["state_dict"] if part in name and name.endswith("weight")]
    assert names
    for name in names:
        content["state_dict"][name] = content["state_dict"][name] * 1e38
    torch.save(content, checkpoint)
    return checkpoint


def test_a_map_with_scores_that_are_no_numbers_is_not_written(scene, tmp_path) -> None:
    predictor = SegmentationPredictor(
        damaged(save_segmenter(tmp_path / "m.ckpt"), "head"), SegmentationPredictOptions(device="cpu")
    )
    with pytest.raises(NotFiniteError, match=r"scene\.tif: scores of Window\(row=0, col=0.* are not finite"):
        predictor.run(str(scene), tmp_path / "map.tif")
    assert not (tmp_path / "map.tif").exists()
    report = predict_many(predictor, find_inputs([scene], tmp_path / "maps"), each=predictor.each, on_error="skip")
    assert [each.status for each in report.inputs] == ["failed"]
    assert "not finite" in report.inputs[0].error


def test_strips_name_the_window(scene) -> None:
    class Bad(nn.Module):
        def forward(self, image):
            return image.new_full((len(image), 2, *image.shape[-2:]), torch.nan)

    maker = StripMaker(extent=open_source(scene).extent, num_channels=2, window_size=64, overlap=0)
    with pytest.raises(NotFiniteError, match=r"scene\.tif: scores of Window\(row=0"):
        list(predict_strips(Bad(), open_source(scene), lambda image: image.pixels.astype(np.float32), maker))


@pytest.mark.parametrize("part", ["head", "neck", "backbone"])
def test_a_detector_that_overflows_finds_no_empty_scene(scene, tmp_path, part: str) -> None:
    checkpoint = damaged(save_small_detector(tmp_path / "d.ckpt"), part)
    predictor = DetectionPredictor(checkpoint, DetectionPredictOptions(device="cpu", score_threshold=0.0))
    with pytest.raises(NotFiniteError, match=r"scene\.tif, Window.* are not finite"):
        predictor.run(str(scene), tmp_path / "found.gpkg")
    assert not (tmp_path / "found.gpkg").exists()


@pytest.mark.parametrize("kind", ["single_label", "multilabel", "regression"])
def test_a_row_with_scores_that_are_no_numbers_has_the_reason(scene, tmp_path, kind: str) -> None:
    options = ClassificationPredictOptions(device="cpu", batch_size=2, on_error="skip")
    predictor = ClassificationPredictor(save_classifier(tmp_path / "c.ckpt", kind), options)
    images = [str(write_image(tmp_path / "in" / f"{number}.tif", 40, number)) for number in range(3)]
    scores, count = predictor.scores, iter(range(99))

    def broken(tiles, valid):
        found = scores(tiles, valid)
        # The batch of the first two, and the second by itself.
        found[-1] = torch.nan if next(count) in (0, 2) else found[-1]
        return found

    predictor.scores = broken
    found = predictor.run(images, tmp_path / "found.csv")
    assert list(found.failed) == [images[1]]
    rows = list(csv.reader((tmp_path / "found.csv").open()))
    assert "nan" not in "".join(rows[1][:-1] + rows[3][:-1])
    assert f"scores of {images[1]} are not finite numbers" in rows[2][-1]
    predictor = ClassificationPredictor(damaged(tmp_path / "c.ckpt", "patch_embed"), options)
    with pytest.raises(InputError, match=r"none of 3 images could be read, the first: scores of .* are not finite"):
        predictor.run(images, tmp_path / "none.csv")
