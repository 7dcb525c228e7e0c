"""`data.nodata` of detection: undeclared missing pixels, in training, validation, evaluation and prediction."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from command_line import call, save_detector
from small_models import DETECTOR_SPEC, write_half_empty

from perf_vit.data import DetectionDataConfig, DetectionSplitConfig, build_detection_datamodule
from perf_vit.errors import ConfigError
from perf_vit.inference import DetectionPredictOptions, DetectionPredictor
from perf_vit.models import load_detector
from perf_vit.workflows.evaluate import evaluate

ROWS = ["5,5,20,20", "30,40,50,60", "75,5,90,20", "120,70,140,90"]
TRAIN = """
task: detection
data: {classes: [car], tile_px: 64, tiles_per_epoch: 2, batch_size: 2, nodata: 0}
model: {backbone: test_resnet, strides: [8], channels: 64, head: fcos, head_kwargs: {num_convs: 1}}
trainer: {max_epochs: 1, accelerator: cpu, report: false}
"""


@pytest.fixture
def split(tmp_path) -> DetectionSplitConfig:
    """An image whose columns from 70 on are 0, which it doesn't declare, and four cars, two of them there."""
    write_half_empty(tmp_path / "a.tif", nodata=None)
    lines = ["image,xmin,ymin,xmax,ymax,label", *(f"a.tif,{row},car" for row in ROWS)]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    return DetectionSplitConfig(image=str(tmp_path / "a.tif"), labels=str(tmp_path / "labels.csv"), label_format="csv")


@pytest.mark.parametrize(("nodata", "num_seen"), [(None, 4), (0, 2)])
def test_training_and_validation_leave_missing_pixels_out(split, nodata, num_seen) -> None:
    config = DetectionDataConfig(train=split, val=split, classes=["car"], tile_px=64, batch_size=1, nodata=nodata)
    data = build_detection_datamodule(config, seed=0)
    assert (data.normalizer.mean[0] > 100) == (nodata == 0)
    tiles = [data.val[index] for index in range(len(data.val))]
    assert sum(int((~objects.ignored).sum()) for _, objects, _ in tiles) == num_seen
    # Where pixels are missing, the network sees the mean.
    assert (torch.stack([tile for tile, _, _ in tiles])[-1] == 0).all() == (nodata == 0)


def test_a_trained_detector_keeps_the_nodata_value(split, tmp_path) -> None:
    (tmp_path / "config.yaml").write_text(TRAIN)
    args = [
        f"data.{part}.{key}={getattr(split, key)}"
        for part in ("train", "val")
        for key in ("image", "labels", "label_format")
    ]
    assert call(["train", tmp_path / "config.yaml", f"out={tmp_path / 'run'}", *args]) == 0
    model = load_detector(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert model.spec.nodata == 0
    source = model.spec.open(split.image)
    assert np.array_equal(source.read(source.extent).valid.any(0), np.arange(160) < 70)


@pytest.mark.parametrize(("nodata", "num_seen"), [(None, 4), (0, 2)])
def test_evaluation_and_prediction_pass_over_missing_pixels(split, tmp_path, nodata, num_seen) -> None:
    checkpoint = save_detector(
        tmp_path / "last.ckpt", replace(DETECTOR_SPEC, nodata=nodata), head_kwargs={"detections_per_tile": 20}
    )
    report = evaluate(checkpoint, tmp_path / "a.tif", tmp_path / "labels.csv")
    assert report.scores.classes[0].num_objects == num_seen
    options = DetectionPredictOptions(device="cpu", overlap=0, score_threshold=0.0)
    predictor = DetectionPredictor(checkpoint, options)
    source = predictor.open(split.image)
    objects = predictor.find(source, source.extent)
    # The windows of columns 64 to 128 and 96 to 160 overlap the hole; an object there touches no valid pixel.
    assert (objects.geometry[:, 0] < 70).all() == (nodata == 0)


def test_nodata_is_for_rasters(split) -> None:
    config = DetectionDataConfig(train=split, val=split, classes=["car"], tile_px=64, nodata=0, mpp=0.5)
    with pytest.raises(ConfigError, match=r"data\.nodata is for rasters"):
        build_detection_datamodule(config, seed=0)
