"""Training of segmentation networks: losses without ignored pixels, their weighted sums, and the Lightning module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import torch
from segmentation_models_pytorch.losses import LovaszLoss
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.data.base import TileBatch
from perf_vit.distributed import mean_normalizer, sum_over_processes
from perf_vit.errors import ConfigError
from perf_vit.metrics import RegisteredMetrics, class_scores, segmentation_metrics
from perf_vit.models import (
    CHECKPOINT_KEY,
    SegmentationModelConfig,
    SegmentationSpec,
    build_segmenter,
    checkpoint_metadata,
    restore_draw,
)
from perf_vit.registry import did_you_mean
from perf_vit.streaming.stripes import StripedSegmenter
from perf_vit.tasks.optim import OptimizerConfig, TrainingTask, check_class_weights, with_valid
from perf_vit.types import IGNORE_INDEX

__all__ = [
    "LossConfig",
    "MultilabelLoss",
    "SegmentationLoss",
    "SegmentationOptimConfig",
    "SegmentationTask",
    "balanced_weights",
    "check_terms",
    "focal_factor",
    "soft_dice",
]

_FOCAL_EXPONENT = 2


@dataclass(kw_only=True)
class LossConfig:
    """Weights of the loss terms; 0 leaves a term out.

    Attributes:
        ce: Cross-entropy.
        dice: Soft Dice over the classes present in a batch; large and small classes have equal weight.
        focal: Focal loss, cross-entropy times (1 - p)^2 with p the probability of the true class (Lin et al. 2017);
            gives easy pixels little weight.
        lovasz: Lovasz-Softmax (Berman et al. 2018), a surrogate of 1 - IoU. It sorts all pixels for each class of a
            batch, so it is the slowest term and takes the most memory.
    """

    ce: float = 1.0
    dice: float = 0.0
    focal: float = 0.0
    lovasz: float = 0.0

    @staticmethod
    def from_short(value: Any, key: str) -> dict[str, Any] | None:
        """Return the weights that names of terms in place of a mapping stand for: 1 each, 0 for all others.

        Raises:
            ConfigError: A term is unknown.
        """
        terms = value.replace(",", " ").split() if isinstance(value, str) else value
        if not isinstance(terms, list | tuple) or not terms:
            return None
        known = [each.name for each in fields(LossConfig)]
        for term in terms:
            if term not in known:
                near = did_you_mean(term, known, "; weights are given as in {ce: 1, dice: 0.5}")
                raise ConfigError(f"{key} must be one or more of {', '.join(known)}, got {term!r}{near}")
        return {name: float(name in terms) for name in known}

    @staticmethod
    def short_schema() -> dict[str, Any]:
        """Return the JSON schema of what `from_short` takes."""
        names = {"enum": [each.name for each in fields(LossConfig)]}
        return {"anyOf": [names, {"type": "array", "items": names}]}


class SegmentationLoss(nn.Module):
    """Weighted sum of losses over the labelled pixels.

    In training mode the mean over processes equals the loss of one process on all samples, except for Lovasz, which
    sorts pixels; all processes must call it.

    Args:
        terms: Weights of the loss terms.
        class_weights: One factor per class in cross-entropy and focal loss; None for 1. The other terms weight all
            classes equally.

    Attributes:
        group: Process group over which the mean is that of one process in evaluation mode, too; None for no group.

    Raises:
        ConfigError: A weight is negative, or none is above 0.
    """

    def __init__(self, terms: LossConfig | None = None, class_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.terms = LossConfig() if terms is None else terms
        check_terms(self.terms)
        self.class_weights: Tensor | None
        factors = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", factors, persistent=False)
        self.lovasz = LovaszLoss("multiclass", ignore_index=IGNORE_INDEX)
        self.group: Any = None

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the mean loss; 0 with a gradient of 0 if there are no labelled pixels.

        Args:
            logits: Logits, [B, K, H, W].
            labels: Class indices, [B, H, W] int64; `IGNORE_INDEX` for unlabelled pixels.

        Returns:
            A scalar.
        """
        logits = logits.float()
        terms = self.terms
        loss = logits.new_zeros(())
        if terms.ce or terms.focal:
            loss = loss + self._by_pixel(logits, labels)
        if terms.dice:
            loss = loss + terms.dice * soft_dice(logits, labels, over_processes=_over(self))
        if terms.lovasz:
            # The Lovasz loss is an empty tensor if there are no labelled pixels.
            loss = loss + terms.lovasz * self.lovasz(logits, labels).sum()
        return loss

    def _by_pixel(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the mean cross-entropy and focal loss over the labelled pixels."""
        entropy = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
        per_pixel = (self.terms.ce + self.terms.focal * focal_factor(entropy)) * entropy
        keep = labels != IGNORE_INDEX
        if self.class_weights is not None:
            per_pixel = per_pixel * self.class_weights[labels.masked_fill(~keep, 0)]
        return per_pixel.sum() / _mean_divisor(self, keep.sum())


def _over(loss: Any) -> Any:
    """Return the processes over which a loss is one: False for none, True for all, or a group."""
    return loss.training or (loss.group is not None and loss.group)


def _mean_divisor(loss: Any, num_labelled: Tensor) -> Tensor:
    over = _over(loss)
    if over is False:
        return num_labelled.clamp(min=1)
    return mean_normalizer(num_labelled, group=None if over is True else over)


def soft_dice(logits: Tensor, labels: Tensor, *, over_processes: Any = False) -> Tensor:
    """Compute 1 - soft Dice over the batch, averaged over the classes present (Milletari et al. 2016, eq. 5).

    No one-hot labels are stored, which would dominate memory with many classes.

    Args:
        logits: Logits, [B, K, H, W] float.
        labels: Class indices, [B, H, W] int64; `IGNORE_INDEX` for unlabelled pixels.
        over_processes: Whether to treat the batches of all processes, or of a process group, as one; all of them must
            call it then.

    Returns:
        A scalar in [0, 1]; 0 if there are no labelled pixels.
    """
    keep = labels != IGNORE_INDEX
    probs = logits.softmax(dim=1) * keep.unsqueeze(1)
    at_label = probs.gather(1, labels.masked_fill(~keep, 0).unsqueeze(1)).squeeze(1)
    present_labels = labels[keep]
    overlap = probs.new_zeros(logits.shape[1]).index_add(0, present_labels, at_label[keep])
    size = present_labels.bincount(minlength=logits.shape[1])
    squares = probs.square().sum((0, 2, 3))
    if over_processes:
        overlap, squares, size = _summed((overlap, squares, size), over_processes)
    dice = 2 * overlap / (squares + size).clamp(min=1e-6)
    present = size > 0
    return ((1 - dice) * present).sum() / present.sum().clamp(min=1)


def focal_factor(entropy: Tensor) -> Tensor:
    """Compute (1 - p)^2 from cross-entropies -log p."""
    return (1 - (-entropy).exp()) ** _FOCAL_EXPONENT


def check_terms(terms: LossConfig) -> None:
    """Check the weights of the loss terms.

    Raises:
        ConfigError: A weight is negative, or none is above 0.
    """
    weights = asdict(terms)
    if not all(0 <= weight < math.inf for weight in weights.values()) or not any(weights.values()):
        raise ConfigError(f"optim.loss must hold weights of at least 0, one of them above 0, got {weights}")


def balanced_weights(pixels: Sequence[int]) -> list[float]:
    """Compute class weights inverse to the number of pixels, with a mean of 1 over all pixels.

    All classes then have the same share in the loss.

    Args:
        pixels: Number of pixels per class; classes without pixels get a weight of 1.
    """
    num_present = sum(count > 0 for count in pixels)
    return [sum(pixels) / (num_present * count) if count else 1.0 for count in pixels]


class MultilabelLoss(nn.Module):
    """Weighted sum of losses over independent classes (sigmoid) and their labelled pixels.

    The terms are the binary versions of those of `LossConfig`: binary cross-entropy, soft Dice over the classes present
    in a batch, focal loss, and the Lovasz hinge of each class. Several processes are handled as in `SegmentationLoss`.

    Args:
        terms: Weights of the loss terms.
        class_weights: One factor per class in cross-entropy and focal loss; None for 1.

    Raises:
        ConfigError: A weight is negative, or none is above 0.
    """

    def __init__(self, terms: LossConfig | None = None, class_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.terms = LossConfig() if terms is None else terms
        check_terms(self.terms)
        self.class_weights: Tensor | None
        factors = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32).view(1, -1, 1, 1)
        self.register_buffer("class_weights", factors, persistent=False)
        self.lovasz = LovaszLoss("binary", ignore_index=IGNORE_INDEX)
        self.group: Any = None

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the mean loss; 0 with a gradient of 0 if there are no labels.

        Args:
            logits: Logits, [B, K, H, W].
            labels: 1 where a class is present, 0 where it is absent, `IGNORE_INDEX` if unlabelled, [B, K, H, W] int64.

        Returns:
            A scalar.
        """
        logits = logits.float()
        terms = self.terms
        keep = labels != IGNORE_INDEX
        target = labels.masked_fill(~keep, 0).to(logits.dtype)
        loss = logits.new_zeros(())
        if terms.ce or terms.focal:
            loss = loss + self._by_label(logits, target, keep)
        if terms.dice:
            loss = loss + terms.dice * _soft_dice(logits, target, keep, over_processes=_over(self))
        if terms.lovasz:
            by_class = [self.lovasz(logits[:, k], labels[:, k]) for k in range(logits.shape[1])]
            loss = loss + terms.lovasz * torch.stack(by_class).mean()
        return loss

    def _by_label(self, logits: Tensor, target: Tensor, keep: Tensor) -> Tensor:
        """Compute the mean cross-entropy and focal loss over the labelled classes and pixels."""
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        values = (self.terms.ce + self.terms.focal * focal_factor(entropy)) * entropy * keep
        if self.class_weights is not None:
            values = values * self.class_weights
        return values.sum() / _mean_divisor(self, keep.sum())


def _summed(sums: Sequence[Tensor], over_processes: Any) -> list[Tensor]:
    return [sum_over_processes(each, None if over_processes is True else over_processes) for each in sums]


def _soft_dice(logits: Tensor, target: Tensor, keep: Tensor, *, over_processes: Any) -> Tensor:
    probs = logits.sigmoid() * keep
    sums = [values.sum((0, 2, 3)) for values in (probs * target, probs.square(), target)]
    overlap, squares, size = _summed(sums, over_processes) if over_processes else sums
    dice = 2 * overlap / (squares + size).clamp(min=1e-6)
    present = size > 0
    return ((1 - dice) * present).sum() / present.sum().clamp(min=1)


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
        check_class_weights(optim.class_weights, num_classes, "balanced, or numbers")
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
