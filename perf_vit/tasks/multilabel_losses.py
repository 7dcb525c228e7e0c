"""Losses where several classes may be true at a pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from segmentation_models_pytorch.losses import LovaszLoss
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.ops.processes import mean_normalizer, sum_over_processes
from perf_vit.tasks.losses import LossConfig, check_terms, focal_factor
from perf_vit.types import IGNORE_INDEX

__all__ = ["MultilabelLoss"]


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
