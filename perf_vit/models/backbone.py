"""Config of backbones, and backbones built from it: timm models and folders of converted models."""

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

import perf_vit.backbones  # noqa: F401  (registers the backbones)
from perf_vit.conversion import load_converted
from perf_vit.conversion.save import build_converted, read_saved_config
from perf_vit.conversion.weights import check_file_arguments, is_model
from perf_vit.errors import ConfigError, PerfVitError, reason_line
from perf_vit.models.valid_tokens import with_key_mask
from perf_vit.types import FeatureSpec

__all__ = [
    "BackboneConfig",
    "build_backbone",
    "check_argument_names",
    "constructor_errors",
    "create_backbone",
    "feature_specs",
]


@dataclass(kw_only=True)
class BackboneConfig:
    """Backbone of a model.

    Attributes:
        backbone: Name of a timm model, or folder of a converted model, whose weights are loaded.
        backbone_kwargs: Arguments of `timm.create_model`, such as {attn_kwargs: {num_features: 128}}; limited to those
            of `perf_vit.conversion.weights`.
        pretrained: Whether to load timm's weights for the backbone.
    """

    backbone: str = "performer_vit_small_patch16_224"
    backbone_kwargs: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False


# A million patches of 16 px; larger tiles are a mistake that would need gigabytes each.
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
        config: Backbone.
        out_indices: Indices of the feature maps, None for timm's default.
        in_chans: Number of bands of the images.
        tile_px: Tile size in pixels.
        saved_backbone: Config of the converted model that the backbone was built from, used instead of its folder.

    Returns:
        The backbone, and the config of the converted model that it was built from, None for a timm model.

    Raises:
        CheckpointError: The folder has no converted model.
        ConfigError: The backbone is unknown or doesn't accept its arguments.
    """
    if out_indices is not None and len(set(out_indices)) != len(out_indices):
        raise ConfigError(f"model.out_indices must not repeat an index, got {list(out_indices)}")
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
    """Create a timm model, or a converted model from its folder or saved config.

    Args:
        config: Backbone.
        in_chans: Number of bands of the images.
        tile_px: Tile size in pixels, for models of fixed input size.
        saved_backbone: Config of the converted model that the backbone was built from, used instead of its folder.
        options: Further arguments of `timm.create_model`, overridden by those of the config.

    Returns:
        The model, and the config of the converted model that it was built from, None for a timm model.

    Raises:
        CheckpointError: The folder has no converted model.
        ConfigError: The model is unknown or doesn't accept its arguments, or the tile size is out of range.
    """
    check_file_arguments(config.backbone_kwargs, "model.backbone_kwargs")
    if not 1 <= tile_px <= _LARGEST_TILE_PX:
        raise ConfigError(f"data.tile_px must be from 1 to {_LARGEST_TILE_PX}, got {tile_px}")
    in_folder = saved_backbone is None and not is_model(config.backbone) and Path(config.backbone).is_dir()
    if in_folder:
        saved_backbone = read_saved_config(config.backbone)
    made = _create(config, in_chans, tile_px, saved_backbone, options or {}, load_weights=in_folder)
    return made, saved_backbone


def feature_specs(backbone: nn.Module) -> list[FeatureSpec]:
    """Return the channels and strides of the feature maps of a `features_only` backbone."""
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
    if saved is None and not is_model(config.backbone):
        near = difflib.get_close_matches(config.backbone, timm.list_models(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "see `timm.list_models('performer_*')`"
        raise ConfigError(f"model.backbone: timm has no model {config.backbone}, nor is it a folder; {hint}")
    with constructor_errors(f"model.backbone {config.backbone}"):
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
    # Models of fixed input size need these options; others (convolutions, rotary positions) accept any size.
    cfg = timm.get_pretrained_cfg(name)
    return {"img_size": tile_px, "dynamic_img_size": True} if cfg is not None and cfg.fixed_input_size else {}


@contextmanager
def constructor_errors(keys: str) -> Iterator[None]:
    """Convert exceptions of a network's constructor to a one-line error about the config.

    Constructors check few of their arguments and raise exceptions of any class.

    Args:
        keys: Config keys of the arguments, such as "model.head fcos".

    Raises:
        ConfigError: The constructor fails; a `PerfVitError` is passed on unchanged.
    """
    try:
        yield
    except PerfVitError:
        raise
    except Exception as error:
        raise ConfigError(f"{keys}: {reason_line(error)}") from error


def check_argument_names(function: Callable[..., Any], names: Iterable[str], key: str, *, given: int = 0) -> None:
    """Check that a function has keyword arguments of these names.

    Args:
        function: Function or class.
        names: Names of keyword arguments.
        key: Config key for the error message.
        given: Number of leading arguments that are passed by position.

    Raises:
        ConfigError: a name is unknown; the message lists the known names and the closest one.
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
