"""Segmentation heads: their registry, and the parts of an image that they compute apart from the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.errors import CheckpointError, ConfigError
from perf_vit.registry import Registry
from perf_vit.types import Window

__all__ = [
    "SEGMENTATION_HEADS",
    "GridPart",
    "Placement",
    "Reach",
    "reach_of",
    "register_segmentation_head",
    "resize_part",
]

SEGMENTATION_HEADS: Registry[Callable[..., nn.Module]] = Registry("model.head", ConfigError)
"""Heads by name, called with (feature_specs, in_chans, num_classes, **options).

A head's `forward(features, image)` takes the backbone's maps and the image [B, C, H, W] and returns logits
[B, num_classes, H, W].
"""

register_segmentation_head = SEGMENTATION_HEADS.register

_INSTEAD = (
    "train with model.head=full_resolution, linear or segformer and batch norm, or predict in windows without `whole`"
)

# What these compute for a pixel depends on all pixels of the image.
_GLOBAL = (nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.MultiheadAttention)
_GLOBAL_POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@dataclass(frozen=True)
class Reach:
    """How far a head looks.

    Attributes:
        margin: Number of tokens around a part of the image that its scores depend on.
        multiple: Number of tokens that a part's first row and column must be multiples of.
    """

    margin: int
    multiple: int = 1


@dataclass(frozen=True)
class GridPart:
    """Part of an image, in tokens.

    Attributes:
        window: Rows and columns of the part.
        grid: Rows and columns of the image.
    """

    window: Window
    grid: tuple[int, int]


@dataclass(frozen=True)
class Placement:
    """Where the cells of a map of a part lie in the map of the image, along one axis.

    Attributes:
        first: Index of the part's first cell.
        total: Number of cells of the image.
    """

    first: int
    total: int

    @classmethod
    def of_strides(cls, part: GridPart, patch: int, num_steps: int) -> list[tuple[Placement, Placement]]:
        """Return the rows and columns of maps at strides 1, 2, 4, ..., each half the size of the one before.

        Args:
            part: Part of the image; it begins at multiples of the strides.
            patch: Pixels of a token.
            num_steps: Number of maps.
        """
        firsts = part.window.row * patch, part.window.col * patch
        totals = part.grid[0] * patch, part.grid[1] * patch
        placements = []
        for step in range(num_steps):
            rows, columns = (
                cls(first // 2**step, -(-total // 2**step)) for first, total in zip(firsts, totals, strict=True)
            )
            placements.append((rows, columns))
        return placements


def reach_of(head: nn.Module) -> Reach:
    """Return how far a head looks.

    Raises:
        CheckpointError: The head needs the whole image at once; the message names it and says what to use instead.
    """
    name = type(head).__name__
    for path, module in head.named_modules():
        kind = type(module).__name__
        if isinstance(module, _GLOBAL) or (isinstance(module, _GLOBAL_POOLS) and module.output_size in (1, (1, 1))):
            raise CheckpointError(f"{name} needs the whole image at once, as {path} is a {kind}; {_INSTEAD}")
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise CheckpointError(
                f"{name} has batch norm in training mode ({path}), which needs the whole image at once; call "
                "model.eval() and train with running statistics"
            )
    declared: Any = getattr(head, "reach", None)
    if declared is None:
        raise CheckpointError(f"{name} must have a method `reach` to run over parts of an image; {_INSTEAD}")
    try:
        reach: Reach = declared()
    except ValueError as error:
        raise CheckpointError(f"{name} needs the whole image at once: {error}; {_INSTEAD}") from error
    return reach


def resize_part(
    x: Tensor,
    size: Sequence[int],
    before: tuple[Placement, Placement],
    after: tuple[Placement, Placement],
) -> Tensor:
    """Resize the map of a part bilinearly, to the values that `interpolate` of the image's map has there.

    Values near the part's edges differ, unless these are edges of the image.

    Args:
        x: Map, [B, C, h, w].
        size: Height and width of the result.
        before: Rows and columns of `x` in the image's map.
        after: Rows and columns of the result in the resized map of the image.
    """
    for axis, length in enumerate(size):
        x = _resize_axis(x, axis, int(length), before[axis], after[axis])
    return x


def _resize_axis(x: Tensor, axis: int, length: int, before: Placement, after: Placement) -> Tensor:
    number = x.shape[2 + axis]
    size = [length if each == axis else x.shape[2 + each] for each in (0, 1)]
    # A scale or an offset of its own: patches of 14 px are no multiple of the strides.
    same_scale = number * after.total == length * before.total
    if same_scale and before.first * after.total == after.first * before.total:
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    wanted = torch.arange(length, device=x.device, dtype=torch.float64) + after.first + 0.5
    position = (wanted * (before.total / after.total) - 0.5).clamp(min=0.0)
    below = position.floor().long().clamp(max=before.total - 1)
    share = (position - below).to(x.dtype)
    first, second = (
        (each.clamp(max=before.total - 1) - before.first).clamp(0, number - 1) for each in (below, below + 1)
    )
    shape = (length, 1) if axis == 0 else (length,)
    lower, upper = x.index_select(2 + axis, first), x.index_select(2 + axis, second)
    return lower + (upper - lower) * share.view(shape)
