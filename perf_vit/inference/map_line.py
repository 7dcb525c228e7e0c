"""Maps of many inputs: while the model computes one, the next are opened and read, and earlier ones are finished."""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perf_vit.errors import BusyError, NotFiniteError, PerfVitError
from perf_vit.inference.batch import InputReport, report_of
from perf_vit.inference.dense import FloatArray, Forward, StripMaker
from perf_vit.inference.dense_output import StripWriter
from perf_vit.inference.inputs import MapInput
from perf_vit.inference.jobs import JobResult
from perf_vit.inference.prefetch import Reads, Tile, in_batches, load_ahead, read_tile
from perf_vit.sources import bounded_cache
from perf_vit.threads import num_processors
from perf_vit.types import BoolArray, Window
from perf_vit.writers import HeldRows, StripStore

if TYPE_CHECKING:
    from perf_vit.inference.segmentation import MapWork, SegmentationPredictor

__all__ = ["MapLine"]

# Small inputs that are opened, and have their outputs locked, before the model comes to them.
_INPUTS_AHEAD = 4

# Tiles read ahead beyond the next batch: each of a small input holds a lock, which is an open file.
_TILES_AHEAD = 32

# Maps that are predicted and not written yet.
_MAPS_BEHIND = 4

# Small maps mostly wait for the disk; large ones use all processors each.
_NUM_FINISHERS = 2


@dataclass(eq=False)
class _Input:
    """One of many inputs on its way.

    Attributes:
        item: Input and output.
        started: Time.
        work: Its map, None where that failed.
        makers: Blending of each gap of the map.
        write: Function of a strip.
        reader: Source of its pixels.
        tile: Its only tile, read where the file was opened: opening takes longer than reading.
        problem: How it differs from the training images.
        num_done: Windows that went through the model.
        error: First failure.
        is_closed: Whether input and output are let go of.
        ended: Time when they were.
    """

    item: MapInput
    started: float
    work: MapWork | None = None
    makers: list[StripMaker] = field(default_factory=list)
    write: StripWriter | None = None
    reader: Reads | None = None
    tile: Tile | None = None
    problem: str | None = None
    num_done: int = 0
    error: Exception | None = None
    is_closed: bool = False
    ended: float = 0.0

    def fail(self, error: Exception) -> None:
        self.error = self.error or error

    def close(self) -> JobResult | Exception:
        """Finish the map, let go of everything, and give the result or the error."""
        self.is_closed = True
        try:
            if self.work is None:
                assert self.error is not None
                raise self.error
            with self.work:
                self.flush()
                if self.error is not None:
                    raise self.error
                return self.work.finish()
        except Exception as error:
            return error
        finally:
            for maker in self.makers:
                maker.close()
            if self.error is not None:
                # Its frames hold rows of windows, and it is held by frames of this thread.
                traceback.clear_frames(self.error.__traceback__)

    def flush(self) -> None:
        """Wait until all rows so far are on disk."""
        try:
            if self.write is not None:
                self.write.flush()
        except Exception as error:
            self.fail(error)

    def let_go(self) -> None:
        """Let go of input and output, with finished rows for a later call."""
        if self.is_closed or self.work is None:
            return
        self.is_closed = True
        with suppress(GeneratorExit, PerfVitError), self.work:
            self.flush()
            raise GeneratorExit


@dataclass(frozen=True, slots=True)
class _Piece:
    """A tile on its way, or the end of an input."""

    input: _Input
    maker: StripMaker | None = None
    tile: Tile | None = None
    is_last: bool = False

    @property
    def pixels(self) -> FloatArray | None:
        # Not by the input's error: one that comes between the model and its use would shift the scores of others.
        return None if self.tile is None else self.tile.pixels

    @property
    def valid(self) -> BoolArray:
        assert self.tile is not None
        return self.tile.valid


class MapLine:
    """Makes the maps of many inputs in their order; batches of the model run across inputs.

    Some threads open inputs and lock their outputs, others read windows, one blends and writes rows, others finish
    maps; the model computes in the calling thread. What goes wrong with an input is part of its report.

    Args:
        predictor: Model and options.
        on_progress: Called with (windows done, windows in all) of the current input.
    """

    def __init__(self, predictor: SegmentationPredictor, on_progress: Callable[[int, int], None]) -> None:
        self._predictor = predictor
        self._on_progress = on_progress
        self._spec = predictor.model.spec
        self._unsettled: set[_Input] = set()
        self._settled_at = 0.0
        options, self._device = predictor.options, predictor.ready()
        self._model = Forward(predictor.model, len(self._spec.classes), self._device, options.dtype, options.flips)
        # Before several threads need them, as each would make one of its own.
        _ = predictor.check_input, predictor.model_id

    def run(self, inputs: Sequence[MapInput]) -> Generator[InputReport, None, None]:
        """Make the maps and yield a report of each, in order.

        Inputs that are on their way when the generator is closed are left for a later call, with their finished rows.
        With `on_error="stop"`, none is finished after one that failed before whoever takes the reports goes on.
        """
        num_done = 0
        while num_done < len(inputs):
            with closing(self._run(inputs[num_done:])) as reports:
                for report in reports:
                    num_done += 1
                    yield report

    def _run(self, inputs: Sequence[MapInput]) -> Generator[InputReport, None, None]:
        """Make the maps up to the end, or the first failure that stops."""
        self._is_stopped = False
        options, readers = self._predictor.options, self._predictor.options.num_readers or num_processors()
        self._finishers = ThreadPoolExecutor(_NUM_FINISHERS, thread_name_prefix="perf_vit-finisher")
        self._writers = ThreadPoolExecutor(1, thread_name_prefix="perf_vit-writer")
        pending: deque[tuple[_Input, Future[JobResult | Exception]]] = deque()
        with ExitStack() as stack:
            stack.enter_context(bounded_cache())
            stack.callback(self._writers.shutdown)
            stack.callback(self._let_go)
            stack.callback(self._finishers.shutdown, cancel_futures=True)
            depth = options.batch_size + min(options.batch_size, _TILES_AHEAD) + readers
            begun = stack.enter_context(closing(self._begun(inputs, depth)))
            pieces = load_ahead(self._windows(begun), self._read, num_threads=readers, depth=depth)
            batches = in_batches(self._forward, pieces, self._consume, options.batch_size)
            for finishing in stack.enter_context(closing(batches)):
                # None after each batch, so that a map is reported, and its error stops, while a long one is computed.
                if finishing is not None:
                    pending.append(finishing)
                while pending and (len(pending) > _MAPS_BEHIND or pending[0][1].done()):
                    yield self._settled(*pending.popleft())
            while pending:
                yield self._settled(*pending.popleft())

    def _begun(self, inputs: Sequence[MapInput], num_ahead: int) -> Generator[_Input, None, None]:
        """Begin inputs in threads: several ahead while they are small, else none, as other processes may take them."""
        todo, begun = deque(inputs), deque[tuple[MapInput, Future[_Input]]]()
        pool = ThreadPoolExecutor(2, thread_name_prefix="perf_vit-opener")

        def begin(depth: int) -> None:
            while todo and len(begun) < depth:
                item = todo.popleft()
                begun.append((item, pool.submit(self._begin, item)))

        try:
            begin(1)
            while begun:
                found = begun.popleft()[1].result()
                if sum(len(maker.windows) for maker in found.makers) <= num_ahead:
                    begin(_INPUTS_AHEAD)
                else:
                    todo.extendleft(item for item, _ in reversed(begun))
                    self._return([future for _, future in begun])
                    begun.clear()
                yield found
                begin(1)
        finally:
            pool.shutdown(cancel_futures=True)

    def _return(self, begun: Sequence[Future[_Input]]) -> None:
        """Let go of inputs that were begun behind a small one, and are behind a large one now."""
        for future in begun:
            if not future.cancel():
                found = future.result()
                found.let_go()
                self._unsettled.discard(found)

    def _begin(self, item: MapInput) -> _Input:
        found = _Input(item, time.monotonic())
        self._unsettled.add(found)
        try:
            found.work = work = self._predictor.work(item.path, item.output)
            if work.store is not None:
                self._prepare(found, work, work.store)
        except Exception as error:
            found.fail(error)
        return found

    def _prepare(self, found: _Input, work: MapWork, store: StripStore | HeldRows) -> None:
        found.problem = self._predictor.check_input.problem(work.source)
        found.write = self._predictor.writer(store, self._writers)
        found.reader = self._predictor.reader(work.source, store.folder)
        gaps = store.gaps(0, work.source.height)
        found.makers = [self._predictor.maker(work.source.extent, gap) for gap in gaps]
        windows = [window for maker in found.makers for window in maker.windows]
        if len(windows) == 1:
            found.tile = read_tile(found.reader, self._spec.normalizer, windows[0])

    def _windows(self, begun: Iterator[_Input]) -> Iterator[tuple[_Input, StripMaker | None, Window | None, bool]]:
        """All windows, and whether one is its input's last; one without window ends an input early."""
        for found in begun:
            try:
                self._predictor.check_input.warn(found.problem)
            except Exception as error:
                # A filter of warnings turns them into errors.
                found.fail(error)
            windows = [(maker, window) for maker in found.makers for window in maker.windows]
            is_last = False
            for number, (maker, window) in enumerate(windows, 1):
                if found.error is not None or self._is_stopped:
                    break
                is_last = number == len(windows)
                yield found, maker, window, is_last
            if not is_last:
                yield found, None, None, True
            if self._is_stopped or self._stops_at(found):
                return

    def _stops_at(self, found: _Input) -> bool:
        """Whether no further input is to be begun after one."""
        is_failure = found.error is not None and not isinstance(found.error, BusyError)
        return is_failure and self._predictor.options.on_error == "stop"

    def _read(self, wanted: tuple[_Input, StripMaker | None, Window | None, bool]) -> _Piece:
        found, maker, window, is_last = wanted
        tile = None
        if window is not None and found.error is None:
            assert found.reader is not None
            try:
                tile = found.tile or read_tile(found.reader, self._spec.normalizer, window)
            except Exception as error:
                found.fail(error)
        return _Piece(found, maker, tile, is_last)

    def _forward(self, pieces: Sequence[_Piece]) -> Tensor:
        """Scores of a batch; where the model fails, those of each input by itself, so that no other fails with it."""
        try:
            return self._model(pieces)
        except Exception as error:
            inputs = list(dict.fromkeys(piece.input for piece in pieces))
            if len(inputs) > 1:
                return torch.cat([self._forward([p for p in pieces if p.input is each]) for each in inputs])
            inputs[0].fail(error)
            return torch.zeros(len(pieces), len(self._spec.classes), *pieces[0].valid.shape, device=self._device)

    def _consume(
        self, pieces: Sequence[_Piece], scores: Sequence[FloatArray | None]
    ) -> list[tuple[_Input, Future[JobResult | Exception]] | None]:
        """Blend scores, write rows, and have maps finished of which these were the last."""
        finishing: list[tuple[_Input, Future[JobResult | Exception]] | None] = []
        for piece, found in zip(pieces, scores, strict=True):
            try:
                self._add(piece, found)
            except Exception as error:
                piece.input.fail(error)
            if piece.is_last and not self._is_stopped:
                finishing.append((piece.input, self._finishers.submit(self._finish, piece.input)))
                if self._stops_at(piece.input):
                    self._is_stopped = True
        self._show(pieces[-1].input)
        return [*finishing, None]

    def _finish(self, found: _Input) -> JobResult | Exception:
        outcome = found.close()
        found.ended = time.monotonic()
        if isinstance(outcome, Exception):
            found.fail(outcome)
            if self._stops_at(found):
                self._is_stopped = True
        return outcome

    def _show(self, found: _Input) -> None:
        if found.makers:
            self._on_progress(found.num_done, sum(len(maker.windows) for maker in found.makers))

    def _add(self, piece: _Piece, scores: FloatArray | None) -> None:
        found = piece.input
        if piece.tile is None or piece.maker is None or found.error is not None:
            return
        assert found.write is not None
        try:
            for strip in piece.maker.add(piece.tile, scores):
                found.write(strip)
        except NotFiniteError as error:
            raise NotFiniteError(f"{found.item.path}: {error}") from error
        found.num_done += 1

    def _settled(self, found: _Input, future: Future[JobResult | Exception]) -> InputReport:
        outcome = future.result()
        self._unsettled.discard(found)
        # The error's traceback holds the frames that hold this.
        found.error = None
        # Of the time that it shares with the input before, none counts twice.
        seconds = max(0.0, found.ended - max(found.started, self._settled_at))
        self._settled_at = max(found.ended, self._settled_at)
        return report_of(found.item, outcome, seconds)

    def _let_go(self) -> None:
        for found in self._unsettled:
            found.let_go()
        self._unsettled.clear()
