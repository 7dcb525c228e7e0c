"""How attention learns where its tokens lie: the patch embedding of the same forward pass tells it."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from timm.layers import to_2tuple
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

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if isinstance(arguments[0], torch.fx.Proxy):
            # A graph is made, in which there is no patch embedding any more, but its convolution.
            module.get_submodule("proj").register_forward_hook(_WatchConvolution(self.grid))
            return
        height, width = arguments[0].shape[-2:]
        # It is asked for in each pass: `set_input_size` may change it.
        patch_height, patch_width = to_2tuple(module.patch_size)
        if getattr(module, "dynamic_img_pad", False):
            self.grid.size = (-(-height // patch_height), -(-width // patch_width))
        else:
            self.grid.size = (height // patch_height, width // patch_width)


class _WatchConvolution:
    def __init__(self, grid: TokenGrid) -> None:
        self.grid = grid

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        rows, columns = output.shape[-2:]
        self.grid.size = (rows, columns)


def watch_patch_embed(model: nn.Module, grid: TokenGrid) -> torch.utils.hooks.RemovableHandle:
    """Have the `patch_embed` of a timm model write its grid of patches down in each forward pass.

    Raises:
        ValueError: a model without a patch embedding, or one without a patch size.
    """
    patch_embed = getattr(model, "patch_embed", None)
    if not isinstance(patch_embed, nn.Module) or getattr(patch_embed, "patch_size", None) is None:
        raise ValueError(
            "windows, sinks and local enhancement need the grid, which a patch_embed with a patch_size tells; "
            f"{type(model).__name__} has none; use attention='performer' or window_size=0, num_sinks=0, "
            "local_enhancement=False"
        )
    return patch_embed.register_forward_hook(_Watch(grid))
