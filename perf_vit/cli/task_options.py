"""Which options of the commands fit which task; all others are refused, so that none is passed over in silence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import typer

from perf_vit.errors import ConfigError

__all__ = ["EVALUATE_OPTIONS", "PREDICT_OPTIONS", "refuse_other_options"]

_COMMON = frozenset({"checkpoint", "batch_size", "device", "precision"})
_PREDICT = _COMMON | {"inputs", "more_inputs", "output", "path_column", "on_error", "overwrite"}
_EVALUATE = _COMMON | {"image", "labels", "json", "overwrite"}
_SOURCES = frozenset({"crs", "resolution", "mpp", "slide_mpp", "tissue", "mosaic"})
_WINDOWS = frozenset({"window_size", "overlap"})
_MAPS = frozenset({"kind", "blend", "flips", "resume", "engine", "num_actors", "ray_address"})
_FILES = frozenset({"num_readers", "polygons", "score_threshold"})

PREDICT_OPTIONS = {
    "segmentation": _PREDICT | _SOURCES | _WINDOWS | _MAPS | _FILES,
    "detection": _PREDICT | _SOURCES | _WINDOWS | _FILES | {"coco_images"},
    "classification": _PREDICT,
    "regression": _PREDICT,
    "slide": _PREDICT | {"num_readers", "slide_mpp", "tissue"},
}
"""Parameters of `perf-vit predict`, by the task of the checkpoint's network."""

EVALUATE_OPTIONS = {
    "segmentation": _EVALUATE | _WINDOWS | {"region", "all_touched", "flips", "slide_mpp", "tissue"},
    "detection": _EVALUATE | _WINDOWS | {"label_format", "names"},
    "classification": _EVALUATE,
    "regression": _EVALUATE,
    "slide": _EVALUATE,
}
"""Parameters of `perf-vit evaluate`, likewise."""


def refuse_other_options(
    context: typer.Context, options: Mapping[str, frozenset[str]], task: str, checkpoint: Path, network: str
) -> None:
    """Refuse what was given on the command line and means nothing to the task.

    Args:
        context: of the call.
        options: parameters by task.
        task: of the checkpoint's network.
        checkpoint: that was given.
        network: what to call the network.

    Raises:
        ConfigError: names the first such option.
    """
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and name not in options[task]:
            # The name of a flag that was turned off is its second one.
            off = getattr(parameter, "secondary_opts", None) if context.params[name] is False else None
            flag = (off or parameter.opts)[0]
            raise ConfigError(f"{flag} is not for {network}, which {checkpoint} holds; leave it out")
