"""One choice a layer under one budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["choose_under_budget"]

# Costs are rounded up to this part of the budget, so the choice never exceeds it.
_STEPS = 4000


def choose_under_budget(errors: Sequence[Sequence[float]], costs: Sequence[float], budget: float) -> list[int] | None:
    """For each layer the candidate that makes the sum of errors smallest while the sum of costs fits a budget.

    A multiple-choice knapsack, solved by dynamic programming over the cost, which is exact but for the rounding of
    costs to 1 / 4,000 of the budget.

    Args:
        errors: of each layer, one a candidate.
        costs: of the candidates, alike in all layers, above 0.
        budget: in the unit of the costs.

    Returns:
        The place of each layer's candidate, or None where even the cheapest ones don't fit.
    """
    if budget <= 0:
        return None
    steps = [math.ceil(cost / budget * _STEPS) for cost in costs]
    # best[c]: the least error of the layers so far at a cost of at most c steps.
    best = np.zeros(_STEPS + 1)
    chosen = []
    for layer in errors:
        options = np.full((len(costs), _STEPS + 1), np.inf)
        for place, (error, step) in enumerate(zip(layer, steps, strict=True)):
            if step <= _STEPS:
                options[place, step:] = best[: _STEPS + 1 - step] + error
        chosen.append(options.argmin(axis=0))
        best = options.min(axis=0)
    if not math.isfinite(best[-1]):
        return None
    places, left = [], _STEPS
    for choice in reversed(chosen):
        places.append(int(choice[left]))
        left -= steps[places[-1]]
    return places[::-1]
