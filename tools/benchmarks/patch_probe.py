"""A logistic regression on single tokens, its scores, and how far they depend on the windows that were scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc, binary_average_precision


@dataclass(frozen=True, eq=False)
class Probe:
    """Logits, linear in features that are standardised by the statistics of training.

    Attributes:
        mean: of each feature in training, [C].
        std: its standard deviation, [C].
        weight: [C].
        bias: [].
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, features: Tensor, share: Tensor, l2: float) -> Self:
        """Minimise the mean cross-entropy + l2 / 2 x the squared weights, until the gradient is gone.

        Args:
            features: [P, C].
            share: what the probability is fitted to, 0 to 1, [P].
            l2: weight of the penalty; above 0, so that there is one minimum.
        """
        mean, std = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
        x = (features - mean) / std
        parameters = torch.zeros(x.shape[1] + 1, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [parameters], max_iter=500, history_size=20, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            logits = x @ parameters[:-1] + parameters[-1]
            value = F.binary_cross_entropy_with_logits(logits, share) + l2 / 2 * parameters[:-1].square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        weight, bias = parameters.detach().split([x.shape[1], 1])
        return cls(mean, std, weight, bias)

    def __call__(self, features: Tensor) -> Tensor:
        """[P, C] -> [P]."""
        return (features - self.mean) / self.std @ self.weight + self.bias


def scores_of(logits: Tensor, positive: Tensor) -> tuple[float, float]:
    """ROC AUC and average precision."""
    # The metrics squash logits themselves, which makes ties of the large ones; ranks are all that counts.
    ranks = logits.argsort().argsort().double() / len(logits)
    return binary_auroc(ranks, positive.long()).item(), binary_average_precision(ranks, positive.long()).item()


def resampled_auc(logits: Tensor, positive: Tensor, group: Tensor, resamples: Tensor) -> Tensor:
    """ROC AUC when whole groups of patches are drawn with replacement.

    Args:
        logits: [P].
        positive: [P] bool.
        group: number of each patch's group, [P].
        resamples: how often each group is drawn, [R, groups].

    Returns:
        [R]; NaN where a draw has one class only.
    """
    order = logits.argsort()
    group, positive = group[order], positive[order].double()
    areas = []
    for counts in resamples.double():
        weights = counts[group]
        positives, negatives = weights * positive, weights * (1 - positive)
        areas.append((positives @ negatives.cumsum(dim=0)) / (positives.sum() * negatives.sum()))
    return torch.stack(areas)
