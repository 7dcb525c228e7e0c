"""Prediction of detection: objects of whole inputs, resumable."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perf_vit.errors import InputError, OptionError
from perf_vit.files import read_json_or_none, write_text
from perf_vit.geometry import Objects
from perf_vit.inference.batch import InputReport
from perf_vit.inference.detect import WindowLog, predict_objects
from perf_vit.inference.inputs import MapInput
from perf_vit.inference.jobs import JobResult
from perf_vit.inference.jobs.identity import OutputRecord, SourceIdentity
from perf_vit.inference.jobs.job import RecordedJob
from perf_vit.inference.jobs.journal import DamageLog, Journal
from perf_vit.inference.options import DetectionPredictOptions
from perf_vit.inference.predictor import (
    InputPredictor,
    OnProgress,
    check_window_size,
    ignore_progress,
    register_predictor,
)
from perf_vit.inference.prefetch import Reads, SalvagingReader
from perf_vit.labels.objects import CocoImages
from perf_vit.models import Detector, load_detector, standardized
from perf_vit.plotting import default_colormap
from perf_vit.reporting.outputs import write_object_report
from perf_vit.sources import GEOTIFF_SUFFIXES
from perf_vit.sources.base import has_place
from perf_vit.sources.slides import SlideSource
from perf_vit.text import to_json
from perf_vit.types import Source, Window
from perf_vit.writers import (
    check_vector_output,
    existing_error,
    existing_outputs,
    tidy_polygons,
    write_object_quicklook,
    write_objects,
    write_qgis_style,
)

__all__ = ["COCO_RESULTS", "DetectionPredictor", "ObjectJob", "check_coco_results", "join_coco_results"]


@dataclass(frozen=True, kw_only=True)
class ObjectJob(RecordedJob):
    """The file of a source's objects.

    Attributes:
        source: Raster, mosaic or slide.
        out: Path of the file, whose suffix chooses the format.
        settings: Plain values that decide the objects, with the model.
        meaning: Plain values that decide how they are written.
        options: Options of the prediction.
        device: Device that the model runs on.
    """

    source: Source
    out: Path
    settings: Mapping[str, Any]
    meaning: Mapping[str, Any]
    options: DetectionPredictOptions
    device: str = "cpu"

    @property
    def beside(self) -> Sequence[Path]:
        """Picture, report and colours of the objects, as far as they are asked for."""
        return files_beside_objects(self.out, self.options)

    @property
    def input_files(self) -> Sequence[str]:
        """Paths of the source, several of a mosaic."""
        return tuple(getattr(self.source, "paths", (self.source.path,)))

    @property
    def begun_with(self) -> Mapping[str, Any]:
        """Plain values that decide the objects of a window."""
        return {**self.settings, "device": torch.device(self.device).type, **self._source_identity.settings}

    @property
    def identity(self) -> Mapping[str, Any]:
        """Plain values that decide the file."""
        return {**self.settings, **self.meaning, **self._source_identity.tags}

    def changed_since(self, out: Path) -> bool:
        """Whether a file of the source is newer than an output."""
        return self._source_identity.changed_since(out)

    @cached_property
    def _source_identity(self) -> SourceIdentity:
        return SourceIdentity(self.source)


def files_beside_objects(out: Path, options: DetectionPredictOptions) -> list[Path]:
    """Picture, report and colours of objects, as far as they are asked for; QGIS has no style for COCO files."""
    suffixes = [*([".png"] if options.quicklook else []), *([".html"] if options.report else [])]
    suffixes += [".qml"] if options.style and out.suffix.lower() != ".json" else []
    return [out.with_suffix(suffix) for suffix in suffixes]


COCO_RESULTS = "coco_results.json"


def check_coco_results(folder: Path, images: CocoImages) -> None:
    """Refuse a file that isn't the results of an earlier run on the same images.

    Args:
        folder: of the outputs.
        images: those of the results.

    Raises:
        OutputError: names the file.
    """
    for path in existing_outputs([folder / COCO_RESULTS]):
        if not _is_results(path, images.ids):
            raise existing_error(path, reason=", but holds no COCO results of these images")


def join_coco_results(parts: Iterable[Path], folder: Path) -> None:
    """Write the results of all images that have some as one list, line by line.

    Args:
        parts: results of an image each, of which some may be missing.
        folder: of the outputs.

    Raises:
        OutputError: nothing can be written there.
    """
    found = [each for part in parts if part.exists() for each in json.loads(part.read_bytes())]
    if found or folder.exists():
        write_text(folder / COCO_RESULTS, "[" + ",\n".join(to_json(each) for each in found) + "]\n")


def _is_results(path: Path, ids: frozenset[int]) -> bool:
    content = read_json_or_none(path)
    return isinstance(content, list) and all(
        isinstance(each, dict) and isinstance(each.get("image_id"), int) and each["image_id"] in ids and "score" in each
        for each in content
    )


def tidied(objects: Objects, source: Source, options: DetectionPredictOptions, *, keep_parts: bool = False) -> Objects:
    """Objects that are large enough, with simplified outlines: all parts of each, or one polygon, its largest part."""
    polygons, kept = tidy_polygons(objects.polygons(), source, **options.tidying)
    geometry = objects.geometry
    if objects.kind == "polygons":
        whole = polygons if keep_parts else map(_largest_part, polygons)
        geometry = np.array([*whole, None], object)[:-1]
    return Objects(objects.kind, geometry[kept], objects.scores[kept], objects.labels[kept])


def _largest_part(geometry: Any) -> Any:
    return max(geometry.geoms, key=lambda part: part.area) if geometry.geom_type == "MultiPolygon" else geometry


class DetectionPredictor(InputPredictor[Detector, DetectionPredictOptions]):
    """Finds the objects of rasters, mosaics and slides and writes them into files that GIS and QuPath open.

    Objects of finished windows go into the folder `OUT.partial`, where an interrupted call goes on.
    """

    def load(self, checkpoint: Path) -> Detector:
        """The model of a checkpoint."""
        return load_detector(checkpoint)

    def run(self, source: Any, out: str | Path, *, on_progress: OnProgress = ignore_progress) -> JobResult:
        """Write the objects of an input, unless they are there.

        Args:
            source: What `perf_vit.open` opens, or a source.
            out: Path of the file, whose suffix chooses the format; with .tif, `polygons` and the CRS choose it.
            on_progress: Called with (windows done, windows in all).

        Raises:
            BusyError: Another process writes it.
            InputError: The input can't be read, or doesn't fit the model.
            OutputError: The file can't be written, or is another one without `overwrite`.
        """
        with self.opened(source) as scene:
            job = self.job(scene, out)
            with job.work() as journal:
                if journal is None:
                    return JobResult(made=False, **self.size_of(job))
                return self._search(job, journal, on_progress)

    def find(
        self, source: Reads, extent: Window, *, log: WindowLog | None = None, on_progress: OnProgress = ignore_progress
    ) -> Objects:
        """The objects of a part of a source; see `predict_objects`.

        Args:
            source: Where pixels come from.
            extent: Part to search.
            log: Objects of windows that are finished already; those of further ones are added.
            on_progress: Called with (windows done, windows in all).

        Raises:
            InputError: A window can't be read.
            OptionError: An overlap that isn't below the window size.
        """
        window_size, overlap = self.options.windows(self.model.spec.tile_px)
        check_window_size(self.model, window_size)
        return predict_objects(
            self.model,
            source,
            partial(standardized, normalizer=self.model.spec.normalizer),
            extent=extent,
            window_size=window_size,
            overlap=overlap,
            batch_size=self.options.batch_size,
            num_readers=self.options.num_readers,
            device=self.ready(),
            dtype=self.options.dtype,
            score_threshold=self.score_threshold,
            log=log,
            on_progress=on_progress,
        )

    def _search(self, job: ObjectJob, journal: Journal, on_progress: OnProgress) -> JobResult:
        self.check_input(job.source)
        damage = DamageLog(journal.folder)
        reader = SalvagingReader(job.source, damage.add) if self.options.on_error == "skip" else job.source
        objects = self.find(reader, job.source.extent, log=WindowLog(journal.folder), on_progress=on_progress)
        damaged = tuple(damage.pieces())
        # Results that are scored keep every pixel of a mask.
        objects = tidied(objects, job.source, self.options, keep_parts=job.out.suffix.lower() == ".json")
        made = {job.out: self._write(journal.folder / job.out.name, objects, job.source)}
        made |= self._write_beside(job, journal.folder, objects)
        job.finish(journal, made, num_damaged=len(damaged))
        threshold = self.score_threshold
        return JobResult(
            made=True, num_objects=len(objects), score_threshold=threshold, damaged=damaged, **self.size_of(job)
        )

    @property
    def score_threshold(self) -> float:
        """Lowest score of an object."""
        given = self.options.score_threshold
        return self.model.spec.score_threshold if given is None else given

    def open(self, source: Any) -> Source:
        """Open an input; COCO results are in pixels of the listed image, of a slide all of level 0 or its bounds."""
        opened = super().open(source)
        if self.coco_images is None or not isinstance(opened, SlideSource):
            return opened
        return opened if self.coco_images.size_of(opened.path) == opened.size else opened.whole

    def job(self, source: Any, out: str | Path) -> ObjectJob:
        """What is to be made of an input; see `InputPredictor.job`."""
        scene = self.open(source)
        target = self._names(Path(out))[0 if has_place(scene) else -1]
        check_vector_output(target, scene)
        window_size, overlap = self.options.windows(self.model.spec.tile_px)
        check_window_size(self.model, window_size)
        return ObjectJob(
            source=scene,
            out=target,
            settings={
                **self.model_settings,
                "window_size": window_size,
                "overlap": overlap,
                "score_threshold": self.score_threshold,
            },
            meaning={**self._coco_options(scene), **self.options.tidying},
            options=self.options,
            device=self.device,
        )

    def described(self) -> dict[str, Any]:
        """The model and the options, for the report of many inputs."""
        found = super().described()
        return {**found, "settings": {**found["settings"], "score_threshold": self.score_threshold}}

    def outputs(self, out: Path) -> list[Path]:
        """All files that may be written for an output.

        Raises:
            OptionError: Options that choose another format than the name.
        """
        names = self._names(out)
        beside = dict.fromkeys(path for name in names for path in files_beside_objects(name, self.options))
        return [*names, *beside, *(OutputRecord(name).path for name in names)]

    def _names(self, out: Path) -> list[Path]:
        """Names that an input's file may have: with a CRS the first, without one the last.

        Raises:
            OptionError: Options that choose another format than the name.
        """
        if out.suffix.lower() not in GEOTIFF_SUFFIXES:
            self._check_format(out)
            return [out]
        name = out.name.removesuffix(out.suffix).removesuffix(".ome")
        suffix = self.options.suffix
        return [out.with_name(name + each) for each in ([suffix] if suffix else [".gpkg", ".geojson"])]

    def check(self, inputs: Sequence[MapInput]) -> dict[MapInput, InputReport]:
        """Refuse inputs whose outputs would replace other files, or that the COCO file doesn't list."""
        if self.coco_images is not None:
            self.coco_images.check(item.path for item in inputs)
        return super().check(inputs)

    def folder_files(self, folder: Path) -> list[Path]:
        """The COCO results of all inputs, if they are asked for."""
        return [] if self.options.coco_images is None else [folder / COCO_RESULTS]

    def check_folder(self, folder: Path) -> None:
        """Refuse a file in the place of the COCO results of all inputs."""
        if self.coco_images is not None and not self.options.overwrite:
            check_coco_results(folder, self.coco_images)

    def finish_folder(self, inputs: Sequence[MapInput], folder: Path) -> None:
        """Write the COCO results of all inputs, if they are asked for."""
        if self.options.coco_images is not None:
            join_coco_results([path for item in inputs for path in self._names(item.output)], folder)

    def _check_format(self, out: Path) -> None:
        if self.options.polygons is not None:
            raise OptionError(f"polygons chooses the format of several outputs; one file has it in its name, got {out}")
        if self.options.coco_images is not None and out.suffix.lower() != ".json":
            raise OptionError(f"coco_images is for COCO results, whose name ends in .json, got {out}")

    @property
    def read_files(self) -> list[str | Path]:
        """Files that are read besides inputs."""
        given = self.options.coco_images
        return [*super().read_files, *([] if given is None else [given])]

    @cached_property
    def coco_images(self) -> CocoImages | None:
        """Image ids and category ids of results, None without `coco_images`."""
        return None if self.options.coco_images is None else CocoImages(self.options.coco_images)

    def _coco_options(self, scene: Source) -> dict[str, Any]:
        """COCO ids, as options of `write_objects`."""
        spec = self.model.spec
        if self.coco_images is None:
            return {"category_ids": spec.category_ids}
        return {
            "category_ids": self.coco_images.category_ids(spec.classes),
            "image_id": self.coco_images.image_id(scene.path, scene.size),
        }

    def _write_beside(self, job: ObjectJob, folder: Path, objects: Objects) -> dict[Path, Path]:
        """Write picture, report and colours into the job's folder; by their final paths."""
        classes = self.model.spec.classes
        made = {path: folder / f"beside{path.suffix}.tmp" for path in job.beside}
        for path, file in made.items():
            if path.suffix == ".qml":
                write_qgis_style(file, classes, default_colormap(len(classes)))
            elif path.suffix == ".html":
                write_object_report(file, job.source, objects, classes, settings=self.described())
            else:
                self._write_quicklook(job, objects, file)
        return {path: file for path, file in made.items() if file.exists()}

    def _write_quicklook(self, job: ObjectJob, objects: Objects, path: Path) -> None:
        """Write the picture, unless the whole scene can't be read and damaged parts may be left out."""
        try:
            write_object_quicklook(job.source, objects, path, self.model.spec.classes)
        except InputError:
            if self.options.on_error == "stop":
                raise

    def _write(self, path: Path, objects: Objects, scene: Source) -> Path:
        spec = self.model.spec
        return write_objects(
            path,
            objects.geometry,
            objects.scores,
            objects.labels,
            spec.classes,
            source=scene,
            **self._coco_options(scene),
        )


register_predictor("detection", DetectionPredictor, DetectionPredictOptions)
