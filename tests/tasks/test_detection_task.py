"""Training steps of a detector."""

from dataclasses import replace

import numpy as np
import torch

from perf_vit.models import DetectionModelConfig, DetectionSpec
from perf_vit.tasks import DetectionOptimConfig, DetectionTask
from perf_vit.transforms import Normalizer
from perf_vit.types import ObjectLabels


def test_logged_training_losses_are_means_over_all_processes(monkeypatch) -> None:
    spec = DetectionSpec(classes=("a",), normalizer=Normalizer((0.0,) * 3, (1.0,) * 3), tile_px=32)
    config = DetectionModelConfig(backbone="resnet18", strides=[8], channels=64, head_kwargs={"num_convs": 1})
    task = DetectionTask(config, spec, DetectionOptimConfig())
    synced = {}
    monkeypatch.setattr(task, "log", lambda name, value, **options: synced.update({name: options["sync_dist"]}))
    monkeypatch.setattr(
        task, "log_dict", lambda values, **options: synced.update(dict.fromkeys(values, options["sync_dist"]))
    )
    boxes = np.array([[4, 4, 20, 20]], np.float32)
    labels = ObjectLabels(labels=np.zeros(1, np.int64), boxes_xyxy=boxes, ignored=np.zeros(1, bool))
    task.training_step(([torch.zeros(3, 64, 64)], [labels]), 0)
    names = ("loss", "classification", "box", "centerness")
    assert synced == {f"train/{name}": True for name in names}


def test_a_resumed_run_keeps_its_score_threshold() -> None:
    spec = DetectionSpec(classes=("a",), normalizer=Normalizer((0.0,) * 3, (1.0,) * 3), tile_px=32)
    config = DetectionModelConfig(backbone="resnet18", strides=[8], channels=64, head_kwargs={"num_convs": 1})
    first, second = (DetectionTask(config, spec, DetectionOptimConfig()) for _ in range(2))
    first.model.spec = replace(first.model.spec, score_threshold=0.31)
    checkpoint: dict = {}
    first.on_save_checkpoint(checkpoint)
    second.on_load_checkpoint(checkpoint)
    assert second.model.spec.score_threshold == 0.31
