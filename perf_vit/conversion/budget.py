"""One choice a layer under one budget."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from perf_vit.conversion.fidelity import attention_errors, evaluating, final_errors, image_batches
from perf_vit.conversion.linearize import Conversion, body_of, converted_layers, convertible_layers, linearize
from perf_vit.layers import LinearizedAttention
from perf_vit.layers.token_grid import TokenGrid, watch_patch_embed

__all__ = ["CANDIDATES", "choose_layer_options", "choose_under_budget"]

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


CANDIDATES: tuple[dict[str, int], ...] = tuple(
    {"window_size": window_size, "num_sinks": num_sinks, "num_clusters": num_clusters}
    for window_size, num_sinks, num_clusters in (
        (8, 16, 32),
        *product((12, 16, 24), (32, 128), (64, 96, 256)),
        (16, 256, 96),
        (24, 256, 96),
        (16, 256, 512),
    )
)
"""What `choose_layer_options` chooses from for each layer."""

_TIMED_RUNS = 3

# A choice that takes longer than its layer's time made believe is made again, so often, with as much less to spend.
_CHOICES = 4

# What a measured time may be above the budget: noise.
_TOLERANCE = 1.02


def choose_layer_options(
    model: nn.Module,
    images: Sequence[Tensor],
    budget: float = 1.5,
    *,
    layers: Collection[int] | None = None,
    candidates: Sequence[Mapping[str, int]] | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> dict[int, dict[str, int]]:
    """Windows, sinks and clusters for each layer that keep most of a model within a time.

    Measures what each candidate does to the outputs of each layer, on the inputs that the layer has in the softmax
    model, how far the final tokens move if the fastest one stands in one layer alone, and how long each takes on one
    layer. From the first two it predicts what each choice costs in the cosine of the final tokens, which grows with the
    square of a layer's error, and chooses so that the sum is smallest while the model's forward takes at most `budget`
    times that of plain FAVOR+ (256 features). What it has chosen it times, and chooses again with less to spend where
    that takes longer. Times are those of this machine, at the size of the images, while nothing else should run.

    Args:
        model: the softmax model.
        images: a few standardised images, [B, C, H, W] or [C, H, W]; the first one is timed.
        budget: times of plain FAVOR+, whole models, projections and feed-forward layers included.
        layers: indices of the layers to convert, None for all.
        candidates: options to choose from, those of `CANDIDATES` if None.
        on_step: called with the number of measurements that are done and of all.
        **options: fields of `ClusteredOptions` that all candidates share; what is given here isn't chosen.

    Returns:
        Index -> options, for the `per_layer` of `linearize`.

    Raises:
        ValueError: no image, a model that can't be converted, candidates that don't fit the other
            options, or a budget below what the fastest candidate takes.
    """
    candidates = _fitting(CANDIDATES, options) if candidates is None else candidates
    if not images or not candidates:
        raise ValueError(f"expected images and candidates to choose by, got {len(images)} and {len(candidates)}")
    _check_candidates(candidates, options)
    model = body_of(model)
    plain = linearize(model, "performer", layers)
    if not converted_layers(plain):
        raise ValueError("layers must name one layer or more to choose options for, got none; leave it out for all")
    alternatives = _alternatives(model, sorted(converted_layers(plain)), candidates, options)
    steps = _Steps(len(alternatives) * (len(candidates) + 1) * len(images) + _TIMED_RUNS + 2, on_step)
    (batch,) = image_batches(model, images[:1])
    seconds, whole, rest = _seconds(plain, alternatives, batch, steps)
    errors = attention_errors(model, alternatives, images, steps)
    fastest = seconds.index(min(seconds))
    alone = {index: [layers[fastest]] for index, layers in alternatives.items()}
    moved = final_errors(model, alone, images, steps)
    losses = [
        [moved[index] * (error / of_layer[fastest]) ** 2 if of_layer[fastest] else error for error in of_layer]
        for index, of_layer in errors.items()
    ]

    def relative_time(places: Sequence[int]) -> float:
        made = linearize(model, "clustered", layers, _by_layer(alternatives, candidates, places), **options)
        return _relative_time(made, plain, batch)

    chosen = _choose(losses, seconds, budget, whole, rest, relative_time)
    if chosen is None:
        raise ValueError(_too_little(budget, (rest + len(alternatives) * min(seconds)) / whole))
    steps()
    return _by_layer(alternatives, candidates, chosen)


def _choose(
    losses: Sequence[Sequence[float]],
    seconds: Sequence[float],
    budget: float,
    whole: float,
    rest: float,
    relative_time: Callable[[Sequence[int]], float],
) -> list[int] | None:
    """Places of the candidates, one a layer, that lose least of those whose measured time is within the budget.

    Args:
        losses: of each candidate in each layer.
        seconds: of each candidate, in any layer.
        budget: times of plain FAVOR+.
        whole: seconds of the model with plain FAVOR+.
        rest: seconds of all but its converted layers.
        relative_time: times of plain FAVOR+ that a choice takes, measured.
    """
    spend = budget
    for _ in range(_CHOICES):
        places = choose_under_budget(losses, seconds, spend * whole - rest)
        if places is None:
            return None
        measured = relative_time(places)
        if measured <= _TOLERANCE * budget:
            return places
        spend *= budget / measured
    return None


def _too_little(budget: float, least: float) -> str:
    """What to say of a budget that nothing was found for.

    Args:
        budget: times of plain FAVOR+.
        least: the fastest candidates', by the times of single layers.
    """
    try_this = f"try {math.ceil(10 * max(least, budget) + 1) / 10:g}"
    if least > budget:
        return (
            f"budget must be at least what the fastest candidates take, about {least:.2f} times plain FAVOR+ here, got "
            f"{budget:g}; {try_this}"
        )
    return (
        f"no options were found that take at most {budget:g} times plain FAVOR+ when measured, though the fastest "
        f"alone should take {least:.2f}; {try_this}, and let nothing else run meanwhile"
    )


def _by_layer(
    layers: Iterable[int], candidates: Sequence[Mapping[str, int]], places: Sequence[int]
) -> dict[int, dict[str, int]]:
    return {index: dict(candidates[place]) for index, place in zip(layers, places, strict=True)}


def _fitting(candidates: Sequence[Mapping[str, int]], fixed: Mapping[str, Any]) -> list[Mapping[str, int]]:
    """Candidates with what is fixed in the place of their own, each once."""
    fitting: list[Mapping[str, int]] = []
    for candidate in candidates:
        own = {name: fixed.get(name, value) for name, value in candidate.items()}
        if own not in fitting:
            fitting.append(own)
    return fitting


def _check_candidates(candidates: Sequence[Mapping[str, int]], options: Mapping[str, Any]) -> None:
    """Find out before anything is measured what no layer could have."""
    for candidate in candidates:
        twice = [name for name, value in candidate.items() if options.get(name, value) != value]
        if twice:
            raise ValueError(
                f"{twice[0]} must not be both an option of all layers ({options[twice[0]]!r}) and one to choose "
                f"({candidate[twice[0]]!r}); leave it out of one of them"
            )
        Conversion(options={**options, **candidate})


class _Steps:
    """Counts measurements."""

    def __init__(self, total: int, on_step: Callable[[int, int], None]) -> None:
        self.done, self.total, self.on_step = 0, total, on_step

    def __call__(self) -> None:
        self.done += 1
        self.on_step(self.done, self.total)


def _alternatives(
    model: nn.Module, layers: Sequence[int], candidates: Sequence[Mapping[str, int]], options: Mapping[str, Any]
) -> dict[int, list[LinearizedAttention]]:
    """The layers that each candidate would make, which share the model's modules."""
    body, grid = body_of(model), TokenGrid()
    found, prefix = convertible_layers(body), getattr(body, "num_prefix_tokens", 0)
    conversions = [Conversion(options={**options, **candidate}) for candidate in candidates]
    return {
        index: [LinearizedAttention(found[index][1], each.of_layer(index, prefix), grid) for each in conversions]
        for index in layers
    }


@torch.no_grad()
def _seconds(
    plain: nn.Module,
    alternatives: Mapping[int, Sequence[LinearizedAttention]],
    batch: Tensor,
    on_step: Callable[[], None],
) -> tuple[list[float], float, float]:
    """Seconds of each candidate in one layer, of the model with plain FAVOR+, and of all but its converted layers."""
    index = list(alternatives)[len(alternatives) // 2]
    linear, candidates = converted_layers(plain)[index], alternatives[index]
    with evaluating(plain):
        arguments, options = _inputs_of(linear, plain, [layer.grid for layer in candidates[:1]], batch)
        calls: list[Callable[[], Any]] = [lambda: plain(batch), lambda: linear(*arguments, **options)]
        calls += [partial(layer, *arguments, **options) for layer in candidates]
        runs = []
        # One of all, again and again: whatever else the machine does hits all alike. The first round warms up.
        for _ in range(_TIMED_RUNS + 1):
            runs.append([_clock(call, batch.device) for call in calls])
            on_step()
    whole, of_layer, *of_candidates = (statistics.median(times) for times in zip(*runs[1:], strict=True))
    return of_candidates, whole, max(0.0, whole - len(alternatives) * of_layer)


@torch.no_grad()
def _relative_time(model: nn.Module, plain: nn.Module, batch: Tensor) -> float:
    """Time of a model's forward over that of another, in turns."""
    with evaluating(model), evaluating(plain):
        runs = [[_clock(partial(x, batch), batch.device) for x in (model, plain)] for _ in range(_TIMED_RUNS + 1)]
    own, others = (statistics.median(times) for times in zip(*runs[1:], strict=True))
    return own / others


def _inputs_of(
    layer: nn.Module, model: nn.Module, grids: Sequence[TokenGrid], batch: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a layer is called with when the model sees a batch; grids are told theirs."""
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        given.append((arguments, options))

    with ExitStack() as hooks:
        hooks.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
        body = body_of(model)
        for grid in grids if hasattr(body, "patch_embed") else ():
            hooks.callback(watch_patch_embed(body, grid).remove)
        model(batch)
    return given[0]


def _clock(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
