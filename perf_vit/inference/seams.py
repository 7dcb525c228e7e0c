"""Seam disagreement: the share of a map's pixels on which overlapping windows decide differently.

It is the share of the valid pixels under two or more windows on which not all of these windows give the same decision,
before they are blended. A decision is the class of the largest score, where classes exclude each other; else which
classes are true. So it is the same number for a map of classes and for one of probabilities, and 0 for a model that
looks no further than the pixel. Scores that are no classes, such as heights, have no decisions: nothing is counted,
unless `StripMaker` is given a function that makes classes of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from perf_vit.types import BoolArray, Window

__all__ = ["Decide", "SeamCount", "SeamCounter", "decide_classes", "largest_score"]

FloatArray = npt.NDArray[np.float32]

Decide = Callable[[FloatArray], npt.NDArray[Any]]
"""Scores [K, h, w] to decisions [L, h, w]: windows disagree about a pixel where one of the L numbers differs."""

# The last one is the value of a comparison, as a byte.
_SEEN, _SHARED, _DIFFERS = np.uint8(4), np.uint8(2), np.uint8(1)


@dataclass(frozen=True, slots=True)
class SeamCount:
    """Pixels of some rows on which several windows could disagree, and did.

    Attributes:
        num_shared: Number of valid pixels that two or more windows cover.
        num_differing: Number of those on which the windows decide differently.
    """

    num_shared: int = 0
    num_differing: int = 0

    def __add__(self, other: SeamCount) -> SeamCount:
        return SeamCount(self.num_shared + other.num_shared, self.num_differing + other.num_differing)

    @property
    def share(self) -> float | None:
        """Share of the shared pixels on which windows disagree, None without such pixels."""
        return self.num_differing / self.num_shared if self.num_shared else None


class SeamCounter:
    """Compares the decisions of each window with those of the first window that covered a pixel.

    All windows agree about a pixel if none differs from the first, so one decision a pixel is kept, in a ring of rows.

    Args:
        decide: Function from scores to decisions.
        windows: Windows of the grid, all of one size.
        width: Number of columns of the ring, whose height is that of a window.
    """

    def __init__(self, decide: Decide, windows: Sequence[Window], width: int) -> None:
        height = windows[0].height
        self._decide = decide
        self._rows = _alone({window.row for window in windows}, height)
        self._cols = _alone({window.col for window in windows}, windows[0].width)
        self._state = np.zeros((height, width), np.uint8)
        self._first: npt.NDArray[Any] | None = None

    def shared_parts(self, window: Window, inside: Window) -> Iterator[Window]:
        """Yield the parts of a window that others cover too, and rows beside them; `inside` is what counts of it."""
        (top, bottom), (left, right) = self._rows[window.row], self._cols[window.col]
        across = (inside.col, inside.col_stop)
        for rows, cols in (
            ((inside.row, top), across),
            ((top, bottom), (inside.col, left)),
            ((top, bottom), (right, inside.col_stop)),
            ((bottom, inside.row_stop), (inside.col, left)),
            ((bottom, inside.row_stop), (left, inside.col_stop)),
        ):
            if rows[0] < rows[1] and cols[0] < cols[1]:
                part = Window(rows[0], cols[0], rows[1] - rows[0], cols[1] - cols[0]).intersect(inside)
                if part is not None:
                    yield part

    def add(self, held: tuple[slice, slice], scores: FloatArray) -> None:
        """Take the scores of a part of a window, [K, h, w], at some rows and columns of the ring."""
        decided = self._decide(scores)
        if self._first is None:
            self._first = np.zeros((len(decided), *self._state.shape), decided.dtype)
        first, state = self._first[:, *held], self._state[held]
        if state.max() == 0:
            first[:] = decided
            state[:] = _SEEN
            return
        differs = first[0] != decided[0]
        for one, other in zip(first[1:], decided[1:], strict=True):
            differs |= one != other
        if state.min() > 0:
            state |= _SHARED
            state |= differs.view(np.uint8)
            return
        # Where a window without a valid pixel was left out.
        seen = state > 0
        np.copyto(first, decided, where=~seen)
        state |= np.where(seen, differs.view(np.uint8) | _SHARED, _SEEN)

    def take(self, rows: slice, valid: BoolArray) -> SeamCount:
        """Count the valid pixels of some rows of the ring, and forget these rows."""
        state = self._state[rows] if valid.all() else np.where(valid, self._state[rows], np.uint8(0))
        count = SeamCount(int(np.count_nonzero(state & _SHARED)), int(np.count_nonzero(state & _DIFFERS)))
        self._state[rows] = 0
        return count


def _alone(starts: Set[int], size: int) -> dict[int, tuple[int, int]]:
    """For windows along an axis, by their starts: first and last pixel + 1 that no other window covers."""
    found = {}
    ordered = sorted(starts)
    for before, start, after in zip([None, *ordered], ordered, [*ordered[1:], None], strict=False):
        first = start if before is None else max(start, before + size)
        stop = start + size if after is None else min(start + size, after)
        found[start] = (first, max(first, stop))
    return found


def decide_classes(scores: FloatArray, *, multilabel: bool, score_threshold: float | None = None) -> npt.NDArray[Any]:
    """Return what the logits of a segmenter, [K, h, w], decide, [L, h, w].

    Args:
        scores: Logits.
        multilabel: Whether each class is true or not by itself; else the class of the largest score is taken.
        score_threshold: With `multilabel`, the probability from which on a class is true; 0.5 by default.
    """
    if not multilabel:
        return largest_score(scores)[None]
    threshold = 0.5 if score_threshold is None else score_threshold
    return _true_classes(np.float32(math.log(threshold / (1 - threshold))), scores)


def _true_classes(least_score: np.float32, scores: FloatArray) -> npt.NDArray[np.uint8]:
    """Eight classes a byte, [ceil(K / 8), h, w]."""
    bits = np.zeros((-(-len(scores) // 8), *scores.shape[1:]), np.uint8)
    for index, plane in enumerate(scores):
        bits[index // 8] |= (plane > least_score).view(np.uint8) << np.uint8(index % 8)
    return bits


def largest_score(scores: FloatArray) -> npt.NDArray[Any]:
    """Index of the first largest score, [h, w], of [K, h, w]: numpy's, in a tenth of its time along the first axis."""
    if len(scores) > 256:
        return scores.argmax(0).astype(np.uint16)
    if len(scores) == 1:
        return np.zeros(scores.shape[1:], np.uint8)
    found, best = (scores[1] > scores[0]).view(np.uint8), scores[0]
    for index in range(2, len(scores)):
        best = np.maximum(best, scores[index - 1])
        np.maximum(found, (scores[index] > best).view(np.uint8) * np.uint8(index), out=found)
    return found
