"""The `perf-vit` command."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from perf_vit._version import __version__
from perf_vit.cli.benchmark import benchmark_app
from perf_vit.errors import ConfigError, DataWarning, PerfVitError

__all__ = ["app", "run"]

app = typer.Typer(
    name="perf-vit",
    help="Vision transformers with linear attention for imagery too large to downsample.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(benchmark_app, name="benchmark")

Checkpoint = Annotated[Path, typer.Option(help="A .ckpt file that `perf-vit train` wrote.")]
Input = Annotated[Path, typer.Option("--input", help="The raster; for a detector, an image or a folder of them.")]
WindowSize = Annotated[int | None, typer.Option(help="Side of a window in pixels; the training tile's by default.")]
Overlap = Annotated[int | None, typer.Option(help="Pixels that neighbours share; a quarter window by default.")]
BatchSize = Annotated[int, typer.Option(help="Windows a forward pass.", min=1)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Mpp = Annotated[float | None, typer.Option(help="Micrometres per pixel to read slides at.")]
SlideMpp = Annotated[float | None, typer.Option(help="Of a slide's level 0, where the file doesn't say.")]
Precision = Annotated[str, typer.Option(help="32, bf16 or 16.")]


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or a shipped one: configs/segmentation/buildings.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ..., as in data.tile_px=512")] = None,
) -> None:
    """Train a model from a config file and key=value overrides."""
    from perf_vit.cli.console import console
    from perf_vit.cli.training_tasks import train_from_config

    best = train_from_config(config, overrides or [])
    console.print(f"best checkpoint: {best}", soft_wrap=True)


@app.command()
def fit_tile(
    config: Annotated[str, typer.Argument(help="A YAML file, or a shipped one, whose data are there.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ..., as in model.lora={rank: 8}")] = None,
    memory: Annotated[str | None, typer.Option(help="16GB, 500MB, ...; what is free now by default.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Tiles a step; the config's by default.", min=1)] = None,
    max_tile: Annotated[int, typer.Option(help="The largest side to try, in pixels.", min=1)] = 8192,
) -> None:
    """Find the largest tile that a config can be trained on, by training a little on growing ones."""
    from perf_vit.cli.console import console
    from perf_vit.cli.fitting import fit_tile_from_config

    found = fit_tile_from_config(config, overrides or [], memory=memory, batch_size=batch_size, max_tile_px=max_tile)
    console.print(
        f"largest tile: data.tile_px={found.tile_px}, {found.peak_bytes / 1e9:.2f} of {found.memory_bytes / 1e9:.2f} GB"
    )


@app.command()
def distill(
    config: Annotated[
        str, typer.Argument(help="A YAML file, or a shipped one: configs/distillation/vit_small_dinov2.yaml")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ..., as in optim.max_minutes=20")] = None,
) -> None:
    """Train the linear copy of a pretrained ViT to give its tokens, on images without labels."""
    from perf_vit.cli.console import console
    from perf_vit.cli.distilling import distill_model
    from perf_vit.cli.schemas import DistillationRun
    from perf_vit.config import load_config

    student = distill_model(load_config(config, DistillationRun, overrides or []))
    console.print(f"student: {student}", soft_wrap=True)


@app.command()
def predict(
    context: typer.Context,
    checkpoint: Checkpoint,
    inputs: Annotated[
        list[str], typer.Option("--input", help="A raster, a folder, a glob, or a list as CSV or Parquet; repeat it.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="The map to write, .tif; a quicklook .png goes beside it. A folder for several outputs. "
            "Objects: .gpkg, .geojson, .parquet or COCO's .json."
        ),
    ],
    more_inputs: Annotated[
        list[str] | None, typer.Argument(help="Further inputs: what a shell makes of --input *.tif.")
    ] = None,
    kind: Annotated[
        Literal["classes", "probabilities", "probabilities-uint8"],
        typer.Option(help="Class indices, one float32 band a class, or the same in steps of 1/254."),
    ] = "classes",
    window_size: WindowSize = None,
    overlap: Overlap = None,
    batch_size: BatchSize = 1,
    blend: Annotated[Literal["hann", "gaussian"], typer.Option(help="How overlapping windows are weighted.")] = "hann",
    flips: Annotated[bool, typer.Option("--flips", help="Average over mirror images: four times the work.")] = False,
    num_readers: Annotated[int, typer.Option(help="Threads that read ahead.", min=1)] = 2,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on with an interrupted map.")] = True,
    on_error: Annotated[
        Literal["stop", "skip"],
        typer.Option(help="Stop at an error, or leave pixels that can't be read as nodata and go on after bad files."),
    ] = "stop",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Of several outputs, make those anew that are there already.")
    ] = False,
    path_column: Annotated[str, typer.Option(help="Column of a list that holds the paths.")] = "path",
    polygons: Annotated[
        Literal["gpkg", "geojson", "parquet", "json"] | None,
        typer.Option(
            help="Write the areas of the classes, but the first, beside the map; geojson of slides is QuPath's. "
            "Of a detector: the format of several outputs, gpkg by default, geojson of images without CRS."
        ),
    ] = None,
    score_threshold: Annotated[
        float | None,
        typer.Option(
            help="Lowest score of an object; where F1 was best in validation, by default. In maps of classes that "
            "don't exclude each other, the probability above which one is true; 0.5 by default."
        ),
    ] = None,
    mosaic: Annotated[bool, typer.Option("--mosaic", help="Read a folder, glob or STAC items as one scene.")] = False,
    crs: Annotated[str | None, typer.Option(help="Read rasters in this CRS, as EPSG:32637.")] = None,
    resolution: Annotated[
        float | None, typer.Option(help="Read rasters with pixels of this size, in CRS units.")
    ] = None,
    mpp: Mpp = None,
    slide_mpp: SlideMpp = None,
    tissue: Annotated[
        str | None, typer.Option(help="Only the tissue of slides: otsu, or a GeoJSON file of polygons.")
    ] = None,
    device: Device = "auto",
    precision: Precision = "32",
    engine: Annotated[Literal["local", "ray"], typer.Option(help="This process, or a Ray cluster.")] = "local",
    num_actors: Annotated[
        int | None, typer.Option(help="Ray processes; one a GPU, else one a CPU, by default.", min=1)
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Of a running cluster, as auto; a Ray of its own by default.")
    ] = None,
) -> None:
    """Map rasters with a trained model, find objects in them, or tell what whole images or slides show."""
    from perf_vit.cli.task_options import PREDICT_OPTIONS, refuse_other_options
    from perf_vit.models import NETWORKS, checkpoint_task

    task = checkpoint_task(checkpoint)
    refuse_other_options(context, PREDICT_OPTIONS, task, checkpoint, NETWORKS[task])
    source = {"crs": crs, "resolution": resolution, "mpp": mpp, "slide_mpp": slide_mpp, "tissue": tissue}
    if task in {"classification", "regression"}:
        from perf_vit.cli.scenes import predict_scenes

        predict_scenes(
            checkpoint,
            [*inputs, *(more_inputs or ())],
            output,
            path_column=path_column,
            skip_errors=on_error == "skip",
            batch_size=batch_size,
            device=device,
            precision=precision,
        )
        return
    if task == "slide":
        from perf_vit.cli.slides import predict_slides

        predict_slides(
            checkpoint,
            [*inputs, *(more_inputs or ())],
            output,
            slide_mpp=slide_mpp,
            tissue=tissue,
            path_column=path_column,
            skip_errors=on_error == "skip",
            batch_size=batch_size,
            num_readers=num_readers,
            device=device,
            precision=precision,
        )  # fmt: skip
        return
    if task == "detection":
        from perf_vit.cli.finding import find_objects

        find_objects(
            checkpoint,
            [*inputs, *(more_inputs or ())],
            output,
            score_threshold=score_threshold,
            mosaic=mosaic,
            path_column=path_column,
            polygons=polygons,
            on_error=on_error,
            overwrite=overwrite,
            source=source,
            window_size=window_size,
            overlap=overlap,
            batch_size=batch_size,
            num_readers=num_readers,
            device=device,
            precision=precision,
        )
        return
    from perf_vit.cli.predicting import predict_inputs

    predict_inputs(
        checkpoint,
        [*inputs, *(more_inputs or ())],
        output,
        path_column=path_column,
        mosaic=mosaic,
        polygons=polygons,
        source=source,
        threshold=score_threshold,
        overwrite=overwrite,
        engine=engine,
        num_actors=num_actors,
        ray_address=ray_address,
        kind=kind,
        window_size=window_size,
        overlap=overlap,
        batch_size=batch_size,
        blend=blend,
        flips=flips,
        num_readers=num_readers,
        resume=resume,
        on_error=on_error,
        device=device,
        precision=precision,
    )


@app.command()
def evaluate(
    context: typer.Context,
    checkpoint: Checkpoint,
    image: Input,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="A mask raster or a vector file, as in training; labels of objects; a CSV of images or slides, which "
            "folders by class do without."
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(help="Write the scores here too; curves and confusion matrix go beside it, as .png."),
    ] = None,
    label_format: Annotated[
        str | None, typer.Option(help="Of labels of objects: coco, voc, yolo, ...; as in training by default.")
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option("--list", help="Of labelled images, those to score: a text file with one name a line."),
    ] = None,
    region: Annotated[
        tuple[int, int, int, int] | None,
        typer.Option(help="row col height width, in pixels, of the part to score."),
    ] = None,
    window_size: WindowSize = None,
    overlap: Overlap = None,
    batch_size: BatchSize = 1,
    flips: Annotated[bool, typer.Option("--flips", help="Of maps: average over mirror images, as predict.")] = False,
    device: Device = "auto",
    precision: Precision = "32",
) -> None:
    """Score a trained model on a labelled raster, or on labelled images or slides, class by class."""
    from perf_vit.cli.task_options import EVALUATE_OPTIONS, refuse_other_options
    from perf_vit.models import NETWORKS, checkpoint_task

    task = checkpoint_task(checkpoint)
    refuse_other_options(context, EVALUATE_OPTIONS, task, checkpoint, NETWORKS[task])
    if task in {"classification", "regression"}:
        from perf_vit.cli.scenes import report_scenes

        report_scenes(checkpoint, image, labels, json, batch_size=batch_size, device=device, precision=precision)
        return
    if labels is None:
        raise ConfigError("evaluate needs --labels: a mask raster or a vector file, labels of objects, or a CSV file")
    if task == "slide":
        from perf_vit.cli.slides import report_slides

        report_slides(checkpoint, image, labels, json, batch_size=batch_size, device=device, precision=precision)
        return
    if task == "detection":
        from perf_vit.cli.detecting import report_objects

        report_objects(
            checkpoint,
            image,
            labels,
            json,
            label_format=label_format,
            names=names,
            window_size=window_size,
            overlap=overlap,
            batch_size=batch_size,
            device=device,
            precision=precision,
        )
        return
    from perf_vit.cli.console import console, score_table
    from perf_vit.cli.mapping import evaluate_raster, write_scores

    scores, curves = evaluate_raster(
        checkpoint,
        image,
        labels,
        region=region,
        with_curves=json is not None,
        window_size=window_size,
        overlap=overlap,
        batch_size=batch_size,
        flips=flips,
        device=device,
        precision=precision,
    )
    console.print(score_table(scores, title=f"{image.name} against {labels.name}"))
    if json is not None:
        write_scores(scores, json, curves)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A timm model, or a folder with a saved one.")],
    out: Annotated[Path, typer.Option(help="Folder for model.safetensors, config.json and fidelity.html.")],
    weights: Annotated[Path | None, typer.Option(help="Weights of the model; timm's own if left out.")] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes of the weights; 0 for none.", min=0)] = None,
    attention: Annotated[
        str | None,
        typer.Option(help="clustered; scatterbrain: random features for clusters; performer: plain FAVOR+."),
    ] = None,
    window_size: Annotated[
        int | None, typer.Option(help="Side of a window in patches, at most; 16 by default, 12 for scatterbrain.")
    ] = None,
    num_sinks: Annotated[
        int | None, typer.Option(help="Keys that all see exactly; 64 by default, 512 for scatterbrain.")
    ] = None,
    num_clusters: Annotated[int | None, typer.Option(help="Clusters of all other keys; 128 by default.")] = None,
    num_features: Annotated[
        int | None, typer.Option(help="Random features; 128 for scatterbrain, 256 for performer by default.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Layers to convert, as 0-5,8; all by default.")] = None,
    img_size: Annotated[int | None, typer.Option(help="Side of the images; the model's own by default.")] = None,
    images: Annotated[list[Path] | None, typer.Option(help="Image or folder to measure on; repeat it.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Choose windows, sinks and clusters of each layer: 1.5 x plain FAVOR+'s time.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="Fix each layer's statistics to those of the images.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Decides projections and crops.", min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in the folder.")] = False,
    time_softmax: Annotated[bool, typer.Option("--time-softmax", help="Time softmax at any size.")] = False,
) -> None:
    """Make the attention of a pretrained ViT linear, and report what it keeps."""
    from perf_vit.cli.console import console
    from perf_vit.cli.convert import ConversionRequest, convert_model, parse_layers

    given = {
        "window_size": window_size,
        "num_sinks": num_sinks,
        "num_clusters": num_clusters,
        "num_features": num_features,
    }
    report = convert_model(
        ConversionRequest(
            source=source,
            out=out,
            weights=weights,
            num_classes=num_classes,
            attention=attention,
            options={name: value for name, value in given.items() if value is not None},
            layers=parse_layers(layers),
            img_size=img_size,
            images=tuple(images or ()),
            budget=budget,
            calibrate=calibrate,
            seed=seed,
            overwrite=overwrite,
            time_softmax=time_softmax,
        )
    )
    console.print(f"model: {out}\nreport: {report}", soft_wrap=True)


@app.command()
def info(
    image: Annotated[str, typer.Argument(metavar="FILE", help="A raster or a slide; a path or a URL.")],
    model: Annotated[
        str | None, typer.Option(help="A .ckpt file, or a model of timm: count its tokens and time it.")
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


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for scene, run, map and report.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Decides the scene and the training.")] = 0,
) -> None:
    """Make a scene, train a small model on half of it, map all of it and write a report: a few minutes on a CPU."""
    from perf_vit.cli.demo import run_demo

    run_demo(out, seed)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"perf-vit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    pass


def run(args: list[str] | None = None) -> None:
    """Run the command line and exit: 0 when all went well, 2 with one line on stderr for what a user can mend."""
    try:
        with _warnings_as_lines():
            app(args)
    except PerfVitError as error:
        sys.exit(_fail(str(error)))
    except (OSError, MemoryError) as error:
        sys.exit(_fail(f"{type(error).__name__}: {error}"))


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print each warning about the data once a run, as one line without the code that found it."""
    told: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", DataWarning)
        other = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
            if not issubclass(category, DataWarning):
                other(message, category, *place, **options)
            elif str(message) not in told:
                told.add(str(message))
                typer.echo(f"Warning: {' '.join(str(message).split())}", err=True)

        warnings.showwarning = show
        yield


def _fail(message: str) -> int:
    typer.echo(f"Error: {' '.join(message.split())}", err=True)
    return 2
