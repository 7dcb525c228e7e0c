"""Training of object detectors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from perf_vit.data.detection_tiles import DetectionBatch
from perf_vit.metrics import DetectionMetrics, DetectionScores, RegisteredMetrics
from perf_vit.models import (
    CHECKPOINT_KEY,
    DetectionModelConfig,
    DetectionSpec,
    build_detector,
    checkpoint_metadata,
    restore_draw,
)
from perf_vit.tasks.callbacks import Curves
from perf_vit.tasks.optim import OptimizerConfig, TrainingTask, with_valid
from perf_vit.types import Detections

__all__ = ["DETECTION_CURVES", "DETECTION_MONITOR", "DetectionOptimConfig", "DetectionTask"]

DETECTION_MONITOR = "val/ap50"
"""Metric that selects the best checkpoint; AP at higher IoUs depends on single pixels of small objects."""

DETECTION_CURVES = Curves(
    losses=("train/loss",), scores=("val/ap", "val/ap50"), title="validation, mean over classes and IoUs"
)


@dataclass(kw_only=True)
class DetectionOptimConfig(OptimizerConfig):
    """Optimizer and schedule of detection.

    Attributes:
        lr: Peak learning rate.
    """

    lr: float = 5e-4


class DetectionTask(TrainingTask):
    """Training of a detector; checkpoints hold everything that `perf_vit.models.load_detector` needs.

    Args:
        model_config: Network config.
        spec: Classes and statistics of the training data.
        optim: Optimizer and schedule.

    Raises:
        ConfigError: The network can't be built, or the optimizer settings are out of range.
    """

    def __init__(
        self,
        model_config: DetectionModelConfig,
        spec: DetectionSpec,
        optim: DetectionOptimConfig,
    ) -> None:
        super().__init__(optim)
        self.model_config = model_config
        self.model = build_detector(model_config, spec)
        self.val_metrics = DetectionMetrics(spec.classes, self.model.spec.kind)
        self.registered_metrics = RegisteredMetrics(self.model.task, self.model.spec)
        self.save_hyperparameters({"model": asdict(model_config), "optim": asdict(optim)})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the metadata."""
        checkpoint[CHECKPOINT_KEY] = checkpoint_metadata(self.model_config, self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the score threshold and the draw of the random projections, which are not part of the weights."""
        metadata = checkpoint[CHECKPOINT_KEY]
        self.model.spec = replace(self.model.spec, score_threshold=metadata["spec"]["score_threshold"])
        restore_draw(self.model, metadata)

    def forward(self, tiles: Tensor, valid: Tensor | None = None) -> list[Detections]:
        """Detect objects.

        Args:
            tiles: Standardised tiles, [B, C, H, W].
            valid: Valid pixels as for `Detector`.
        """
        return self.model(tiles, valid)

    def transfer_batch_to_device(
        self, batch: DetectionBatch, device: torch.device, dataloader_idx: int
    ) -> DetectionBatch:
        """Move the images to the device; labels stay arrays, as heads and metrics expect."""
        images, labels, valid = with_valid(batch)
        moved = [[each.to(device, non_blocking=True) for each in planes] for planes in (images, valid or [])]
        return moved[0], labels, moved[1] or None

    def training_step(self, batch: DetectionBatch, batch_idx: int) -> Tensor:
        """Compute the sum of the head's losses of a batch."""
        images, labels, valid = with_valid(batch)
        losses = self.model.losses(images, labels, valid)
        loss = torch.stack(list(losses.values())).sum()
        shared: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(images), "sync_dist": True}
        self.log("train/loss", loss, prog_bar=True, **shared)
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, **shared)
        return loss

    def validation_step(self, batch: DetectionBatch, batch_idx: int) -> None:
        """Update the metrics with the detections of a batch."""
        images, labels, valid = with_valid(batch)
        num = self.num_counted(batch_idx, len(images))
        for index, image in enumerate(images):
            found = self(image[None], None if valid is None else valid[index][None])
            if index < num:
                self.val_metrics.update(found, [labels[index]])
                self.registered_metrics.update(found, [labels[index]])

    def on_validation_epoch_end(self) -> None:
        """Log average precision, overall, per class and per size, and set the score threshold of the network."""
        scores = self.val_metrics.compute()
        self.val_metrics.reset()
        for name, value in _logged(scores).items():
            self.log(name, value, prog_bar=name in ("val/ap", DETECTION_MONITOR))
        self.log_registered_metrics()
        if not math.isnan(scores.threshold):
            self.model.spec = replace(self.model.spec, score_threshold=scores.threshold)


def _logged(scores: DetectionScores) -> dict[str, float]:
    """Return scores by name for logging; undefined overall scores are 0, other undefined scores are left out."""
    overall = {f"val/{name}": getattr(scores, name) for name in ("ap", "ap50", "ap75", "recall")}
    parts = {f"val/ap_{name}": value for name, value in scores.ap_by_size.items()}
    for each in scores.classes:
        parts |= {f"val/ap50/{each.name}": each.ap50, f"val/f1/{each.name}": each.f1}
    known = {name: value for name, value in parts.items() if not math.isnan(value)}
    return {name: 0.0 if math.isnan(value) else value for name, value in overall.items()} | known
