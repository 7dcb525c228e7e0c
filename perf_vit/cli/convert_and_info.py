"""`perf-vit convert`, `info` and `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from perf_vit.cli.arguments import Mpp, SlideMpp, SlideMppOverride, WindowSize, given_options

__all__ = ["convert", "demo", "info"]


def convert(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="A timm model, or a folder with a saved one.")],
    out: Annotated[Path, typer.Option(help="Folder for model.safetensors, config.json and fidelity.html.")],
    weights: Annotated[Path | None, typer.Option(help="Weights of the model; timm's own if left out.")] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes of the weights; 0 for none.", min=0)] = None,
    mixer: Annotated[
        str, typer.Option(help="clustered: windows, sinks and clusters; performer: FAVOR+.")
    ] = "clustered",
    window_size: Annotated[
        int | None, typer.Option(help="Largest side of a window in patches; 16 by default (clustered).")
    ] = None,
    num_sinks: Annotated[int | None, typer.Option(help="Keys that all see; 256 or 0 by size (clustered).")] = None,
    num_clusters: Annotated[
        int | None,
        typer.Option(help="Clusters of all other keys; by default 128, or 160 above 32,768 patches (clustered)."),
    ] = None,
    max_exact_tokens: Annotated[
        str | None,
        typer.Option(help="Patches of the largest image with softmax attention, or auto; 2304 by default (clustered)."),
    ] = None,
    num_features: Annotated[int | None, typer.Option(help="Random features; 256 by default (performer).")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers to convert, as 0-5,8, or none; all by default.")] = None,
    native_size: Annotated[int | None, typer.Option(help="Windows of the pretraining, in patches.", min=1)] = None,
    img_size: Annotated[int | None, typer.Option(help="Side of the images; the model's own by default.")] = None,
    images: Annotated[list[Path] | None, typer.Option(help="Image or folder to measure on; repeat it.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Choose windows, sinks and clusters of each layer: 1.5 x plain FAVOR+'s time.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides projections and crops.", min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in the folder.")] = False,
    time_softmax: Annotated[bool, typer.Option("--time-softmax", help="Time softmax at any size.")] = False,
) -> None:
    """Make the attention of a pretrained ViT linear, and report what it keeps."""
    from perf_vit.workflows.convert import convert
    from perf_vit.workflows.progress import say, show

    report = convert(source, out, **given_options(context, {"source", "out"}))
    show(*report.tables())
    say(*report.notes, f"model: {report.folder}", f"report: {report.path}")


def info(
    image: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A raster or a slide (a path or a URL); or a run folder, checkpoint, config, vector or COCO file.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="A segmenter's run folder or .ckpt file, or a model of timm: count its tokens and time it."),
    ] = None,
    window_size: WindowSize = None,
    mpp: Mpp = None,
    slide_mpp: SlideMpp = None,
    slide_mpp_override: SlideMppOverride = None,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Tell what a raster, slide, model, config or vector file is, and how long a model would take for a raster."""
    from perf_vit.workflows.info import describe
    from perf_vit.workflows.progress import say, say_json, show

    of_slides = {"mpp": mpp, "slide_mpp": slide_mpp, "slide_mpp_override": slide_mpp_override}
    found = describe(image, model=model, window_size=window_size, **of_slides)
    if json:
        say_json(found.to_dict())
    else:
        say(image)
        show(found.table())


def demo(
    out: Annotated[Path, typer.Option(help="Folder for scene, run, map and report.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Decides the scene and the training.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo in the folder.")] = False,
) -> None:
    """Make a scene, train a small model on half of it, map all of it and write a report: a few minutes on a CPU."""
    from perf_vit.workflows.demo import run_demo
    from perf_vit.workflows.progress import say, show, show_log

    show_log()
    found = run_demo(out, seed, overwrite=overwrite)
    show(*found.scores.tables())
    say(
        f"IoU of ships: {found.iou:.3f}  ({found.seconds:.0f} s in all)",
        f"map: {found.map}",
        f"quicklook: {found.map.with_suffix('.png')}",
        f"report: {found.report}",
    )
