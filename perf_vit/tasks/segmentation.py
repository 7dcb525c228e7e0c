"""Training of segmentation networks."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import Tensor

from perf_vit.data.base import TileBatch
from perf_vit.metrics import RegisteredMetrics, class_scores, segmentation_metrics
from perf_vit.models import (
    CHECKPOINT_KEY,
    SegmentationModelConfig,
    SegmentationSpec,
    build_segmenter,
    checkpoint_metadata,
    restore_draw,
)
from perf_vit.streaming.stripes import StripedSegmenter
from perf_vit.tasks.losses import LossConfig, MultilabelLoss, SegmentationLoss, check_class_weights
from perf_vit.tasks.optim import OptimizerConfig, TrainingTask, with_valid
from perf_vit.types import IGNORE_INDEX

__all__ = ["SegmentationOptimConfig", "SegmentationTask"]


@dataclass(kw_only=True)
class SegmentationOptimConfig(OptimizerConfig):
    """Optimizer, schedule and loss of segmentation.

    Attributes:
        loss: Weights of the loss terms.
        class_weights: One factor per class in cross-entropy and focal loss, or "balanced" for factors inverse to the
            number of pixels of each class in the training labels.
    """

    loss: LossConfig = field(default_factory=LossConfig)
    class_weights: Literal["balanced"] | list[float] | None = None


class SegmentationTask(TrainingTask):
    """Training of a segmenter; checkpoints hold everything that `perf_vit.models.load_segmenter` needs.

    Args:
        model_config: Network config.
        spec: Classes and statistics of the training data.
        optim: Optimizer, schedule and loss.
    """

    def __init__(
        self, model_config: SegmentationModelConfig, spec: SegmentationSpec, optim: SegmentationOptimConfig
    ) -> None:
        super().__init__(optim)
        num_classes = len(spec.classes)
        check_class_weights(optim.class_weights, num_classes)
        assert not isinstance(optim.class_weights, str)
        self.model_config = model_config
        self.model = build_segmenter(model_config, spec)
        self.loss = (MultilabelLoss if spec.multilabel else SegmentationLoss)(optim.loss, optim.class_weights)
        self.val_metrics = segmentation_metrics(num_classes, multilabel=spec.multilabel)
        self.registered_metrics = RegisteredMetrics(self.model.task, self.model.spec)
        # Set while several processes share each tile.
        self.stripes: StripedSegmenter | None = None
        self.save_hyperparameters({"model": asdict(model_config), "optim": asdict(optim)})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the metadata."""
        checkpoint[CHECKPOINT_KEY] = checkpoint_metadata(self.model_config, self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the draw of the random projections, which is not part of the weights."""
        restore_draw(self.model, checkpoint[CHECKPOINT_KEY])

    def forward(self, image: Tensor, valid: Tensor | None = None) -> Tensor:
        """Compute logits, [B, K, H, W]; only those of this process's rows where several share a tile.

        Args:
            image: Standardised tiles, [B, C, H, W].
            valid: Valid pixels as for `Segmenter`.
        """
        return self.model(image, valid) if self.stripes is None else self.stripes.logits(image, valid)

    def training_step(self, batch: TileBatch, batch_idx: int) -> Tensor:
        """Compute the loss of a batch."""
        image, labels, valid = with_valid(batch)
        loss = self.loss(self(image, valid), self._own(labels))
        size = len(image)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=size)
        return loss

    def validation_step(self, batch: TileBatch, batch_idx: int) -> None:
        """Update loss and metrics with a batch."""
        image, labels, valid = with_valid(batch)
        num = self.num_counted(batch_idx, len(image))
        labels[num:] = IGNORE_INDEX
        logits, labels = self(image, valid), self._own(labels)
        self.log_counted("val/loss", self.loss(logits, labels), num, prog_bar=True)
        predicted = self.model.to_labels(logits)
        self.val_metrics.update(predicted, labels)
        self.registered_metrics.update(predicted, labels)

    def _own(self, labels: Tensor) -> Tensor:
        """Return the labels of the pixels whose logits this process computes."""
        return labels if self.stripes is None else self.stripes.own(labels)

    def on_validation_epoch_end(self) -> None:
        """Log IoU and F1 per class and their means over the classes present."""
        scores = class_scores(self.val_metrics, self.model.spec.classes)
        for score in scores:
            self.log(f"val/iou/{score.name}", score.iou)
            self.log(f"val/f1/{score.name}", score.f1)
        present = [score for score in scores if not math.isnan(score.iou)]
        self.log("val/iou", sum(s.iou for s in present) / max(1, len(present)), prog_bar=True)
        self.log("val/f1", sum(s.f1 for s in present) / max(1, len(present)))
        self.val_metrics.reset()
        self.log_registered_metrics()
