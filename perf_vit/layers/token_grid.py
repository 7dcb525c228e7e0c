"""How attention learns where its tokens lie: the patch embedding of the same forward pass tells it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["TokenGrid", "watch_patch_embed"]


class TokenGrid:
    """Rows and columns of the tokens that are on their way through a model.

    Attributes:
        size: (rows, columns), set by the patch embedding; None before the first image.
    """

    def __init__(self) -> None:
        self.size: tuple[int, int] | None = None

    def of(self, num_tokens: int) -> tuple[int, int]:
        """The grid, if it has so many tokens.

        Raises:
            ValueError: no patch embedding has told the grid, or it told another.
        """
        if self.size is None or self.size[0] * self.size[1] != num_tokens:
            raise ValueError(
                f"expected the patch embedding to tell the grid of {num_tokens} patch tokens, got {self.size}; "
                "call the whole model, or set the layer's grid.size = (rows, columns)"
            )
        return self.size


class _Watch:
    """A forward hook that writes down the grid; an object, so that a copied model gets a copy of its own."""

    def __init__(self, grid: TokenGrid, patch_size: tuple[int, int]) -> None:
        self.grid, self.patch_size = grid, patch_size

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        height, width = arguments[0].shape[-2:]
        if getattr(module, "dynamic_img_pad", False):
            rows, columns = -(-height // self.patch_size[0]), -(-width // self.patch_size[1])
        else:
            rows, columns = height // self.patch_size[0], width // self.patch_size[1]
        self.grid.size = (rows, columns)


def watch_patch_embed(patch_embed: nn.Module, grid: TokenGrid) -> torch.utils.hooks.RemovableHandle:
    """Have a timm `PatchEmbed` write its grid of patches down in each forward pass.

    Raises:
        ValueError: a module without a patch size.
    """
    patch_size = getattr(patch_embed, "patch_size", None)
    if patch_size is None:
        raise ValueError(
            f"expected a patch embedding with a patch_size, got {type(patch_embed).__name__}; windows need the grid"
        )
    size = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    return patch_embed.register_forward_hook(_Watch(grid, (size[0], size[1])))
