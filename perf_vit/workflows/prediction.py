"""`perf-vit predict`: one input, or many, in this process or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from perf_vit.errors import ConfigError, InputError, OutputError
from perf_vit.inference import (
    REPORT,
    InputPredictor,
    MapInput,
    RayPool,
    RunReport,
    SegmentationPredictor,
    SlideClassificationPredictor,
    TablePredictor,
    attention_folder,
    check_report,
    find_inputs,
    find_paths,
    in_turn,
    is_one_file,
    predict_many,
    reserve_report,
    resolve_one,
    scene_files,
)
from perf_vit.inference.jobs import JobResult
from perf_vit.workflows.progress import inputs_progress, print_damage, run_table, say, show, windows_progress
from perf_vit.writers import check_outputs

__all__ = ["Engine", "InputsOptions", "predict_inputs", "predict_table"]

Engine = Literal["local", "ray"]

_THERE = ", there already with this input, model and settings; --overwrite makes it again"
_FILE_SUFFIXES = frozenset({".tif", ".tiff", ".gpkg", ".geojson", ".parquet", ".json", ".csv"})


@dataclass(frozen=True, kw_only=True)
class InputsOptions:
    """How inputs are found and shared.

    Attributes:
        path_column: Column of a list that holds the paths.
        mosaic: Read the one input, a folder, glob or list of STAC items, as one scene.
        engine: This process, or a Ray cluster.
        num_actors: Ray processes; one a GPU, else one a CPU, by default.
        ray_address: Address of a running cluster; a Ray of its own by default.
    """

    path_column: str = "path"
    mosaic: bool = False
    engine: Engine = "local"
    num_actors: int | None = None
    ray_address: str | None = None

    def __post_init__(self) -> None:
        if self.engine == "local" and (self.num_actors or self.ray_address):
            raise ConfigError("`num_actors` and `ray_address` are for `engine=ray`")

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


def predict_inputs(
    predictor: InputPredictor[Any, Any], inputs: Sequence[str], output: Path, given: InputsOptions
) -> None:
    """Predict one file into one file, or several into a folder.

    Nothing is computed before it is known that no output replaces an input or, without `overwrite`, another file.

    Raises:
        InputError: Some inputs failed, after all others are done.
        PerfVitError: As `perf_vit.inference.predict_many` says.
    """
    if given.mosaic and len(inputs) != 1:
        raise ConfigError(f"`mosaic` reads one folder, glob or list of STAC items as one scene, got {len(inputs)}")
    if not given.mosaic:
        inputs = resolve_one(inputs, output)
    if given.mosaic or is_one_file(inputs):
        _predict_one(predictor, inputs[0], output, given)
        return
    if output.suffix.lower() in _FILE_SUFFIXES and not output.is_dir():
        raise OutputError(f"several inputs need a folder as `output`, got {output}; try {output.with_suffix('')}")
    found = find_inputs(inputs, output, path_column=given.path_column)
    outputs = [path for item in found for path in predictor.outputs(item.output)]
    outputs += [*predictor.folder_files(output), output / REPORT]
    read = [*predictor.read_files, *(each for each in inputs if Path(each).is_file()), *(item.path for item in found)]
    check_outputs(outputs, read, overwrite=True)
    check_report(output, overwrite=predictor.options.overwrite)
    predictor.check_folder(output)
    with given.pool(predictor.options.device) as pool:
        if pool is not None:
            predictor = predictor.on(_device_of(pool, predictor))
            found = [MapInput(_absolute(item.path), item.output.absolute()) for item in found]
        predictor.check(found)
        try:
            _predict_many(predictor, found, output, pool)
        finally:
            predictor.finish_folder(found, output)


def predict_table(
    predictor: TablePredictor[Any, Any], inputs: Sequence[str], output: Path, given: InputsOptions
) -> None:
    """Write a table with a row an input.

    Raises:
        InputError: An input can't be read, or with `on_error="skip"` none.
        PerfVitError: An input or output that doesn't fit.
    """
    paths = find_paths(inputs, path_column=given.path_column, outputs=attention_folder(output))
    lists = [each for each in inputs if Path(each).is_file()]
    job = predictor.job(paths, output)
    check_outputs(job.files, [*predictor.read_files, *lists, *paths], overwrite=True)
    job.check()
    with given.pool(predictor.options.device) as pool, windows_progress("predicting", predictor.noun) as on_progress:
        if pool is not None:
            predictor = predictor.on(_device_of(pool, predictor))
            paths = [_absolute(path) for path in paths]
        result = predictor.run(paths, output, on_progress=on_progress, pool=pool)
    if not result.made:
        say(f"{output}{_THERE}")
        return
    left_out = f", {len(result.failed)} could not be read" if result.failed else ""
    say(f"{result.num_rows:,} {predictor.noun}{left_out}: {output}")
    if isinstance(predictor, SlideClassificationPredictor):
        say(f"attention: {attention_folder(output)}")


def _predict_one(predictor: InputPredictor[Any, Any], source: str, output: Path, given: InputsOptions) -> None:
    files = [scene_files(source) if given.mosaic else source, *predictor.read_files]
    check_outputs(predictor.outputs(output), files, overwrite=True)
    job: Any = predictor.job(source, output)
    job.check()
    job.source.close()
    with given.pool(predictor.options.device) as pool:
        run = predictor.run
        if pool is not None:
            if not isinstance(predictor, SegmentationPredictor):
                raise ConfigError("`engine=ray` shares several inputs, or the rows of one map; leave it out")
            source, output = _absolute(source), output.absolute()
            run = partial(predictor.on(_device_of(pool, predictor)).run, pool=pool)
        with windows_progress(f"predicting {Path(source).name}", "rows" if pool else "windows") as on_progress:
            result = run(source, output, on_progress=on_progress)
    print_damage(result.damaged)
    _tell_of_one(predictor, result, output)


def _tell_of_one(predictor: InputPredictor[Any, Any], result: JobResult, output: Path) -> None:
    if isinstance(predictor, SegmentationPredictor):
        say(f"map: {output}{'' if result.made else _THERE}")
        if result.made and (quicklook := output.with_suffix(".png")).exists():
            say(f"quicklook: {quicklook}")
    else:
        told = _objects(predictor, result.num_objects or 0) if result.made else "objects"
        say(f"{told}: {result.out}{'' if result.made else _THERE}")


def _objects(predictor: Any, number: int) -> str:
    return f"{number:,} objects with scores from {predictor.score_threshold:.2f}"


def _predict_many(
    predictor: InputPredictor[Any, Any], inputs: list[MapInput], folder: Path, pool: RayPool | None
) -> None:
    """Predict all inputs, in this process or in a pool, keep a report and show it."""
    options = predictor.options
    # A checkpoint that can't be read is no input's fault.
    header = predictor.described() | {"started": datetime.now(UTC).isoformat(timespec="seconds")}
    header["settings"] |= {"num_actors": pool and pool.num_actors}
    report = RunReport(header=header)
    with reserve_report(folder, overwrite=options.overwrite) as path:
        try:
            with inputs_progress(len(inputs), windows=pool is None) as (on_input, on_window):
                predict_many(
                    partial(predictor, on_progress=on_window) if on_window else predictor,
                    inputs,
                    each=pool.each if pool else in_turn,
                    on_error=options.on_error,
                    report=report,
                    report_path=path,
                    on_input=on_input,
                )
        finally:
            if report.inputs:
                show(run_table(report))
    counts = [each.num_objects for each in report.inputs if each.num_objects is not None]
    say(f"{_objects(predictor, sum(counts))}: {folder}" if counts else f"outputs: {folder}", f"report: {path}")
    if num_failed := report.count("failed"):
        raise InputError(f"{num_failed} of {len(inputs)} inputs failed, all others were gone through; see {path}")


def _device_of(pool: RayPool, predictor: Any) -> str:
    """The device of the pool's actors, whatever this process has."""
    device = str(predictor.options.device)
    return ("cuda" if pool.use_gpus else "cpu") if device == "auto" else device


def _absolute(path: str) -> str:
    """Workers stand in other folders."""
    return str(Path(path).absolute()) if Path(path).exists() else path
