"""Key masks as timm's attention layers take them."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.multiprocessing import reductions

__all__ = ["FollowTokens", "TokenGrid", "follow_tokens", "key_mask_of", "watch_patch_embed"]


def key_mask_of(attn_mask: Tensor | None, k: Tensor) -> Tensor | None:
    """The key mask, [B, N], of a mask as timm passes it, [B, N] or [B, 1, 1, N].

    Args:
        attn_mask: the mask, or None for all keys.
        k: keys, or values, [B, H, N, D].

    Raises:
        ValueError: any other mask.
    """
    if attn_mask is None:
        return None
    B, N = k.shape[0], k.shape[2]
    if attn_mask.dtype != torch.bool or tuple(attn_mask.shape) not in {(B, N), (B, 1, 1, N)}:
        raise ValueError(
            f"linear attention can leave keys out and nothing else: attn_mask must be bool, [{B}, {N}] or "
            f"[{B}, 1, 1, {N}], got {attn_mask.dtype} {list(attn_mask.shape)}; use timm's own Attention for others"
        )
    return attn_mask.reshape(B, N)


# Untyped in torch.
_WeakRef: Any = reductions.StorageWeakRef

# `torch.utils.checkpoint` computes again in a backward pass, which has a number; no backward pass runs under this one.
_NO_BACKWARD = -1


class TokenGrid:
    """Rows and columns of the tokens that are on their way through a model.

    Each thread has its own. Gradient checkpointing computes blocks again in the backward pass, after other images have
    gone through the model, maybe in another thread: there the grid comes with the tokens that enter a block (`follow`).
    """

    def __init__(self) -> None:
        # Dynamo knows plain thread-local objects, no subclasses.
        self._here = threading.local()
        self._lock = threading.Lock()
        self._sizes: set[tuple[int, int]] = set()
        self._of_tokens: dict[tuple[Any, ...], tuple[Any, tuple[int, int]]] = {}

    def __reduce__(self) -> tuple[type[TokenGrid], tuple[()]]:
        # A copied model has seen no image.
        return TokenGrid, ()

    @property
    def size(self) -> tuple[int, int] | None:
        """(rows, columns) of the last image in this thread; None before the first one."""
        return getattr(self._here, "size", None)

    @size.setter
    def size(self, size: tuple[int, int]) -> None:
        self._here.size = size
        if not torch.compiler.is_compiling():
            self._here.backward = _backward()
            with self._lock:
                self._sizes.add(size)
                self._of_tokens = {key: value for key, value in self._of_tokens.items() if not value[0].expired()}

    def follow(self, tokens: Any) -> None:
        """Keep the grid for tokens that enter a block, or take it from them where the block is computed again.

        Args:
            tokens: [B, N, C]; they are known again by their memory, as long as anyone keeps it.
        """
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return
        if not self._sizes or not _has_memory(tokens):
            return
        storage, backward = tokens.untyped_storage(), _backward()
        key = (storage._cdata, tokens.storage_offset(), tokens.shape)
        with self._lock:
            known = self._of_tokens.get(key)
            if backward != _NO_BACKWARD and known is not None and not known[0].expired():
                self._here.size, self._here.backward = known[1], backward
            elif self.size is not None and self._here.backward == backward:
                self._of_tokens[key] = (_WeakRef(storage), self.size)

    def of(self, num_tokens: int) -> tuple[int, int]:
        """The grid, if it has so many tokens.

        Raises:
            ValueError: no patch embedding has told the grid, it told another, or what a checkpoint computes again may
                have either of two grids.
        """
        size = self.size if self._is_of_this_pass() else self._only_size(num_tokens)
        if size is None or size[0] * size[1] != num_tokens:
            raise ValueError(
                f"expected the patch embedding to tell the grid of {num_tokens} patch tokens, got {size}; "
                "call the whole model, without patch dropout, or set the layer's grid.size = (rows, columns)"
            )
        return size

    def _is_of_this_pass(self) -> bool:
        """Whether the thread's grid is that of the tokens that are on their way now."""
        if torch.compiler.is_compiling() or _backward() == _NO_BACKWARD:
            return True
        return getattr(self._here, "backward", None) == _backward()

    def _only_size(self, num_tokens: int) -> tuple[int, int] | None:
        """The one grid of so many tokens that was ever told: for tokens that lie elsewhere in the backward pass."""
        found = [size for size in self._sizes if size[0] * size[1] == num_tokens]
        if len(found) > 1:
            raise ValueError(
                f"a checkpointed block is computed again for {num_tokens} patch tokens of a grid that is one of "
                f"{sorted(found)}; don't move the saved tensors of checkpointed blocks (save_on_cpu)"
            )
        return found[0] if found else None


class FollowTokens:
    """A hook that runs before a block; an object, so that a copied model gets a copy of its own."""

    def __init__(self, grid: TokenGrid) -> None:
        self.grid = grid

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Have the grid follow the first argument."""
        if arguments:
            self.grid.follow(arguments[0])


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
            f"or HybridEmbed as patch_embed, got {type(model).__name__} with {got}; use mixer='performer'"
        )
    return patch_embed.register_forward_hook(_Watch(grid))


def follow_tokens(model: nn.Module, grid: TokenGrid) -> None:
    """Have the grid follow the tokens into whatever holds an attention layer with this grid, for checkpointing."""
    layers = {name for name, module in model.named_modules() if getattr(module, "grid", None) is grid}
    # A layer follows its tokens itself.
    for name in sorted({parent for layer in layers for parent in _parents(layer)} - layers):
        model.get_submodule(name).register_forward_pre_hook(FollowTokens(grid))


def _parents(name: str) -> list[str]:
    """Names of the modules that hold a module, without the model itself: "a.b" and "a" of "a.b.c"."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _backward() -> int:
    """The number of the backward pass that this thread is in, as `torch.utils.checkpoint` tells them apart."""
    return torch._C._current_graph_task_id()


def _has_memory(tokens: Any) -> bool:
    # Neither do those that `torch.fx` traces with, nor those of `torch.func`.
    return isinstance(tokens, Tensor) and not torch._C._functorch.is_functorch_wrapped_tensor(tokens)
