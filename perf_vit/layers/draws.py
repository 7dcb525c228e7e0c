"""The draw of a whole model: which random projections all its layers use."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from perf_vit.layers.performer_attention import RandomProjectionMixin

__all__ = ["copy_projections", "current_draw", "redraw_projections"]


def current_draw(model: nn.Module) -> int:
    """The number of the draw that the model's Performer layers hold; 0 where it has none.

    Raises:
        ValueError: the layers hold different ones, which no checkpoint could name.
    """
    draws = {layer.draw for layer in _performer_layers(model)} or {0}
    if len(draws) > 1:
        raise ValueError(
            f"the layers of a model must hold one draw, got {', '.join(map(str, sorted(draws)))}; "
            "call redraw_projections(model, draw)"
        )
    return draws.pop()


def redraw_projections(model: nn.Module, draw: int) -> None:
    """Give every Performer layer of a model draw number `draw`, in place; layers that hold it are left alone.

    To be called between steps, with the same number on every process (see `PerformerAttention.redraw`).
    """
    for layer in _performer_layers(model):
        if layer.draw != draw:
            layer.redraw(draw)


def copy_projections(source: nn.Module, target: nn.Module) -> None:
    """Give a copy of a model the projections that the model holds now, in place."""
    for layer, copied in zip(_performer_layers(source), _performer_layers(target), strict=True):
        copied.projection.copy_(layer.projection)
        copied.draw = layer.draw


def _performer_layers(model: nn.Module) -> Iterator[RandomProjectionMixin]:
    return (module for module in model.modules() if isinstance(module, RandomProjectionMixin))
