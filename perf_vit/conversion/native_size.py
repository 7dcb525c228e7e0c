"""ViTs beyond the size that they were pretrained at: windows of that size in most layers, and positions tiled by it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from timm.layers import Format, PatchEmbed, resample_abs_pos_embed, to_2tuple
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from perf_vit.ops.windows import WindowGrid

__all__ = ["NativePositions", "native_layers", "native_size_of", "period_of", "tile_positions"]


def native_layers(num_layers: int, native_size: int, global_layers: Collection[int]) -> dict[int, dict[str, Any]]:
    """Return the options of the layers that attend within windows of the native size, by index.

    Args:
        num_layers: Number of attention layers.
        native_size: Rows and columns of patches of the pretraining.
        global_layers: Indices of layers that see the whole image.
    """
    windows = {"mixer": "registers", "window_size": native_size}
    return {index: windows for index in range(num_layers) if index not in global_layers}


def period_of(grid: tuple[int, int], native_size: int | None) -> tuple[int, int]:
    """Return rows and columns after which positions repeat: those of a window, or of the grid without native size."""
    if native_size is None:
        return grid
    windows = WindowGrid.of(grid, native_size)
    return windows.height, windows.width


def native_size_of(model: Any) -> int | None:
    """Return the native size of a converted ViT, None for one whose positions cover its images."""
    size: int | None = getattr(getattr(model, "conversion", None), "native_size", None)
    return size


def tile_positions(model: Any, native_size: int) -> None:
    """Let a ViT take images of any size, and repeat its positions in each window of the native size.

    Args:
        model: timm's `VisionTransformer`, changed in place.
        native_size: Rows and columns of patches of a window.

    Raises:
        ValueError: The model has other positions than those that timm's `VisionTransformer` learns, or they are of
            another size: resampled twice, they would not be those of the pretraining.
    """
    is_plain = isinstance(model, VisionTransformer) and type(model)._pos_embed is VisionTransformer._pos_embed
    if not is_plain or type(model.patch_embed) is not PatchEmbed or model.pos_embed is None:
        raise ValueError(
            f"native_size tiles the learned positions of timm's VisionTransformer, got {type(model).__name__} with "
            "other ones; leave native_size out"
        )
    patch_embed, grid = model.patch_embed, tuple(model.patch_embed.grid_size)
    if grid != (native_size, native_size):
        sides = [native_size * patch for patch in patch_embed.patch_size]
        raise ValueError(
            f"native_size={native_size} needs positions of as many rows and columns of patches, got {grid[0]} x "
            f"{grid[1]}; create the model with img_size={tuple(sides)}, or give its size as native_size"
        )
    model.dynamic_img_size = True
    patch_embed.strict_img_size, patch_embed.flatten, patch_embed.output_fmt = False, False, Format.NHWC
    model._pos_embed = NativePositions(model, native_size)
    model.set_input_size = _AnySize(model)


class NativePositions:
    """Position embedding of a ViT in place of `VisionTransformer._pos_embed`, repeated in each window.

    Windows are those of `WindowGrid`: the fewest of at most the native size, of nearly equal size. The learned
    positions are resampled to one window as timm resamples them to an image, so images of up to the native size have
    timm's.

    Args:
        model: ViT with `dynamic_img_size`.
        native_size: Rows and columns of patches of a window.
    """

    def __init__(self, model: Any, native_size: int) -> None:
        self._model, self._native_size = model, native_size

    def __call__(self, x: Tensor) -> Tensor:
        """Add positions to patches, [B, rows, columns, C], and put the prefix before them, [B, P + N, C]."""
        model, grid = self._model, (x.shape[1], x.shape[2])
        period, first = period_of(grid, self._native_size), 0 if model.no_embed_class else model.num_prefix_tokens
        table = resample_abs_pos_embed(model.pos_embed, list(period), list(model.patch_embed.grid_size), first)
        window = table[:, first:].unflatten(1, period)
        repeats = [-(-length // size) for length, size in zip(grid, period, strict=True)]
        tiled = window.repeat(1, *repeats, 1)[:, : grid[0], : grid[1]]
        prefix = [token for token in (model.cls_token, model.reg_token) if token is not None]
        tokens = [(x + tiled).flatten(1, 2)]
        if prefix:
            joined = torch.cat(prefix, dim=1)
            tokens.insert(0, (joined + table[:, :first] if first else joined).expand(len(x), -1, -1))
        out: Tensor = model.pos_drop(torch.cat(tokens, dim=1))
        return out


class _AnySize:
    """`set_input_size` of a model that takes images of any size: positions stay those of the native size."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, img_size: object = None, patch_size: int | tuple[int, int] | None = None) -> None:
        """Resample the patch embedding to another size of patches; the image size changes nothing."""
        if patch_size is not None:
            patches, grid = to_2tuple(patch_size), self._model.patch_embed.grid_size
            native_px = tuple(count * side for count, side in zip(grid, patches, strict=True))
            type(self._model).set_input_size(self._model, img_size=native_px, patch_size=patches)
