"""Training of image classification and regression networks."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.data.base import TileBatch
from perf_vit.errors import ConfigError
from perf_vit.metrics import ClassificationMetrics, ClassificationScores, RegisteredMetrics, RegressionScores
from perf_vit.models import (
    CHECKPOINT_KEY,
    ClassificationModelConfig,
    ClassificationSpec,
    build_classifier,
    checkpoint_metadata,
    restore_draw,
)
from perf_vit.models.classification import trunk_layers
from perf_vit.tasks.callbacks import Curves
from perf_vit.tasks.optim import ClassificationOptimConfig, TrainingTask, check_classification_loss, with_valid

__all__ = [
    "CLASSIFICATION_CURVES",
    "CLASSIFICATION_MONITOR",
    "LOSS_MONITOR",
    "REGRESSION_CURVES",
    "REGRESSION_MONITOR",
    "ClassificationTask",
    "logged_scores",
]

CLASSIFICATION_MONITOR = "val/f1"
"""Metric that selects the best checkpoint; rare classes count as much as frequent ones."""

REGRESSION_MONITOR = "val/r2"

LOSS_MONITOR = "val/negative_loss"
"""Metric that selects the best checkpoint where R2 or F1 are undefined."""

CLASSIFICATION_CURVES = Curves(
    losses=("train/loss", "val/loss"), scores=("val/accuracy", "val/f1", "val/auroc"), title="validation"
)
REGRESSION_CURVES = Curves(
    losses=("train/loss", "val/loss"), scores=("val/r2",), title="validation, mean over targets", score_range=None
)


class ClassificationTask(TrainingTask):
    """Training of a classifier; checkpoints hold everything that `perf_vit.models.load_classifier` needs.

    The loss is cross-entropy for single-label classes, binary cross-entropy for multi-label classes, and the Huber loss
    of standardised targets for regression, which is quadratic up to one standard deviation.

    Args:
        model_config: Network config.
        spec: Classes or targets, and statistics of the training data.
        optim: Optimizer, schedule and loss.

    Attributes:
        monitor: Metric that selects the best checkpoint; None for that of the task.

    Raises:
        ConfigError: The network can't be built, or the optimizer or loss settings don't fit it.
    """

    monitor: str | None = None

    def __init__(
        self, model_config: ClassificationModelConfig, spec: ClassificationSpec, optim: ClassificationOptimConfig
    ) -> None:
        super().__init__(optim)
        check_classification_loss(optim, len(spec.classes))
        if spec.kind == "regression" and (optim.label_smoothing or optim.class_weights is not None):
            raise ConfigError(
                "optim.label_smoothing and optim.class_weights are for classification, not regression; leave them out"
            )
        self.model_config = model_config
        self.model = build_classifier(model_config, spec)
        self.val_metrics = ClassificationMetrics(spec.classes, spec.kind)
        self.registered_metrics = RegisteredMetrics(self.model.task, self.model.spec)
        weights = None if optim.class_weights is None else torch.tensor(optim.class_weights)
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", weights, persistent=False)
        self.save_hyperparameters({"model": asdict(model_config), "optim": asdict(optim)})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the metadata."""
        checkpoint[CHECKPOINT_KEY] = checkpoint_metadata(self.model_config, self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the draw of the random projections, which is not part of the weights."""
        restore_draw(self.model, checkpoint[CHECKPOINT_KEY])

    def forward(self, image: Tensor, valid: Tensor | None = None) -> Tensor:
        """Compute logits or standardised targets, [B, K].

        Args:
            image: Standardised tiles, [B, C, H, W].
            valid: Valid pixels as for `Classifier`.
        """
        return self.model(image, valid)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean loss of a batch.

        Args:
            logits: Logits or standardised targets, [B, K].
            targets: Class indices, [B]; 0 and 1 per class (multi-label) or regression targets in their units, [B, K].
        """
        logits = logits.float()
        kind, smoothing = self.model.spec.kind, self.optim.label_smoothing
        if kind == "single_label":
            # torch's weighted mean divides by the sum of weights in the batch, which cancels weights in small batches.
            options: dict[str, Any] = {"reduction": "none", "label_smoothing": smoothing}
            return F.cross_entropy(logits, targets, self.class_weights, **options).mean()
        if kind == "multilabel":
            smooth = targets * (1 - smoothing) + smoothing / 2
            return F.binary_cross_entropy_with_logits(logits, smooth, self.class_weights)
        return F.smooth_l1_loss(logits, self.model.standardised(targets))

    def training_step(self, batch: TileBatch, batch_idx: int) -> Tensor:
        """Compute the loss of a batch."""
        image, targets, valid = with_valid(batch)
        loss = self.loss(self(image, valid), targets)
        size = len(image)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=size)
        return loss

    def validation_step(self, batch: TileBatch, batch_idx: int) -> None:
        """Update loss and scores with a batch."""
        image, targets, valid = with_valid(batch)
        num = self.num_counted(batch_idx, len(image))
        logits, targets = self(image, valid)[:num], targets[:num]
        loss = self.loss(logits, targets) if num else 0.0
        self.log_counted("val/loss", loss, num, prog_bar=True)
        if self.monitor == LOSS_MONITOR:
            self.log_counted(LOSS_MONITOR, -loss, num)
        scores = self.model.scores(logits)
        self.val_metrics.update(scores, targets)
        if num:
            self.registered_metrics.update(scores, targets)

    def on_validation_epoch_end(self) -> None:
        """Log the scores, overall and per class."""
        self.log_dict(logged_scores(self.val_metrics.summary()))
        self.val_metrics.reset()
        self.log_registered_metrics()

    @property
    def body(self) -> nn.Module:
        """Return the whole timm model."""
        network: nn.Module = self.model.network
        return network

    def backbone_layers(self) -> dict[str, int]:
        """Return the layer index of each parameter outside of pooling and classifier."""
        return {f"network.{name}": layer for name, layer in trunk_layers(self.model.network).items()}


def logged_scores(scores: ClassificationScores | RegressionScores) -> dict[str, float]:
    """Return scores by name for logging; undefined scores are 0 overall and left out per class and in regression."""
    overall = {f"val/{name}": value for name, value in scores.overall().items()}
    if isinstance(scores, RegressionScores):
        parts = overall | {f"val/mae/{each.name}": each.mae for each in scores.targets}
        overall = {}
    else:
        overall = {name: 0.0 if math.isnan(value) else value for name, value in overall.items()}
        parts = {f"val/f1/{each.name}": each.f1 for each in scores.classes}
    return overall | {name: value for name, value in parts.items() if not math.isnan(value)}
