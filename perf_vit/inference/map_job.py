"""One map in the making: begun, its rows written by whoever can, and finished."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from perf_vit._version import __version__
from perf_vit.errors import OutputError, PerfVitError
from perf_vit.inference.damage import DamagedPiece, DamageLog
from perf_vit.inference.dense_output import DenseOutput
from perf_vit.inference.engine import Strip, TileModel, predict_strips
from perf_vit.inference.journal import Journal, check_partial_folder, discard_journal, open_journal
from perf_vit.inference.reader import Reads, SalvagingReader
from perf_vit.inference.source_identity import SourceIdentity
from perf_vit.io import (
    RasterLayout,
    SlideSource,
    StripStore,
    bounded_cache,
    check_outputs,
    existing_error,
    existing_outputs,
    holds_layout,
    is_ome_tiff_name,
    write_cog,
    write_ome_tiff,
)
from perf_vit.tiling import Blend, grid_windows
from perf_vit.types import GeoImage, Source, Window

__all__ = ["MapJob", "MapResult", "OnError", "check_map_name", "make_map", "map_exists"]

FloatArray = npt.NDArray[np.float32]

OnError = Literal["stop", "skip"]

# One strip is encoded and written while the next is waiting.
_WRITER_DEPTH = 2

_VERSION_TAG = "PERF_VIT_VERSION"
_DAMAGE_TAG = "PERF_VIT_DAMAGED_PIECES"

_ANOTHER_MAP = (
    ", but not as this model's map of this input with these settings, or is older than the input, or has damaged pixels"
)


@dataclass(frozen=True, kw_only=True)
class MapJob:
    """Everything that decides a map, apart from the model itself; cheap to make, anywhere.

    `begin` it in an open journal, `write_rows` of the journal's folder from any number of processes, `finish` it.

    Attributes:
        source: from `perf_vit.open_source`.
        out: path of the map: .tif for a Cloud-Optimised GeoTIFF, .ome.tif for a pyramid that viewers of slides open.
        output: how scores become pixels.
        model_id: tells this model and its weights from others.
        num_channels: K, the channels of the model's output.
        window_size: side of a window, in pixels.
        overlap: pixels that neighbouring windows share.
        blend: "hann" or "gaussian" weights.
        flips: average the scores of a tile and its three mirror images.
        precision: torch.float32, or torch.bfloat16 / torch.float16 for autocast.
        device: where the model runs.
        on_error: "stop" at a window that can't be read, or "skip" what is damaged of it, as nodata.

    Raises:
        OutputError: the map would replace its input, isn't named .tif, or is an OME-TIFF of pixels of unknown size.
    """

    source: Source
    out: Path
    output: DenseOutput
    model_id: str
    num_channels: int
    window_size: int
    overlap: int
    blend: Blend = "hann"
    flips: bool = False
    precision: torch.dtype = torch.float32
    device: str | torch.device = "cpu"
    on_error: OnError = "stop"

    def __post_init__(self) -> None:
        check_map_name(self.out)
        if is_ome_tiff_name(self.out):
            _mpp_xy(self.source)
        check_outputs([self.out], self.input_files, overwrite=True)
        if self.on_error not in ("stop", "skip"):
            raise PerfVitError(f"on_error must be stop or skip, got {self.on_error}")

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the scores, as plain values; the map's tags hold it."""
        return {
            "model": self.model_id,
            "window_size": self.window_size,
            "overlap": self.overlap,
            "blend": self.blend,
            "flips": self.flips,
            "precision": str(self.precision).removeprefix("torch."),
        }

    @property
    def input_files(self) -> tuple[str, ...]:
        """Paths of the source, several of a mosaic."""
        return tuple(getattr(self.source, "paths", (self.source.path,)))

    @cached_property
    def _identity(self) -> SourceIdentity:
        return SourceIdentity(self.source)

    @property
    def layout(self) -> RasterLayout:
        """The map's size, place, bands and tags."""
        tags = {f"PERF_VIT_{name.upper()}": str(value) for name, value in self.settings.items()}
        return self.output.layout(self.source, {_VERSION_TAG: __version__, **self._identity.tags, **tags})

    @property
    def window_rows(self) -> list[int]:
        """The first row of each row of windows."""
        return sorted({window.row for window in self._windows()})

    @property
    def num_windows(self) -> int:
        """Windows of the whole source."""
        return len(self._windows())

    def is_done(self) -> bool:
        """Whether the map is there, of the same model, settings and input, and not older than that.

        A map with damaged pieces isn't what `on_error="stop"` asks for.
        """
        if not self.out.exists():
            return False
        if self._identity.changed_since(self.out):
            return False
        layout = self.layout
        if self.on_error == "stop":
            layout = replace(layout, tags={**layout.tags, _DAMAGE_TAG: "0"})
        return holds_layout(self.out, layout, other_tags={_VERSION_TAG})

    def begin(self, journal: Journal, *, resume: bool) -> None:
        """Go on with what is in the journal, or begin anew.

        Raises:
            OutputError: what is there was begun with other settings.
        """
        identity = {
            "device": torch.device(self.device).type,
            "on_error": self.on_error,
            "bands": list(self.output.band_names),
            "dtype": str(np.dtype(self.output.dtype)),
            "output": dict(self.output.tags),
        }
        settings = {**self.settings, **identity, **self._identity.settings, "version": __version__}
        journal.begin(settings, resume=resume)

    def write_rows(
        self,
        folder: Path,
        model: TileModel,
        normalize: Callable[[GeoImage], FloatArray],
        rows: tuple[int, int] | None = None,
        *,
        batch_size: int = 1,
        num_readers: int = 2,
        on_window: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Predict those of the rows that are not in the folder yet.

        Args:
            folder: of the journal.
            model: tiles to scores; see `predict_strips`.
            normalize: a window's pixels to the model's input, [C, h, w].
            rows: (first, first below); all by default.
            batch_size: windows a forward pass.
            num_readers: threads that read.
            on_window: called with (windows done, windows in all), for a progress bar.

        Raises:
            InputError: a window can't be read, or the model's output has another shape.
            OutputError: the disk is full.
        """
        # Tags, which take a look at all files of the source, are of the finished map.
        store = StripStore(folder, self.output.layout(self.source, {}), self.out)
        reader: Reads = self.source
        if self.on_error == "skip":
            reader = SalvagingReader(self.source, DamageLog(folder).add)
        for start, stop in store.gaps(*(rows or (0, self.source.height))):
            strips = predict_strips(
                model,
                reader,
                normalize,
                extent=self.source.extent,
                num_channels=self.num_channels,
                window_size=self.window_size,
                overlap=self.overlap,
                start_row=start,
                stop_row=stop,
                blend=self.blend,
                flips=self.flips,
                batch_size=batch_size,
                num_readers=num_readers,
                device=self.device,
                precision=self.precision,
                on_window=on_window,
            )
            with bounded_cache():
                _write_behind(strips, lambda strip: store.write(strip.window.row, self.output.encode(strip)))

    def finish(self, journal: Journal) -> list[DamagedPiece]:
        """Make the map of all rows and put it under its name.

        Returns:
            What couldn't be read, of all runs that wrote rows.

        Raises:
            OutputError: rows are missing, or the disk is full.
        """
        damaged = DamageLog(journal.folder).pieces()
        layout = self.layout
        layout = replace(layout, tags={**layout.tags, _DAMAGE_TAG: str(len(damaged))})
        made = journal.folder / self.out.name
        store = StripStore(journal.folder, layout, self.out)
        if is_ome_tiff_name(self.out):
            pyramid = journal.folder / "pyramid.tif"
            write_cog(store, layout, pyramid, self.out)
            write_ome_tiff(made, pyramid, mpp=_mpp_xy(self.source), tags=layout.tags)
        else:
            write_cog(store, layout, made, self.out)
        journal.complete(made)
        return damaged

    def _windows(self) -> list[Window]:
        return grid_windows(self.source.extent, self.window_size, self.overlap)


@dataclass(frozen=True, kw_only=True)
class MapResult:
    """What became of a map.

    Attributes:
        made: False where it was there already.
        num_windows: of the source.
        num_pixels: of the source.
        damaged: what couldn't be read and is nodata.
    """

    made: bool
    num_windows: int
    num_pixels: int
    damaged: tuple[DamagedPiece, ...] = ()


def make_map(
    job: MapJob,
    write_rows: Callable[[Path], None],
    *,
    resume: bool = True,
    overwrite: bool = False,
    beside: Sequence[Path] = (),
) -> MapResult:
    """Begin a map, have its rows written and finish it.

    Args:
        job: what to make.
        write_rows: called with a folder, writes all rows into it with `MapJob.write_rows`.
        resume: go on with an unfinished map; else begin anew.
        overwrite: make the map even if it is there, and replace what else is in its place.
        beside: further files that the caller writes for a new map, such as a quicklook.

    Raises:
        BusyError: another process makes it.
        InputError: a window can't be read, or the model's output has another shape.
        OutputError: the map can't be written, was begun with other settings, or other files are in its place.
    """
    result = partial(MapResult, num_windows=job.num_windows, num_pixels=job.source.height * job.source.width)
    if map_exists(job, beside=beside, overwrite=overwrite):
        discard_journal(job.out)
        return result(made=False)
    with open_journal(job.out) as journal:
        # Another process may have finished it between the look above and the lock.
        if map_exists(job, beside=beside, overwrite=overwrite):
            return result(made=False)
        job.begin(journal, resume=resume)
        write_rows(journal.folder)
        return result(made=True, damaged=tuple(job.finish(journal)))


def map_exists(job: MapJob, *, beside: Sequence[Path] = (), overwrite: bool = False) -> bool:
    """Whether nothing is to be done for a map; refuses to write over other files.

    Args:
        job: what would be made.
        beside: further files that would be written.
        overwrite: allow files that are there, but for inputs.

    Returns:
        True if the map of the same model, settings and input is there, unless `overwrite`.

    Raises:
        OutputError: a file is an input, or exists without `overwrite` and without such a map.
    """
    outputs = [job.out, *beside]
    check_outputs(outputs, job.input_files, overwrite=True)
    check_partial_folder(job.out)
    found = existing_outputs(outputs)
    if overwrite or not found:
        return False
    # Another process may have made the map meanwhile: it appears before the files beside it.
    if job.is_done():
        return True
    raise existing_error(found[0], _ANOTHER_MAP if found[0] == job.out else "")


def _write_behind(strips: Iterable[Strip], write: Callable[[Strip], None]) -> None:
    """Write strips in a thread of its own, in order, while the model goes on."""
    writing: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="perf_vit-writer") as pool:
        for strip in strips:
            writing.append(pool.submit(write, strip))
            if len(writing) >= _WRITER_DEPTH:
                writing.popleft().result()
        for written in writing:
            written.result()


def _mpp_xy(source: Source) -> tuple[float, float]:
    """Micrometres per pixel of a slide as it is read."""
    if source.mpp is None:
        raise OutputError(
            f"an OME-TIFF tells the size of its pixels, and that of {source.path} is not known; give slide_mpp "
            "(--slide-mpp), or a name that ends in .tif alone"
        )
    if not isinstance(source, SlideSource) or source.slide_mpp is None:
        return source.mpp, source.mpp
    (mpp_x, mpp_y), (down_x, down_y) = source.slide_mpp, source.downsample_xy
    return mpp_x * down_x, mpp_y * down_y


def check_map_name(out: Path) -> None:
    """Refuse a map whose name doesn't say that it is a GeoTIFF.

    Raises:
        OutputError: it doesn't end in .tif or .tiff.
    """
    if out.suffix.lower() not in {".tif", ".tiff"}:
        raise OutputError(f"the map is a GeoTIFF: its name must end in .tif, got {out}; try {out.with_suffix('.tif')}")
