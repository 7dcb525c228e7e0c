"""Resumable jobs with recorded progress; jobs of maps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perf_vit._version import __version__
from perf_vit.errors import OutputError
from perf_vit.inference.dense_output import DenseOutput
from perf_vit.inference.jobs.beside import attached_files, discard_style, has_style, is_to_be_made, stray_style
from perf_vit.inference.jobs.identity import OutputRecord, SourceIdentity
from perf_vit.inference.jobs.journal import (
    MADE_MAP,
    MADE_PYRAMID,
    DamagedPiece,
    DamageLog,
    Journal,
    SeamLog,
    check_partial_folder,
    discard_journal,
    has_partial_folder,
    open_journal,
)
from perf_vit.inference.options import PredictOptions, SegmentationPredictOptions
from perf_vit.sources.describe import seam_disagreement_of
from perf_vit.sources.files import VERSION_TAG
from perf_vit.sources.slides import SlideSource
from perf_vit.tiling import grid_windows
from perf_vit.types import Source, Window
from perf_vit.writers import (
    HeldRows,
    RasterLayout,
    StripStore,
    category_names_path,
    check_map_name,
    check_outputs,
    existing_error,
    existing_outputs,
    holds_layout,
    is_ome_tiff_name,
    is_one_block,
    write_cog,
    write_ome_tiff,
)

__all__ = ["Job", "JobResult", "MapJob", "RecordedJob"]


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """What became of a job.

    Attributes:
        made: False where its outputs existed already.
        out: Path of the main output.
        num_windows: Windows of the input.
        num_pixels: Pixels of the input.
        num_objects: Objects found in this call, None where none are looked for.
        score_threshold: Lowest score of these objects.
        num_rows: Inputs in a table but those that failed, None for other outputs.
        seam_disagreement: Share of a map's pixels on which windows disagree (`perf_vit.inference.seams`), or None.
        damaged: Parts of the input that couldn't be read and were skipped.
        failed: Errors of inputs of a table that were skipped, by path.
        beside: Further outputs, next to the main one.
    """

    made: bool
    out: Path | None = None
    num_windows: int = 0
    num_pixels: int = 0
    num_objects: int | None = None
    score_threshold: float | None = None
    num_rows: int | None = None
    seam_disagreement: float | None = None
    damaged: tuple[DamagedPiece, ...] = ()
    failed: Mapping[str, str] | None = None
    beside: tuple[Path, ...] = ()


class Job(ABC):
    """A set of outputs, and everything that decides what they hold.

    Subclasses say what that is; `work` gives the journal of what is left to do, or None where nothing is.

    Attributes:
        out: Main output, which appears last.
        beside: Further outputs that are made with it.
        input_files: Files that are read, none of which may be replaced.
        options: Options of the prediction.
    """

    out: Path
    options: PredictOptions
    _what = "this model's output of this input"

    @property
    def beside(self) -> Sequence[Path]:
        """Further outputs; none by default."""
        return ()

    @property
    def files(self) -> list[Path]:
        """All files that may be written."""
        return [self.out, *self.beside]

    @property
    def keeps_pieces(self) -> bool:
        """Whether an interrupted call leaves pieces for the next one, which needs to know what they were made with."""
        return True

    @property
    @abstractmethod
    def input_files(self) -> Sequence[str]:
        """Files that are read."""

    @property
    @abstractmethod
    def begun_with(self) -> Mapping[str, Any]:
        """Plain values that must be the same to go on with what an interrupted call left."""

    @abstractmethod
    def is_done(self, found: Sequence[Path]) -> bool:
        """Whether all outputs are there; refuses those that are not of this job.

        Args:
            found: Outputs that exist, at least one.

        Raises:
            OutputError: Names the first that is another's.
        """

    def check(self) -> bool:
        """Whether nothing is to be done; refuses to replace files that are not this job's.

        Raises:
            OutputError: An output is an input, or exists without `overwrite` and is not of this job.
        """
        check_outputs(self.files, self.input_files, overwrite=True)
        check_partial_folder(self.out)
        found = self.found()
        return bool(found) and not self.options.overwrite and self.is_done(found)

    def found(self) -> list[Path]:
        """Outputs that exist."""
        return existing_outputs([self.out, *self.beside])

    def discard_begun(self) -> None:  # noqa: B027  (most jobs have nothing there)
        """Remove what an interrupted call left outside of its folder."""

    def is_complete(self) -> bool:
        """Whether a job that has nothing to do has no file to make next to its output, and none to remove."""
        return not any(map(self.lacks, self.beside)) and not has_partial_folder(self.out)

    def lacks(self, beside: Path) -> bool:
        """Whether a further output is to be made next to the main one, which is there."""
        return not beside.exists()

    @contextmanager
    def work(self) -> Iterator[Journal | None]:
        """Give the journal to finish the job in, alone among all processes; None where nothing is to be done.

        Raises:
            BusyError: Another process works on it.
            OutputError: As `check` says; or the outputs were begun with other settings, or can't be written.
        """
        if self.check():
            if has_partial_folder(self.out):
                discard_journal(self.out, self.begun_with)
            yield None
            return
        with open_journal(self.out) as journal:
            # Another process may have finished it between the look above and the lock.
            if self.check():
                yield None
                return
            if not self.options.resume:
                self.discard_begun()
            if self.keeps_pieces or journal.settings() is not None:
                journal.begin({**self.begun_with, "version": __version__}, resume=self.options.resume)
            else:
                journal.clear()
            if self.options.on_error == "stop" and DamageLog(journal.folder).pieces():
                raise OutputError(
                    f"{journal.folder} holds the unfinished {self.out.name}, made with `on_error=skip`, without the "
                    "parts that can't be read; go on with skip, or begin again with `resume=False`"
                )
            yield journal

    def _other(self, path: Path, reason: str) -> OutputError:
        return existing_error(path, f", but {reason}" if reason else "")


class RecordedJob(Job):
    """A job whose identity is kept in a hidden file next to its outputs, as their formats have no place for it.

    `.NAME.perf_vit.json` holds the identity and a fingerprint of each output, so outputs that were edited since are
    never taken for those of the job.
    """

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """Plain values that decide what the outputs hold: model, settings and content of the inputs."""

    @abstractmethod
    def changed_since(self, out: Path) -> bool:
        """Whether an input is newer than an output."""

    @cached_property
    def _record(self) -> OutputRecord:
        return OutputRecord(self.out)

    @property
    def files(self) -> list[Path]:
        """All files that may be written, with the record."""
        return [*super().files, self._record.path]

    def check(self) -> bool:
        """Whether nothing is to be done; see `Job.check`."""
        check_outputs(self.files, self.input_files, overwrite=True)
        if not self.options.overwrite and self._record.is_foreign():
            raise self._other(self._record.path, "was not made by perf_vit")
        return super().check()

    def is_done(self, found: Sequence[Path]) -> bool:
        """Whether all recorded outputs are there; see `Job.is_done`."""
        content = self._record.read()
        if content is None or not found[0].exists():
            raise self._other(found[0], "")
        if content["identity"] != self._record.plain(self.identity) or self.changed_since(found[0]):
            raise self._other(found[0], f"not as {self._what} with these settings, or is older than the input")
        if self.options.on_error == "stop" and content["num_damaged"]:
            raise self._other(found[0], "without parts of the input that couldn't be read")
        for path in found:
            if not self._record.holds(path, content):
                raise self._other(path, "was changed since it was made" if path == self.out else "")
        return self._record.is_complete(found, content)

    def finish(self, journal: Journal, made: Mapping[Path, Path], *, num_damaged: int = 0) -> None:
        """Put finished files under their names, the main output last, and keep what they are.

        Args:
            journal: Journal of `work`.
            made: Output to the finished file in the journal's folder, with the main output. One that an interrupted
                call has moved already needs no file.
            num_damaged: Parts of the inputs that were skipped.

        Raises:
            OutputError: Nothing can be written there.
        """
        files = {out: file if file.exists() else out for out, file in made.items()}
        discard_style(journal, self._record, made, overwrite=self.options.overwrite)
        self._record.write(self.identity, files, num_damaged)
        for out, file in sorted(files.items(), key=lambda pair: pair[0] == self.out):
            if file != out:
                journal.move(file, out)

    def found(self) -> list[Path]:
        """Outputs that exist; where the main one is missing, also a style without a record, which QGIS would apply."""
        stray = [] if self.out.exists() or has_style(self.out, self._record) else stray_style(self.out)
        return existing_outputs(dict.fromkeys([self.out, *self.beside, *stray]))


_DAMAGE_TAG = "PERF_VIT_DAMAGED_PIECES"


@dataclass(frozen=True, kw_only=True)
class MapJob(Job):
    """The map of a source; its tags hold what it was made of.

    Attributes:
        source: Raster, mosaic or slide.
        out: Path of the map: .tif for a Cloud-Optimised GeoTIFF, .ome.tif for a pyramid that slide viewers open.
        output: How scores become pixels.
        model_id: Identifies the model and its weights.
        window_size: Side of a window in pixels.
        overlap: Pixels that neighbouring windows share.
        options: Options of the prediction.
        device: Device that the model runs on.
        shared: Whether several processes write rows.

    Raises:
        OutputError: The map would replace its input, isn't named .tif, or is an OME-TIFF of pixels of unknown size.
    """

    source: Source
    out: Path
    output: DenseOutput
    model_id: str
    window_size: int
    overlap: int
    options: SegmentationPredictOptions
    device: str = "cpu"
    shared: bool = False

    def __post_init__(self) -> None:
        check_map_name(self.out)
        if is_ome_tiff_name(self.out):
            _mpp_xy(self.source)
        check_outputs([self.out], self.input_files, overwrite=True)

    @property
    def beside(self) -> Sequence[Path]:
        """Quicklook, report, polygons and names of classes, as far as they are asked for."""
        return self.options.files_beside(self.out)

    @property
    def settings(self) -> dict[str, Any]:
        """Plain values that decide the scores; the map's tags hold them."""
        return {
            "model": self.model_id,
            "kind": self.options.kind,
            **self.options.scoring(self.window_size, self.overlap),
            "precision": str(self.options.dtype).removeprefix("torch."),
        }

    @property
    def input_files(self) -> tuple[str, ...]:
        """Paths of the source, several of a mosaic."""
        return tuple(getattr(self.source, "paths", (self.source.path,)))

    @property
    def begun_with(self) -> Mapping[str, Any]:
        """Plain values that decide the rows."""
        return {
            **self.settings,
            "device": torch.device(self.device).type,
            "bands": list(self.output.band_names),
            "dtype": str(np.dtype(self.output.dtype)),
            "output": dict(self.output.tags),
            **self._identity.settings,
        }

    @cached_property
    def _identity(self) -> SourceIdentity:
        return SourceIdentity(self.source)

    @property
    def layout(self) -> RasterLayout:
        """The map's size, place, bands and tags."""
        tags = {f"PERF_VIT_{name.upper()}": str(value) for name, value in self.settings.items()}
        return self.output.map_layout(self.source, {VERSION_TAG: __version__, **self._identity.tags, **tags})

    @property
    def window_rows(self) -> list[int]:
        """The first row of each row of windows."""
        return sorted({window.row for window in self._windows})

    def is_done(self, found: Sequence[Path]) -> bool:
        """Whether the map is there, of the same model, settings and input, and not older than that.

        A map with damaged pieces isn't what `on_error="stop"` asks for. Files next to it are made again if they are
        missing; another process may have made the map meanwhile, which appears before them.
        """
        if self.out.exists() and not self._identity.changed_since(self.out):
            layout = self.layout
            if self.options.on_error == "stop":
                layout = replace(layout, tags={**layout.tags, _DAMAGE_TAG: "0"})
            if holds_layout(self.out, layout, other_tags={VERSION_TAG}):
                return True
        other = "not as this model's map of this input with these settings, or is older than the input, or has damaged "
        raise self._other(found[0], f"{other}pixels" if found[0] == self.out else "")

    def found(self) -> list[Path]:
        """Outputs that exist, and files that GDAL and QGIS would take for those of the map, asked for or not."""
        is_styled = self.out.with_suffix(".qml").exists()
        attached = attached_files(self.out) if is_styled else [category_names_path(self.out)]
        return existing_outputs(dict.fromkeys([self.out, *self.beside, *attached]))

    def lacks(self, beside: Path) -> bool:
        """Whether a file next to the map that is there is missing, or of an earlier map."""
        return is_to_be_made(beside, self.out)

    def is_complete(self) -> bool:
        """Whether nothing is to be made; polygons that are there may have to be tidied otherwise."""
        return not self.options.polygons and super().is_complete()

    @property
    def keeps_pieces(self) -> bool:
        """Whether rows go into files: not where they are few, in one row of windows, and all finished at once."""
        is_small = is_one_block(self.source.height, self.source.width) and len(self.window_rows) == 1
        return self.shared or self.options.whole or not is_small

    def store(self, folder: Path) -> StripStore | HeldRows:
        """Rows of the map, in a folder unless it is small."""
        # Tags, which take a look at all files of the source, are of the finished map.
        layout = self.output.layout(self.source)
        if not self.keeps_pieces:
            return HeldRows(folder, layout, self.out)
        return StripStore(folder, layout, self.out, encode_early=not self.shared)

    def finish(self, journal: Journal, store: StripStore | HeldRows) -> tuple[DamagedPiece, ...]:
        """Make the map of all rows and put it under its name.

        Args:
            journal: Journal of `work`.
            store: All rows.

        Returns:
            What couldn't be read, of all runs that wrote rows.

        Raises:
            OutputError: Rows are missing, or the disk is full.
        """
        damaged = DamageLog(journal.folder).pieces()
        layout = self.layout
        tags = {_DAMAGE_TAG: str(len(damaged)), **SeamLog(journal.folder).tags(self.source.height)}
        layout = replace(layout, tags={**layout.tags, **tags})
        made = journal.folder / MADE_MAP
        if is_ome_tiff_name(self.out):
            pyramid = journal.folder / MADE_PYRAMID
            write_cog(store, layout, pyramid, self.out)
            frame = self.source.frame.tags() if isinstance(self.source, SlideSource) else {}
            write_ome_tiff(made, pyramid, mpp=_mpp_xy(self.source), name=self.out.name, tags={**layout.tags, **frame})
        else:
            write_cog(store, layout, made, self.out)
        # If this process ends before it makes them, or isn't to, none of an earlier map is taken for one of this map.
        for path in [*self.beside, *attached_files(self.out)] if self.options.overwrite else ():
            journal.discard(path)
        journal.move(made)
        return tuple(damaged)

    def seam_disagreement(self) -> float | None:
        """Return the share of pixels on which overlapping windows disagree, of the map that is there, if it has one."""
        can_have = len(self._windows) > 1 and self.out.exists()
        return seam_disagreement_of(self.out) if can_have else None

    @cached_property
    def _windows(self) -> list[Window]:
        return grid_windows(self.source.extent, self.window_size, self.overlap)


def _mpp_xy(source: Source) -> tuple[float, float]:
    """Micrometres per pixel of a slide as it is read."""
    if source.mpp is None:
        raise OutputError(
            f"an OME-TIFF tells the size of its pixels, and that of {source.path} is not known; give `slide_mpp`, or "
            "a name that ends in .tif alone"
        )
    pixel_um_xy = source.frame.pixel_um_xy if isinstance(source, SlideSource) else None
    return pixel_um_xy or (source.mpp, source.mpp)
