"""Segmentation maps of whole inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from perf_vit.errors import InputError, OptionError
from perf_vit.inference.dense import Strip, predict_strips
from perf_vit.inference.dense_output import DenseOutput, class_output
from perf_vit.inference.jobs import JobResult, MapJob, check_map_name, files_beside
from perf_vit.inference.jobs.journal import DamageLog
from perf_vit.inference.options import SegmentationPredictOptions
from perf_vit.inference.predictor import InputPredictor, OnProgress, ignore_progress
from perf_vit.inference.prefetch import Reads, SalvagingReader
from perf_vit.inference.ray import RayPool, row_ranges
from perf_vit.models import Segmenter, load_segmenter
from perf_vit.sources import bounded_cache
from perf_vit.types import Window
from perf_vit.writers import StripStore, check_vector_output, polygonize_classes, write_map_quicklook, write_objects

__all__ = ["SegmentationPredictor"]


class SegmentationPredictor(InputPredictor[Segmenter, SegmentationPredictOptions]):
    """Makes georeferenced maps of rasters, mosaics and slides.

    Finished rows go into the folder `OUT.partial`, each strip a file that is complete or absent. After a crash, a full
    disk or an interrupt the same call goes on there, and the map has the same bytes as an uninterrupted run's. The map
    appears under its name when it is complete.
    """

    def load(self, checkpoint: Path) -> Segmenter:
        """The model of a checkpoint."""
        return load_segmenter(checkpoint)

    def run(
        self,
        source: Any,
        out: str | Path,
        *,
        on_progress: OnProgress = ignore_progress,
        pool: RayPool | None = None,
    ) -> JobResult:
        """Make the map of an input and the files next to it, as far as they aren't there.

        Args:
            source: What `perf_vit.open` opens, or a source.
            out: Path of the map, .tif or .ome.tif; missing folders are made.
            on_progress: Called with (windows done, windows in all), or rows with a pool.
            pool: Ray processes that share the rows; each opens `source`, a path, by itself.

        Raises:
            BusyError: Another process makes the map.
            InputError: The input can't be read, or doesn't fit the model.
            OutputError: The map can't be written, or is another file without `overwrite`.
        """
        with self.opened(source) as opened:
            job = self.job(opened, out)
            with job.work() as journal:
                if journal is not None:
                    self.check_input(opened)
                    store = job.store(journal.folder.absolute())
                    if pool is None:
                        self.run_rows(opened, store, on_progress=on_progress)
                    else:
                        self._run_in_pool(pool, source, job, store, on_progress)
                    damaged = job.finish(journal)
            made = journal is not None
            self._write_beside(job, made=made, damaged=bool(damaged) if made else self.options.on_error == "skip")
            return JobResult(
                made=made,
                out=job.out,
                num_windows=job.num_windows,
                num_pixels=opened.height * opened.width,
                damaged=damaged if made else (),
            )

    def run_rows(
        self,
        source: Any,
        store: StripStore,
        rows: tuple[int, int] | None = None,
        *,
        on_progress: OnProgress = ignore_progress,
    ) -> None:
        """Predict those rows of a map that are not in its store yet; any number of processes may share a store.

        Args:
            source: What `perf_vit.open` opens, or a source.
            store: Rows of the map.
            rows: (first, first below); all by default.
            on_progress: Called with (windows done, windows in all).

        Raises:
            InputError: A window can't be read, or the model's output has another shape.
            OutputError: The disk is full.
        """
        encode = self.output().encode

        def write(strip: Strip) -> None:
            store.write(strip.window.row, encode(strip))

        with self.opened(source) as opened, bounded_cache():
            skip = self.options.on_error == "skip"
            reader = SalvagingReader(opened, DamageLog(store.folder).add) if skip else opened
            for gap in store.gaps(*(rows or (0, opened.height))):
                for _ in self.strips(reader, opened.extent, gap, finish=write, on_progress=on_progress):
                    pass

    def strips(
        self,
        source: Reads,
        extent: Window,
        rows: tuple[int, int] | None = None,
        *,
        finish: Callable[[Strip], Any] | None = None,
        on_progress: OnProgress = ignore_progress,
    ) -> Iterator[Any]:
        """Blended logits of a part of a source, strip by strip; see `predict_strips`.

        Args:
            source: Where pixels come from.
            extent: Part to predict.
            rows: (first, first below) of it; all by default.
            finish: Function of a strip whose results are yielded instead.
            on_progress: Called with (windows done, windows in all).

        Raises:
            InputError: A window can't be read, or the model's output has another shape.
            OptionError: A window size that doesn't fit the patch size.
        """
        window_size, overlap = self._windows()
        start, stop = rows or (extent.row, extent.row_stop)
        return predict_strips(
            self.model,
            source,
            self.model.spec.normalizer,
            extent=extent,
            num_channels=len(self.model.spec.classes),
            window_size=window_size,
            overlap=overlap,
            start_row=start,
            stop_row=stop,
            blend=self.options.blend,
            flips=self.options.flips,
            batch_size=self.options.batch_size,
            num_readers=self.options.num_readers,
            device=self.ready(),
            precision=self.options.dtype,
            finish=finish,
            on_progress=on_progress,
        )

    def job(self, source: Any, out: str | Path) -> MapJob:
        """What is to be made of an input; see `InputPredictor.job`."""
        opened, out = self.open(source), Path(out)
        if self.options.polygons:
            check_vector_output(out.with_suffix(f".{self.options.polygons}"), opened)
        window_size, overlap = self._windows()
        return MapJob(
            source=opened,
            out=out,
            output=self.output(),
            model_id=self.model_id,
            window_size=window_size,
            overlap=overlap,
            options=self.options,
            device=self.device,
        )

    def outputs(self, out: Path) -> list[Path]:
        """The map, its quicklook and its polygons.

        Raises:
            OutputError: The map isn't named .tif.
        """
        check_map_name(out)
        return [out, *files_beside(out, self.options)]

    def _run_in_pool(self, pool: RayPool, source: Any, job: MapJob, store: StripStore, on_progress: OnProgress) -> None:
        total, done = job.source.height, 0
        ranges = row_ranges(job.window_rows, total, pool.num_actors)
        for (start, stop), _ in pool.map(partial(self.run_rows, source, store), ranges):
            done += stop - start
            on_progress(done, total)

    def output(self) -> DenseOutput:
        """How scores become pixels.

        Raises:
            OptionError: Options of another kind of model.
        """
        spec, threshold = self.model.spec, self.options.score_threshold
        if spec.multilabel and self.options.polygons:
            raise OptionError("polygons are of classes that exclude each other; this model's classes don't")
        if not spec.multilabel and threshold is not None:
            raise OptionError("score_threshold is for objects and for classes that don't exclude each other")
        return class_output(
            self.options.kind,
            spec.classes,
            background=spec.background_index,
            multilabel=spec.multilabel,
            threshold=0.5 if threshold is None else threshold,
        )

    def _windows(self) -> tuple[int, int]:
        size, overlap = self.options.windows(self.model.spec.tile_px)
        multiple = self.model.size_multiple
        if size % multiple:
            nearest = max(1, round(size / multiple)) * multiple
            raise OptionError(f"window_size must be a multiple of the patch size {multiple}, got {size}; try {nearest}")
        return size, overlap

    def _write_beside(self, job: MapJob, *, made: bool, damaged: bool) -> None:
        """Write the files next to a map that are asked for, where the map was there those that are missing."""
        missing = {path.suffix for path in job.beside if made or not path.exists()}
        if ".png" in missing:
            self._write_quicklook(job, job.out.with_suffix(".png"), damaged=damaged)
        if self.options.polygons and f".{self.options.polygons}" in missing:
            self._write_polygons(job, job.out.with_suffix(f".{self.options.polygons}"))

    def _write_quicklook(self, job: MapJob, path: Path, *, damaged: bool) -> None:
        spec = self.model.spec
        try:
            write_map_quicklook(
                job.source, job.out, path, spec.classes, background=spec.background_index, multilabel=spec.multilabel
            )
        except InputError:
            if not damaged:
                raise
            # The picture of the whole scene needs pixels that can't be read; an earlier map's would mislead.
            path.unlink(missing_ok=True)

    def _write_polygons(self, job: MapJob, path: Path) -> None:
        spec = self.model.spec
        background = spec.background_index
        polygons, labels = polygonize_classes(job.out, skip=() if background is None else (background,))
        write_objects(
            path, polygons, None, labels, spec.classes, source=job.source, object_type="annotation",
            background=background,
        )  # fmt: skip
