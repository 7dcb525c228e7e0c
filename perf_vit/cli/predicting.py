"""`perf-vit predict` with many inputs, or on many machines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from perf_vit.cli.console import inputs_progress, print_damage, run_table, say, show, windows_progress
from perf_vit.cli.mapping import predict_raster
from perf_vit.cli.segmentation_maps import SegmentationMaps
from perf_vit.errors import ConfigError, InputError, OutputError
from perf_vit.inference import (
    REPORT,
    MapInput,
    MapResult,
    RayPool,
    RunReport,
    check_map_name,
    find_inputs,
    in_turn,
    is_one_file,
    predict_many,
    reserve_report,
    resolve_one,
    rows_in_pool,
    scene_files,
)
from perf_vit.io import check_outputs

__all__ = ["Engine", "predict_inputs"]

Engine = Literal["local", "ray"]

_THERE = ", there already with this input, model and settings; --overwrite makes it again"


def predict_inputs(
    checkpoint: Path,
    inputs: Sequence[str],
    output: Path,
    *,
    path_column: str = "path",
    mosaic: bool = False,
    overwrite: bool = False,
    engine: Engine = "local",
    num_actors: int | None = None,
    ray_address: str | None = None,
    **options: Any,
) -> None:
    """Map one file into one file, or several into a folder.

    Nothing is computed before it is known that no output replaces an input or, without `overwrite`, another file.

    Raises:
        InputError: some inputs failed, after all others are done.
        PerfVitError: as `perf_vit.inference.predict_many` says.
    """
    use_gpus = None if (device := options.get("device", "auto")) == "auto" else device.startswith("cuda")
    open_pool = partial(RayPool, num_actors=num_actors, address=ray_address, use_gpus=use_gpus)
    if engine == "local" and (num_actors or ray_address):
        raise ConfigError("--num-actors and --ray-address are for --engine ray")
    if mosaic and len(inputs) != 1:
        raise ConfigError(f"--mosaic reads one folder, glob or list of STAC items as one scene, got {len(inputs)}")
    options["overwrite"] = overwrite
    read = [checkpoint, (options.get("source") or {}).get("tissue")]
    if not mosaic:
        inputs = resolve_one(inputs, output)
    if not mosaic and not is_one_file(inputs):
        found = _find(inputs, output, path_column)
        read += [each for each in inputs if Path(each).is_file()]
        if engine == "local":
            _run_many(SegmentationMaps(checkpoint, **options), found, output, None, options, read)
            return
        with open_pool() as pool:
            apart = [MapInput(_absolute(item.path), item.output.absolute()) for item in found]
            maps = SegmentationMaps(checkpoint, **_for_pool(options, pool))
            _run_many(maps, apart, output, pool, options, read)
        return
    check_map_name(output)
    beside = SegmentationMaps(checkpoint, **options).beside(output)
    check_outputs([output, *beside], [scene_files(inputs[0]) if mosaic else inputs[0], *read], overwrite=True)
    if engine == "local":
        result = predict_raster(checkpoint, inputs[0], output, **options)
    else:
        with open_pool() as pool:
            result = _run_rows(checkpoint, MapInput(_absolute(inputs[0]), output.absolute()), pool, options)
    say(f"map: {output}{'' if result.made else _THERE}")
    if result.made and (quicklook := output.with_suffix(".png")).exists():
        say(f"quicklook: {quicklook}")


def _find(inputs: Sequence[str], output: Path, path_column: str) -> list[MapInput]:
    if output.suffix.lower() in {".tif", ".tiff"} and not output.is_dir():
        raise OutputError(f"several maps need a folder as --output, got {output}; try {output.with_suffix('')}")
    return find_inputs(inputs, output, path_column=path_column)


def _run_many(
    maps: SegmentationMaps,
    inputs: list[MapInput],
    folder: Path,
    pool: RayPool | None,
    options: dict[str, Any],
    read: Sequence[str | Path | None],
) -> None:
    """Map all inputs, in this process or in a pool, keep a report and show it; `read` are files besides the inputs."""
    outputs = [path for item in inputs for path in (item.output, *maps.beside(item.output))]
    check_outputs([*outputs, folder / REPORT], [*read, *(item.path for item in inputs)], overwrite=True)
    maps.check(inputs)
    # A checkpoint that can't be read is no input's fault.
    header = {
        "model": maps.model_id,
        "checkpoint": str(maps.checkpoint),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {**options, "num_actors": pool and pool.num_actors},
    }
    report = RunReport(header=header)
    with reserve_report(folder, overwrite=options["overwrite"]) as path:
        try:
            with inputs_progress(len(inputs), windows=pool is None) as (on_input, on_window):
                maps.on_window = on_window
                predict_many(
                    maps,
                    inputs,
                    each=pool.each if pool else in_turn,
                    on_error=options.get("on_error", "stop"),
                    report=report,
                    report_path=path,
                    on_input=on_input,
                )
        finally:
            if report.inputs:
                show(run_table(report))
    say(f"maps: {folder}", f"report: {path}")
    if num_failed := report.count("failed"):
        raise InputError(f"{num_failed} of {len(inputs)} inputs failed, all others were gone through; see {path}")


def _run_rows(checkpoint: Path, item: MapInput, pool: RayPool, options: dict[str, Any]) -> MapResult:
    """Map one input, its rows shared by a pool."""
    maps = SegmentationMaps(checkpoint, **_for_pool(options, pool))
    job = maps.job(item)
    maps.check([item])
    with windows_progress(f"predicting {Path(item.path).name}", "rows") as on_rows:
        write_rows: Callable[[Path], None] = rows_in_pool(pool, job, partial(maps.write_rows, item), on_rows=on_rows)
        result = maps.make(job, write_rows)
    print_damage(result.damaged)
    return result


def _for_pool(options: dict[str, Any], pool: RayPool) -> dict[str, Any]:
    """Options whose device is that of the pool's actors, whatever this process has."""
    device = options.get("device", "auto")
    return {**options, "device": ("cuda" if pool.use_gpus else "cpu") if device == "auto" else device}


def _absolute(path: str) -> str:
    """Workers stand in other folders."""
    return str(Path(path).absolute()) if Path(path).exists() else path
