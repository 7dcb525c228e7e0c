"""Segmentation maps of whole inputs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from perf_vit.errors import InputError, OptionError
from perf_vit.inference.batch import InputReport, PredictOne
from perf_vit.inference.dense import Strip, StripMaker, predict_strips
from perf_vit.inference.dense_output import DenseOutput, StripWriter, class_output
from perf_vit.inference.inputs import MapInput
from perf_vit.inference.jobs import DamagedPiece, JobResult, MapJob
from perf_vit.inference.jobs.beside import PolygonRecord, warn_of_style
from perf_vit.inference.jobs.journal import DamageLog, SeamLog, has_partial_folder, open_journal
from perf_vit.inference.map_line import MapLine
from perf_vit.inference.options import SegmentationPredictOptions
from perf_vit.inference.predictor import (
    InputPredictor,
    OnProgress,
    check_window_size,
    ignore_progress,
    register_predictor,
)
from perf_vit.inference.prefetch import Reads, SalvagingReader
from perf_vit.inference.ray import RayPool, row_ranges
from perf_vit.inference.seams import decide_classes
from perf_vit.inference.whole import map_whole
from perf_vit.models import Segmenter, load_segmenter
from perf_vit.plotting import default_colormap
from perf_vit.reporting.outputs import write_map_report
from perf_vit.sources import bounded_cache
from perf_vit.types import Source, Window
from perf_vit.writers import (
    HeldRows,
    StripStore,
    category_names_path,
    check_map_name,
    check_vector_output,
    polygonize_classes,
    tidy_polygons,
    write_category_names,
    write_map_quicklook,
    write_objects,
    write_qgis_style,
)

__all__ = ["SegmentationPredictor"]


class MapWork:
    """A map in the making: the open input and the journal, for this process alone until the `with` block ends.

    Args:
        predictor: Model and options.
        source: What `perf_vit.open` opens, or a source.
        out: Path of the map.
        shared: Whether several processes write rows.

    Attributes:
        source: Open input.
        job: What is to be made.
        store: Rows of the map; None where it is there.

    Raises:
        BusyError: Another process makes the map.
        InputError: The input can't be read, or doesn't fit the model.
        OutputError: The map can't be written, or is another file without `overwrite`.
    """

    def __init__(self, predictor: SegmentationPredictor, source: Any, out: str | Path, *, shared: bool = False) -> None:
        self._predictor = predictor
        with ExitStack() as stack:
            self.source: Source = stack.enter_context(predictor.opened(source))
            self.job = replace(predictor.job(self.source, out), shared=shared)
            self._working = stack.enter_context(ExitStack())
            self._journal = self._working.enter_context(self.job.work())
            self.store: StripStore | HeldRows | None = None
            if self._journal is not None:
                self.store = self.job.store(self._journal.folder.absolute())
                self._working.callback(self.store.close)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of input and outputs; after an exception, keep finished rows for a later call."""
        self._stack.__exit__(kind, error, trace)

    def finish(self) -> JobResult:
        """Put the map under its name, if it was made, and make the files next to it that are missing.

        Raises:
            OutputError: Rows are missing, or the disk is full.
        """
        made = self._journal is not None
        damaged: tuple[DamagedPiece, ...] = ()
        if self._journal is not None and self.store is not None:
            damaged = self.job.finish(self._journal, self.store)
        self._working.close()
        is_damaged = bool(damaged) if made else self._predictor.options.on_error == "skip"
        self._predictor.write_beside(self.job, made=made, damaged=is_damaged)
        return JobResult(made=made, damaged=damaged, **self._predictor.size_of(self.job))


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
        with self.work(source, out, shared=pool is not None) as work:
            if work.store is not None:
                self.check_input(work.source)
                if pool is None:
                    self.run_rows(work.source, work.store, on_progress=on_progress)
                else:
                    self._run_in_pool(pool, source, work, on_progress)
            return work.finish()

    def each(
        self, predict_one: PredictOne, inputs: Sequence[MapInput], *, on_progress: OnProgress = ignore_progress
    ) -> Generator[InputReport, None, None]:
        """Make the maps of inputs, several of them at a time, each in another step; see `MapLine`."""
        if self.options.whole:
            return super().each(predict_one, inputs)
        return MapLine(self, on_progress).run(inputs)

    def run_rows(
        self,
        source: Any,
        store: StripStore | HeldRows,
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
        writers = ThreadPoolExecutor(1, thread_name_prefix="perf_vit-writer")
        write = self.writer(store, writers)
        with self.opened(source) as opened, bounded_cache(), writers:
            gaps = store.gaps(*(rows or (0, opened.height)))
            if self.options.whole:
                map_whole(self, opened, store.folder, gaps, write, on_progress)
            reader = self.reader(opened, store.folder)
            for gap in () if self.options.whole else gaps:
                strips = self.strips(reader, opened.extent, gap, finish=write, on_progress=on_progress)
                with closing(strips):
                    for _ in strips:
                        pass
            write.flush()

    def strips(
        self,
        source: Reads,
        extent: Window,
        rows: tuple[int, int] | None = None,
        *,
        finish: Callable[[Strip], Any] | None = None,
        on_progress: OnProgress = ignore_progress,
    ) -> Generator[Any, None, None]:
        """Blended logits of a part of a source, strip by strip; see `predict_strips`.

        Args:
            source: Where pixels come from.
            extent: Part to predict.
            rows: (first, first below) of it; all by default.
            finish: Function of a strip whose results are yielded instead.
            on_progress: Called with (windows done, windows in all).

        Raises:
            InputError: A window can't be read, or the model's output has another shape.
            OptionError: A window size that doesn't fit the patch size, or the only size of the backbone.
        """
        return predict_strips(
            self.model,
            source,
            self.model.spec.normalizer,
            self.maker(extent, rows),
            flips=self.options.flips,
            batch_size=self.options.batch_size,
            num_readers=self.options.num_readers,
            device=self.ready(),
            dtype=self.options.dtype,
            finish=finish,
            on_progress=on_progress,
        )

    def maker(self, extent: Window, rows: tuple[int, int] | None = None) -> StripMaker:
        """Windows and blending of a part of a source.

        Args:
            extent: Part to predict.
            rows: (first, first below) of it; all by default.

        Raises:
            OptionError: A window size that doesn't fit the patch size.
        """
        start, stop = rows or (None, None)
        return StripMaker(
            extent=extent,
            num_channels=len(self.model.spec.classes),
            start_row=start,
            stop_row=stop,
            blend=self.options.blend,
            decide=partial(
                decide_classes,
                multilabel=self.model.spec.multilabel,
                score_threshold=self.options.score_threshold,
            ),
            **self.grid(),
        )

    def grid(self) -> dict[str, int]:
        """Window size and overlap, as arguments.

        Raises:
            OptionError: A window size that doesn't fit the patch size.
        """
        size, overlap = self.options.windows(self.model.spec.tile_px)
        multiple = self.model.size_multiple
        if size % multiple:
            nearest = max(1, round(size / multiple)) * multiple
            raise OptionError(f"window_size must be a multiple of the patch size {multiple}, got {size}; try {nearest}")
        check_window_size(self.model, size)
        return {"window_size": size, "overlap": overlap}

    def work(self, source: Any, out: str | Path, *, shared: bool = False) -> MapWork:
        """Begin or resume a map; see `MapWork`."""
        return MapWork(self, source, out, shared=shared)

    def writer(self, store: StripStore | HeldRows, pool: ThreadPoolExecutor) -> StripWriter:
        """Return a function that encodes a strip and has a thread write it to a store."""
        # What is held in memory is lost with its counts.
        seams = SeamLog(store.folder, is_kept=not isinstance(store, HeldRows))
        return StripWriter(self.output(), store, pool, seams.add)

    def reader(self, source: Source, folder: Path) -> Reads:
        """The source, or with `on_error="skip"` one that notes damaged pixels in a folder and leaves them out."""
        return SalvagingReader(source, DamageLog(folder).add) if self.options.on_error == "skip" else source

    def job(self, source: Any, out: str | Path) -> MapJob:
        """What is to be made of an input; see `InputPredictor.job`."""
        opened, out = self.open(source), Path(out)
        if self.options.polygons:
            polygons = out.with_suffix(f".{self.options.polygons}")
            check_vector_output(polygons, opened)
            if not self.options.overwrite:
                PolygonRecord(polygons, self.options.tidying, out).check()
        grid = self.grid()
        return MapJob(
            source=opened,
            out=out,
            output=self.output(),
            model_id=self.model_id,
            window_size=grid["window_size"],
            overlap=grid["overlap"],
            options=self.options,
            device=self.device,
        )

    def outputs(self, out: Path) -> list[Path]:
        """The map and the files next to it.

        Raises:
            OutputError: The map isn't named .tif.
        """
        check_map_name(out)
        suffix, tidying = self.options.polygons, self.options.tidying
        records = [PolygonRecord(out.with_suffix(f".{suffix}"), tidying, out).path] if suffix else []
        return [out, *self.options.files_beside(out), *records]

    def size_of(self, job: MapJob) -> dict[str, Any]:
        """Outputs, windows, pixels and seams of a map that is there; a whole image is one window."""
        size = super().size_of(job)
        return {
            **size,
            "seam_disagreement": job.seam_disagreement(),
            **({"num_windows": 1} if self.options.whole else {}),
        }

    def _run_in_pool(self, pool: RayPool, source: Any, work: MapWork, on_progress: OnProgress) -> None:
        assert work.store is not None
        total, done = work.source.height, 0
        ranges = row_ranges(work.job.window_rows, total, pool.num_actors)
        for (start, stop), _ in pool.map(partial(self.run_rows, source, work.store), ranges):
            done += stop - start
            on_progress(done, total)

    def output(self) -> DenseOutput:
        """How scores become pixels.

        Raises:
            OptionError: Options of another kind of model.
        """
        spec, score_threshold = self.model.spec, self.options.score_threshold
        if spec.multilabel and self.options.polygons:
            raise OptionError("polygons are of classes that exclude each other; this model's classes don't")
        if not spec.multilabel and score_threshold is not None:
            raise OptionError("score_threshold is for objects and for classes that don't exclude each other")
        return class_output(
            self.options.kind,
            spec.classes,
            background=spec.background_index,
            multilabel=spec.multilabel,
            score_threshold=0.5 if score_threshold is None else score_threshold,
        )

    def write_beside(self, job: MapJob, *, made: bool, damaged: bool) -> None:
        """Write the files next to a map that are asked for; of a map that was there those that it lacks."""
        if made and job.out.with_suffix(".qml").exists():
            warn_of_style(job.out, job.beside)
        missing = {path.suffix for path in job.beside if made or job.lacks(path)}
        if ".png" in missing:
            self._write_quicklook(job, job.out.with_suffix(".png"), damaged=damaged)
        if self.options.polygons and (f".{self.options.polygons}" in missing or not made):
            self._write_polygons(job, job.out.with_suffix(f".{self.options.polygons}"), is_there=not made)
        spec = self.model.spec
        if ".qml" in missing and not spec.multilabel:
            colors = default_colormap(len(spec.classes), spec.background_index)
            write_qgis_style(job.out.with_suffix(".qml"), spec.classes, colors)
        if ".xml" in missing and not spec.multilabel:
            write_category_names(category_names_path(job.out), spec.classes)
        if ".html" in missing:
            write_map_report(
                job.out.with_suffix(".html"),
                job.source,
                job.out,
                spec.classes,
                background=spec.background_index,
                multilabel=spec.multilabel,
                scale=self.output().scale,
                seam_disagreement=job.seam_disagreement(),
                settings=self.described(),
            )

    def _write_quicklook(self, job: MapJob, path: Path, *, damaged: bool) -> None:
        spec = self.model.spec
        try:
            write_map_quicklook(
                job.source,
                job.out,
                path,
                spec.classes,
                background=spec.background_index,
                multilabel=spec.multilabel,
                scale=self.output().scale,
            )
        except InputError:
            if not damaged:
                raise
            # The picture of the whole scene needs pixels that can't be read; an earlier map's would mislead.
            path.unlink(missing_ok=True)

    def _write_polygons(self, job: MapJob, path: Path, *, is_there: bool) -> None:
        """Write the areas of the classes, but of a declared background, unless they are there as they are asked for."""
        tidying = self.options.tidying
        record = PolygonRecord(path, tidying, job.out)
        if is_there and record.is_done() and not has_partial_folder(path):
            return
        # Alone: another process may write them tidied otherwise, and file and record belong together.
        with open_journal(path) as journal:
            if is_there and record.is_done():
                return
            journal.begin(record.identity, resume=False)
            spec, background = self.model.spec, self.model.spec.background_index
            polygons, labels = polygonize_classes(job.out, skip=() if background is None else (background,))
            polygons, kept = tidy_polygons(polygons, job.source, **tidying)
            made = write_objects(
                journal.folder / path.name, polygons[kept], None, labels[kept], spec.classes, source=job.source,
                object_type="annotation", background=background,
            )  # fmt: skip
            record.put(journal, made)


register_predictor("segmentation", SegmentationPredictor, SegmentationPredictOptions)
