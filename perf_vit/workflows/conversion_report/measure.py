"""Fidelity and times of a converted model, compared with its softmax model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perf_vit.conversion import attention_errors, linearize, token_cosines
from perf_vit.conversion.linearize import converted_layers, find_vit, max_exact_side
from perf_vit.conversion.native_size import native_size_of
from perf_vit.layers import MixerOptions
from perf_vit.workflows.conversion_report.timing import alternating_medians

__all__ = ["NUM_RUNS", "SOFTMAX_TOKENS", "Fidelity", "MeasuredConversion", "Speed", "measure_conversion"]

SOFTMAX_TOKENS = 8192
"""Largest number of tokens with which softmax is timed unasked: on a CPU it takes minutes beyond."""

NUM_RUNS = 3
"""Forward passes that are timed of each model."""

# Softmax takes most of the time at the larger size.
_LARGER_IMAGES = 2

_LARGEST_FACTOR = 32


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of one image at one size.

    Attributes:
        size_px: Side of the image.
        num_tokens: Number of tokens at that size.
        softmax: Seconds of the softmax model, None where it was left out.
        plain: Seconds of the model with plain FAVOR+ in the same layers.
        converted: Seconds of the converted model.
    """

    size_px: int
    num_tokens: int
    softmax: float | None
    plain: float
    converted: float


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Fidelity to the softmax model at one image size.

    Attributes:
        size_px: Side of the images.
        grid: Rows and columns of their patches.
        errors: Relative error of each converted layer's outputs on its inputs in the softmax model, by index.
        patch_cosines: Cosine of the final patch tokens with those of the softmax model, by image.
        class_cosines: Cosine of the class token by image, or empty.
    """

    size_px: int
    grid: tuple[int, int]
    errors: dict[int, float]
    patch_cosines: list[float]
    class_cosines: list[float]


@dataclass(frozen=True, kw_only=True)
class MeasuredConversion:
    """Measurements of a conversion.

    Attributes:
        options: Options of the converted layers by index.
        max_exact_px: Size of the largest square image with softmax attention in all layers, 0 for none.
        fidelity: Fidelity at the models' size and, if attention is exact there, at a larger size.
        speeds: Times at the models' size and at the larger size.
        native_size: Rows and columns of windows after which positions repeat, None for positions of whole images.
    """

    options: dict[int, MixerOptions]
    max_exact_px: int
    fidelity: list[Fidelity]
    speeds: list[Speed]
    native_size: int | None = None


def measure_conversion(
    softmax: Any,
    converted: Any,
    crops: Callable[[int], Sequence[Tensor]],
    *,
    time_softmax: bool = False,
    on_step: Callable[[str], None] = lambda _: None,
) -> MeasuredConversion:
    """Compare a converted model with the softmax model that it came from.

    Times are measured at the models' size and at a larger one: twice the size, or the first multiple at which attention
    is not exact. Fidelity is measured at the models' size, and at the larger one where the first says nothing.

    Args:
        softmax: Model before the conversion.
        converted: Model after it.
        crops: Function that returns standardised images, [C, S, S], of a size S; none if the images are smaller.
        time_softmax: Whether to run softmax at the larger size whatever the number of tokens.
        on_step: Callback with the measurement that starts.
    """
    models, options = (softmax, converted), {i: layer.options for i, layer in converted_layers(converted).items()}
    (size, _), patch_px = softmax.patch_embed.img_size, softmax.patch_embed.patch_size[0]
    images = crops(size)
    fidelity = [_fidelity(*models, images, on_step)]
    speeds = [_speed(*models, images[0], time_softmax, on_step)]
    larger = _larger_size(options.values(), softmax.patch_embed.grid_size, size)
    models = (_resized(softmax, larger), _resized(converted, larger))
    speeds.append(_speed(*models, images[0].repeat(1, larger // size, larger // size), time_softmax, on_step))
    if _is_exact(options.values(), softmax.patch_embed.grid_size) and speeds[1].softmax is not None:
        larger_images = crops(larger)[:_LARGER_IMAGES]
        fidelity += [_fidelity(*models, larger_images, on_step)] if larger_images else []
    return MeasuredConversion(
        options=options,
        max_exact_px=patch_px * (max_exact_side(converted) or 0),
        fidelity=fidelity,
        speeds=speeds,
        native_size=native_size_of(find_vit(converted)),
    )


def _is_exact(options: Collection[MixerOptions], grid: tuple[int, int]) -> bool:
    return all(each.is_exact(grid) for each in options)


def _larger_size(options: Collection[MixerOptions], grid: tuple[int, int], size: int) -> int:
    """Return the first multiple of the size, from twice on, at which attention is not exact; else twice the size."""
    rows, columns = grid
    factors = (f for f in range(2, _LARGEST_FACTOR) if not _is_exact(options, (f * rows, f * columns)))
    return size * next(factors, 2)


def _resized(model: nn.Module, size: int) -> Any:
    resized: Any = copy.deepcopy(model)
    resized.set_input_size(img_size=(size, size))
    return resized


def _fidelity(softmax: Any, converted: Any, images: Sequence[Tensor], on_step: Callable[[str], None]) -> Fidelity:
    size = images[0].shape[-1]
    on_step(f"errors of the layers at {size} px")
    layers = {index: [layer] for index, layer in converted_layers(converted).items()}
    errors = attention_errors(softmax, layers, images)
    on_step(f"final tokens at {size} px")
    patches, class_tokens = token_cosines(softmax, converted, images)
    return Fidelity(
        size_px=size,
        grid=softmax.patch_embed.grid_size,
        errors={index: error for index, (error,) in errors.items()},
        patch_cosines=patches,
        class_cosines=class_tokens,
    )


@torch.no_grad()
def _speed(softmax: Any, converted: Any, image: Tensor, time_softmax: bool, on_step: Callable[[str], None]) -> Speed:
    on_step(f"time at {image.shape[-1]} px")
    plain = linearize(softmax, "performer", sorted(converted_layers(converted)))
    models = {"softmax": softmax, "converted": converted, "plain": plain}
    rows, columns = softmax.patch_embed.grid_size
    num_tokens = rows * columns + softmax.num_prefix_tokens
    if num_tokens > SOFTMAX_TOKENS and not time_softmax:
        del models["softmax"]
    batch = image.unsqueeze(0)
    calls = {name: lambda model=model: (model.eval()(batch),) for name, model in models.items()}
    seconds = alternating_medians(calls, NUM_RUNS, str(batch.device))
    return Speed(
        size_px=image.shape[-1],
        num_tokens=num_tokens,
        softmax=seconds.get("softmax"),
        plain=seconds["plain"],
        converted=seconds["converted"],
    )
