"""Prediction of all tasks: one input or many, in this process or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from perf_vit.errors import ConfigError, InputError, OptionError, OutputError, extra, reason_line
from perf_vit.types import Source

with extra("geo", "prediction"):
    from perf_vit.inference import (
        REPORT,
        InputPredictor,
        InputReport,
        MapInput,
        RayPool,
        RunReport,
        SegmentationPredictor,
        TablePredictor,
        attention_folder,
        check_report,
        find_inputs,
        find_paths,
        ignore_progress,
        is_one_file,
        predict_many,
        reserve_report,
        resolve_one,
        scene_files,
    )
    from perf_vit.inference.jobs import JobResult
    from perf_vit.inference.options import options_of
    from perf_vit.inference.predictor import PREDICTORS
    from perf_vit.inference.prefetch import takes_valid
    from perf_vit.inference.whole import plan_map
    from perf_vit.inference.whole_plan import WholePlan
    from perf_vit.models import NETWORKS, InputSpec, SegmentationSpec
    from perf_vit.reporting.outputs import is_run_report, run_page, write_run_report
    from perf_vit.sources import GEOTIFF_SUFFIXES
    from perf_vit.transforms import Normalizer
    from perf_vit.workflows.load import evaluating, find_model, has_task, task_name
    from perf_vit.workflows.progress import inputs_progress, note, progress_shown, run_table, windows_progress
    from perf_vit.writers import check_outputs

__all__ = ["PREDICTORS", "Engine", "InputsOptions", "as_segmenter", "plan", "predict"]

Engine = Literal["local", "ray"]

# Of networks that don't say how large their tiles are.
_TILE_PX = 512

_FILE_SUFFIXES = frozenset({*GEOTIFF_SUFFIXES, ".gpkg", ".geojson", ".parquet", ".json", ".csv"})


@dataclass(frozen=True, kw_only=True)
class InputsOptions:
    """How inputs are found and shared.

    Attributes:
        path_column: Column of a list that holds the paths.
        mosaic: Read the one input, a folder, glob or list of STAC items, as one scene.
        engine: This process, or a Ray cluster.
        num_actors: Ray processes; one a GPU, else one a CPU, by default.
        ray_address: Address of a running cluster; that of RAY_ADDRESS, else a Ray of its own, by default.
    """

    path_column: str = "path"
    mosaic: bool = False
    engine: Engine = "local"
    num_actors: int | None = None
    ray_address: str | None = None

    def __post_init__(self) -> None:
        if self.engine not in get_args(Engine):
            raise OptionError(f"engine must be one of {', '.join(get_args(Engine))}, got {self.engine}")
        for name in ("num_actors", "ray_address"):
            if self.engine == "local" and getattr(self, name):
                raise OptionError(f"{name} is for `engine=ray`; leave it out")

    @contextmanager
    def pool(self, device: str) -> Iterator[RayPool | None]:
        """A pool of Ray processes, None for this process.

        Args:
            device: Device of the prediction.
        """
        if self.engine == "local":
            yield None
            return
        use_gpus = None if device == "auto" else device.startswith("cuda")
        with RayPool(num_actors=self.num_actors, address=self.ray_address, use_gpus=use_gpus) as pool:
            yield pool


def predict(
    model: nn.Module | str | Path,
    input: Any,  # noqa: A002  (as on the command line)
    output: str | Path,
    *,
    progress: bool = True,
    **options: Any,
) -> JobResult | RunReport:
    """Predict inputs and write the outputs of the model's task.

    Segmentation writes a georeferenced map, .tif; detection the objects, .gpkg, .geojson, .parquet or COCO's .json;
    classification, regression and slide classification a table, .csv. Inputs are read as the model was trained.
    Outputs appear under their names when they are complete; an interrupted call goes on where it was.

    Args:
        model: Model of `load`, or what `load` takes; or any network that gives scores [B, K, h, w] for tiles
            [B, C, h, w], with an `InputSpec` as its attribute `spec` or without one, for all bands as they are.
        input: Path, URL, folder, glob, list of paths as CSV or Parquet, or several of these; or an open source.
        output: Path of the main output, or a folder for those of several inputs; missing folders are made.
        progress: Show a progress bar.
        **options: Fields of `InputsOptions` and of the task's options, such as `SegmentationPredictOptions`.

    Returns:
        What became of one input or table, or the report of several inputs.

    Raises:
        BusyError: Another process writes the output.
        InputError: An input can't be read, or doesn't fit the model.
        OptionError: The task has no such option, or it takes no such value.
        OutputError: The output can't be written, or is another file without `overwrite`.
    """
    own = {each.name for each in fields(InputsOptions)}
    shared = InputsOptions(**{name: value for name, value in options.items() if name in own})
    given = {name: value for name, value in options.items() if name not in own}
    inputs = _as_inputs(input)
    with progress_shown(progress), evaluating(model):
        predictor = _predictor(model, inputs, Path(output), given, shared)
        if isinstance(predictor, TablePredictor):
            return _predict_table(predictor, inputs, Path(output), shared)
        source = _only_source(inputs, Path(output), shared)
        if source is not None:
            return _predict_one(predictor, source, Path(output), shared)
        return _predict_folder(predictor, [str(each) for each in inputs], Path(output), shared)


def plan(model: nn.Module | str | Path, input: Any, output: str | Path, **options: Any) -> WholePlan:  # noqa: A002
    """Return what the map of a whole image would take: tokens, time, memory and disk; see `perf_vit.predict`.

    Args:
        model: As in `predict`.
        input: Path, URL or open source of one image.
        output: Path of the map.
        **options: As in `predict`, with `whole=True`.

    Raises:
        CheckpointError: The model needs all tokens at once.
        OptionError: There are several inputs, or no `whole`.
    """
    own = {each.name for each in fields(InputsOptions)}
    shared = InputsOptions(**{name: value for name, value in options.items() if name in own})
    given = {name: value for name, value in options.items() if name not in own}
    inputs = _as_inputs(input)
    with evaluating(model):
        predictor = _predictor(model, inputs, Path(output), given, shared)
        source = _only_source(inputs, Path(output), shared)
        if source is None or not getattr(predictor.options, "whole", False):
            raise OptionError("plan is of the map of one image with `whole`; give one image, or leave it out")
        with predictor.opened(source) as opened:
            return plan_map(predictor, opened, Path(output))


def _as_inputs(given: Any) -> list[Any]:
    """Return one or several inputs as a list of paths, or of one open source.

    Raises:
        InputError: They are anything else.
    """
    is_one = isinstance(given, str | Path) or hasattr(given, "read") or not isinstance(given, Iterable)
    inputs = [given] if is_one else list(given)
    if not inputs:
        raise InputError("expected at least one input, got an empty list")
    for each in (one for one in inputs if not isinstance(one, str | Path)):
        kind = type(each).__name__
        if not (hasattr(each, "read") and hasattr(each, "extent")):
            raise InputError(f"input must be paths, URLs or what `perf_vit.open` gives, got {kind}; give its path")
        if len(inputs) > 1:
            raise InputError(f"several inputs are given by their paths, got an open {kind}; give its path")
    return inputs


def _predictor(
    model: nn.Module | str | Path,
    inputs: Sequence[Any],
    output: Path,
    given: Mapping[str, Any],
    shared: InputsOptions,
) -> Any:
    found = model if isinstance(model, nn.Module) else find_model(model)
    name = task_name(found)
    predictor, kind = PREDICTORS[name]
    kinds = ((NETWORKS[task].label, options) for task, (_, options) in PREDICTORS.items())
    options: Any = options_of(kind, given, NETWORKS[name].label, kinds)
    if not isinstance(found, nn.Module) or has_task(found):
        return predictor(found, options)
    spec = getattr(found, "spec", None)
    is_one = shared.mosaic or hasattr(inputs[0], "read")
    first = inputs[0] if is_one else find_paths(inputs, path_column=shared.path_column, outputs=output)[0]
    opened = (spec if isinstance(spec, InputSpec) else InputSpec()).open(first, **options.input_options)
    try:
        return predictor(as_segmenter(found, opened, options.window_size), options)
    finally:
        opened.close()


def _only_source(inputs: Sequence[Any], output: Path, given: InputsOptions) -> Any:
    """The one input that becomes one output: a path, or an open source; None for several inputs."""
    if len(inputs) == 1 and not isinstance(inputs[0], str | Path):
        return inputs[0]
    paths = [str(each) for each in inputs]
    if given.mosaic and len(paths) != 1:
        raise OptionError(f"mosaic reads one folder, glob or list of STAC items as one scene, got {len(paths)}")
    if not given.mosaic:
        paths = resolve_one(paths, output)
    return paths[0] if given.mosaic or is_one_file(paths) else None


def _predict_folder(
    predictor: InputPredictor[Any, Any], inputs: Sequence[str], output: Path, given: InputsOptions
) -> RunReport:
    """Predict several inputs into a folder.

    Nothing is computed before it is known that no output replaces an input or, without `overwrite`, another file.

    Raises:
        InputError: Some inputs failed, after all others are done.
        PerfVitError: See `perf_vit.inference.predict_many`.
    """
    if output.suffix.lower() in _FILE_SUFFIXES and not output.is_dir():
        raise OutputError(f"several inputs need a folder as `output`, got {output}; try {output.with_suffix('')}")
    found = find_inputs(inputs, output, path_column=given.path_column)
    outputs = [path for item in found for path in predictor.outputs(item.output)]
    outputs += [*predictor.folder_files(output), output / REPORT]
    page = run_page(output) if predictor.options.report else None
    if page is not None:
        # One page of all outputs, none of each.
        predictor = predictor.with_options(replace(predictor.options, report=False))
        outputs = [each for each in outputs if each.suffix != page.suffix] + [page]
    read = [*predictor.read_files, *(each for each in inputs if Path(each).is_file()), *(item.path for item in found)]
    check_outputs(outputs, read, overwrite=True)
    check_report(output, overwrite=predictor.options.overwrite)
    if page is not None and not (predictor.options.overwrite or is_run_report(page)):
        check_outputs([page], [])
    predictor.check_folder(output)
    with given.pool(predictor.options.device) as pool:
        if pool is not None:
            predictor = predictor.on(_device_of(pool, predictor))
            found = [MapInput(_absolute(item.path), item.output.absolute()) for item in found]
        report = _predict_many(predictor, found, output, pool, predictor.check(found))
    if page is not None:
        _write_page(predictor, report, page)
    if num_failed := report.count("failed"):
        raise InputError(f"{num_failed} of {len(found)} inputs failed, all others were gone through; see {report.path}")
    return report


def _write_page(predictor: InputPredictor[Any, Any], report: RunReport, page: Path) -> None:
    """Write the page of a run; while another run has the report, under its own name too."""
    own = page if report.path is None or report.path.name == REPORT else report.path.with_suffix(page.suffix)
    pictures = [(Path(each.input).name, Path(each.output).with_suffix(".png")) for each in report.inputs]
    write_run_report(own, report.to_dict(), pictures)


def _predict_table(
    predictor: TablePredictor[Any, Any], given_inputs: Sequence[Any], output: Path, given: InputsOptions
) -> JobResult:
    """Write a table with a row an input.

    Raises:
        InputError: An input can't be read, or with `on_error="skip"` none.
        PerfVitError: An input or output that doesn't fit.
    """
    if given.mosaic:
        raise OptionError("mosaic is for maps and objects, and this model makes a table; leave it out")
    if any(hasattr(each, "read") for each in given_inputs):
        raise InputError(f"a table of {predictor.noun} is made of their paths, got an open source; give its path")
    inputs = [str(each) for each in given_inputs]
    paths = find_paths(inputs, path_column=given.path_column, outputs=attention_folder(output))
    lists = [each for each in inputs if Path(each).is_file()]
    job = predictor.job(paths, output)
    check_outputs(job.files, [*predictor.read_files, *lists, *paths], overwrite=True)
    job.check()
    with given.pool(predictor.options.device) as pool, windows_progress("predicting", predictor.noun) as on_progress:
        if pool is not None:
            predictor = predictor.on(_device_of(pool, predictor))
        return predictor.run(paths, output, on_progress=on_progress, pool=pool)


def _predict_one(predictor: InputPredictor[Any, Any], source: Any, output: Path, given: InputsOptions) -> JobResult:
    name = str(getattr(source, "path", source))
    files = [scene_files(name) if given.mosaic else name, *predictor.read_files]
    check_outputs(predictor.outputs(output), files, overwrite=True)
    if given.engine == "ray":
        return _predict_rows(predictor, source, output, given)
    unit = "rows of tokens" if getattr(predictor.options, "whole", False) else "windows"
    with windows_progress(f"predicting {Path(name).name}", unit) as on_progress:
        return predictor.run(source, output, on_progress=on_progress)


def _predict_rows(predictor: Any, source: Any, output: Path, given: InputsOptions) -> JobResult:
    """Share the rows of one map out."""
    if not isinstance(predictor, SegmentationPredictor) or not isinstance(source, str):
        raise OptionError("engine ray shares several inputs, or the rows of one map, by their paths; leave it out")
    if predictor.options.whole:
        raise OptionError("engine ray shares windows, and `whole` has none; leave one of them out")
    # Before a pool is made.
    job = predictor.job(source, output)
    job.check()
    job.source.close()
    title = f"predicting {Path(source).name}"
    with given.pool(predictor.options.device) as pool, windows_progress(title, "rows") as on_progress:
        assert pool is not None
        predictor = predictor.on(_device_of(pool, predictor))
        return predictor.run(_absolute(source), output.absolute(), on_progress=on_progress, pool=pool)


def _predict_many(
    predictor: InputPredictor[Any, Any],
    inputs: list[MapInput],
    folder: Path,
    pool: RayPool | None,
    settled: Mapping[MapInput, InputReport],
) -> RunReport:
    """Predict all inputs but those that are settled, in this process or in a pool, keep a report and note it."""
    options = predictor.options
    # A checkpoint that can't be read is no input's fault.
    header = predictor.described() | {"started": datetime.now(UTC).isoformat(timespec="seconds")}
    header["settings"] |= {"num_actors": pool and pool.num_actors}
    report = RunReport(header=header)
    with reserve_report(folder, overwrite=options.overwrite) as path:
        report.path = path
        try:
            with inputs_progress(len(inputs), windows=pool is None) as (on_input, on_window):
                predict_many(
                    partial(predictor, on_progress=on_window) if on_window else predictor,
                    inputs,
                    each=pool.each if pool else partial(predictor.each, on_progress=on_window or ignore_progress),
                    on_error=options.on_error,
                    report=report,
                    report_path=path,
                    settled=settled,
                    on_input=on_input,
                )
        finally:
            if report.inputs:
                note(run_table(report))
            predictor.finish_folder(_of_this_run(inputs, report, options.overwrite), folder)
    return report


def _of_this_run(inputs: Sequence[MapInput], report: RunReport, overwrite: bool) -> list[MapInput]:
    """Inputs but those whose outputs, if there are any, may be of another model or other settings."""
    # Without `overwrite`, outputs of inputs that the run didn't come to were checked before it.
    fine = {"done", "skipped-existing", *([] if overwrite else ["busy", None])}
    status = {each.input: each.status for each in report.inputs}
    return [item for item in inputs if status.get(item.path) in fine]


def _device_of(pool: RayPool, predictor: Any) -> str:
    """The device of the pool's actors, whatever this process has."""
    device = str(predictor.options.device)
    return ("cuda" if pool.use_gpus else "cpu") if device == "auto" else device


def _absolute(path: str) -> str:
    """Workers stand in other folders."""
    return str(Path(path).absolute()) if Path(path).exists() else path


class BareSegmenter(nn.Module):
    """Any network that gives a score per class and pixel, with what prediction needs to know of it.

    Args:
        network: Tiles [B, C, h, w] to logits [B, K, h, w]; one channel is the logit of a single class. If it has an
            argument `valid`, it is given the valid pixels, bool [B, h, w], or None if all are.
        spec: What it expects and means.
    """

    task = "segmentation"
    size_multiple = 1

    def __init__(self, network: nn.Module, spec: SegmentationSpec) -> None:
        super().__init__()
        self.network = network
        self.spec = spec

    def forward(self, image: Tensor, valid: Tensor | None = None) -> Tensor:
        """Logits [B, K, h, w] of tiles [B, C, h, w] and their valid pixels, bool [B, h, w]."""
        logits: Tensor = self.network(image, valid=valid) if takes_valid(self.network) else self.network(image)
        return logits

    def to_labels(self, logits: Tensor) -> Tensor:
        """Class indices [B, h, w], or 0 and 1 of a single class, [B, 1, h, w]; see `Segmenter.to_labels`."""
        return (logits > 0).long() if self.spec.multilabel else logits.argmax(1)


def as_segmenter(network: nn.Module, source: Source, tile_px: int | None = None) -> BareSegmenter:
    """Take any network for a segmentation model.

    Args:
        network: Network, with an `InputSpec` as its attribute `spec` or without one: it reads all bands then, and
            pixels as they are.
        source: An input of it, opened as the spec says.
        tile_px: Size of its tiles; that of the spec, or 512, by default.

    Raises:
        ConfigError: It gives no scores per pixel, or of another number of classes than the spec has.
    """
    given = getattr(network, "spec", None)
    known = given if isinstance(given, InputSpec) else InputSpec()
    size = tile_px or known.tile_px or _TILE_PX
    num_classes = _count_classes(network, source.num_bands, size)
    classes = known.classes or tuple(f"class_{index}" for index in range(num_classes))
    if len(classes) != num_classes:
        raise ConfigError(f"the spec has {len(classes)} classes, and the model gives {num_classes} scores per pixel")
    values = {each.name: getattr(known, each.name) for each in fields(InputSpec)}
    identity = Normalizer((0.0,) * source.num_bands, (1.0,) * source.num_bands)
    values |= {"classes": classes, "normalizer": known.normalizer or identity, "tile_px": size}
    return BareSegmenter(network, SegmentationSpec(**values, multilabel=num_classes == 1))


def _count_classes(network: nn.Module, num_bands: int, size: int) -> int:
    """Scores per pixel that a network gives for a tile of zeros."""
    parameter = next(network.parameters(), None)
    tile = torch.zeros(1, num_bands, size, size, device=None if parameter is None else parameter.device)
    try:
        with torch.inference_mode():
            shape = tuple(network(tile).shape)
    # The network is the user's.
    except Exception as error:
        raise ConfigError(f"the model doesn't take tiles of {tuple(tile.shape)}: {reason_line(error)}") from error
    if len(shape) != 4 or shape[-2:] != (size, size):
        raise ConfigError(f"expected scores [1, K, {size}, {size}] from the model, got {list(shape)}")
    return int(shape[1])
