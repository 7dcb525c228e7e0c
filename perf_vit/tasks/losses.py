"""Losses of segmentation, and mixtures of them, that leave ignored pixels out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from segmentation_models_pytorch.losses import LovaszLoss
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.distributed import mean_normalizer, sum_over_processes
from perf_vit.errors import ConfigError
from perf_vit.types import IGNORE_INDEX

__all__ = [
    "LossConfig",
    "MultilabelLoss",
    "SegmentationLoss",
    "balanced_weights",
    "check_class_weights",
    "check_terms",
    "focal_factor",
    "soft_dice",
]

_FOCAL_EXPONENT = 2


@dataclass(kw_only=True)
class LossConfig:
    """Weights of the terms of a loss; 0 leaves a term out.

    Attributes:
        ce: cross-entropy.
        dice: soft Dice over the classes present in a batch: large and small classes count the same.
        focal: cross-entropy times (1 - p)^2, p the probability of the right class (Lin et al. 2017): easy pixels count
            little.
        lovasz: Lovasz-Softmax (Berman et al. 2018), whose minimum is that of 1 - IoU. It sorts all pixels for each
            class of a batch, so it is the slowest and takes the most memory.
    """

    ce: float = 1.0
    dice: float = 0.0
    focal: float = 0.0
    lovasz: float = 0.0


class SegmentationLoss(nn.Module):
    """A weighted sum of losses over the pixels that carry a label.

    In training mode the mean over processes is the loss of one process on all their samples, but for Lovasz, which
    sorts pixels. Each of them must call it.

    Args:
        terms: their weights.
        class_weights: one factor a class in cross-entropy and focal loss, None for 1 each. The other terms weigh
            classes alike as they are.

    Raises:
        ConfigError: a negative weight, or none above 0.
    """

    def __init__(self, terms: LossConfig | None = None, class_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.terms = LossConfig() if terms is None else terms
        check_terms(self.terms)
        self.class_weights: Tensor | None
        factors = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", factors, persistent=False)
        self.lovasz = LovaszLoss("multiclass", ignore_index=IGNORE_INDEX)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss; 0, with a gradient of 0, where no pixel carries a label.

        Args:
            logits: [B, K, H, W].
            labels: class indices, [B, H, W] int64, `IGNORE_INDEX` where there is none.

        Returns:
            A scalar.
        """
        logits = logits.float()
        terms = self.terms
        loss = logits.new_zeros(())
        if terms.ce or terms.focal:
            loss = loss + self._by_pixel(logits, labels)
        if terms.dice:
            loss = loss + terms.dice * soft_dice(logits, labels, over_processes=self.training)
        if terms.lovasz:
            # Without a labelled pixel it is an empty tensor.
            loss = loss + terms.lovasz * self.lovasz(logits, labels).sum()
        return loss

    def _by_pixel(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy and focal loss from one value a pixel, mean over the labelled ones."""
        entropy = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
        per_pixel = (self.terms.ce + self.terms.focal * focal_factor(entropy)) * entropy
        keep = labels != IGNORE_INDEX
        if self.class_weights is not None:
            per_pixel = per_pixel * self.class_weights[labels.masked_fill(~keep, 0)]
        num_labelled = keep.sum()
        return per_pixel.sum() / (mean_normalizer(num_labelled) if self.training else num_labelled.clamp(min=1))


def soft_dice(logits: Tensor, labels: Tensor, *, over_processes: bool = False) -> Tensor:
    """1 - the soft Dice coefficient over the batch, mean over the classes present in it (Milletari et al. 2016, eq. 5).

    Beside the probabilities it holds no one-hot labels, which for many classes are larger than all else.

    Args:
        logits: [B, K, H, W] float.
        labels: [B, H, W] int64, `IGNORE_INDEX` where there is none.
        over_processes: count the batches of all processes as one; each of them must call it.

    Returns:
        A scalar in [0, 1]; 0 where no pixel carries a label.
    """
    keep = labels != IGNORE_INDEX
    probs = logits.softmax(dim=1) * keep.unsqueeze(1)
    at_label = probs.gather(1, labels.masked_fill(~keep, 0).unsqueeze(1)).squeeze(1)
    present_labels = labels[keep]
    overlap = probs.new_zeros(logits.shape[1]).index_add(0, present_labels, at_label[keep])
    size = present_labels.bincount(minlength=logits.shape[1])
    squares = probs.square().sum((0, 2, 3))
    if over_processes:
        overlap, squares, size = (sum_over_processes(each) for each in (overlap, squares, size))
    dice = 2 * overlap / (squares + size).clamp(min=1e-6)
    present = size > 0
    return ((1 - dice) * present).sum() / present.sum().clamp(min=1)


def focal_factor(entropy: Tensor) -> Tensor:
    """(1 - p)^2 of cross-entropies -log p."""
    return (1 - (-entropy).exp()) ** _FOCAL_EXPONENT


def check_terms(terms: LossConfig) -> None:
    """Refuse weights that make no loss.

    Raises:
        ConfigError: a negative weight, or none above 0.
    """
    weights = asdict(terms)
    if not all(0 <= weight < math.inf for weight in weights.values()) or not any(weights.values()):
        raise ConfigError(f"optim.loss must hold weights of at least 0, one of them above 0, got {weights}")


def balanced_weights(pixels: Sequence[int]) -> list[float]:
    """Factors inverse to the number of a class's pixels, 1 on average over all pixels.

    Each class then has the same share in the loss.

    Args:
        pixels: of each class; a class without any gets 1.
    """
    num_present = sum(count > 0 for count in pixels)
    return [sum(pixels) / (num_present * count) if count else 1.0 for count in pixels]


def check_class_weights(weights: Any, num_classes: int) -> None:
    """Refuse what is not one factor a class.

    Raises:
        ConfigError: another number of factors, or no numbers of at least 0.
    """
    if weights is None:
        return
    is_list = isinstance(weights, Sequence) and not isinstance(weights, str)
    if not is_list or not all(isinstance(w, int | float) and 0 <= w < math.inf for w in weights):
        raise ConfigError(f"optim.class_weights must be balanced, or numbers of at least 0, got {weights}")
    if len(weights) != num_classes:
        raise ConfigError(f"optim.class_weights must give one weight a class, got {len(weights)} for {num_classes}")


class MultilabelLoss(nn.Module):
    """A weighted sum of losses over sigmoids, one a class, and the pixels that carry a label for it.

    The terms are those of `LossConfig` for two outcomes: binary cross-entropy, soft Dice over the classes present in a
    batch, focal loss, and the Lovasz hinge of each class. Of several processes they are as `SegmentationLoss` says.

    Args:
        terms: their weights.
        class_weights: one factor a class in cross-entropy and focal loss, None for 1 each.

    Raises:
        ConfigError: a negative weight, or none above 0.
    """

    def __init__(self, terms: LossConfig | None = None, class_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.terms = LossConfig() if terms is None else terms
        check_terms(self.terms)
        self.class_weights: Tensor | None
        factors = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32).view(1, -1, 1, 1)
        self.register_buffer("class_weights", factors, persistent=False)
        self.lovasz = LovaszLoss("binary", ignore_index=IGNORE_INDEX)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss; 0, with a gradient of 0, where nothing carries a label.

        Args:
            logits: [B, K, H, W].
            labels: 1 where a class is true, 0 where not, `IGNORE_INDEX` where nobody says: [B, K, H, W] int64.

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
            loss = loss + terms.dice * _soft_dice(logits, target, keep, over_processes=self.training)
        if terms.lovasz:
            by_class = [self.lovasz(logits[:, k], labels[:, k]) for k in range(logits.shape[1])]
            loss = loss + terms.lovasz * torch.stack(by_class).mean()
        return loss

    def _by_label(self, logits: Tensor, target: Tensor, keep: Tensor) -> Tensor:
        """Cross-entropy and focal loss from one value a class and pixel, mean over those labelled."""
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        values = (self.terms.ce + self.terms.focal * focal_factor(entropy)) * entropy * keep
        if self.class_weights is not None:
            values = values * self.class_weights
        num_labelled = keep.sum()
        return values.sum() / (mean_normalizer(num_labelled) if self.training else num_labelled.clamp(min=1))


def _soft_dice(logits: Tensor, target: Tensor, keep: Tensor, *, over_processes: bool) -> Tensor:
    probs = logits.sigmoid() * keep
    sums = [values.sum((0, 2, 3)) for values in (probs * target, probs.square(), target)]
    overlap, squares, size = (sum_over_processes(each) for each in sums) if over_processes else sums
    dice = 2 * overlap / (squares + size).clamp(min=1e-6)
    present = size > 0
    return ((1 - dice) * present).sum() / present.sum().clamp(min=1)
