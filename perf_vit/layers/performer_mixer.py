"""Mixer of FAVOR+ attention (random features), and redrawing of a model's projections."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.fx
from torch import Tensor, nn

from perf_vit.layers.mixer import Mixer, MixerOptions, check_integers, register_mixer
from perf_vit.ops import draw_projection, favor_attention, fit_balancing
from perf_vit.ops.kernels import get_kernel
from perf_vit.ops.projection import ProjectionNorms
from perf_vit.ops.streaming import AttentionStream, LinearStream
from perf_vit.ops.stripes import Reduce

__all__ = [
    "PerformerMixer",
    "PerformerOptions",
    "copy_projections",
    "current_draw",
    "redraw_projections",
    "seeded_generator",
]


@dataclass(frozen=True, kw_only=True)
class PerformerOptions(MixerOptions):
    """Options of FAVOR+.

    Attributes:
        kernel: Name of the feature map: "softmax+", "softmax-hyp+", "softmax-trig", "relu", "oprf" or a registered one.
        num_features: Number of random features, M.
        orthogonal: Whether the rows of the projection are orthogonal within blocks.
        norms: Norms of the rows, "chi" or "sqrt" (see `draw_projection`).
        center: Whether queries and keys are centred by their means per call and head (see `fit_balancing`).
        balance: Whether their channels are balanced per call and head.
        seed: Seed of the model's projections, at least 0; each layer draws its own.
        chunk_size: Number of tokens per sample and head whose features are in memory at once, see
            `perf_vit.ops.favor_attention`; None suits the device.

    Raises:
        ValueError: The kernel is unknown or incompatible with centring and balancing, or a value is negative or not
            an integer; `draw_projection` checks the rest.
    """

    kernel: str = "softmax+"
    num_features: int = 256
    orthogonal: bool = True
    norms: ProjectionNorms = "chi"
    center: bool = False
    balance: bool = False
    seed: int = 0
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if (self.center or self.balance) and not get_kernel(self.kernel).estimates_softmax:
            raise ValueError(
                f"center and balance need a kernel that estimates softmax, got {self.kernel!r}; use center=False, "
                "balance=False"
            )
        check_integers(1, num_features=self.num_features)
        check_integers(seed=self.seed)
        if self.chunk_size is not None:
            check_integers(1, chunk_size=self.chunk_size)
        super().__post_init__()

    def summary(self, grid: tuple[int, int]) -> dict[str, int]:
        """Return the sizes shown in reports for an image with a grid of (rows, columns) of tokens."""
        return {"features": self.num_features}


@register_mixer("performer")
class PerformerMixer(Mixer):
    """FAVOR+ attention (Choromanski et al. 2020).

    The projection, [R, D], is determined by (seed, layer_index, draw), so it is a non-persistent buffer that
    checkpoints don't store. It stays float32 when the module is cast: features are computed in float32, and rounding
    would change the projection.

    Attributes:
        draw: Index of the current draw of the projection.
    """

    options_type = PerformerOptions
    options: PerformerOptions
    projection: Tensor

    def __init__(
        self, options: PerformerOptions, head_dim: int, device: torch.device | None = None, num_heads: int = 1
    ) -> None:
        super().__init__(options, head_dim, device, num_heads)
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
        """Attend, see `Mixer.forward`.

        Raises:
            ValueError: `is_causal` is combined with centring or balancing.
        """
        reduce = None
        if self.stripe is not None:
            reduce, first = self.stripe.reduce, self.stripe.first_key(self.options.num_prefix_tokens)
            k, v, key_mask = k[:, :, first:], v[:, :, first:], None if key_mask is None else key_mask[:, first:]
        return _attend(q, k, v, self.projection, self.options, key_mask, is_causal, reduce)

    def stream(
        self,
        prefix: tuple[Tensor, Tensor, Tensor],
        sample: tuple[Tensor, Tensor, Tensor] | None,
        grid: tuple[int, int],
    ) -> AttentionStream:
        """Start the attention over an image in parts, see `Mixer.stream`.

        Raises:
            ValueError: The image is large and the layer centres or balances, or fits a parameter to all tokens.
        """
        if not self.adds_up(grid):
            return super().stream(prefix, sample, grid)
        return LinearStream(prefix, self.projection, self.options.kernel)

    def adds_up(self, grid: tuple[int, int]) -> bool:
        """Return whether the attention is made of sums over parts, see `Mixer.adds_up`."""
        options = self.options
        return not (options.center or options.balance or get_kernel(options.kernel).needs_parameter)

    def redraw(self, draw: int) -> None:
        """Replace the projection in place by draw number `draw` of the same seed; 0 is the initial one.

        Call it between steps, with the same number on every process, never within a forward pass: a checkpointed block
        would be recomputed with a different projection.
        """
        self.draw = draw
        self.projection.copy_(self._draw_projection(self.projection.device))

    def init_non_persistent_buffers(self) -> None:
        """Draw the projection on the module's device."""
        self.projection = self._draw_projection(self.projection.device)

    def _draw_projection(self, device: torch.device) -> Tensor:
        options = self.options
        if device.type == "meta":
            num_rows = get_kernel(options.kernel).num_rows(options.num_features)
            return torch.empty(num_rows, self.head_dim, dtype=torch.float32, device=device)
        generator = seeded_generator(options.seed, options.layer_index, self.draw)
        projection = draw_projection(
            options.num_features, self.head_dim, options.orthogonal, options.norms, generator, options.kernel
        )
        return projection.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.projection
        super()._apply(fn, recurse)
        if self.projection.dtype != before.dtype:
            self.projection = before.to(self.projection.device)
        return self


# A leaf for torch.fx: branches on shapes can't be traced.
@torch.fx.wrap
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    options: PerformerOptions,
    key_mask: Tensor | None,
    is_causal: bool,
    reduce: Reduce | None = None,
) -> Tensor:
    balancing = None
    if options.center or options.balance:
        if is_causal:
            raise ValueError(
                "is_causal=True needs center=False and balance=False: the statistics of a call include future tokens"
            )
        balancing = fit_balancing(
            q, k, key_mask, center=options.center, balance=options.balance, chunk_size=options.chunk_size
        )
    chunk_size = options.chunk_size
    return favor_attention(q, k, v, projection, options.kernel, key_mask, is_causal, balancing, chunk_size, reduce)


def current_draw(model: nn.Module) -> int:
    """Return the index of the draw of a model's projections; 0 for a model without projections.

    Raises:
        ValueError: The layers have different draws, which a checkpoint can't store.
    """
    draws = {layer.draw for layer in _performer_layers(model)} or {0}
    if len(draws) > 1:
        raise ValueError(
            f"the layers of a model must hold one draw, got {', '.join(map(str, sorted(draws)))}; "
            "call redraw_projections(model, draw)"
        )
    return draws.pop()


def redraw_projections(model: nn.Module, draw: int) -> None:
    """Set every Performer layer of a model to draw number `draw`, in place; layers that have it are unchanged.

    Call it between steps, with the same number on every process (see `PerformerMixer.redraw`).
    """
    for layer in _performer_layers(model):
        if layer.draw != draw:
            layer.redraw(draw)


def copy_projections(source: nn.Module, target: nn.Module) -> None:
    """Copy the current projections of a model to a copy of the model, in place."""
    for layer, copied in zip(_performer_layers(source), _performer_layers(target), strict=True):
        copied.projection.copy_(layer.projection)
        copied.draw = layer.draw


def _performer_layers(model: nn.Module) -> Iterator[PerformerMixer]:
    return (module for module in model.modules() if isinstance(module, PerformerMixer))


def seeded_generator(*entropy: int) -> torch.Generator:
    """Return a generator that follows from several numbers, such as a seed and the index of a layer."""
    # SeedSequence gives independent streams for neighbouring seeds, layers and draws; sums of them would collide.
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed)
