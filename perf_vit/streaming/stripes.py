"""A segmentation network on a stripe of rows of each tile, whose other stripes other processes have."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import PatchDropout
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from perf_vit.errors import CheckpointError, ConfigError
from perf_vit.layers.mixer import Mixer
from perf_vit.models import Segmenter, backbone_body
from perf_vit.models.heads.parts import GridPart, Reach
from perf_vit.models.valid_tokens import MaskedFeatures, forward_maps, key_mask
from perf_vit.ops.stripes import Stripe
from perf_vit.ops.windows import WindowGrid, split_dim
from perf_vit.streaming.forward import check_blocks
from perf_vit.streaming.processes import Processes
from perf_vit.types import Window

__all__ = ["StripedSegmenter", "check_striped"]


@dataclass(frozen=True)
class _Cut:
    """Rows of tokens of a tile: those of this process, and those that its head sees besides."""

    rows: int
    first: int
    stop: int
    first_seen: int
    stop_seen: int


class StripedSegmenter:
    """Forward pass of a segmenter whose tiles are cut into stripes of rows, one for each process.

    In the backbone, only sums over keys and values cross. The head also computes rows of its neighbours that reach
    into its stripe: it gets their features and, as each process has the whole image, their pixels. Rows for each
    convolution would be more messages, whole maps as much memory as one process needs. Means and variances of group
    norms are those of the whole tile.

    Parameters, and the class and register tokens, have copies in all processes. The sum of their gradients over
    processes is that of a single process.

    Args:
        model: Network that `check_striped` accepts.
        processes: Processes that share each tile.
    """

    def __init__(self, model: Segmenter, processes: Processes) -> None:
        self.processes = processes
        self._model, self._body = model, _body(model)
        self._mixers = [module for module in self._body.modules() if isinstance(module, Mixer)]
        self._norms = [module for module in model.head.modules() if isinstance(module, nn.GroupNorm)]
        self._stripe = Stripe(processes.reduce, processes.rank, processes.number, (0, 0))
        self._cut: _Cut | None = None
        # Those of a converted model with a native size.
        self._own_positions: Any = None

    def begin(self) -> None:
        """Let the network compute stripes, until `end`; the backward pass, which may compute blocks again, included."""
        for mixer in self._mixers:
            mixer.stripe = self._stripe
        self._own_positions = vars(self._body).get("_pos_embed")
        self._body._pos_embed = _Positions(self._body, self._stripe)
        for norm in self._norms:
            norm.forward = partial(self._group_norm, norm)  # type: ignore[method-assign]

    def end(self) -> None:
        """Let the network compute whole tiles again."""
        for mixer in self._mixers:
            mixer.stripe = None
        for module, name in ((self._body, "_pos_embed"), *((norm, "forward") for norm in self._norms)):
            vars(module).pop(name, None)
        if self._own_positions is not None:
            self._body._pos_embed = self._own_positions

    def logits(self, image: Tensor, valid: Tensor | None) -> Tensor:
        """Compute the logits of the rows of `own`, [B, K, h, W]; all processes must call it with the same tiles.

        Args:
            image: Whole tiles, [B, C, H, W].
            valid: Valid pixels as for `Segmenter`.
        """
        model, cut, patch = self._model, self._cut_of(image), _patch_px(self._body)
        columns = image.shape[3] // patch[1]
        self._stripe.grid, self._stripe.first_row, self._cut = (cut.rows, columns), cut.first, cut
        mask = key_mask(model.backbone, valid)
        if mask is not None:
            prefix = self._body.num_prefix_tokens
            own = mask[..., prefix + cut.first * columns : prefix + cut.stop * columns]
            mask = torch.cat([mask[..., :prefix], own], dim=-1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not model.is_backbone_frozen):
            maps = forward_maps(model.backbone, self.own(image), None, attn_mask=mask)
        seen = image[:, :, cut.first_seen * patch[0] : cut.stop_seen * patch[0]]
        options = {}
        if "part" in inspect.signature(model.head.forward).parameters:
            window = Window(cut.first_seen, 0, cut.stop_seen - cut.first_seen, columns)
            options = {"part": GridPart(window, (cut.rows, columns))}
        logits: Tensor = model.head(self._with_neighbours(maps, cut), seen, **options)
        first, number = (cut.first - cut.first_seen) * patch[0], (cut.stop - cut.first) * patch[0]
        return logits[:, :, first : first + number]

    def own(self, x: Tensor) -> Tensor:
        """Return this process's rows of tiles or labels, [.., H, W] -> [.., h, W]."""
        cut, (height, _) = self._cut_of(x), _patch_px(self._body)
        return x[..., cut.first * height : cut.stop * height, :]

    def _cut_of(self, x: Tensor) -> _Cut:
        patch, width = _patch_px(self._body)
        grid = x.shape[-2] // patch, x.shape[-1] // width
        halo, at_once = _halo_rows(self._model), _rows_together(self._model, grid)
        first, stop = self.processes.stripe(grid[0], at_once)
        return _Cut(grid[0], first, stop, max(0, first - halo), min(grid[0], stop + halo))

    def _with_neighbours(self, maps: Sequence[Tensor], cut: _Cut) -> list[Tensor]:
        """Return maps, [B, C_i, rows, columns], with the neighbours' rows that the head sees."""
        halo, rank, number = _halo_rows(self._model), self.processes.rank, self.processes.number
        x = torch.cat(list(maps), dim=1)
        edges = torch.stack([x[:, :, :halo], x[:, :, x.shape[2] - halo :]])
        slots = torch.stack([edges if index == rank else torch.zeros_like(edges) for index in range(number)])
        slots = self.processes.reduce(slots, "sum")
        above = [slots[rank - 1, 1]] if rank else []
        below = [slots[rank + 1, 0]] if rank < number - 1 else []
        seen = torch.cat([*above, x, *below], dim=2)
        assert seen.shape[2] == cut.stop_seen - cut.first_seen
        return list(torch.split(seen, [each.shape[1] for each in maps], dim=1))

    def _group_norm(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        """Apply a group norm with the statistics of the whole tile to the rows that this process sees, [B, C, h, w]."""
        assert self._cut is not None
        cut = self._cut
        first, number, of_all = (
            rows * x.shape[2] // (cut.stop_seen - cut.first_seen)
            for rows in (cut.first - cut.first_seen, cut.stop - cut.first, cut.rows)
        )
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = split_dim(x, 1, norm.num_groups, x.shape[1] // norm.num_groups)
        count = of_all * x.shape[2] * x.shape[4]

        def mean(values: Tensor) -> Tensor:
            own = values[:, :, :, first : first + number].sum((2, 3, 4), keepdim=True)
            return self.processes.reduce(own, "sum") / count

        x = x - mean(x)
        normed = (x * (mean(x.square()) + norm.eps).rsqrt()).flatten(1, 2)
        return normed if norm.weight is None else normed * norm.weight[:, None, None] + norm.bias[:, None, None]


class _Positions:
    """A ViT's position embedding of the rows of a stripe: it gives those of the whole grid, of which some are taken."""

    def __init__(self, body: Any, stripe: Stripe) -> None:
        self._whole, self._num_prefix, self._stripe = body._pos_embed, body.num_prefix_tokens, stripe

    def __call__(self, x: Tensor) -> Any:
        """Add positions to patches, [B, rows, columns, C], and put the prefix before them, [B, P + n, C]."""
        found = self._whole(x.new_zeros(1, *self._stripe.grid, x.shape[-1]))
        tokens, rope = found if isinstance(found, tuple) else (found, None)
        first, x = self._stripe.first_row * self._stripe.grid[1], x.flatten(1, 2)
        prefix, positions = tokens[:, : self._num_prefix], tokens[:, self._num_prefix :]
        out = torch.cat([prefix.expand(len(x), -1, -1), x + positions[:, first : first + x.shape[1]]], dim=1)
        if not isinstance(found, tuple):
            return out
        return out, None if rope is None else rope[..., first : first + x.shape[1], :]


def check_striped(model: Segmenter, size_px: int, number: int) -> None:
    """Check that a network can be trained on tiles that several processes share.

    Args:
        model: Network in training mode.
        size_px: Height and width of a tile.
        number: Number of processes.

    Raises:
        ConfigError: It can't; the message names the layer or the option.
    """
    start, body = "trainer.sequence_parallel needs", _body(model)
    if not isinstance(model.backbone, MaskedFeatures) or not getattr(body, "dynamic_img_size", False):
        raise ConfigError(f"{start} a plain ViT of any image size as model.backbone, got {type(body).__name__}")
    height, width = _patch_px(body)
    grid = size_px // height, size_px // width
    try:
        check_blocks(body, grid)
    except CheckpointError as error:
        raise ConfigError(f"{start} a model.backbone whose attention is made of sums: {error}") from error
    for index, block in enumerate(body.blocks):
        mixer = block.attn.mixer
        # Small images could be held whole, but each process sees its own rows only.
        if not mixer.adds_up(grid):
            raise ConfigError(
                f"{start} a model.backbone whose attention is made of sums: mixer={mixer.name!r} of block {index} "
                f"needs all {grid[0]} x {grid[1]} tokens of a tile at once; with 'clustered' set max_exact_tokens=0 "
                "and num_sinks=0, with 'performer' center=False, balance=False and a kernel other than 'oprf'"
            )
    _reach(model)
    for layer, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            hint = "model.head_kwargs={norm: group}" if layer.startswith("head.") else "model.freeze_norms=true"
            raise ConfigError(f"{start} norms that don't depend on the stripe, got batch norm in {layer}; set {hint}")
        rate = module.p if isinstance(module, _DropoutNd) else getattr(module, "prob", 0)
        if isinstance(module, _DropoutNd | PatchDropout) and rate > 0 and module.training:
            raise ConfigError(f"{start} a network without dropout, got {rate:g} in {layer}; set it to 0")
    _check_size(model, size_px, grid, number)


def _check_size(model: Segmenter, size_px: int, grid: tuple[int, int], number: int) -> None:
    halo, together = _halo_rows(model), _rows_together(model, grid)
    groups, needed = -(-grid[0] // together), -(-halo // together)
    # The last group of rows may be incomplete.
    shortest = min(groups // number * together, grid[0] - groups * (number - 1) // number * together)
    multiple = _rows_of_head(model) * _patch_px(_body(model))[0]
    if size_px % multiple or shortest < max(1, halo):
        least = number * needed * together * _patch_px(_body(model))[0]
        raise ConfigError(
            f"trainer.sequence_parallel needs a data.tile_px that is a multiple of {multiple} and "
            f"gives each of {number} processes {needed} times {together} rows of patches, about {least}, got {size_px}"
        )


def _body(model: Segmenter) -> Any:
    return backbone_body(model.backbone)


def _patch_px(body: Any) -> tuple[int, int]:
    height, width = body.patch_embed.patch_size
    return height, width


def _rows_together(model: Segmenter, grid: tuple[int, int]) -> int:
    """Return the number of rows of tokens at whose multiples a tile may be cut: windows, and steps of the head."""
    sizes = {getattr(block.attn.options, "window_size", 0) for block in _body(model).blocks}
    windows = (WindowGrid.of(grid, size).height for size in sizes if size)
    return math.lcm(*windows, _rows_of_head(model))


def _rows_of_head(model: Segmenter) -> int:
    return _reach(model).multiple


def _halo_rows(model: Segmenter) -> int:
    """Return the number of rows of tokens above and below a stripe that the head sees."""
    reach = _reach(model)
    return -(-reach.margin // reach.multiple) * reach.multiple


def _reach(model: Segmenter) -> Reach:
    """Return how far the head looks, but for group norms, whose sums cross.

    Raises:
        ConfigError: It needs whole tiles.
    """
    head: Any = model.head
    try:
        reach: Reach = head.reach()
    except (AttributeError, ValueError) as error:
        name = type(head).__name__
        raise ConfigError(
            f"trainer.sequence_parallel needs a head that sees a part of a tile, got {name}; set model.head to "
            "full_resolution, segformer or linear"
        ) from error
    return reach
