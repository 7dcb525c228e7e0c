"""Which options of the commands fit which task; all others are refused, so that none is passed over in silence."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import typer

from perf_vit.errors import ConfigError

__all__ = ["EVALUATE_OPTIONS", "predict_options", "refuse_other_options"]

_COMMON = frozenset({"checkpoint", "batch_size", "device", "precision"})
_RUN = frozenset(
    {"checkpoint", "inputs", "more_inputs", "output", "path_column", "engine", "num_actors", "ray_address"}
)
_EVALUATE = _COMMON | {"image", "labels", "json", "overwrite"}
_WINDOWS = frozenset({"window_size", "overlap"})


def predict_options(task: str, options: type[Any]) -> frozenset[str]:
    """Parameters of `perf-vit predict` for a task: those of all tasks, and the fields of its own options.

    Args:
        task: Name of the task.
        options: Dataclass of its options.
    """
    scene = {"mosaic"} if task in {"segmentation", "detection"} else set()
    return _RUN | scene | {each.name for each in fields(options)}


EVALUATE_OPTIONS = {
    "segmentation": _EVALUATE | _WINDOWS | {"region", "all_touched", "flips", "slide_mpp", "tissue"},
    "detection": _EVALUATE | _WINDOWS | {"label_format", "names"},
    "classification": _EVALUATE,
    "regression": _EVALUATE,
    "slide_classification": _EVALUATE,
}
"""Parameters of `perf-vit evaluate`, by the task of the checkpoint's network."""


def refuse_other_options(context: typer.Context, known: frozenset[str], checkpoint: Path, network: str) -> None:
    """Refuse what was given on the command line and means nothing to the task.

    Args:
        context: of the call.
        known: parameters of the task.
        checkpoint: that was given.
        network: what to call the network.

    Raises:
        ConfigError: names the first such option.
    """
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and name not in known:
            # The name of a flag that was turned off is its second one.
            off = getattr(parameter, "secondary_opts", None) if context.params[name] is False else None
            flag = (off or parameter.opts)[0]
            raise ConfigError(f"{flag} is not for {network}, which {checkpoint} holds; leave it out")
