"""What a map holds: blended scores turned into the pixels of a file."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from perf_vit.errors import OptionError, PerfVitError
from perf_vit.inference.dense import Strip
from perf_vit.inference.options import OutputKind
from perf_vit.inference.seams import SeamCount, largest_score
from perf_vit.plotting import default_colormap
from perf_vit.types import IGNORE_INDEX, Source, Window
from perf_vit.writers import HeldRows, RasterLayout, StripStore

__all__ = ["DenseOutput", "StripWriter", "class_map", "class_output", "class_probabilities"]

FloatArray = npt.NDArray[np.float32]
ToProbabilities = Callable[[FloatArray, float], FloatArray]

# Strips that are encoded and not written yet: each takes memory.
_STRIPS_BEHIND = 2

_LEVELS = 254
"""Steps of a quantised probability; 255 is nodata."""


@dataclass(frozen=True, kw_only=True)
class DenseOutput:
    """How strips become the bands of a map.

    Attributes:
        encode: a strip to pixels [C, h, w].
        band_names: one a band.
        dtype: of the pixels.
        nodata: value of missing pixels.
        colormap: makes the table of value to (red, green, blue, alpha); None for none.
        scale: what pixels are to be multiplied with to get their value.
        overviews: how to make them.
        tags: metadata of the file.
    """

    encode: Callable[[Strip], npt.NDArray[Any]]
    band_names: Sequence[str]
    dtype: npt.DTypeLike
    nodata: float | None
    colormap: Callable[[], Mapping[int, tuple[int, ...]]] | None = None
    scale: float = 1.0
    overviews: Literal["nearest", "average"] | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    def layout(self, source: Source) -> RasterLayout:
        """The pixels on a source's grid, without colours and tags."""
        return RasterLayout(
            height=source.height,
            width=source.width,
            num_bands=len(self.band_names),
            dtype=np.dtype(self.dtype),
            crs=source.crs,
            transform=source.transform,
            nodata=self.nodata,
            band_names=tuple(self.band_names),
            scale=self.scale,
            overviews=self.overviews or ("average" if self.colormap is None else "nearest"),
        )

    def map_layout(self, source: Source, tags: Mapping[str, str]) -> RasterLayout:
        """The file on a source's grid, with further tags."""
        colors = None if self.colormap is None else self.colormap()
        return replace(self.layout(source), colormap=colors, tags={**self.tags, **tags})


class StripWriter:
    """Encodes strips and has a thread compress and write them.

    Args:
        output: How strips become pixels.
        store: Rows of the map.
        pool: Thread that writes.
        note_seams: Called with the rows and the count of each strip that has one, before its pixels are written.
    """

    def __init__(
        self,
        output: DenseOutput,
        store: StripStore | HeldRows,
        pool: ThreadPoolExecutor,
        note_seams: Callable[[Window, SeamCount], None] = lambda window, count: None,
    ) -> None:
        self._output = output
        self._store = store
        self._note_seams = note_seams
        self._pool = pool
        self._waiting: deque[Future[None]] = deque()

    def __call__(self, strip: Strip) -> None:
        """Encode a strip and hand it over, once all but one of those before it are written.

        Raises:
            OutputError: One of those can't be written.
        """
        pixels = self._output.encode(strip)
        if isinstance(self._store, HeldRows):
            self._write(strip.window, strip.seams, pixels)
            return
        if any(np.may_share_memory(pixels, held) for held in (strip.scores, strip.valid)):
            pixels = pixels.copy()
        while len(self._waiting) >= _STRIPS_BEHIND:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._write, strip.window, strip.seams, pixels))

    def _write(self, window: Window, seams: SeamCount | None, pixels: npt.NDArray[Any]) -> None:
        if seams is not None:
            self._note_seams(window, seams)
        self._store.write(window.row, pixels)

    def flush(self) -> None:
        """Wait until all strips are written.

        Raises:
            OutputError: One of them can't be written.
        """
        waiting, self._waiting = self._waiting, deque()
        wait(waiting)
        for future in waiting:
            future.result()


def class_output(
    kind: OutputKind,
    classes: Sequence[str],
    *,
    background: int | None = None,
    multilabel: bool = False,
    score_threshold: float = 0.5,
) -> DenseOutput:
    """The output of a semantic segmenter, whose scores are one logit a class.

    "classes" is one uint8 band of class indices with a colour table and nodata 255, "probabilities" one float32 band
    a class with nodata NaN, "probabilities-uint8" the same in 254 steps with nodata 255: a quarter of the size.

    Args:
        kind: of these.
        classes: their names.
        background: index of the class that is background, if one is; it is dark grey.
        multilabel: each class is true or not by itself. "classes" is then a uint8 band of 0 and 1 a class, and
            probabilities are sigmoids.
        score_threshold: with `multilabel`, the probability from which on a class is true.

    Raises:
        PerfVitError: none of these, more than 255 classes that exclude each other in a class map, or a threshold that
            is no probability between 0 and 1.
    """
    tags = {"PERF_VIT_CLASSES": ",".join(classes)}
    if kind == "classes" and multilabel:
        return _true_classes(classes, score_threshold, tags)
    to_probabilities = sigmoid if multilabel else softmax
    if kind == "classes":
        return DenseOutput(
            encode=lambda strip: class_map(strip)[None],
            band_names=["class"],
            dtype="uint8",
            nodata=_nodata_besides(classes),
            colormap=partial(default_colormap, len(classes), background),
            tags=tags,
        )
    if kind == "probabilities":
        return DenseOutput(
            encode=partial(_probabilities, to_probabilities),
            band_names=classes,
            dtype="float32",
            nodata=float("nan"),
            tags=tags,
        )
    if kind == "probabilities-uint8":
        return DenseOutput(
            encode=partial(_quantised, to_probabilities),
            band_names=classes,
            dtype="uint8",
            nodata=IGNORE_INDEX,
            scale=1 / _LEVELS,
            overviews="average",
            tags=tags,
        )
    raise PerfVitError(f"expected classes, probabilities or probabilities-uint8 as the kind of the map, got {kind}")


def _nodata_besides(classes: Sequence[str]) -> int:
    """Nodata of a map of class indices, which is none of them."""
    if len(classes) > IGNORE_INDEX:
        raise OptionError(
            f"kind must be probabilities for more than {IGNORE_INDEX} classes, as {IGNORE_INDEX} is nodata in maps of "
            f"classes; got classes and {len(classes)} classes"
        )
    return IGNORE_INDEX


def class_map(strip: Strip) -> npt.NDArray[np.uint8]:
    """The class of largest score, `IGNORE_INDEX` where there is no data: [h, w]."""
    return np.where(strip.valid, largest_score(strip.scores), np.uint8(IGNORE_INDEX))


def softmax(scores: FloatArray, scale: float = 1.0) -> FloatArray:
    """`scale` times the softmax of [K, h, w] over K."""
    shifted = np.exp(scores - scores.max(0))
    shifted *= scale / shifted.sum(0)
    return shifted


def sigmoid(scores: FloatArray, scale: float = 1.0) -> FloatArray:
    """`scale` times the sigmoid of each score."""
    # By the hyperbolic tangent, which doesn't overflow.
    return np.float32(scale / 2) * (1 + np.tanh(scores / 2))


def class_probabilities(strip: Strip, *, multilabel: bool = False) -> FloatArray:
    """Softmax of the scores, or sigmoids with `multilabel`, NaN where there is no data: [K, h, w]."""
    return _probabilities(sigmoid if multilabel else softmax, strip)


def _probabilities(to_probabilities: ToProbabilities, strip: Strip) -> FloatArray:
    return np.where(strip.valid, to_probabilities(strip.scores, 1.0), np.float32("nan"))


def _quantised(to_probabilities: ToProbabilities, strip: Strip) -> npt.NDArray[np.uint8]:
    """Times 254, rounded, 255 where there is no data: [K, h, w]."""
    scaled = to_probabilities(strip.scores, float(_LEVELS))
    return np.where(strip.valid, np.rint(scaled).astype(np.uint8), np.uint8(IGNORE_INDEX))


def _true_classes(classes: Sequence[str], score_threshold: float, tags: Mapping[str, str]) -> DenseOutput:
    if not 0 < score_threshold < 1:
        raise PerfVitError(f"score_threshold must lie between 0 and 1, got {score_threshold:g}")
    least_score = np.float32(math.log(score_threshold / (1 - score_threshold)))

    def encode(strip: Strip) -> npt.NDArray[np.uint8]:
        return np.where(strip.valid, (strip.scores > least_score).astype(np.uint8), np.uint8(IGNORE_INDEX))

    tags = {**tags, "PERF_VIT_THRESHOLD": str(float(score_threshold))}
    return DenseOutput(encode=encode, band_names=classes, dtype="uint8", nodata=IGNORE_INDEX, tags=tags)
