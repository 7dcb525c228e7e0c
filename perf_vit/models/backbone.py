"""Config of backbones, and backbones built from it: timm models and folders of stored models."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import perf_vit.backbones  # noqa: F401  (registers the backbones)
from perf_vit.conversion import load_converted
from perf_vit.conversion.save import build_converted, is_converted, load_softmax, read_model_config
from perf_vit.conversion.weights import (
    check_file_arguments,
    create_without_classifier,
    is_model,
    read_weights,
    stored_folder,
)
from perf_vit.errors import ConfigError, PerfVitError, reason_line
from perf_vit.models.valid_tokens import with_key_mask
from perf_vit.types import FeatureSpec

__all__ = [
    "BackboneConfig",
    "build_backbone",
    "check_argument_names",
    "constructor_errors",
    "create_backbone",
    "default_indices",
    "feature_specs",
    "is_random",
    "map_strides",
]


@dataclass(kw_only=True)
class BackboneConfig:
    """Backbone of a model.

    Attributes:
        backbone: Name of a timm model; or a model with its weights: a folder of `perf-vit convert` or in timm's hub
            format, also as local-dir:FOLDER, or hf-hub:OWNER/MODEL.
        weights: Weights file for the timm model, .safetensors or .pth, with the names of timm or of the model's
            authors; None for random weights, or those of `pretrained`.
        patch_size: Side of a patch of a ViT in pixels; None for the model's own. Weights are resampled as FlexiViT does
            (Beyer et al. 2022, arXiv:2212.08013), so smaller patches see the image as if it were enlarged.
        backbone_kwargs: Arguments of `timm.create_model`, such as {attn_kwargs: {num_features: 128}}; limited to those
            of `perf_vit.conversion.weights`.
        pretrained: Whether to load timm's weights for the backbone.
    """

    backbone: str = "performer_vit_small_patch16_224"
    weights: str | None = None
    patch_size: int | None = None
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
    try:
        backbone, saved_backbone = create_backbone(config, in_chans, tile_px, saved_backbone, options)
    except ConfigError as error:
        _check_indices(config, out_indices, tile_px, saved_backbone, error)
        raise
    return with_key_mask(backbone), saved_backbone


def map_strides(config: BackboneConfig, tile_px: int, saved_backbone: Mapping[str, Any] | None = None) -> list[int]:
    """Return the strides of all feature maps of a backbone, from which `out_indices` choose.

    Args:
        config: Backbone.
        tile_px: Tile size in pixels.
        saved_backbone: Config of the stored model that the backbone was built from, used instead of its folder.

    Raises:
        ConfigError: The backbone is unknown, or gives no maps.
    """
    plain = replace(config, pretrained=False, weights=None)
    if saved_backbone is None and (folder := stored_folder(config.backbone)) is not None:
        saved_backbone = read_model_config(folder)
    options = {"features_only": True, "out_indices": (0,)}
    # Neither time nor random numbers are spent on weights that are thrown away.
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                probe: Any = _create(plain, 3, tile_px, saved_backbone, options)
        # Some constructors need values, which meta tensors lack.
        except ConfigError:
            probe = _create(plain, 3, tile_px, saved_backbone, options)
    return [each["reduction"] for each in probe.feature_info.info]


def default_indices(strides: Sequence[int]) -> list[int]:
    """Return indices of maps for a segmentation head: four blocks of a plain ViT, or strides 4 to 32 of a pyramid.

    Args:
        strides: Result of `map_strides`.
    """
    if len(set(strides)) == 1:
        return sorted({-(-len(strides) * part // 4) - 1 for part in (1, 2, 3, 4)})
    last = {stride: index for index, stride in enumerate(strides)}
    return [index for stride, index in last.items() if 4 <= stride <= 32] or list(last.values())


def _check_indices(
    config: BackboneConfig,
    out_indices: Sequence[int] | None,
    tile_px: int,
    saved_backbone: Mapping[str, Any] | None,
    error: ConfigError,
) -> None:
    """Explain an error of `out_indices` that the backbone doesn't have."""
    if not out_indices:
        return
    try:
        strides = map_strides(config, tile_px, saved_backbone)
    except PerfVitError:
        return
    if not all(-len(strides) <= index < len(strides) for index in out_indices):
        raise ConfigError(
            f"model.out_indices must be from 0 to {len(strides) - 1}, as {config.backbone} has maps of strides "
            f"{strides}, got {list(out_indices)}; leave it out for {default_indices(strides)}"
        ) from error


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
    if not 1 <= tile_px <= _LARGEST_TILE_PX:
        raise ConfigError(f"data.tile_px must be from 1 to {_LARGEST_TILE_PX}, got {tile_px}")
    folder = stored_folder(config.backbone) if saved_backbone is None else None
    if folder is not None:
        saved_backbone = read_model_config(folder)
    made = _create(config, in_chans, tile_px, saved_backbone, options or {}, folder)
    return made, saved_backbone


def is_random(config: BackboneConfig) -> bool:
    """Return whether training starts from random weights of the backbone."""
    return not config.pretrained and config.weights is None and is_model(config.backbone)


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
    folder: Path | None = None,
) -> nn.Module:
    # Before anything is built: the argument of a file must not load other files.
    check_file_arguments(config.backbone_kwargs, "model.backbone_kwargs")
    if saved is None and not is_model(config.backbone):
        near = difflib.get_close_matches(config.backbone, timm.list_models(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "see `timm.list_models('performer_*')`"
        raise ConfigError(f"model.backbone: timm has no model {config.backbone}, nor is it a folder; {hint}")
    if config.weights is not None and (saved is not None or config.pretrained):
        other = "model.pretrained" if config.pretrained else f"model.backbone {config.backbone}"
        raise ConfigError(f"model.weights and {other} both give weights; leave one of them out")
    given = {**options, "in_chans": in_chans, **_patch_option(config, tile_px)}
    name = config.backbone if saved is None else str(saved["architecture"])
    with constructor_errors(f"model.backbone {config.backbone}"), _patches_expected(config):
        *tried, last = _size_options(name, tile_px)
        for size in tried:
            try:
                return _built(config, saved, folder, {**given, **size, **config.backbone_kwargs}).train()
            except TypeError as error:
                # Models take other sizes by different arguments.
                if not any(argument in str(error) for argument in size):
                    raise
        return _built(config, saved, folder, {**given, **last, **config.backbone_kwargs}).train()


def _built(
    config: BackboneConfig, saved: Mapping[str, Any] | None, folder: Path | None, options: Mapping[str, Any]
) -> nn.Module:
    """Build a backbone with its weights, from a folder, a file or timm, or with random ones."""
    if folder is not None:
        return load_converted(folder, **options) if is_converted(folder) else load_softmax(folder, **options)
    if saved is not None:
        return build_converted(saved, **options)
    if config.weights is None:
        model: nn.Module = timm.create_model(config.backbone, pretrained=config.pretrained, **options)
        return model
    return create_without_classifier(config.backbone, read_weights(config.weights), config.weights, **options)


def _patch_option(config: BackboneConfig, tile_px: int) -> dict[str, int]:
    """Return the argument that sets the size of patches, which timm's filters of weights follow."""
    if config.patch_size is None:
        return {}
    if "patch_size" in config.backbone_kwargs:
        raise ConfigError("model.patch_size and model.backbone_kwargs.patch_size are the same; leave one of them out")
    if not 1 <= config.patch_size <= tile_px:
        raise ConfigError(
            f"model.patch_size must be from 1 to the {tile_px} px of a tile of the backbone, got {config.patch_size}; "
            "8 suits objects of 8 px and more"
        )
    return {"patch_size": config.patch_size}


@contextmanager
def _patches_expected(config: BackboneConfig) -> Iterator[None]:
    """Explain the error of a network that has no patches."""
    try:
        yield
    except TypeError as error:
        if config.patch_size is None or "patch_size" not in str(error):
            raise
        raise ConfigError(
            f"model.patch_size is for vision transformers, and {config.backbone} has no patches; leave it out"
        ) from error


def _size_options(name: str, tile_px: int) -> list[dict[str, Any]]:
    """Return arguments that set the tile size, to be tried in turn; models of any size (convolutions) need none."""
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.fixed_input_size:
        return [{}]
    any_size = [{"dynamic_img_size": True}, {"strict_img_size": False}, {}]
    return [{"img_size": tile_px, **more} for more in any_size]


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
