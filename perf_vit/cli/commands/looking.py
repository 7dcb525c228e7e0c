"""`perf-vit info` and `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from perf_vit.cli.commands.arguments import Mpp, SlideMpp, WindowSize

__all__ = ["demo", "info"]


def info(
    image: Annotated[str, typer.Argument(metavar="FILE", help="A raster or a slide; a path or a URL.")],
    model: Annotated[
        str | None, typer.Option(help="A segmenter's .ckpt file, or a model of timm: count its tokens and time it.")
    ] = None,
    window_size: WindowSize = None,
    mpp: Mpp = None,
    slide_mpp: SlideMpp = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Tell what a raster or slide is, and how long a model would take for it."""
    from perf_vit.cli.info import describe_file
    from perf_vit.io import open_source

    source = open_source(image, mpp=mpp, slide_mpp=slide_mpp)
    describe_file(source, model=model, window_size=window_size, as_json=json)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for scene, run, map and report.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Decides the scene and the training.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo in the folder.")] = False,
) -> None:
    """Make a scene, train a small model on half of it, map all of it and write a report: a few minutes on a CPU."""
    from perf_vit.cli.demo import run_demo

    run_demo(out, seed, overwrite=overwrite)
