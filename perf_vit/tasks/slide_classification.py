"""Training of slide classifiers on bags of tile features."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.metrics import ClassificationMetrics, RegisteredMetrics
from perf_vit.models import (
    CHECKPOINT_KEY,
    SlideClassificationModelConfig,
    SlideClassificationSpec,
    build_slide_classifier,
    checkpoint_metadata,
    restore_draw,
)
from perf_vit.tasks.callbacks import Curves
from perf_vit.tasks.classification import logged_scores
from perf_vit.tasks.optim import ClassificationOptimConfig, TrainingTask, check_classification_loss

__all__ = ["SLIDE_CURVES", "SLIDE_MONITOR", "SlideClassificationTask"]

SLIDE_MONITOR = "val/log_likelihood"
"""Metric that selects the best checkpoint, the negative loss. With few slides, many epochs have equal F1 and AUROC, of
which the first is hardly trained."""

SLIDE_CURVES = Curves(
    losses=("train/loss", "val/loss"), scores=("val/accuracy", "val/f1", "val/auroc"), title="validation"
)


class SlideClassificationTask(TrainingTask):
    """Training of a slide classifier with cross-entropy; checkpoints hold the encoder and all that prediction needs.

    Args:
        model_config: Network config.
        spec: Classes, and how slides are read.
        optim: Optimizer, schedule and loss.

    Raises:
        ConfigError: The network can't be built, or the optimizer or loss settings don't fit it.
    """

    def __init__(
        self,
        model_config: SlideClassificationModelConfig,
        spec: SlideClassificationSpec,
        optim: ClassificationOptimConfig,
    ) -> None:
        super().__init__(optim)
        check_classification_loss(optim, len(spec.classes))
        self.model_config = model_config
        self.model = build_slide_classifier(model_config, spec)
        self.val_metrics = ClassificationMetrics(spec.classes, "single_label")
        self.registered_metrics = RegisteredMetrics(self.model.task, self.model.spec)
        weights = None if optim.class_weights is None else torch.tensor(optim.class_weights)
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", weights, persistent=False)
        self.save_hyperparameters({"model": asdict(model_config), "optim": asdict(optim)})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the metadata."""
        checkpoint[CHECKPOINT_KEY] = checkpoint_metadata(self.model_config, self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the draw of the encoder's random projections, which is not part of the weights."""
        restore_draw(self.model, checkpoint[CHECKPOINT_KEY])

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the mean cross-entropy of logits [B, K] and class indices [B]."""
        # torch's weighted mean divides by the sum of weights, which cancels the weight of a single slide.
        smoothing = self.optim.label_smoothing
        each = F.cross_entropy(logits.float(), labels, self.class_weights, reduction="none", label_smoothing=smoothing)
        return each.mean()

    def classify(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Compute the logits [B, K] of a batch, and return them with its class indices [B]."""
        bags, mask, labels = batch
        return self.model(bags, mask)[0], labels

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Compute the loss of a batch."""
        logits, labels = self.classify(batch)
        loss = self.loss(logits, labels)
        size = len(labels)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=size)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Update loss and scores with a batch."""
        logits, labels = self.classify(batch)
        num = self.num_counted(batch_idx, len(labels))
        logits, labels = logits[:num], labels[:num]
        loss = self.loss(logits, labels) if num else 0.0
        self.log_counted("val/loss", loss, num, prog_bar=True)
        self.log_counted(SLIDE_MONITOR, -loss, num)
        scores = logits.float().softmax(dim=1)
        self.val_metrics.update(scores, labels)
        if num:
            self.registered_metrics.update(scores, labels)

    def on_validation_epoch_end(self) -> None:
        """Log the scores, overall and per class."""
        self.log_dict(logged_scores(self.val_metrics.summary()))
        self.val_metrics.reset()
        self.log_registered_metrics()

    @property
    def body(self) -> nn.Module:
        """Return the encoder."""
        encoder: nn.Module = self.model.encoder
        return encoder

    def backbone_layers(self) -> dict[str, int]:
        """Return no layers, as the encoder isn't trained."""
        return {}
