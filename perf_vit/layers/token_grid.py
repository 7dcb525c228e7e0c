"""How attention learns where its tokens lie: the patch embedding of the same forward pass tells it."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
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
                "call the whole model, without patch dropout, or set the layer's grid.size = (rows, columns)"
            )
        return self.size


class _Watch:
    """A forward hook that writes down the grid; an object, so that a copied model gets a copy of its own."""

    def __init__(self, grid: TokenGrid) -> None:
        self.grid = grid

    def __call__(self, module: Any, arguments: tuple[Any, ...], output: Any) -> None:
        if isinstance(arguments[0], torch.fx.Proxy):
            # A graph is made, in which there is no patch embedding any more, but its convolution.
            module.get_submodule("proj").register_forward_hook(_WatchConvolution(self.grid))
            return
        height, width = arguments[0].shape[-2:]
        rows, columns = module.dynamic_feat_size((height, width))
        self.grid.size = (rows, columns)


class _WatchConvolution:
    def __init__(self, grid: TokenGrid) -> None:
        self.grid = grid

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        rows, columns = output.shape[-2:]
        self.grid.size = (rows, columns)


def watch_patch_embed(model: nn.Module, grid: TokenGrid) -> torch.utils.hooks.RemovableHandle:
    """Have a timm model's `PatchEmbed` or `HybridEmbed` write its grid down in each forward pass.

    Raises:
        ValueError: a model without such a patch embedding.
    """
    patch_embed = getattr(model, "patch_embed", None)
    if not isinstance(patch_embed, nn.Module) or not hasattr(patch_embed, "dynamic_feat_size"):
        got = "none" if patch_embed is None else type(patch_embed).__name__
        raise ValueError(
            "windows, sinks and local enhancement need the grid: expected a model with timm's PatchEmbed "
            f"or HybridEmbed as patch_embed, got {type(model).__name__} with {got}; use attention='performer'"
        )
    return patch_embed.register_forward_hook(_Watch(grid))
