"""Attention through random features, FAVOR+, and the draws of a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.fx
from torch import Tensor, nn

from perf_vit.layers.mixer import Mixer, MixerOptions, check_whole, register_mixer
from perf_vit.ops import draw_projection, favor_attention, fit_balancing
from perf_vit.ops.kernels import get_kernel
from perf_vit.ops.projection import ProjectionNorms

__all__ = ["PerformerMixer", "PerformerOptions", "copy_projections", "current_draw", "redraw_projections"]


@dataclass(frozen=True, kw_only=True)
class PerformerOptions(MixerOptions):
    """Options of FAVOR+.

    Attributes:
        kernel: name of the feature map, "softmax+", "softmax-hyp+", "softmax-trig", "relu", "oprf" or a registered one.
        num_features: number of random features, M.
        orthogonal: whether the projection's rows come in orthogonal blocks.
        norms: norms of its rows, "chi" or "sqrt" (see `draw_projection`).
        center: whether queries and keys are centred by the means of each call and head (see `fit_balancing`).
        balance: whether their channels are balanced likewise.
        seed: seed of the model's projections, 0 or more; layers of one seed draw different ones.

    Raises:
        ValueError: an unknown kernel, one that centring or balancing would change, or a number that is negative or
            not whole; `draw_projection` checks the rest.
    """

    kernel: str = "softmax+"
    num_features: int = 256
    orthogonal: bool = True
    norms: ProjectionNorms = "chi"
    center: bool = False
    balance: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.center or self.balance) and not get_kernel(self.kernel).estimates_softmax:
            raise ValueError(
                f"center and balance leave softmax attention as it is, but kernel {self.kernel!r} estimates another; "
                "use center=False, balance=False"
            )
        check_whole(1, num_features=self.num_features)
        check_whole(seed=self.seed)
        super().__post_init__()

    def summary(self, grid: tuple[int, int]) -> dict[str, int]:
        """Sizes that a report shows for an image of these rows and columns of tokens."""
        return {"features": self.num_features}


@register_mixer("performer")
class PerformerMixer(Mixer):
    """FAVOR+ (Choromanski et al. 2020).

    The projection, [R, D], is drawn from (seed, layer_index, draw), so it is a non-persistent buffer that no
    checkpoint needs to carry. It stays float32 whatever dtype the module is moved to: a rounded draw would be
    another one, and the features are computed in float32 anyway.

    Attributes:
        draw: number of the draw that the projection is.
    """

    options_type = PerformerOptions
    options: PerformerOptions
    projection: Tensor

    def __init__(self, options: PerformerOptions, head_dim: int, device: torch.device | None = None) -> None:
        super().__init__(options, head_dim, device)
        self.draw = 0
        self.register_buffer("projection", self._draw_projection(torch.device(device or "cpu")), persistent=False)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend, as `Mixer.forward` says.

        Raises:
            ValueError: causal order with centring or balancing.
        """
        return _attend(q, k, v, self.projection, self.options, key_mask, is_causal)

    def redraw(self, draw: int) -> None:
        """Replace the projection, in place, by draw number `draw` of the same seed; 0 is the one it starts with.

        To be called between steps with the same number on every process, never within a forward pass: a checkpointed
        block would recompute with another projection than it used.
        """
        self.draw = draw
        self.projection.copy_(self._draw_projection(self.projection.device))

    def init_non_persistent_buffers(self) -> None:
        """Draw the projection on the module's device; timm calls it once a model leaves the meta device."""
        self.projection = self._draw_projection(self.projection.device)

    def _draw_projection(self, device: torch.device) -> Tensor:
        options = self.options
        if device.type == "meta":
            num_rows = get_kernel(options.kernel).num_rows(options.num_features)
            return torch.empty(num_rows, self.head_dim, dtype=torch.float32, device=device)
        generator = _generator(options.seed, options.layer_index, self.draw)
        projection = draw_projection(
            options.num_features, self.head_dim, options.orthogonal, options.norms, generator, options.kernel
        )
        return projection.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.projection
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before.is_meta and not self.projection.is_meta:
            self.init_non_persistent_buffers()
        elif self.projection.dtype != before.dtype:
            self.projection = before.to(self.projection.device)
        return self


# What it decides by shapes can't be traced, so it stays one node of a graph.
@torch.fx.wrap
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    options: PerformerOptions,
    key_mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    balancing = None
    if options.center or options.balance:
        if is_causal:
            raise ValueError(
                "is_causal=True needs center=False and balance=False: the statistics of a call tell of the future"
            )
        balancing = fit_balancing(q, k, key_mask, center=options.center, balance=options.balance)
    return favor_attention(q, k, v, projection, options.kernel, key_mask, is_causal, balancing)


def current_draw(model: nn.Module) -> int:
    """The number of the draw that a model's projections are; 0 where it has none.

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

    To be called between steps, with the same number on every process (see `PerformerMixer.redraw`).
    """
    for layer in _performer_layers(model):
        if layer.draw != draw:
            layer.redraw(draw)


def copy_projections(source: nn.Module, target: nn.Module) -> None:
    """Give a copy of a model the projections that the model holds now, in place."""
    for layer, copied in zip(_performer_layers(source), _performer_layers(target), strict=True):
        copied.projection.copy_(layer.projection)
        copied.draw = layer.draw


def _performer_layers(model: nn.Module) -> Iterator[PerformerMixer]:
    return (module for module in model.modules() if isinstance(module, PerformerMixer))


def _generator(*entropy: int) -> torch.Generator:
    # SeedSequence mixes its words, so neighbouring seeds, layers and draws are independent; a sum would repeat them.
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed)
