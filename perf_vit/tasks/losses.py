"""Losses that leave ignored pixels out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.types import IGNORE_INDEX

__all__ = ["SegmentationLoss", "soft_dice"]


class SegmentationLoss(nn.Module):
    """Cross-entropy plus a weighted soft Dice loss over the pixels that carry a label.

    Args:
        dice_weight: factor of the Dice term; 0 for cross-entropy alone.
        class_weights: one factor a class in the cross-entropy, None for 1 each.
    """

    def __init__(self, dice_weight: float = 0.0, class_weights: list[float] | None = None) -> None:
        super().__init__()
        self.dice_weight = dice_weight
        self.class_weights: Tensor | None
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss; 0, with a gradient of 0, where no pixel carries a label.

        Args:
            logits: [B, K, H, W].
            labels: class indices, [B, H, W] int64, `IGNORE_INDEX` where there is none.

        Returns:
            A scalar.
        """
        logits = logits.float()
        keep = labels != IGNORE_INDEX
        per_pixel = F.cross_entropy(
            logits, labels, weight=self.class_weights, ignore_index=IGNORE_INDEX, reduction="none"
        )
        loss = per_pixel.sum() / keep.sum().clamp(min=1)
        if self.dice_weight:
            loss = loss + self.dice_weight * soft_dice(logits, labels)
        return loss


def soft_dice(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - the soft Dice coefficient over the batch, mean over the classes present in it (Milletari et al. 2016, eq. 5).

    Args:
        logits: [B, K, H, W] float.
        labels: [B, H, W] int64, `IGNORE_INDEX` where there is none.

    Returns:
        A scalar in [0, 1]; 0 where no pixel carries a label.
    """
    keep = (labels != IGNORE_INDEX).unsqueeze(1)
    probs = logits.softmax(dim=1) * keep
    target = F.one_hot(labels.masked_fill(labels == IGNORE_INDEX, 0), logits.shape[1]).permute(0, 3, 1, 2) * keep
    overlap = (probs * target).sum((0, 2, 3))
    size = target.sum((0, 2, 3))
    dice = 2 * overlap / (probs.square().sum((0, 2, 3)) + size).clamp(min=1e-6)
    present = size > 0
    return ((1 - dice) * present).sum() / present.sum().clamp(min=1)
