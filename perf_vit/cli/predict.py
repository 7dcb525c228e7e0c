"""`perf-vit predict` and `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from perf_vit.cli.arguments import (
    INPUT,
    OUTPUT,
    SPEED,
    TILING,
    BatchSize,
    Checkpoint,
    Device,
    Input,
    Mpp,
    Overlap,
    Precision,
    SlideMpp,
    SlideMppOverride,
    Tissue,
    WindowSize,
    given_options,
)
from perf_vit.cli.results import say_plan, say_prediction

__all__ = ["evaluate", "predict"]


def predict(
    context: typer.Context,
    checkpoint: Checkpoint,
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input", help="A raster, a folder, a glob, or a list as CSV or Parquet; repeat it.", rich_help_panel=INPUT
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="The map to write, .tif; a quicklook .png goes beside it. A folder for several outputs. "
            "Objects: .gpkg, .geojson, .parquet or COCO's .json.",
            rich_help_panel=OUTPUT,
        ),
    ],
    more_inputs: Annotated[
        list[str] | None, typer.Argument(help="Further inputs: what a shell makes of --input *.tif.")
    ] = None,
    kind: Annotated[
        Literal["classes", "probabilities", "probabilities-uint8"],
        typer.Option(
            help="Class indices, one float32 band a class, or the same in steps of 1/254.", rich_help_panel=OUTPUT
        ),
    ] = "classes",
    window_size: WindowSize = None,
    overlap: Overlap = None,
    batch_size: BatchSize = 1,
    blend: Annotated[
        str, typer.Option(help="Weights of overlapping windows: hann or gaussian.", rich_help_panel=TILING)
    ] = "hann",
    flips: Annotated[
        bool, typer.Option("--flips", help="Average over mirror images: four times the work.", rich_help_panel=TILING)
    ] = False,
    whole: Annotated[
        bool,
        typer.Option(
            "--whole",
            help="No windows: every token attends to the whole image (ViTs with linear attention).",
            rich_help_panel=TILING,
        ),
    ] = False,
    store: Annotated[
        Literal["float32", "bfloat16", "float16", "memory"],
        typer.Option(help="With --whole: dtype of the file of tokens, or memory.", rich_help_panel=TILING),
    ] = "float32",
    token_folder: Annotated[
        Path | None,
        typer.Option(
            help="With --whole: folder of the file of tokens; next to the output by default.", rich_help_panel=TILING
        ),
    ] = None,
    keep_tokens: Annotated[
        bool,
        typer.Option("--keep-tokens", help="With --whole: keep finished blocks after Ctrl-C.", rich_help_panel=TILING),
    ] = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="With --whole: print tokens, time, memory and disk, and end.", rich_help_panel=TILING
        ),
    ] = False,
    num_readers: Annotated[
        int | None,
        typer.Option(help="Threads that read ahead; one per processor by default.", min=1, rich_help_panel=SPEED),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with an interrupted map.", rich_help_panel=OUTPUT)
    ] = True,
    on_error: Annotated[
        Literal["stop", "skip"],
        typer.Option(
            help="Stop at an error, or leave pixels that can't be read as nodata and go on after bad files.",
            rich_help_panel=INPUT,
        ),
    ] = "stop",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace outputs that exist; an input never is.", rich_help_panel=OUTPUT)
    ] = False,
    path_column: Annotated[
        str, typer.Option(help="Column of a list that holds the paths.", rich_help_panel=INPUT)
    ] = "path",
    quicklook: Annotated[
        bool,
        typer.Option(
            "--quicklook/--no-quicklook",
            help="Write a picture next to the map or objects, .png.",
            rich_help_panel=OUTPUT,
        ),
    ] = True,
    polygons: Annotated[
        Literal["gpkg", "geojson", "parquet", "json"] | None,
        typer.Option(
            help="Write the areas of the classes, but the background, beside the map; geojson of slides is QuPath's. "
            "Of a detector: the format of several outputs, gpkg by default, geojson of images without CRS.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    min_area: Annotated[
        float,
        typer.Option(
            help="Smallest area of a polygon or object: m2 of rasters with a CRS, um2 of slides, else pixels.",
            min=0,
            rich_help_panel=OUTPUT,
        ),
    ] = 0,
    simplify: Annotated[
        float,
        typer.Option(
            help="Largest displacement of a simplified outline: m, um or pixels.", min=0, rich_help_panel=OUTPUT
        ),
    ] = 0,
    report: Annotated[
        bool,
        typer.Option(
            "--report/--no-report", help="Write a page of the result next to the output, .html.", rich_help_panel=OUTPUT
        ),
    ] = True,
    style: Annotated[
        bool,
        typer.Option(
            "--style/--no-style",
            help="Write class names and colours for QGIS next to the output.",
            rich_help_panel=OUTPUT,
        ),
    ] = True,
    coco_images: Annotated[
        Path | None,
        typer.Option(
            help="COCO file of labels of the images: write COCO results, .json, that go by its ids (detection).",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    score_threshold: Annotated[
        float | None,
        typer.Option(
            help="Lowest score of an object; where F1 was best in validation, by default. In maps of classes that "
            "don't exclude each other, the probability above which one is true; 0.5 by default.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    mosaic: Annotated[
        bool, typer.Option("--mosaic", help="Read a folder, glob or STAC items as one scene.", rich_help_panel=INPUT)
    ] = False,
    crs: Annotated[
        str | None, typer.Option(help="Read rasters in this CRS, as EPSG:32637.", rich_help_panel=INPUT)
    ] = None,
    resolution: Annotated[
        float | None, typer.Option(help="Read rasters with pixels of this size, in CRS units.", rich_help_panel=INPUT)
    ] = None,
    mpp: Mpp = None,
    slide_mpp: SlideMpp = None,
    slide_mpp_override: SlideMppOverride = None,
    tissue: Tissue = None,
    device: Device = "auto",
    precision: Precision = "32",
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="This process, or a Ray cluster.", rich_help_panel=SPEED)
    ] = "local",
    num_actors: Annotated[
        int | None,
        typer.Option(help="Ray processes; one a GPU, else one a CPU, by default.", min=1, rich_help_panel=SPEED),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="Of a running cluster, as auto; RAY_ADDRESS, else a Ray of its own, by default.", rich_help_panel=SPEED
        ),
    ] = None,
) -> None:
    """Map rasters with a trained model, find objects in them, or tell what whole images or slides show."""
    from perf_vit.workflows.load import find_model, task_name
    from perf_vit.workflows.predict import PREDICTORS, predict
    from perf_vit.workflows.predict import plan as plan_map

    task = task_name(find_model(checkpoint))
    given = given_options(context, {"checkpoint", "inputs", "more_inputs", "output", "plan"})
    if plan:
        say_plan(plan_map(checkpoint, [*inputs, *(more_inputs or ())], output, **given))
        return
    for name in ("quicklook", "style", "report"):
        if hasattr(PREDICTORS[task][1], name):
            given.setdefault(name, True)
    done = predict(checkpoint, [*inputs, *(more_inputs or ())], output, **given)
    say_prediction(task, done, output)


def evaluate(
    context: typer.Context,
    checkpoint: Checkpoint,
    image: Input,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="A mask raster or a vector file, as in training, or a folder of them for a folder of images; labels "
            "of objects; a CSV of images or slides, which folders by class do without."
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(help="Write the scores here too; curves and confusion matrix go beside it, as .png."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write a page of scores and pictures here, .html; next to --json by default."),
    ] = None,
    label_format: Annotated[
        str | None, typer.Option(help="Of labels of objects: coco, voc, yolo, ...; as in training by default.")
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option(help="Of labelled images, those to score: a text file with one name a line."),
    ] = None,
    region: Annotated[
        tuple[int, int, int, int] | None,
        typer.Option(help="row col height width, in pixels, of the part to score."),
    ] = None,
    all_touched: Annotated[
        bool | None,
        typer.Option(
            "--all-touched/--no-all-touched",
            help="Polygons label every pixel that they touch (segmentation); as in training by default.",
        ),
    ] = None,
    window_size: WindowSize = None,
    overlap: Overlap = None,
    batch_size: BatchSize = 1,
    flips: Annotated[bool, typer.Option("--flips", help="Of maps: average over mirror images, as predict.")] = False,
    slide_mpp: SlideMpp = None,
    slide_mpp_override: SlideMppOverride = None,
    tissue: Tissue = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace scores and pictures that exist.")] = False,
    device: Device = "auto",
    precision: Precision = "32",
) -> None:
    """Score a trained model on a labelled raster, or on labelled images or slides, class by class."""
    from perf_vit.workflows.evaluate import evaluate
    from perf_vit.workflows.progress import show

    found = evaluate(checkpoint, image, labels, **given_options(context, {"checkpoint", "image", "labels"}))
    show(*found.tables())
