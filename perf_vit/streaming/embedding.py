"""First tokens of a ViT for the rows of an image that are read: patch and position embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from timm.layers import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from perf_vit.errors import InputError
from perf_vit.ops.streaming import Part
from perf_vit.streaming.positions import AbsolutePositions, RotaryPositions
from perf_vit.types import BoolArray, GeoImage, Window

__all__ = ["ImageTokens", "Normalize"]

Normalize = Callable[[GeoImage], npt.NDArray[np.float32]]
"""Pixels of a window to the model's input, [C, h, w]."""


class ImageTokens:
    """Tokens of an image before the first block.

    Args:
        model: timm's `VisionTransformer` or `Eva`.
        source: Image; what `read(window)` returns.
        normalize: Pixels to the model's input.

    Attributes:
        grid: Rows and columns of tokens; patches at the right and lower edge may reach past the image.

    Raises:
        ValueError: The patch embedding or the positions need the whole image, or the prefix is not that of a plain ViT.
        InputError: The image has another number of bands than the model.
    """

    def __init__(self, model: Any, source: Any, normalize: Normalize) -> None:
        if _has_relative_biases(model):
            raise ValueError(
                f"the model must have absolute or rotary positions, got {type(model).__name__} with relative position "
                "biases, which need all pairs of tokens"
            )
        if not isinstance(model, VisionTransformer | Eva) or type(model.patch_embed) is not PatchEmbed:
            embed = type(getattr(model, "patch_embed", None)).__name__
            raise ValueError(
                f"the model must be a plain ViT with timm's PatchEmbed, got {type(model).__name__} with {embed}"
            )
        self._model, self._source, self._normalize = model, source, normalize
        self._patch = tuple(model.patch_embed.patch_size)
        self.grid = -(-source.height // self._patch[0]), -(-source.width // self._patch[1])
        self._absolute = None if model.pos_embed is None else AbsolutePositions(model, self.grid)
        rope = getattr(model, "rope", None)
        self._rotary = None if rope is None else RotaryPositions(rope, self.grid)
        bands, expected = getattr(source, "num_bands", None), model.patch_embed.proj.in_channels
        if bands not in (None, expected):
            raise InputError(f"the model takes {expected} bands, {source.path} has {bands}; choose bands with spec=")
        if len(self.prefix()) != model.num_prefix_tokens:
            raise ValueError(f"{type(model).__name__} has prefix tokens other than class and register tokens")

    @property
    def identity(self) -> str:
        """What is the same in all processes that share the image."""
        path = getattr(self._source, "path", "an image")
        return f"{path} of {self.grid[0]} x {self.grid[1]} tokens, {type(self._model).__name__}"

    def read(self, first_row: int, stop_row: int) -> tuple[GeoImage, Tensor]:
        """Read rows of tokens.

        Returns:
            Their pixels, and the tokens with a valid pixel, bool [rows, columns].
        """
        height, width = self._patch
        window = Window(first_row * height, 0, (stop_row - first_row) * height, self.grid[1] * width)
        image = self._source.read(window)
        return image, torch.from_numpy(_any_of_patches(image.valid, height, width))

    def embed(self, image: GeoImage, part: Part) -> Tensor:
        """Return the tokens of a part, [n, C], given the pixels of its rows."""
        model = self._model
        pixels = torch.from_numpy(np.ascontiguousarray(self._normalize(image)))[None]
        x = model.patch_embed.proj(pixels.to(model.patch_embed.proj.weight.dtype))
        x = model.patch_embed.norm(x.flatten(2).mT[0, part.places])
        if self._absolute is not None:
            x = x + self._absolute.at(part.places // self.grid[1] + part.first_row, part.places % self.grid[1])
        return self._before_blocks(x)

    def prefix(self) -> Tensor:
        """Return the class and register tokens, [P, C]."""
        model = self._model
        found = [token[0] for token in (model.cls_token, model.reg_token) if token is not None]
        x = torch.cat(found) if found else model.patch_embed.proj.weight.new_zeros(0, model.embed_dim)
        if self._absolute is not None and 0 < len(self._absolute.prefix) == len(x):
            x = x + self._absolute.prefix
        return self._before_blocks(x)

    def rope(self, rows: Tensor, columns: Tensor) -> Tensor | None:
        """Return the rotary embeddings of tokens at rows and columns, [n, 2 x D]; None for a model without them."""
        return None if self._rotary is None else self._rotary.at(rows, columns)

    def _before_blocks(self, x: Tensor) -> Tensor:
        normed: Tensor = self._model.norm_pre(x)
        return normed


def _has_relative_biases(model: Any) -> bool:
    names = "rel_pos", "relative_position_bias_table"
    return any(getattr(module, name, None) is not None for module in model.modules() for name in names)


def _any_of_patches(valid: BoolArray, height: int, width: int) -> BoolArray:
    rows, columns = valid.shape[0] // height, valid.shape[1] // width
    return np.asarray(valid.reshape(rows, height, columns, width).any((1, 3)))
