"""Choice of options by measurement: of each layer under a time budget, and of the crossover from softmax attention."""

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

from perf_vit.conversion.fidelity import attention_errors, eval_mode, final_errors, image_batches
from perf_vit.conversion.linearize import Conversion, converted_layers, convertible_layers, find_vit, linearize
from perf_vit.layers import LinearizedAttention
from perf_vit.layers.mixer import softmax_attention
from perf_vit.layers.token_grid import TokenGrid, watch_patch_embed

__all__ = ["CANDIDATES", "choose_layer_options", "choose_under_budget", "measure_crossover"]

# Costs are rounded up to this fraction of the budget, so the choice never exceeds it.
_STEPS = 4000


def choose_under_budget(errors: Sequence[Sequence[float]], costs: Sequence[float], budget: float) -> list[int] | None:
    """Choose a candidate per layer that minimises the sum of errors while the sum of costs fits a budget.

    A multiple-choice knapsack problem, solved by dynamic programming over the cost; exact up to the rounding of costs
    to 1 / 4,000 of the budget.

    Args:
        errors: Errors by layer and candidate.
        costs: Cost of each candidate, the same in all layers, above 0.
        budget: Budget in the unit of the costs.

    Returns:
        Index of each layer's candidate, or None if even the cheapest candidates exceed the budget.
    """
    if budget <= 0:
        return None
    steps = [math.ceil(cost / budget * _STEPS) for cost in costs]
    # best[c]: smallest error of the layers so far at a cost of at most c steps.
    best = np.zeros(_STEPS + 1)
    chosen = []
    for layer in errors:
        options = np.full((len(costs), _STEPS + 1), np.inf)
        for position, (error, step) in enumerate(zip(layer, steps, strict=True)):
            if step <= _STEPS:
                options[position, step:] = best[: _STEPS + 1 - step] + error
        chosen.append(options.argmin(axis=0))
        best = options.min(axis=0)
    if not math.isfinite(best[-1]):
        return None
    indices, left = [], _STEPS
    for choice in reversed(chosen):
        indices.append(int(choice[left]))
        left -= steps[indices[-1]]
    return indices[::-1]


CANDIDATES: tuple[dict[str, int], ...] = tuple(
    {"window_size": window_size, "num_sinks": num_sinks, "num_clusters": num_clusters}
    for window_size, num_sinks, num_clusters in (
        (8, 16, 32),
        *product((12, 16, 24), (32, 128), (64, 96, 256)),
        (16, 256, 96),
        (24, 256, 96),
        (16, 256, 512),
        (16, 0, 160),
        (24, 0, 160),
    )
)
"""Default candidates of `choose_layer_options`."""

_TIMED_RUNS = 3

# Attempts: a choice that takes longer than predicted is repeated with a smaller budget.
_CHOICES = 4

# Tolerance of measured times, for noise.
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
    """Choose windows, sinks and clusters for each layer that preserve most of a model within a time budget.

    Measures the error of each candidate at the output of each layer, on the inputs of the layer in the softmax model;
    the change of the final tokens if only one layer is converted with the fastest candidate; and the time of each
    candidate in one layer. The loss of a candidate, in cosine similarity of the final tokens, is predicted from the
    first two: it grows with the square of the layer's error. The choice minimises the sum of losses such that the
    forward pass takes at most `budget` times that of plain FAVOR+ (256 features). The chosen model is timed, and the
    choice repeated with a smaller budget if it takes longer. Times hold for this machine and the size of the images; no
    other process should run meanwhile. Clusters run at every image size here, whatever `max_exact_tokens` is.

    Args:
        model: Softmax model.
        images: Standardised images, [B, C, H, W] or [C, H, W]; the first is used for timing.
        budget: Time of the whole model, relative to plain FAVOR+.
        layers: Indices of the layers to convert, None for all.
        candidates: Options to choose from, None for `CANDIDATES`.
        on_step: Callback with the number of completed measurements and their total.
        **options: Fields of `ClusteredOptions` that all candidates share; they are not chosen.

    Returns:
        Mapping of layer index to options, for `per_layer` of `linearize`.

    Raises:
        ValueError: There are no images, the model can't be converted, candidates conflict with `options`, or no
            choice fits the budget.
    """
    # Every candidate is exact where clusters don't run.
    options = {**options, "max_exact_tokens": 0}
    candidates = _with_fixed_options(CANDIDATES, options) if candidates is None else candidates
    if not images or not candidates:
        raise ValueError(f"expected images and candidates to choose by, got {len(images)} and {len(candidates)}")
    _check_candidates(candidates, options)
    model = find_vit(model)
    plain = linearize(model, "performer", layers)
    if not converted_layers(plain):
        raise ValueError("layers must name one layer or more to choose options for, got none; leave it out for all")
    alternatives = _alternatives(model, sorted(converted_layers(plain)), candidates, options)
    steps = _Steps(len(alternatives) * (len(candidates) + 1) * len(images) + _TIMED_RUNS + 2, on_step)
    (batch,) = image_batches(model, images[:1])
    seconds, whole, rest = _measure_seconds(plain, alternatives, batch, steps)
    errors = attention_errors(model, alternatives, images, steps)
    fastest = seconds.index(min(seconds))
    alone = {index: [layers[fastest]] for index, layers in alternatives.items()}
    moved = final_errors(model, alone, images, steps)
    losses = _predicted_losses(errors, moved, fastest)

    def relative_time(indices: Sequence[int]) -> float:
        made = linearize(model, "clustered", layers, _by_layer(alternatives, candidates, indices), **options)
        return _measure_relative_time(made, plain, batch)

    chosen = _choose(losses, seconds, budget, whole, rest, relative_time)
    if chosen is None:
        raise ValueError(_budget_message(budget, (rest + len(alternatives) * min(seconds)) / whole))
    steps()
    return _by_layer(alternatives, candidates, chosen)


def _predicted_losses(
    errors: Mapping[int, Sequence[float]], moved: Mapping[int, float], fastest: int
) -> list[list[float]]:
    """Predict the loss of each candidate in each layer from that of the fastest one, `moved`."""
    return [
        [moved[index] * (error / of_layer[fastest]) ** 2 if of_layer[fastest] else error for error in of_layer]
        for index, of_layer in errors.items()
    ]


def _choose(
    losses: Sequence[Sequence[float]],
    seconds: Sequence[float],
    budget: float,
    whole: float,
    rest: float,
    relative_time: Callable[[Sequence[int]], float],
) -> list[int] | None:
    """Return the candidate index of each layer, with the smallest loss whose measured time is within the budget.

    Args:
        losses: Losses by layer and candidate.
        seconds: Time of each candidate in one layer, in seconds.
        budget: Time relative to plain FAVOR+.
        whole: Time of the model with plain FAVOR+, in seconds.
        rest: Time of the model without its converted layers, in seconds.
        relative_time: Function that measures the time of a choice, relative to plain FAVOR+.
    """
    spend = budget
    for _ in range(_CHOICES):
        indices = choose_under_budget(losses, seconds, spend * whole - rest)
        if indices is None:
            return None
        measured = relative_time(indices)
        if measured <= _TOLERANCE * budget:
            return indices
        spend *= budget / measured
    return None


def _budget_message(budget: float, least: float) -> str:
    """Format the error for a budget without a solution.

    Args:
        budget: Time relative to plain FAVOR+.
        least: Relative time of the fastest candidates, predicted from the times of single layers.
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
    layers: Iterable[int], candidates: Sequence[Mapping[str, int]], indices: Sequence[int]
) -> dict[int, dict[str, int]]:
    return {index: dict(candidates[position]) for index, position in zip(layers, indices, strict=True)}


def _with_fixed_options(candidates: Sequence[Mapping[str, int]], fixed: Mapping[str, Any]) -> list[Mapping[str, int]]:
    """Replace values of candidates by fixed options and remove duplicates."""
    fitting: list[Mapping[str, int]] = []
    for candidate in candidates:
        own = {name: fixed.get(name, value) for name, value in candidate.items()}
        if own not in fitting:
            fitting.append(own)
    return fitting


def _check_candidates(candidates: Sequence[Mapping[str, int]], options: Mapping[str, Any]) -> None:
    """Validate candidates before any measurement."""
    for candidate in candidates:
        if candidate.get("max_exact_tokens"):
            raise ValueError(
                "candidates must be options of clusters, which are measured at every size, got "
                f"max_exact_tokens={candidate['max_exact_tokens']!r}; give it to linearize"
            )
        twice = [name for name, value in candidate.items() if options.get(name, value) != value]
        if twice:
            raise ValueError(
                f"{twice[0]} must not be both an option of all layers ({options[twice[0]]!r}) and one to choose "
                f"({candidate[twice[0]]!r}); leave it out of one of them"
            )
        Conversion(options={**options, **candidate})


class _Steps:
    """Counter of measurements."""

    def __init__(self, total: int, on_step: Callable[[int, int], None]) -> None:
        self.done, self.total, self.on_step = 0, total, on_step

    def __call__(self) -> None:
        self.done += 1
        self.on_step(self.done, self.total)


def _alternatives(
    model: nn.Module, layers: Sequence[int], candidates: Sequence[Mapping[str, int]], options: Mapping[str, Any]
) -> dict[int, list[LinearizedAttention]]:
    """Make the layers of each candidate, which share the model's modules."""
    body, grid = find_vit(model), TokenGrid()
    found, prefix = convertible_layers(body), getattr(body, "num_prefix_tokens", 0)
    conversions = [Conversion(options={**options, **candidate}) for candidate in candidates]
    return {
        index: [LinearizedAttention(found[index][1], each.layer_options(index, prefix), grid) for each in conversions]
        for index in layers
    }


@torch.no_grad()
def _measure_seconds(
    plain: nn.Module,
    alternatives: Mapping[int, Sequence[LinearizedAttention]],
    batch: Tensor,
    on_step: Callable[[], None],
) -> tuple[list[float], float, float]:
    """Measure each candidate in one layer, the model with plain FAVOR+, and the model without its converted layers."""
    index = list(alternatives)[len(alternatives) // 2]
    linear, candidates = converted_layers(plain)[index], alternatives[index]
    with eval_mode(plain):
        arguments, options = _inputs_of(linear, plain, [layer.grid for layer in candidates[:1]], batch)
        calls: list[Callable[[], Any]] = [lambda: plain(batch), lambda: linear(*arguments, **options)]
        calls += [partial(layer, *arguments, **options) for layer in candidates]
        runs = []
        # Calls are interleaved, so that other load on the machine affects all alike. The first round is a warm-up.
        for _ in range(_TIMED_RUNS + 1):
            runs.append([_clock(call, batch.device) for call in calls])
            on_step()
    whole, of_layer, *of_candidates = (statistics.median(times) for times in zip(*runs[1:], strict=True))
    return of_candidates, whole, max(0.0, whole - len(alternatives) * of_layer)


@torch.no_grad()
def _measure_relative_time(model: nn.Module, plain: nn.Module, batch: Tensor) -> float:
    """Measure the forward time of a model relative to another, interleaved."""
    with eval_mode(model), eval_mode(plain):
        runs = [[_clock(partial(x, batch), batch.device) for x in (model, plain)] for _ in range(_TIMED_RUNS + 1)]
    own, others = (statistics.median(times) for times in zip(*runs[1:], strict=True))
    return own / others


def _inputs_of(
    layer: nn.Module, model: nn.Module, grids: Sequence[TokenGrid], batch: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a layer when the model processes a batch, and record the grids."""
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        given.append((arguments, options))

    with ExitStack() as hooks:
        hooks.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
        body = find_vit(model)
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


# Rows and columns of the grids that `measure_crossover` tries, and the timed runs at each.
_SIDES = (16, 20, 24, 28, 32, 36, 40, 44, 48, 56, 64, 80, 96, 128, 192, 256)
_CROSSOVER_RUNS = 5


@torch.no_grad()
def measure_crossover(model: nn.Module, **options: Any) -> int:
    """Measure the number of patch tokens up to which softmax attention is not slower than clusters on this machine.

    Times one attention layer on random queries, keys and values, on the model's device and in its dtype, for square
    grids of 16 x 16 to 256 x 256 patches. No other process should run meanwhile.

    Args:
        model: Softmax model.
        **options: Fields of `ClusteredOptions`.

    Returns:
        Number of patch tokens, for `max_exact_tokens`; 0 if clusters are faster at 16 x 16 patches.

    Raises:
        ValueError: The model has no convertible layers, or an option is unknown or has an invalid value.
    """
    layer = next(iter(converted_layers(linearize(model, **{**options, "max_exact_tokens": 0})).values()))
    prefix, like = layer.options.num_prefix_tokens, next(layer.parameters())
    crossover = 0
    for side in _SIDES:
        q, k, v = like.new_empty(3, 1, layer.num_heads, prefix + side**2, layer.head_dim).normal_().unbind(0)
        calls = (partial(softmax_attention, q, k, v), partial(layer.mixer, q, k, v, (side, side)))
        runs = [[_clock(call, like.device) for call in calls] for _ in range(_CROSSOVER_RUNS + 1)]
        exact, clustered = (statistics.median(times) for times in zip(*runs[1:], strict=True))
        if clustered < exact:
            break
        crossover = side**2
    return crossover
