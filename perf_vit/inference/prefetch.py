"""Windows of an image that the model waits for, and use of its scores while it computes."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from perf_vit.models.read_ahead import (
    Entry,
    Reads,
    SalvagingReader,
    Tile,
    load_ahead,
    read_ahead,
    read_tile,
    to_device,
    valid_pixels,
)
from perf_vit.types import GeoImage, Window

__all__ = [
    "Entry",
    "FirstWindows",
    "Reads",
    "SalvagingReader",
    "Tile",
    "in_batches",
    "load_ahead",
    "read_ahead",
    "read_tile",
    "takes_valid",
    "to_device",
    "valid_pixels",
]

FloatArray = npt.NDArray[np.float32]


def takes_valid(model: Callable[..., Any]) -> bool:
    """Whether a model, or a function of tiles, has an argument `valid`: the valid pixels, bool [B, h, w], or None."""
    # The module that `torch.compile` returns takes any arguments and hands them on.
    function = getattr(model, "_orig_mod", model).forward if isinstance(model, nn.Module) else model
    try:
        return "valid" in inspect.signature(function).parameters
    except ValueError:
        # Functions written in C have no signature.
        return False


class FirstWindows:
    """Source whose first windows are read when it is made, as those of the next image while the model computes.

    Args:
        source: Source of the pixels.
        windows: Windows to read now; each is given once and not kept.

    Raises:
        InputError: A window can't be read.
    """

    def __init__(self, source: Reads, windows: Iterable[Window]) -> None:
        self._source = source
        self._images = {window: source.read(window) for window in windows}

    def read(self, window: Window) -> GeoImage:
        """Pixels and valid mask of a window."""
        image = self._images.pop(window, None)
        return self._source.read(window) if image is None else image


# Batches whose scores wait while the model computes the next.
_BATCHES_BEHIND = 2

Result = TypeVar("Result")


AnyEntry = TypeVar("AnyEntry", bound=Entry)

# A batch holds further windows without a valid pixel, but not a scene of them.
_MAX_EMPTY = 32


def in_batches(
    forward: Callable[[list[AnyEntry]], Tensor],
    entries: Generator[AnyEntry, None, None],
    consume: Callable[[list[AnyEntry], list[FloatArray | None]], Sequence[Result]],
    batch_size: int,
) -> Generator[Result, None, None]:
    """Run a model on batches in this thread, and a function of their scores in another one meanwhile.

    Args:
        forward: Model of the entries of a batch that have pixels, all of one shape; to scores [B, K, h, w].
        entries: Tiles in order; closed at the end.
        consume: Function of the entries of a batch and their scores [K, h, w], None for those without pixels; called
            in order, at most two batches behind the model.
        batch_size: Maximum number of tiles in a forward pass.

    Yields:
        Each of the results of `consume`, in order.

    Raises:
        Exception: What a function or the generator raises. Batches before it are consumed, none after it.
    """
    failed = Event()

    def guarded(batch: list[AnyEntry], scores: Tensor | None, computed: torch.cuda.Event | None) -> Sequence[Result]:
        # What follows a batch that failed would be blended without its share.
        if failed.is_set():
            return ()
        try:
            return _consume(consume, batch, scores, computed)
        except BaseException:
            failed.set()
            raise

    waiting: deque[Future[Sequence[Result]]] = deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="perf_vit-blender")
    try:
        for batch in _batches(entries, batch_size):
            used = [entry for entry in batch if entry.pixels is not None]
            scores = forward(used) if used else None
            waiting.append(pool.submit(guarded, batch, scores, _end_of(scores)))
            while len(waiting) > _BATCHES_BEHIND:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except Exception:
        pool.shutdown()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        entries.close()


def _consume(
    consume: Callable[[list[AnyEntry], list[FloatArray | None]], Sequence[Result]],
    batch: list[AnyEntry],
    scores: Tensor | None,
    computed: torch.cuda.Event | None,
) -> Sequence[Result]:
    if computed is not None:
        computed.synchronize()
    found = iter(() if scores is None else scores.cpu().numpy())
    return consume(batch, [None if entry.pixels is None else next(found) for entry in batch])


def _end_of(scores: Tensor | None) -> torch.cuda.Event | None:
    """When a GPU has computed scores: another thread copies them in its own stream, which doesn't wait for this one."""
    if scores is None or scores.device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(scores.device))
    return event


def _batches(entries: Iterable[AnyEntry], batch_size: int) -> Iterator[list[AnyEntry]]:
    """All entries in order, up to `batch_size` with pixels of one shape at a time."""
    batch: list[AnyEntry] = []
    shapes: list[tuple[int, ...]] = []
    for entry in entries:
        shape = None if entry.pixels is None else entry.pixels.shape
        if shape is not None and shapes and shape != shapes[0]:
            yield batch
            batch, shapes = [], []
        batch.append(entry)
        shapes += [] if shape is None else [shape]
        if len(shapes) == batch_size or len(batch) == batch_size + _MAX_EMPTY:
            yield batch
            batch, shapes = [], []
    if batch:
        yield batch
