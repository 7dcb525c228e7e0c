"""Backbones: timm models and converted folders from configs."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from torch import nn

import perf_vit.models.backbones  # noqa: F401  (registers the backbones)
from perf_vit.conversion import load_converted
from perf_vit.conversion.save import build_converted, read_saved_config
from perf_vit.conversion.weights import check_file_arguments
from perf_vit.errors import ConfigError, PerfVitError, reason_line
from perf_vit.models.valid_tokens import with_key_mask
from perf_vit.types import FeatureSpec

__all__ = ["BackboneConfig", "build_backbone", "built_from", "check_known", "create_backbone", "feature_specs"]


@dataclass(kw_only=True)
class BackboneConfig:
    """A backbone.

    Attributes:
        backbone: any timm model name; or a folder with a converted model, whose weights are loaded.
        backbone_kwargs: passed to `timm.create_model`, e.g. {attn_kwargs: {num_features: 128}}; those of
            `perf_vit.conversion.weights`.
        pretrained: load timm's weights for the backbone.
    """

    backbone: str = "performer_vit_small_patch16_224"
    backbone_kwargs: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False


# A million patches; larger sides are a mistake that would ask for gigabytes a tile.
_LARGEST_TILE_PX = 16_384


def build_backbone(
    config: BackboneConfig,
    out_indices: Sequence[int] | None,
    in_chans: int,
    tile_px: int,
    saved_backbone: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Mapping[str, Any] | None]:
    """Build a `features_only` backbone.

    Args:
        config: which model.
        out_indices: the maps that it gives, None for timm's choice.
        in_chans: bands of the images.
        tile_px: tile size in pixels.
        saved_backbone: config of the converted model that the backbone was made of, to do without its folder.

    Returns:
        The backbone, and the config of the converted model that it was made of, None for a timm model.

    Raises:
        CheckpointError: a folder without a converted model.
        ConfigError: an unknown backbone or arguments that it doesn't take.
    """
    if out_indices is not None and len(set(out_indices)) != len(out_indices):
        raise ConfigError(f"model.out_indices must name each of the backbone's maps once, got {list(out_indices)}")
    options = {
        "features_only": True,
        **({} if out_indices is None else {"out_indices": tuple(out_indices)}),
    }
    backbone, saved_backbone = create_backbone(config, in_chans, tile_px, saved_backbone, options)
    return with_key_mask(backbone), saved_backbone


def create_backbone(
    config: BackboneConfig,
    in_chans: int,
    tile_px: int,
    saved_backbone: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Mapping[str, Any] | None]:
    """Make a timm model, or a converted one from its folder or saved config.

    Args:
        config: which model.
        in_chans: bands of the images.
        tile_px: side of a tile, for models of fixed input size.
        saved_backbone: config of the converted model that the backbone was made of, to do without its folder.
        options: further ones of `timm.create_model`; those of the config come last.

    Returns:
        The model, and the config of the converted model that it was made of, None for a timm model.

    Raises:
        CheckpointError: a folder without a converted model.
        ConfigError: an unknown model, arguments that it doesn't take, or a tile of no size or of gigabytes.
    """
    check_file_arguments(config.backbone_kwargs, "model.backbone_kwargs")
    if not 1 <= tile_px <= _LARGEST_TILE_PX:
        raise ConfigError(f"data.tile_px must be from 1 to {_LARGEST_TILE_PX}, got {tile_px}")
    in_folder = saved_backbone is None and not timm.is_model(config.backbone) and Path(config.backbone).is_dir()
    if in_folder:
        saved_backbone = read_saved_config(config.backbone)
    made = _create(config, in_chans, tile_px, saved_backbone, options or {}, load_weights=in_folder)
    return made, saved_backbone


def feature_specs(backbone: nn.Module) -> list[FeatureSpec]:
    """Channels and strides of the maps that a `features_only` backbone gives."""
    info: Any = backbone.feature_info
    return [FeatureSpec(c, s) for c, s in zip(info.channels(), info.reduction(), strict=True)]


def _create(
    config: BackboneConfig,
    in_chans: int,
    tile_px: int,
    saved: Mapping[str, Any] | None,
    options: Mapping[str, Any],
    *,
    load_weights: bool,
) -> nn.Module:
    if saved is None and not timm.is_model(config.backbone):
        near = difflib.get_close_matches(config.backbone, timm.list_models(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "see `timm.list_models('performer_*')`"
        raise ConfigError(f"model.backbone: timm has no model {config.backbone}, nor is it a folder; {hint}")
    with built_from(f"model.backbone {config.backbone}"):
        options = {
            **options,
            "in_chans": in_chans,
            **_size_options(config.backbone if saved is None else saved["architecture"], tile_px),
            **config.backbone_kwargs,
        }
        if load_weights:
            return load_converted(config.backbone, **options).train()
        if saved is not None:
            return build_converted(saved, **options).train()
        return timm.create_model(config.backbone, pretrained=config.pretrained, **options)


def _size_options(name: str, tile_px: int) -> dict[str, Any]:
    # A model of fixed input size must be told to give it up; others (convolutions, rotary positions) take any image.
    cfg = timm.get_pretrained_cfg(name)
    return {"img_size": tile_px, "dynamic_img_size": True} if cfg is not None and cfg.fixed_input_size else {}


@contextmanager
def built_from(keys: str) -> Iterator[None]:
    """Report what a network's constructor raises as one line about the config.

    Constructors check few of their arguments, and fail anywhere.

    Args:
        keys: where the arguments come from, "model.head fcos".

    Raises:
        ConfigError: names the keys; errors of this package pass as they are.
    """
    try:
        yield
    except PerfVitError:
        raise
    except Exception as error:
        raise ConfigError(f"{keys}: {reason_line(error)}") from error


def check_known(function: Callable[..., Any], names: Iterable[str], key: str, *, given: int = 0) -> None:
    """Refuse names that a function has no argument of.

    Args:
        function: a function or class.
        names: of its keyword arguments.
        key: what to call them in an error.
        given: how many of its first arguments don't come by name.

    Raises:
        ConfigError: says which there are, and which of them is nearest.
    """
    parameters = list(inspect.signature(function).parameters.values())[given:]
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{key} are {', '.join(known)}, got {name}{hint}")
