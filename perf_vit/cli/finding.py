"""`perf-vit predict` with an object detector: the objects of one input, or of each of many."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from perf_vit.cli.coco_results import COCO_RESULTS, check_coco_results, join_coco_results
from perf_vit.cli.console import inputs_progress, run_table, say, show, windows_progress
from perf_vit.cli.detecting import detect_objects
from perf_vit.errors import ConfigError, InputError, OutputError
from perf_vit.inference import (
    REPORT,
    MapInput,
    MapResult,
    RunReport,
    check_report,
    find_inputs,
    is_one_file,
    predict_many,
    reserve_report,
    resolve_one,
    scene_files,
)
from perf_vit.io import CocoImages, check_outputs, check_vector_output, write_objects
from perf_vit.models import Detector, load_detector
from perf_vit.tiling import grid_windows
from perf_vit.transforms import InputCheck
from perf_vit.types import Source

__all__ = ["find_objects"]


class ObjectFiles:
    """Finds the objects of inputs and writes them.

    Args:
        model: on any device.
        score_threshold: lowest score of an object; the model's own by default.
        source: options of `perf_vit.open_source`.
        suffix: of outputs that are named .tif, as `find_inputs` does; by default .gpkg where the input has a CRS and
            .geojson elsewhere.
        overwrite: find objects again where the output is there.
        coco_images: write COCO results that go by these ids.
        **engine: options of the search.

    Attributes:
        on_window: for a progress bar.
        num_objects: of all inputs so far.
    """

    def __init__(
        self,
        model: Detector,
        *,
        score_threshold: float | None = None,
        source: Mapping[str, Any] | None = None,
        suffix: str | None = None,
        overwrite: bool = False,
        coco_images: CocoImages | None = None,
        **engine: Any,
    ) -> None:
        self.model = model
        self.threshold = model.spec.score_threshold if score_threshold is None else score_threshold
        self.on_window: Callable[[int, int], None] | None = None
        self.num_objects = 0
        self._check_input = InputCheck(model.spec.trained_on)
        self._source = dict(source or {})
        self._suffix = suffix
        self._overwrite = overwrite
        self._coco_images = coco_images
        self._engine = engine

    def output_of(self, item: MapInput, *, placed: bool) -> Path:
        """Where an input's objects go."""
        return output_names(item, self._suffix)[0 if placed else -1]

    def __call__(self, item: MapInput) -> MapResult:
        """Find the objects of an input and write them.

        Raises:
            PerfVitError: an input or output that doesn't fit.
        """
        # Compared with the training images where objects are looked for.
        scene = self.model.spec.open(item.path, check=InputCheck(None), **self._source)
        try:
            output = self.output_of(item, placed=scene.crs is not None)
            size = self._engine.get("window_size") or self.model.spec.tile_px
            windows = grid_windows(scene.extent, size, self._overlap(size))
            result = MapResult(made=True, num_windows=len(windows), num_pixels=scene.height * scene.width)
            if os.path.lexists(output) and not self._overwrite:
                return replace(result, made=False)
            check_vector_output(output, scene)
            self._check_input(scene)
            ids = self._coco_ids(item.path, scene)
            progress: dict[str, Any] = {"on_window": self.on_window} if self.on_window else {}
            objects = detect_objects(self.model, scene, self.threshold, **progress, **self._engine)
            write_objects(
                output, objects.geometry, objects.scores, objects.labels, self.model.spec.classes, source=scene, **ids
            )
            self.num_objects += len(objects)
            return result
        finally:
            scene.close()

    def _coco_ids(self, image: str, scene: Source) -> dict[str, Any]:
        """Options of `write_objects`."""
        spec = self.model.spec
        if self._coco_images is None:
            return {"category_ids": spec.category_ids}
        return {
            "category_ids": self._coco_images.category_ids(spec.classes),
            "image_id": self._coco_images.image_id(image, scene.size),
        }

    def _overlap(self, window_size: int) -> int:
        overlap = self._engine.get("overlap")
        return min(window_size // 4 if overlap is None else int(overlap), window_size - 1)


def output_names(item: MapInput, suffix: str | None) -> list[Path]:
    """Where an input's objects may go: with a CRS the first, without one the last."""
    if item.output.suffix.lower() not in {".tif", ".tiff"}:
        return [item.output]
    name = item.output.name.removesuffix(item.output.suffix).removesuffix(".ome")
    return [item.output.with_name(name + each) for each in ([suffix] if suffix else [".gpkg", ".geojson"])]


def find_objects(
    checkpoint: Path,
    inputs: Sequence[str],
    output: Path,
    *,
    mosaic: bool = False,
    path_column: str = "path",
    polygons: str | None = None,
    coco_images: Path | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    overwrite: bool = False,
    score_threshold: float | None = None,
    **options: Any,
) -> None:
    """Write the objects of one scene, slide or mosaic into one file, or those of several inputs into a folder.

    Args:
        checkpoint: that `perf-vit train` wrote.
        inputs: files, folders, globs and lists.
        output: a file, whose suffix chooses the format, or a folder.
        mosaic: the one input is many files that make one scene.
        path_column: of lists.
        polygons: format of files in a folder, by its suffix.
        coco_images: COCO file of labels: write COCO results that go by its ids, of several inputs also all in one file.
        on_error: of several inputs, "stop" at the first that fails or "skip" it.
        overwrite: replace an output that is there; without it, one of several is left, a single one refused.
        score_threshold: lowest score of an object; the checkpoint's own by default.
        **options: of `ObjectFiles`.

    Raises:
        ConfigError: a threshold that is no score.
        InputError: some inputs failed, after all others are done.
        PerfVitError: an input or output that doesn't fit.
    """
    if score_threshold is not None and not 0 <= score_threshold <= 1:
        raise ConfigError(f"--score-threshold must lie between 0 and 1, got {score_threshold:g}")
    if mosaic and len(inputs) != 1:
        raise ConfigError(f"--mosaic reads one folder, glob or list of STAC items as one scene, got {len(inputs)}")
    if not mosaic:
        inputs = resolve_one(inputs, output)
    many = not mosaic and not is_one_file(inputs)
    if not many:
        _check_one(polygons, on_error)
    elif output.suffix and not output.is_dir():
        raise OutputError(f"the objects of several inputs need a folder as --output, got {output}")
    if coco_images is not None and (polygons or ("json" if many else output.suffix[1:])) != "json":
        raise ConfigError("--coco-images is for COCO results: name --output .json, or give --polygons json")
    suffix = ".json" if coco_images is not None else None if polygons is None else f".{polygons}"
    found = find_inputs(inputs, output, path_column=path_column) if many else [MapInput(inputs[0], output)]
    coco = None if coco_images is None else CocoImages(coco_images)
    read = [checkpoint, coco_images, (options.get("source") or {}).get("tissue")]
    outputs = [name for item in found for name in output_names(item, suffix)]
    if many:
        read += [each for each in inputs if Path(each).is_file()]
        read += [item.path for item in found]
        # Files that are there are left as they are, unless `overwrite`.
        check_outputs([*outputs, output / REPORT, output / COCO_RESULTS], read, overwrite=True)
        check_report(output, overwrite=overwrite)
    else:
        check_outputs(outputs, [scene_files(inputs[0]) if mosaic else inputs[0], *read], overwrite=overwrite)
    if coco is not None:
        coco.check(item.path for item in found)
    if coco is not None and many and not overwrite:
        check_coco_results(outputs, output, coco)
    options |= {"score_threshold": score_threshold, "suffix": suffix, "overwrite": overwrite or not many}
    files = ObjectFiles(load_detector(checkpoint), coco_images=coco, **options)
    if many:
        try:
            _find_in_many(
                files, found, output, checkpoint, on_error, {**options, "coco_images": coco_images and str(coco_images)}
            )
        finally:
            if coco is not None:
                join_coco_results(outputs, output)
        return
    with windows_progress(f"searching {Path(inputs[0]).name}") as on_window:
        files.on_window = on_window
        files(found[0])
    told = f"{files.num_objects:,} objects with scores from {files.threshold:.2f}"
    say(f"{told}: {output}")


def _check_one(polygons: str | None, on_error: Literal["stop", "skip"]) -> None:
    if polygons is not None:
        raise ConfigError("--polygons chooses the format in a folder of several outputs; one file has it in its name")
    if on_error != "stop":
        raise ConfigError("--on-error skip goes on after bad files among several, got one input; leave it out")


def _find_in_many(
    files: ObjectFiles,
    inputs: list[MapInput],
    folder: Path,
    checkpoint: Path,
    on_error: Literal["stop", "skip"],
    options: Any,
) -> None:
    header = {
        "checkpoint": str(checkpoint),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {**options, "score_threshold": files.threshold},
    }
    report = RunReport(header=header)
    with reserve_report(folder, overwrite=options["overwrite"]) as path:
        try:
            with inputs_progress(len(inputs), windows=True) as (on_input, on_window):
                files.on_window = on_window
                predict_many(files, inputs, on_error=on_error, report=report, report_path=path, on_input=on_input)
        finally:
            if report.inputs:
                show(run_table(report))
    told = f"{files.num_objects:,} objects with scores from {files.threshold:.2f}"
    say(f"{told}: {folder}", f"report: {path}")
    if num_failed := report.count("failed"):
        raise InputError(f"{num_failed} of {len(inputs)} inputs failed, all others were gone through; see {path}")
