"""Grid of tokens, recorded from the patch embedding, and key masks in timm's format."""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.multiprocessing import reductions

__all__ = ["FollowTokens", "TokenGrid", "follow_tokens", "to_key_mask", "watch_patch_embed"]


def to_key_mask(attn_mask: Tensor | None, k: Tensor) -> Tensor | None:
    """Convert an attention mask in timm's format, [B, N] or [B, 1, 1, N], to a key mask, [B, N].

    Args:
        attn_mask: Mask of the keys to use, or None for all.
        k: Keys or values, [B, H, N, D].

    Raises:
        ValueError: The mask has another form.
    """
    if attn_mask is None:
        return None
    B, N = k.shape[0], k.shape[2]
    if attn_mask.dtype != torch.bool or tuple(attn_mask.shape) not in {(B, N), (B, 1, 1, N)}:
        raise ValueError(
            f"linear attention supports key masks only: attn_mask must be bool, [{B}, {N}] or "
            f"[{B}, 1, 1, {N}], got {attn_mask.dtype} {list(attn_mask.shape)}; use timm's Attention for other masks"
        )
    return attn_mask.reshape(B, N)


# Untyped in torch.
_WeakRef: Any = reductions.StorageWeakRef

# Index of the backward pass (see `_backward`) outside any backward pass.
_NO_BACKWARD = -1


class TokenGrid:
    """Rows and columns of the tokens that currently pass through a model.

    Each thread has its own grid. Gradient checkpointing recomputes blocks in the backward pass, after other images have
    passed through the model and possibly in another thread. There, the grid is looked up by the tokens that enter a
    block (`follow`).
    """

    def __init__(self) -> None:
        # Dynamo supports plain thread-local objects but not subclasses.
        self._local = threading.local()
        self._lock = threading.Lock()
        self._sizes: set[tuple[int, int]] = set()
        self._size_by_tokens: dict[tuple[Any, ...], tuple[Any, tuple[int, int]]] = {}

    def __reduce__(self) -> tuple[type[TokenGrid], tuple[()]]:
        # A copied model hasn't processed any image.
        return TokenGrid, ()

    @property
    def size(self) -> tuple[int, int] | None:
        """(rows, columns) of the last image in this thread, None before the first."""
        return getattr(self._local, "size", None)

    @size.setter
    def size(self, size: tuple[int, int]) -> None:
        self._local.size = size
        if not torch.compiler.is_compiling():
            self._local.backward = _backward()
            with self._lock:
                self._sizes.add(size)
                self._size_by_tokens = {
                    key: value for key, value in self._size_by_tokens.items() if not value[0].expired()
                }

    def follow(self, tokens: Any) -> None:
        """Record the grid of tokens that enter a block, or look it up where the block is recomputed.

        Args:
            tokens: Tokens, [B, N, C], identified by their memory as long as it is referenced.
        """
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return
        if not self._sizes or not _has_memory(tokens):
            return
        storage, backward = tokens.untyped_storage(), _backward()
        key = (storage._cdata, tokens.storage_offset(), tokens.shape)
        with self._lock:
            known = self._size_by_tokens.get(key)
            if backward != _NO_BACKWARD and known is not None and not known[0].expired():
                self._local.size, self._local.backward = known[1], backward
            elif self.size is not None and self._local.backward == backward:
                self._size_by_tokens[key] = (_WeakRef(storage), self.size)

    def size_for(self, num_tokens: int) -> tuple[int, int]:
        """Return the grid, checked against a number of patch tokens.

        Raises:
            ValueError: No grid or a grid of another size was recorded, or a recomputed block may have either of two
                grids.
        """
        size = self.size if self._is_current_pass() else self._only_size(num_tokens)
        if size is None or size[0] * size[1] != num_tokens:
            raise ValueError(
                f"expected the patch embedding to record the grid of {num_tokens} patch tokens, got {size}; "
                "call the whole model, without patch dropout, or set the layer's grid.size = (rows, columns)"
            )
        return size

    def _is_current_pass(self) -> bool:
        """Return whether the thread's grid belongs to the tokens being processed."""
        if torch.compiler.is_compiling() or _backward() == _NO_BACKWARD:
            return True
        return getattr(self._local, "backward", None) == _backward()

    def _only_size(self, num_tokens: int) -> tuple[int, int] | None:
        """Return the only recorded grid of this number of tokens, for tokens that moved in memory."""
        found = [size for size in self._sizes if size[0] * size[1] == num_tokens]
        if len(found) > 1:
            raise ValueError(
                f"a checkpointed block is computed again for {num_tokens} patch tokens of a grid that is one of "
                f"{sorted(found)}; don't move the saved tensors of checkpointed blocks (save_on_cpu)"
            )
        return found[0] if found else None


class FollowTokens:
    """Forward pre-hook of a block; a class, so that a copied model gets its own copy."""

    def __init__(self, grid: TokenGrid) -> None:
        self.grid = grid

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Pass the first argument to `TokenGrid.follow`."""
        if arguments:
            self.grid.follow(arguments[0])


class _RecordGrid:
    """Forward hook that records the grid; a class, so that a copied model gets its own copy."""

    def __init__(self, grid: TokenGrid) -> None:
        self.grid = grid

    def __call__(self, module: Any, arguments: tuple[Any, ...], output: Any) -> None:
        if isinstance(arguments[0], torch.fx.Proxy):
            # torch.fx is tracing: the graph will hold the convolution instead of the patch embedding.
            module.get_submodule("proj").register_forward_hook(_RecordConvolutionGrid(self.grid))
            return
        height, width = arguments[0].shape[-2:]
        rows, columns = module.dynamic_feat_size((height, width))
        self.grid.size = (rows, columns)


class _RecordConvolutionGrid:
    def __init__(self, grid: TokenGrid) -> None:
        self.grid = grid

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        rows, columns = output.shape[-2:]
        self.grid.size = (rows, columns)


def watch_patch_embed(model: nn.Module, grid: TokenGrid) -> torch.utils.hooks.RemovableHandle:
    """Register a hook on a timm model's `PatchEmbed` or `HybridEmbed` that records the grid in each forward pass.

    Raises:
        ValueError: The model has no such patch embedding.
    """
    patch_embed = getattr(model, "patch_embed", None)
    if not isinstance(patch_embed, nn.Module) or not hasattr(patch_embed, "dynamic_feat_size"):
        got = "none" if patch_embed is None else type(patch_embed).__name__
        raise ValueError(
            "windows, sinks and local enhancement need the grid: expected a model with timm's PatchEmbed "
            f"or HybridEmbed as patch_embed, got {type(model).__name__} with {got}; use mixer='performer'"
        )
    return patch_embed.register_forward_hook(_RecordGrid(grid))


def follow_tokens(model: nn.Module, grid: TokenGrid) -> None:
    """Register `FollowTokens` on all modules that contain an attention layer with this grid, for checkpointing."""
    layers = {name for name, module in model.named_modules() if getattr(module, "grid", None) is grid}
    # The layers call `follow` themselves.
    for name in sorted({parent for layer in layers for parent in _parents(layer)} - layers):
        model.get_submodule(name).register_forward_pre_hook(FollowTokens(grid))


def _parents(name: str) -> list[str]:
    """Return the names of the modules that contain a module, except the model: "a.b" and "a" of "a.b.c"."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _backward() -> int:
    """Return the index of the backward pass in which this thread runs, as `torch.utils.checkpoint` identifies it."""
    return torch._C._current_graph_task_id()


def _has_memory(tokens: Any) -> bool:
    # False for the proxies of torch.fx and the wrapped tensors of torch.func.
    return isinstance(tokens, Tensor) and not torch._C._functorch.is_functorch_wrapped_tensor(tokens)
