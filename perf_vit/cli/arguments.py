"""Options that several commands have, and their flags in errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from perf_vit.errors import OptionError, PerfVitError

__all__ = [
    "INPUT",
    "OUTPUT",
    "SLIDES",
    "SPEED",
    "TILING",
    "BatchSize",
    "Checkpoint",
    "Device",
    "Input",
    "Mpp",
    "Overlap",
    "Precision",
    "SlideMpp",
    "SlideMppOverride",
    "Tissue",
    "WindowSize",
    "given_options",
    "with_flags",
]

INPUT, OUTPUT, TILING, SPEED, SLIDES = "Input", "Output", "Tiling", "Speed", "Slides"
"""Groups of options in the help of a command."""

_OPTION = re.compile(r"`(\w+)(?:=([^`]+))?`")


def with_flags(error: PerfVitError, text: str, command: Any) -> str:
    """What an error says, with flags for the options that stand in backticks: `--overwrite` for `overwrite=True`.

    Args:
        error: Error; the message of an `OptionError` begins with the name of an option.
        text: Its message.
        command: Group of all commands.
    """
    flags = {str(each.name): each for sub in command.commands.values() for each in sub.params}
    if isinstance(error, OptionError):
        name, _, rest = text.partition(" ")
        text = f"`{name}` {rest}"

    def flag(match: re.Match[str]) -> str:
        name, value = match[1], match[2]
        if name not in flags:
            return match[0]
        parameter = flags[name]
        if value == "False":
            return str((parameter.secondary_opts or parameter.opts)[0])
        first = str(parameter.opts[0])
        return first if value in (None, "True") else f"{first} {value}"

    return _OPTION.sub(flag, text)


Checkpoint = Annotated[
    Path, typer.Option(help="A run folder, or a .ckpt file that `perf-vit train` wrote.", rich_help_panel=INPUT)
]

Input = Annotated[
    Path,
    typer.Option(
        "--input",
        help="The raster, or a folder of images; of a detector, an image or a folder of them.",
        rich_help_panel=INPUT,
    ),
]

WindowSize = Annotated[
    int | None, typer.Option(help="Side of a window in pixels; the training tile's by default.", rich_help_panel=TILING)
]

Overlap = Annotated[
    int | None, typer.Option(help="Pixels that neighbours share; a quarter window by default.", rich_help_panel=TILING)
]

BatchSize = Annotated[int, typer.Option(help="Windows a forward pass.", min=1, rich_help_panel=SPEED)]

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=SPEED)]

Mpp = Annotated[float | None, typer.Option(help="Micrometres per pixel to read slides at.", rich_help_panel=SLIDES)]


def _slide_mpp(text: str) -> float | str:
    if text.lower() == "objective":
        return "objective"
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"expected micrometres per pixel, such as 0.25, or objective, got {text}") from error


SlideMpp = Annotated[
    Any,
    typer.Option(
        help="Of a slide's level 0, where the file states none; or objective, for 10 / its magnification.",
        metavar="FLOAT|objective",
        parser=_slide_mpp,
        rich_help_panel=SLIDES,
    ),
]

SlideMppOverride = Annotated[
    float | None, typer.Option(help="Of a slide's level 0, whatever the file states.", rich_help_panel=SLIDES)
]

Tissue = Annotated[
    str | None,
    typer.Option(
        help="Only the tissue of slides: auto, otsu, or a file of outlines (GeoJSON of QuPath, XML of ASAP).",
        rich_help_panel=SLIDES,
    ),
]

Precision = Annotated[
    str, typer.Option(help="32, bf16, 16, or auto: bf16 where the device is fast in it.", rich_help_panel=SPEED)
]


def given_options(context: typer.Context, others: set[str]) -> dict[str, Any]:
    """Options that stand on the command line, by name; all else has the default of the Python call.

    Args:
        context: Call of the command.
        others: Parameters that are no options of the Python call.
    """
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    return {name: context.params[name] for name in given - others}
