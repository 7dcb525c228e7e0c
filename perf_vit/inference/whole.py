"""Dense prediction of a whole image in one forward pass, band after band, without windows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perf_vit.errors import CheckpointError, NotFiniteError, OptionError, PerfVitError
from perf_vit.finite import check_finite
from perf_vit.inference.dense import FloatArray, Strip
from perf_vit.inference.dense_output import StripWriter
from perf_vit.inference.jobs.identity import SourceIdentity
from perf_vit.inference.jobs.journal import TOKEN_FOLDER, DamageLog, partial_folder
from perf_vit.inference.prefetch import Reads, SalvagingReader, Tile, load_ahead, read_tile
from perf_vit.inference.whole_plan import Encode, WholePlan, measured, plan_whole
from perf_vit.streaming import ImageTokens, StreamedTokens, check_streamable, stream_tokens
from perf_vit.streaming.dense import DenseHead
from perf_vit.streaming.journal import TokenJournal
from perf_vit.streaming.processes import Processes
from perf_vit.threads import num_processors
from perf_vit.types import GeoImage, Source, Window

__all__ = ["WholeImage", "map_whole", "plan_map"]

_STRIP_ROWS = 128
"""Most rows of a strip, as in prediction in windows."""

_BAND_BYTES = 2**28
"""Bytes of the scores of a band of parts, as far as margins allow."""

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class _Image:
    """Source that is read through another reader, such as one that leaves out what is damaged."""

    source: Source
    reader: Reads

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def read(self, window: Window) -> GeoImage:
        return self.reader.read(window)


class _Damage:
    """Damaged pieces of an image, which tokens are made without, and which the map leaves out.

    Args:
        source: Image.
        of_tokens: Pieces that tokens were made without.
        of_map: All pieces that the map leaves out.
    """

    def __init__(self, source: Source, of_tokens: DamageLog, of_map: DamageLog) -> None:
        self.reader: Reads = SalvagingReader(source, of_tokens.add)
        self._source, self._of_tokens, self._of_map = source, of_tokens, of_map
        self._known: list[Window] = []

    def tokens_are_made(self) -> None:
        """Note the pieces that tokens were made without as pieces of the map."""
        pieces = self._of_tokens.pieces()
        self._known = [piece.window for piece in pieces]
        for piece in pieces:
            self._of_map.add(piece.window, piece.reason)

    def of_part(self, part: Window) -> Reads:
        """Return a reader of a part and its margins without these pieces, which notes others within the part."""
        return _PartReader(self._source, self._known, part, self._of_map)


@dataclass(frozen=True, eq=False)
class _PartReader:
    source: Source
    known: list[Window]
    part: Window
    log: DamageLog

    def read(self, window: Window) -> GeoImage:
        image = SalvagingReader(self.source, self._note).read(window)
        mask = image.mask.copy()
        for known in map(window.intersect, self.known):
            if known is not None:
                mask[:, *known.slices_in(window)] = False
        return GeoImage.from_mask(image.pixels, mask)

    def _note(self, piece: Window, reason: str) -> None:
        lost = piece.intersect(self.part)
        if lost is not None and lost not in map(lost.intersect, self.known):
            self.log.add(lost, reason)


class WholeImage:
    """Segmentation network that runs over a whole image at once: every token attends to all others.

    Args:
        segmenter: Network in evaluation mode, on the CPU.
        source: Image.
        num_classes: Number of scores per pixel.
        damage: Pieces that can't be read; None where such a piece is an error.

    Raises:
        CheckpointError: The backbone or the head needs all tokens at once; the message names it.
        InputError: The image has other bands than the network.
    """

    def __init__(self, segmenter: Any, source: Source, num_classes: int, damage: _Damage | None = None) -> None:
        self._head = DenseHead(segmenter)
        self._source, self._num_classes, self._damage = source, num_classes, damage
        reader = source if damage is None else damage.reader
        self._normalize = segmenter.spec.normalizer
        try:
            self._image = ImageTokens(self._head.vit, _Image(source, reader), self._normalize)
        except PerfVitError:
            raise
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        width = self._image.grid[1] * self._head.patch[1]
        self._part: tuple[int, int] = self._head.part_size(_BAND_BYTES // (4 * num_classes * width))

    def plan(self, journal: TokenJournal | None, token_dtype: torch.dtype, encode: Encode | None = None) -> WholePlan:
        """Return what the map takes.

        Args:
            journal: Folder for the tokens' files; None for memory.
            token_dtype: Dtype of stored tokens.
            encode: Function from a strip to the pixels of the map, to measure the time; None not to.

        Raises:
            CheckpointError: A block needs all tokens at once.
        """
        check_streamable(self._head.vit, self._image.grid)
        folder = None if journal is None else journal.folder
        plan = plan_whole(self._head, self._source, self._part, self._num_classes, folder, token_dtype)
        if encode is None:
            return plan
        return measured(plan, self._head, self._source, self._normalize, self._part, encode)

    def run(
        self,
        gaps: list[tuple[int, int]],
        finish: Callable[[Strip], Any],
        *,
        on_tokens: Callable[[], Any] = lambda: None,
        flush: Callable[[], Any] = lambda: None,
        journal: TokenJournal | None,
        token_dtype: torch.dtype,
        keep_tokens: bool = False,
        num_readers: int | None = None,
        on_progress: OnProgress = lambda done, total: None,
    ) -> None:
        """Predict some rows.

        Args:
            gaps: Rows of pixels, as (first, first below).
            finish: Function of a strip, whose arrays hold until it returns; strips may hold other rows too.
            on_tokens: Called once all tokens are there, before the first strip.
            flush: Called after the last strip; when it returns, all rows are safe.
            journal: Folder for the tokens' files, which are deleted after that, and kept after an error; None for
                memory.
            token_dtype: Dtype of stored tokens.
            keep_tokens: Keep the files after Ctrl-C too.
            num_readers: Number of threads that read; one per processor by default.
            on_progress: Called with (rows of tokens done, in all), counted in each pass over the image.

        Raises:
            InputError: The image can't be read, or has no valid pixel.
            OutputError: The disk or the memory is too small.
            NotFiniteError: A score is infinite or not a number.
        """
        if not gaps:
            if journal is not None:
                # Those of a process that ended before it deleted them.
                journal.remove()
            return
        self.plan(journal, token_dtype).check()
        rows, before = self._image.grid[0], 0

        def on_block(done: int, total: int) -> None:
            nonlocal before
            before = total
            on_progress(done, total + rows)

        def on_band(done: int, total: int) -> None:
            on_progress(before + done, before + total)

        with nullcontext() if journal is None else journal.kept(after_interrupt=keep_tokens):
            tokens = self.tokens(journal, token_dtype, on_block)
            on_tokens()
            for gap in gaps:
                for strip in self.strips(tokens, gap, on_band, num_readers):
                    finish(strip)
            flush()
            for each in tokens:
                each.store.close()

    def tokens(self, journal: TokenJournal | None, dtype: torch.dtype, on_progress: OnProgress) -> list[StreamedTokens]:
        """Run the backbone, and return the tokens that the head takes.

        Args:
            journal: Folder for the tokens' files; None for memory.
            dtype: Dtype of stored tokens.
            on_progress: Called with (rows of tokens done, in all), counted in each pass over the image.

        Raises:
            InputError: The image can't be read, or has no valid pixel.
            OutputError: The disk or the memory is too small.
        """
        return stream_tokens(
            self._head.vit,
            self._image,
            indices=self._head.indices,
            num_blocks=self._head.indices[-1] + 1,
            margin=self._head.reach.margin,
            journal=journal,
            dtype=dtype,
            on_progress=on_progress,
        )[1]

    def strips(
        self,
        tokens: list[StreamedTokens],
        rows: tuple[int, int],
        on_progress: OnProgress,
        num_readers: int | None = None,
    ) -> Generator[Strip, None, None]:
        """Run the head over bands of parts, and yield their rows from top to bottom.

        Args:
            tokens: Result of `tokens`.
            rows: First row of pixels wanted, and the first below; strips may hold others.
            on_progress: Called with (rows of tokens done, in all).
            num_readers: Number of threads that read; one per processor by default.

        Raises:
            InputError: A part can't be read.
            NotFiniteError: A score is infinite or not a number.
        """
        bands = list(self._bands(*rows))
        parts = [part for band in bands for part in self._parts(band)]
        readers = num_readers or num_processors()
        tiles = load_ahead(parts, self._read, num_threads=readers, depth=readers + 1)
        try:
            for band in bands:
                height = min(band.height * self._head.patch[0], self._source.height - band.row * self._head.patch[0])
                yield from self._strips_of(self._band(tokens, band, height, tiles))
                on_progress(band.row_stop, self._image.grid[0])
        finally:
            tiles.close()

    def _bands(self, start: int, stop: int) -> Iterator[Window]:
        """Yield the bands of tokens that hold rows of pixels; bands don't depend on the rows."""
        (rows, columns), height = self._image.grid, self._part[0]
        for row in range(0, rows, height):
            band = Window(row, 0, min(height, rows - row), columns)
            pixels = self._head.in_pixels(band)
            if pixels.row < stop and pixels.row_stop > start:
                yield band

    def _parts(self, band: Window) -> Iterator[Window]:
        width = self._part[1]
        for column in range(0, band.width, width):
            yield Window(band.row, column, band.height, min(width, band.width - column))

    def _read(self, part: Window) -> tuple[Window, Tile]:
        outer = self._head.in_pixels(self._head.with_margin(part, self._image.grid))
        reader = self._source if self._damage is None else self._damage.of_part(self._head.in_pixels(part))
        return part, read_tile(reader, self._normalize, outer)

    def _band(
        self, tokens: list[StreamedTokens], band: Window, height: int, tiles: Iterator[tuple[Window, Tile]]
    ) -> Strip:
        """Compute the scores of a band."""
        window = Window(self._head.in_pixels(band).row, 0, height, self._source.width)
        scores = np.zeros((self._num_classes, *window.shape), np.float32)
        valid = np.zeros(window.shape, bool)
        for _ in self._parts(band):
            part, tile = next(tiles)
            inner = self._head.in_pixels(part)
            kept = inner.intersect(window)
            assert kept is not None
            found = tile.valid[inner.slices_in(tile.window)][kept.slices_in(inner)]
            valid[kept.slices_in(window)] = found
            if tile.pixels is not None and found.any():
                scores[:, *kept.slices_in(window)] = self._scores(tokens, part, tile)[:, *kept.slices_in(inner)]
        return Strip(window, scores, valid)

    def _scores(self, tokens: list[StreamedTokens], part: Window, tile: Tile) -> FloatArray:
        assert tile.pixels is not None
        pixels = torch.from_numpy(np.ascontiguousarray(tile.pixels))[None]
        scores: FloatArray = self._head.scores(tokens, part, pixels).float().numpy()
        try:
            check_finite(scores[None], "scores", lambda _: str(self._head.in_pixels(part)))
        except NotFiniteError as error:
            raise NotFiniteError(f"{self._source.path}: {error}") from error
        return scores

    def _strips_of(self, band: Strip) -> Iterator[Strip]:
        for first in range(0, band.window.height, _STRIP_ROWS):
            rows = slice(first, min(first + _STRIP_ROWS, band.window.height))
            window = Window(band.window.row + first, 0, rows.stop - rows.start, band.window.width)
            yield Strip(window, band.scores[:, rows], band.valid[rows])


def map_whole(
    predictor: Any,
    source: Source,
    folder: Path,
    gaps: list[tuple[int, int]],
    write: StripWriter,
    on_progress: OnProgress,
) -> None:
    """Predict rows of a map in one forward pass.

    Args:
        predictor: Segmentation model and options.
        source: Image.
        folder: Folder of the unfinished map.
        gaps: Rows of pixels, as (first, first below).
        write: Where its strips go.
        on_progress: Called with (rows of tokens done, in all).

    Raises:
        CheckpointError: The model needs all tokens at once.
        InputError: The image can't be read, or has no valid pixel.
        OptionError: Several processes form a group.
        OutputError: The disk or the memory is too small, or the folder of tokens holds those of another model or image.
    """
    if (number := Processes().number) > 1:
        raise OptionError(f"whole maps are made by one process, got a group of {number}; end the group first")
    options = predictor.options
    # What couldn't be read belongs to the tokens, which outlive the map's folder where they are elsewhere.
    noted = folder if options.store == "memory" else _token_folder(options.token_folder, folder)
    damage = _Damage(source, DamageLog(noted), DamageLog(folder)) if options.on_error == "skip" else None
    whole, journal = _begun(predictor, source, folder, damage)

    whole.run(
        gaps,
        write,
        on_tokens=(lambda: None) if damage is None else damage.tokens_are_made,
        flush=write.flush,
        journal=journal,
        token_dtype=options.token_dtype,
        keep_tokens=options.keep_tokens,
        num_readers=options.num_readers,
        on_progress=on_progress,
    )


def plan_map(predictor: Any, source: Source, out: Path) -> WholePlan:
    """Return what the map of a whole image takes, with the time of its model on this machine.

    Args:
        predictor: Segmentation model and options.
        source: Image.
        out: Path of the map.

    Raises:
        CheckpointError: The model needs all tokens at once.
    """
    whole, journal = _begun(predictor, source, partial_folder(out), resume=True)
    return whole.plan(journal, predictor.options.token_dtype, predictor.output().encode)


def _begun(
    predictor: Any, source: Source, folder: Path, damage: _Damage | None = None, *, resume: bool | None = None
) -> tuple[WholeImage, TokenJournal | None]:
    predictor.ready()
    options, spec = predictor.options, predictor.model.spec
    whole = WholeImage(predictor.model, source, len(spec.classes), damage)
    if options.store == "memory":
        return whole, None
    # Tokens that leave out what can't be read are none of a map that stops there.
    identity = {**predictor.model_settings, **SourceIdentity(source).settings, "on_error": options.on_error}
    resume = options.resume if resume is None else resume
    return whole, TokenJournal(_token_folder(options.token_folder, folder), identity, resume=resume)


def _token_folder(given: str | Path | None, folder: Path) -> Path:
    """Folder of a map's tokens, of one name for each output: in that of its rows, or in the one that is given."""
    if given is None:
        return folder / TOKEN_FOLDER
    name = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:12]
    return Path(given, f"perf_vit_tokens_{name}")
