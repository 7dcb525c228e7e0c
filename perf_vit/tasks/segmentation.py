"""Training of a segmentation network."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import lightning
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from perf_vit.models import (
    CHECKPOINT_KEY,
    ModelConfig,
    SegmenterSpec,
    build_segmenter,
    checkpoint_metadata,
    restore_draw,
)
from perf_vit.tasks.losses import LossConfig, SegmentationLoss, check_class_weights
from perf_vit.tasks.metrics import class_scores, segmentation_metrics
from perf_vit.tasks.multilabel_losses import MultilabelLoss

__all__ = ["OptimConfig", "SegmentationTask"]


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW with a linear warm-up and a cosine decay to zero, over the steps of the whole run.

    Attributes:
        lr: peak learning rate.
        weight_decay: of matrices and kernels; vectors (norms, biases) and position embeddings have none.
        warmup_fraction: share of the steps over which the rate rises.
        loss: weights of its terms.
        class_weights: one factor a class in cross-entropy and focal loss, or "balanced", which `perf-vit train` turns
            into factors inverse to the classes' pixels in the training labels.
    """

    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup_fraction: float = 0.05
    loss: LossConfig = field(default_factory=LossConfig)
    class_weights: Any = None


class SegmentationTask(lightning.LightningModule):
    """Trains a segmenter; its checkpoints hold all that `perf_vit.models.load_segmenter` needs.

    Args:
        model_config: the network.
        spec: classes and statistics of the training data.
        optim: loss and schedule.
    """

    def __init__(self, model_config: ModelConfig, spec: SegmenterSpec, optim: OptimConfig) -> None:
        super().__init__()
        num_classes = len(spec.classes)
        check_class_weights(optim.class_weights, num_classes)
        self.model_config = model_config
        self.optim = optim
        self.model = build_segmenter(model_config, spec)
        self.loss = (MultilabelLoss if spec.multilabel else SegmentationLoss)(optim.loss, optim.class_weights)
        self.val_metrics = segmentation_metrics(num_classes, multilabel=spec.multilabel)
        self.save_hyperparameters({"model": asdict(model_config), "optim": asdict(optim)})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the metadata."""
        checkpoint[CHECKPOINT_KEY] = checkpoint_metadata(self.model_config, self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the draw of the attention's projections, which are no part of the weights."""
        restore_draw(self.model, checkpoint[CHECKPOINT_KEY])

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, K, H, W] of standardised tiles [B, C, H, W]."""
        return self.model(image)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        image, labels = batch
        loss = self.loss(self(image), labels)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and metrics of one batch."""
        image, labels = batch
        logits = self(image)
        self.log("val/loss", self.loss(logits, labels), batch_size=len(image), prog_bar=True, sync_dist=True)
        self.val_metrics.update(self.model.decide(logits), labels)

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

    def configure_optimizers(self) -> Any:
        """AdamW and the schedule, stepped every batch."""
        optimizer = AdamW(self._parameter_groups(), lr=self.optim.lr)
        total = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, total, self.optim.warmup_fraction))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _parameter_groups(self) -> list[dict[str, Any]]:
        exempt = ("pos_embed", "cls_token", "reg_token")
        decayed: list[Tensor] = []
        plain: list[Tensor] = []
        for name, parameter in self.model.named_parameters():
            is_plain = parameter.ndim < 2 or name.endswith(exempt)
            (plain if is_plain else decayed).append(parameter)
        return [{"params": decayed, "weight_decay": self.optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]


def warmup_cosine(step: int, total: int, warmup_fraction: float) -> float:
    """Factor of the learning rate at a step: linear up to 1, then half a cosine down to 0 at `total`."""
    warmup = max(1, round(total * warmup_fraction))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))
