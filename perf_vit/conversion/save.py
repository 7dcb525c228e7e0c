"""Folders of converted models: weights in timm's format, and timm's config with the conversion."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.layers import to_2tuple
from torch import Tensor, nn

from perf_vit._version import __version__
from perf_vit.conversion.linearize import Conversion, convert_in_place, convertible_layers, find_vit
from perf_vit.conversion.weights import (
    ENHANCEMENT,
    check_file_arguments,
    create_with_weights,
    create_without_classifier,
    is_model,
    pretrained_cfg_of_file,
    read_weights,
    weights_file,
)
from perf_vit.errors import CheckpointError, OutputError, parsing, reason_line
from perf_vit.layers import current_draw, redraw_projections
from perf_vit.text import to_json

__all__ = [
    "CONFIG",
    "MODEL_FILES",
    "build_converted",
    "check_output_folder",
    "input_bands",
    "is_converted",
    "load_converted",
    "load_softmax",
    "read_model_config",
    "read_saved_config",
    "save_converted",
    "staged_folder",
]

WEIGHTS, CONFIG = "model.safetensors", "config.json"
CONFIG_KEY = "perf_vit"
"""Key of the conversion in timm's config."""

# A folder with other files is not overwritten.
MODEL_FILES = (WEIGHTS, CONFIG, ENHANCEMENT, "fidelity.html")


def save_converted(model: nn.Module, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Save a converted model as `model.safetensors` and `config.json`, atomically.

    The files have the format of timm's hub, so `timm.create_model("local-dir:FOLDER", pretrained=True)` returns the
    softmax model; `load_converted` returns the converted one. Parameters of `local_enhancement` are saved to
    `local_enhancement.safetensors`.

    Args:
        model: Result of `linearize` for a model from `timm.create_model`.
        folder: Output folder.
        overwrite: Whether to replace an existing model in the folder.

    Returns:
        The folder.

    Raises:
        ValueError: The model wasn't converted, or timm can't rebuild it from its name and arguments.
        OutputError: The folder isn't empty or isn't writable.
    """
    folder = Path(folder)
    check_output_folder(folder, overwrite=overwrite)
    config = _config_of(model)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    prefix = _vit_prefix(model)
    enhancement = {name.removeprefix(prefix): state.pop(name) for name in list(state) if _is_enhancement(name)}
    _check_that_timm_builds(config, state)
    with staged_folder(folder, overwrite=overwrite) as staging:
        # `metadata` as in timm's files, which other tools require.
        save_file(state, staging / WEIGHTS, metadata={"format": "pt"})
        if enhancement:
            save_file(enhancement, staging / ENHANCEMENT)
        (staging / CONFIG).write_text(to_json(config, indent=2) + "\n", encoding="utf-8")
        # safetensors creates files readable by the owner only; use the permissions of the config.
        for path in staging.iterdir():
            path.chmod((staging / CONFIG).stat().st_mode)
    return folder


def load_converted(folder: str | Path, **timm_kwargs: Any) -> nn.Module:
    """Load a converted model, in evaluation mode, on the CPU.

    Args:
        folder: Folder written by `save_converted`.
        **timm_kwargs: Arguments of `timm.create_model` that override the saved ones: img_size, in_chans, num_classes,
            features_only with out_indices. Weights are adapted as timm adapts pretrained ones. A model with a
            `native_size` takes images of any size; img_size changes nothing.

    Raises:
        CheckpointError: a file is missing or damaged, the config has no conversion, or the weights don't match it.
    """
    config = read_saved_config(folder)
    weights = read_weights(Path(folder, WEIGHTS))
    ours = config[CONFIG_KEY]
    enhancement = read_weights(Path(folder, ENHANCEMENT)) if ours.get("enhancement") else {}
    model = build_converted(config, weights, origin=folder, **timm_kwargs)
    _load_enhancement(find_vit(model), enhancement, folder)
    return model


def load_softmax(folder: str | Path, **timm_kwargs: Any) -> nn.Module:
    """Load the softmax model of a folder written by `save_converted` or in the format of timm's hub.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights don't match the config.
    """
    config = read_model_config(folder)
    return _build(config, read_weights(weights_file(folder)), folder, **timm_kwargs)


def build_converted(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    *,
    origin: str | Path = "",
    **timm_kwargs: Any,
) -> nn.Module:
    """Build the model described by a saved config, converted if the config has a conversion.

    Args:
        config: Result of `read_saved_config` or `read_model_config`.
        weights: State dict of the softmax model; None for random weights.
        origin: Path of the weights, for error messages.
        **timm_kwargs: Arguments of `timm.create_model` that override those of the config.

    Raises:
        CheckpointError: The weights don't match the config, or the conversion is of another version.
    """
    fixed = _native_img_size(config, timm_kwargs.get("patch_size"))
    model = _build(config, weights, origin, fixed, **timm_kwargs)
    if CONFIG_KEY not in config:
        return model.eval()
    body, ours = find_vit(model), config[CONFIG_KEY]
    if weights is not None:
        _check_names(model, weights, origin)
    try:
        conversion = Conversion.from_dict(ours["conversion"]).truncated(len(convertible_layers(body)))
        convert_in_place(body, conversion)
    # The file may hold anything.
    except Exception as error:
        raise CheckpointError(
            f"{origin or 'the checkpoint'} holds an invalid conversion: {reason_line(error)}; convert the "
            "model again with `perf-vit convert`"
        ) from error
    redraw_projections(body, ours["draw"])
    return model.eval()


def read_saved_config(folder: str | Path) -> dict[str, Any]:
    """Read the config of a folder written by `save_converted`.

    Raises:
        CheckpointError: The folder or its config doesn't exist, or the config has no conversion.
    """
    path = Path(folder, CONFIG)
    config = _read_json(path)
    ours = config.get(CONFIG_KEY)
    if not isinstance(ours, dict) or not {"conversion", "draw"} <= set(ours):
        raise CheckpointError(
            f"{path} has no conversion; expected a folder from perf_vit.save_converted; convert the model with "
            "`perf-vit convert`"
        )
    return config


def read_model_config(folder: str | Path) -> dict[str, Any]:
    """Read the config of a folder in timm's hub format, with or without a conversion.

    Raises:
        CheckpointError: The config is missing or damaged, or this timm lacks the architecture.
    """
    return _read_json(Path(folder, CONFIG))


def is_converted(folder: str | Path) -> bool:
    """Return whether a folder of a saved model has a conversion.

    Raises:
        CheckpointError: The config is missing or damaged.
    """
    return CONFIG_KEY in _read_json(Path(folder, CONFIG))


def check_output_folder(folder: Path, *, overwrite: bool) -> None:
    """Check that a model can be saved in a folder, before anything is computed.

    Raises:
        OutputError: It is a file, holds a model and `overwrite` is not set, holds other files, or isn't writable.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"can't save a model in {folder}: it is a file; choose a folder")
    held = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    foreign = [name for name in held if name not in MODEL_FILES]
    if foreign:
        raise OutputError(f"{folder} holds {foreign[0]}, which is not part of a saved model; choose an empty folder")
    if held and not overwrite:
        raise OutputError(f"{folder} already holds a model; choose another folder, or replace it with `overwrite=True`")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise OutputError(f"can't save a model in {folder}: {nearest} is not a writable folder; choose another")


def input_bands(model: Any) -> int:
    """Return the number of input bands of a timm model."""
    first = model.pretrained_cfg.get("first_conv")
    layer = model.get_submodule(first) if isinstance(first, str) else None
    return int(getattr(layer, "in_channels", model.pretrained_cfg["input_size"][0]))


def _config_of(model: nn.Module) -> dict[str, Any]:
    conversion, cfg = _saveable(model)
    args = check_file_arguments(_model_args(model), "a saved model", ValueError)
    pretrained = {key: value for key, value in pretrained_cfg_of_file(cfg).items() if value is not None}
    pretrained["num_classes"] = args["num_classes"]
    pretrained["input_size"] = (args["in_chans"], *args["img_size"])
    state = model.state_dict()
    config = {
        "architecture": cfg["architecture"],
        "num_classes": args["num_classes"],
        "num_features": getattr(model, "num_features", None),
        "model_args": args,
        "pretrained_cfg": pretrained,
        CONFIG_KEY: {
            "version": __version__,
            "conversion": conversion.to_dict(),
            "draw": current_draw(model),
            "enhancement": any(_is_enhancement(name) for name in state),
        },
    }
    try:
        # The round trip converts tuples to lists, so that the config equals the one read back.
        return dict(json.loads(json.dumps(config, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the arguments of timm.create_model must be plain values to be saved, got {error}; create the model with "
            "names instead of objects"
        ) from error


def _saveable(model: nn.Module) -> tuple[Conversion, Mapping[str, Any]]:
    """Return the conversion and timm's config of a model, if it can be saved."""
    conversion = getattr(find_vit(model), "conversion", None)
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    if not isinstance(conversion, Conversion):
        raise ValueError(f"expected a model from perf_vit.linearize, got {type(model).__name__}; convert it first")
    if "architecture" not in cfg:
        raise ValueError(
            f"expected a model that timm.create_model made, got {type(model).__name__} without a timm name; make it "
            "with timm.create_model, then convert it"
        )
    if getattr(getattr(find_vit(model), "patch_embed", None), "patch_size", None) is None:
        raise ValueError(
            f"expected a vision transformer with one grid of patches to save, got {cfg['architecture']}; save its "
            "state_dict, and convert it again after loading"
        )
    return conversion, cfg


def _model_args(model: Any) -> dict[str, Any]:
    """Return the arguments of `timm.create_model` that rebuild the model in its current form."""
    # timm stores the arguments of `create_model`; sizes and classifier may have changed since.
    made_with: Mapping[str, Any] = getattr(model, "_model_args", {})
    args = {name: value for name, value in made_with.items() if not name.endswith("drop_rate")}
    patch_embed: Any = find_vit(model).patch_embed
    img_size = patch_embed.img_size or model.pretrained_cfg["input_size"][1:]
    args["img_size"] = [img_size] * 2 if isinstance(img_size, int) else list(img_size)
    args["in_chans"] = input_bands(model)
    args["num_classes"] = model.num_classes
    if isinstance(getattr(model, "global_pool", None), str):
        args["global_pool"] = model.global_pool
    return args


def _check_that_timm_builds(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Check that the saved model can be loaded again."""
    with torch.device("meta"):
        built = timm.create_model(config["architecture"], pretrained=False, **config["model_args"])
    expected = {name: value.shape for name, value in built.state_dict().items()}
    got = {name: value.shape for name, value in state.items()}
    wrong = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
    if wrong:
        raise ValueError(
            f"{wrong[0]} of this model differs from timm's {config['architecture']} with {config['model_args']}, so it "
            "could not be loaded again; save a model with the modules that timm.create_model made"
        )


def _build(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None,
    origin: str | Path,
    fixed: Mapping[str, Any] | None = None,
    **timm_kwargs: Any,
) -> nn.Module:
    name = _architecture(config, origin)
    args = check_file_arguments(config.get("model_args", {}), f"model_args of {origin or name}", CheckpointError)
    # Older versions of timm write the pool only outside of `model_args`; the norm of a ViT may come after it.
    if "fc_norm.weight" in (weights or {}) and isinstance(config.get("global_pool"), str):
        args.setdefault("global_pool", config["global_pool"])
    kwargs = {
        "pretrained_cfg": pretrained_cfg_of_file(config.get("pretrained_cfg")),
        **args,
        **timm_kwargs,
        **(fixed or {}),
    }
    if weights is None:
        return timm.create_model(name, pretrained=False, **kwargs)
    if CONFIG_KEY not in config and (kwargs.get("features_only") or kwargs.get("num_classes") == 0):
        return create_without_classifier(name, weights, origin, **kwargs)
    return create_with_weights(name, weights, origin, **kwargs)


def _native_img_size(config: Mapping[str, Any], patch_size: Any) -> dict[str, Any]:
    """Return the size of a model that tiles its positions: timm must not resample them to the size of images.

    Args:
        config: Result of `read_saved_config`.
        patch_size: Side of the patches, or height and width; None for the saved size.
    """
    try:
        native_size = config[CONFIG_KEY]["conversion"].get("native_size")
        if native_size is None:
            return {}
        if patch_size is None:
            return {"img_size": config["model_args"]["img_size"]}
        return {"img_size": [int(native_size) * side for side in to_2tuple(patch_size)]}
    # The file may hold anything; what is wrong is said where it is read.
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _architecture(config: Mapping[str, Any], origin: str | Path) -> str:
    """Return the timm model name of a config; hub addresses and folders, which timm also accepts, are refused."""
    name = config.get("architecture")
    if not isinstance(name, str) or not is_model(name):
        raise CheckpointError(
            f"{origin or 'the checkpoint'} needs a timm with {name}, which this one lacks; update timm"
        )
    return name


def _vit_prefix(model: nn.Module) -> str:
    """Return the prefix of the ViT's parameter names."""
    body = find_vit(model)
    return next(f"{name}." if name else "" for name, module in model.named_modules() if module is body)


def _check_names(model: nn.Module, weights: Mapping[str, Tensor], origin: str | Path) -> None:
    body: Any = find_vit(model)
    # Weights of a ViT inside timm's feature wrapper are saved without the wrapper's prefix.
    prefix = _vit_prefix(model)
    prefix = prefix if any(name.startswith(prefix) for name in weights) else ""
    # If the number of classes differs, timm doesn't check the names.
    classifiers = body.get_classifier() if hasattr(body, "get_classifier") else ()
    if isinstance(classifiers, nn.Module):
        classifiers = (classifiers,)
    classifier = {id(parameter) for each in classifiers for parameter in each.parameters()}
    for name, parameter in body.named_parameters():
        if prefix + name not in weights and id(parameter) not in classifier:
            raise CheckpointError(
                f"{origin}: {WEIGHTS} has no {prefix}{name}, which {CONFIG} requires; save the model again"
            )


def _load_enhancement(body: nn.Module, enhancement: Mapping[str, Tensor], origin: str | Path) -> None:
    expected = {name: value.shape for name, value in body.state_dict().items() if _is_enhancement(name)}
    wrong = [name for name, shape in expected.items() if name not in enhancement or enhancement[name].shape != shape]
    if enhancement and wrong:
        raise CheckpointError(f"{origin}: {wrong[0]} of {ENHANCEMENT} doesn't match the model; save the model again")
    # `features_only` removes the blocks after the last feature.
    body.load_state_dict({name: enhancement[name] for name in expected if enhancement}, strict=False)


def _is_enhancement(name: str) -> bool:
    return ".local_enhancement." in name


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"no {path.name} in {path.parent}; expected a folder of a saved model")
    with parsing(path, "JSON", CheckpointError):
        config = json.loads(path.read_bytes())
    if not isinstance(config, dict) or "architecture" not in config:
        raise CheckpointError(f"{path} has no architecture; expected a config in the format of timm's hub")
    _architecture(config, path)
    return config


@contextmanager
def staged_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a hidden folder next to `folder` that replaces it on exit; after an exception it is deleted.

    Args:
        folder: Output folder.
        overwrite: Whether to replace an existing model.

    Yields:
        The folder to write into.

    Raises:
        OutputError: The folder isn't writable or must not be replaced.
    """
    # Keep a symbolic link: replace its target.
    folder = folder.resolve()
    parent = folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=parent) as scratch:
            made, old = Path(scratch, "new"), Path(scratch, "old")
            made.mkdir()
            yield made
            # Another process may have written to the folder meanwhile.
            check_output_folder(folder, overwrite=overwrite)
            if folder.exists():
                folder.rename(old)
            try:
                made.rename(folder)
            except OSError:
                with suppress(OSError):
                    old.rename(folder)
                raise
            shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"can't save a model in {folder}: {reason}; choose another folder") from error
