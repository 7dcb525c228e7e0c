"""Whether anything wants to see the calls of a module."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as _everywhere
from torch.nn.utils import parametrize

from perf_vit.layers.token_grid import FollowTokens

__all__ = ["is_hooked"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_hooked(module: nn.Module) -> bool:
    """Whether the module or one within has a hook, a parametrization, or a `forward` that was put over its own.

    Each of them expects one call with all tokens.
    """
    if any(getattr(_everywhere, f"_global{hooks}") for hooks in _HOOKS):
        return True
    return any(_is_hooked_itself(each) for each in module.modules())


def _is_hooked_itself(module: nn.Module) -> bool:
    hooks = (hook for name in _HOOKS for hook in getattr(module, name).values())
    return (
        any(not isinstance(hook, FollowTokens) for hook in hooks)
        or "forward" in vars(module)
        or parametrize.is_parametrized(module)
    )
