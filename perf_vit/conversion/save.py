"""Converted models as folders: weights as timm has them, timm's config with the conversion in it."""

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
from torch import Tensor, nn

from perf_vit._version import __version__
from perf_vit.conversion.linearize import Conversion, body_of, convert_in_place, convertible_layers
from perf_vit.conversion.weights import check_file_arguments, create_with_weights, pretrained_cfg_of_file, read_weights
from perf_vit.errors import CheckpointError, OutputError, parsing, reason_line
from perf_vit.layers import current_draw, redraw_projections
from perf_vit.text import to_json

__all__ = [
    "MODEL_FILES",
    "build_converted",
    "check_output_folder",
    "input_bands",
    "load_converted",
    "load_softmax",
    "read_saved_config",
    "save_converted",
    "staged_folder",
]

WEIGHTS, CONFIG = "model.safetensors", "config.json"
ENHANCEMENT = "local_enhancement.safetensors"
CONFIG_KEY = "perf_vit"
"""Where the conversion lies in timm's config."""

# All that a folder may hold to be replaced as a whole.
MODEL_FILES = (WEIGHTS, CONFIG, ENHANCEMENT, "fidelity.html")


def save_converted(model: nn.Module, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Save a converted model as `model.safetensors` and `config.json`.

    What `local_enhancement` adds to the weights goes to `local_enhancement.safetensors`. The first two are what timm
    writes for its hub, so
    `timm.create_model("local-dir:FOLDER", pretrained=True)` gives the softmax model; `load_converted` gives the
    converted one. The folder appears when all of it is written.

    Args:
        model: from `linearize`, of a model from `timm.create_model`.
        folder: where it goes.
        overwrite: replace an earlier model in that folder.

    Returns:
        The folder.

    Raises:
        ValueError: a model that wasn't converted, or that timm can't build again from its name and arguments.
        OutputError: the folder holds something, or can't be written.
    """
    folder = Path(folder)
    check_output_folder(folder, overwrite=overwrite)
    config = _config_of(model)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    prefix = _place_of_body(model)
    enhancement = {name.removeprefix(prefix): state.pop(name) for name in list(state) if _is_enhancement(name)}
    _check_that_timm_builds(config, state)
    with staged_folder(folder, overwrite=overwrite) as staging:
        # `metadata` as timm writes it; other tools ask for it.
        save_file(state, staging / WEIGHTS, metadata={"format": "pt"})
        if enhancement:
            save_file(enhancement, staging / ENHANCEMENT)
        (staging / CONFIG).write_text(to_json(config, indent=2) + "\n", encoding="utf-8")
        # safetensors lets nobody else read what it writes; whoever may read the config may read the rest.
        for path in staging.iterdir():
            path.chmod((staging / CONFIG).stat().st_mode)
    return folder


def load_converted(folder: str | Path, **timm_kwargs: Any) -> nn.Module:
    """Load a converted model, in evaluation mode, on the CPU.

    Args:
        folder: from `save_converted`.
        **timm_kwargs: of `timm.create_model`, over those it was saved with: img_size, in_chans, num_classes,
            features_only with out_indices. Weights are adapted as timm adapts pretrained ones.

    Raises:
        CheckpointError: a missing or broken file, a config without a conversion, or weights that don't fit it.
    """
    config = read_saved_config(folder)
    weights = read_weights(Path(folder, WEIGHTS))
    ours = config[CONFIG_KEY]
    enhancement = read_weights(Path(folder, ENHANCEMENT)) if ours.get("enhancement") else {}
    model = build_converted(config, weights, origin=folder, **timm_kwargs)
    _load_enhancement(body_of(model), enhancement, folder)
    return model


def load_softmax(folder: str | Path, **timm_kwargs: Any) -> nn.Module:
    """The softmax model that a folder holds: one of `save_converted`'s, or as timm saves models for its hub.

    Raises:
        CheckpointError: a missing or broken file, or weights that don't fit the config.
    """
    config = _read_json(Path(folder, CONFIG))
    return _build(config, read_weights(Path(folder, WEIGHTS)), folder, **timm_kwargs)


def build_converted(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    *,
    origin: str | Path = "",
    **timm_kwargs: Any,
) -> nn.Module:
    """The model that a saved config describes.

    Args:
        config: from `read_saved_config`.
        weights: of the softmax model; None for random ones.
        origin: where these came from, for messages.
        **timm_kwargs: of `timm.create_model`, over those of the config.

    Raises:
        CheckpointError: weights that don't fit the config, or a conversion of another version.
    """
    model = _build(config, weights, origin, **timm_kwargs)
    body, ours = body_of(model), config[CONFIG_KEY]
    if weights is not None:
        _check_names(model, weights, origin)
    try:
        conversion = Conversion.from_dict(ours["conversion"]).within(len(convertible_layers(body)))
        convert_in_place(body, conversion)
    # The file's author decides what it holds.
    except Exception as error:
        raise CheckpointError(
            f"{origin or 'the checkpoint'} holds a conversion that can't be made: {reason_line(error)}; convert the "
            "model again with `perf-vit convert`"
        ) from error
    redraw_projections(body, ours["draw"])
    return model.eval()


def read_saved_config(folder: str | Path) -> dict[str, Any]:
    """The config of a folder that `save_converted` wrote.

    Raises:
        CheckpointError: no folder, no config in it, or one without a conversion.
    """
    path = Path(folder, CONFIG)
    config = _read_json(path)
    ours = config.get(CONFIG_KEY)
    if not isinstance(ours, dict) or not {"conversion", "draw"} <= set(ours):
        raise CheckpointError(
            f"{path} says nothing of a conversion; expected a folder from perf_vit.save_converted; convert the model "
            "with `perf-vit convert`"
        )
    return config


def check_output_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that a model can't be saved in, before anything is computed.

    Raises:
        OutputError: it is a file, it holds a model and `overwrite` is not set, or it holds other things.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"can't save a model in {folder}: it is a file; choose a folder")
    held = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    foreign = [name for name in held if name not in MODEL_FILES]
    if foreign:
        raise OutputError(f"{folder} holds {foreign[0]}, which is no part of a saved model; choose a folder of its own")
    if held and not overwrite:
        raise OutputError(f"{folder} already holds a model; choose another folder, or replace it with `overwrite=True`")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise OutputError(f"can't save a model in {folder}: {nearest} is not a writable folder; choose another")


def input_bands(model: Any) -> int:
    """Bands of the images that a timm model takes."""
    first = model.pretrained_cfg.get("first_conv")
    layer = model.get_submodule(first) if isinstance(first, str) else None
    return int(getattr(layer, "in_channels", model.pretrained_cfg["input_size"][0]))


def _config_of(model: nn.Module) -> dict[str, Any]:
    conversion = getattr(body_of(model), "conversion", None)
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    if not isinstance(conversion, Conversion):
        raise ValueError(f"expected a model from perf_vit.linearize, got {type(model).__name__}; convert it first")
    if "architecture" not in cfg:
        raise ValueError(
            f"expected a model that timm.create_model made, got {type(model).__name__} without a timm name; make it "
            "with timm.create_model, then convert it"
        )
    if getattr(getattr(body_of(model), "patch_embed", None), "patch_size", None) is None:
        raise ValueError(
            f"expected a vision transformer with one grid of patches to save, got {cfg['architecture']}; keep its "
            "state_dict, and convert it again after loading"
        )
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
        # What is read back is what was meant: tuples become lists here already.
        return dict(json.loads(json.dumps(config, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the arguments of timm.create_model must be plain values to be saved, got {error}; make the model with "
            "names instead of objects"
        ) from error


def _model_args(model: Any) -> dict[str, Any]:
    """The arguments of `timm.create_model` that give the model as it is now."""
    # timm keeps what `create_model` was called with; sizes and classifier may have changed since.
    made_with: Mapping[str, Any] = getattr(model, "_model_args", {})
    args = {name: value for name, value in made_with.items() if not name.endswith("drop_rate")}
    patch_embed: Any = body_of(model).patch_embed
    img_size = patch_embed.img_size or model.pretrained_cfg["input_size"][1:]
    args["img_size"] = [img_size] * 2 if isinstance(img_size, int) else list(img_size)
    args["in_chans"] = input_bands(model)
    args["num_classes"] = model.num_classes
    if isinstance(getattr(model, "global_pool", None), str):
        args["global_pool"] = model.global_pool
    return args


def _check_that_timm_builds(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """A saved model that can't be loaded is found out now."""
    with torch.device("meta"):
        built = timm.create_model(config["architecture"], pretrained=False, **config["model_args"])
    expected = {name: value.shape for name, value in built.state_dict().items()}
    got = {name: value.shape for name, value in state.items()}
    wrong = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
    if wrong:
        raise ValueError(
            f"timm's {config['architecture']} with {config['model_args']} has another {wrong[0]} than this model, so "
            "it could not be loaded again; save a model whose parts are as timm.create_model made them"
        )


def _build(
    config: Mapping[str, Any], weights: Mapping[str, Tensor] | None, origin: str | Path, **timm_kwargs: Any
) -> nn.Module:
    name = _architecture(config, origin)
    args = check_file_arguments(config.get("model_args", {}), f"model_args of {origin or name}", CheckpointError)
    kwargs = {"pretrained_cfg": pretrained_cfg_of_file(config.get("pretrained_cfg")), **args, **timm_kwargs}
    if weights is None:
        return timm.create_model(name, pretrained=False, **kwargs)
    return create_with_weights(name, weights, origin, **kwargs)


def _architecture(config: Mapping[str, Any], origin: str | Path) -> str:
    """The timm name in a config; timm takes addresses of its hub, and folders, for names too."""
    name = config.get("architecture")
    if not isinstance(name, str) or not timm.is_model(name):
        raise CheckpointError(f"{origin or 'the checkpoint'} is of {name}, which this timm doesn't have; update timm")
    return name


def _place_of_body(model: nn.Module) -> str:
    """What the names of the ViT's parameters begin with."""
    body = body_of(model)
    return next(f"{name}." if name else "" for name, module in model.named_modules() if module is body)


def _check_names(model: nn.Module, weights: Mapping[str, Tensor], origin: str | Path) -> None:
    body: Any = body_of(model)
    # timm's wrapper for features holds a ViT whose weights are saved without it.
    prefix = _place_of_body(model)
    prefix = prefix if any(name.startswith(prefix) for name in weights) else ""
    # Where the classifier is another, timm doesn't ask for any of the names.
    classifiers = body.get_classifier() if hasattr(body, "get_classifier") else ()
    if isinstance(classifiers, nn.Module):
        classifiers = (classifiers,)
    classifier = {id(parameter) for each in classifiers for parameter in each.parameters()}
    for name, parameter in body.named_parameters():
        if prefix + name not in weights and id(parameter) not in classifier:
            raise CheckpointError(
                f"{origin}: {WEIGHTS} has no {prefix}{name}, which {CONFIG} asks for; save the model again"
            )


def _load_enhancement(body: nn.Module, enhancement: Mapping[str, Tensor], origin: str | Path) -> None:
    expected = {name: value.shape for name, value in body.state_dict().items() if _is_enhancement(name)}
    wrong = [name for name, shape in expected.items() if name not in enhancement or enhancement[name].shape != shape]
    if enhancement and wrong:
        raise CheckpointError(f"{origin}: {ENHANCEMENT} has another {wrong[0]} than the model; save the model again")
    # Blocks past the last one that features are taken from are cut off.
    body.load_state_dict({name: enhancement[name] for name in expected if enhancement}, strict=False)


def _is_enhancement(name: str) -> bool:
    return ".local_enhancement." in name


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"no {path.name} in {path.parent}; expected a folder that a model was saved in")
    with parsing(path, "JSON", CheckpointError):
        config = json.loads(path.read_bytes())
    if not isinstance(config, dict) or "architecture" not in config:
        raise CheckpointError(f"{path} names no architecture; expected a config as timm saves it for its hub")
    _architecture(config, path)
    return config


@contextmanager
def staged_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A hidden folder beside `folder`, which takes its place once all is written; nothing is left after an error.

    Args:
        folder: the output.
        overwrite: replace a model that is there at the end.

    Yields:
        The folder to write into.

    Raises:
        OutputError: nothing can be written there, or what is there must stay.
    """
    # A link stays one.
    folder = folder.resolve()
    parent = folder.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=parent) as scratch:
            made, old = Path(scratch, "new"), Path(scratch, "old")
            made.mkdir()
            yield made
            # Making it took time, in which somebody may have put something there.
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
