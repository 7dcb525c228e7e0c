"""Samples of an evaluation: the worst and the best tiles, images or slides, as pictures."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from perf_vit.errors import InputError
from perf_vit.plotting import colorize, default_colormap, natural_bands, rgb_from
from perf_vit.plotting.colors import Color, last_true
from perf_vit.plotting.panels import ERROR_COLOR, error_panel, on_white, outlined_polygons
from perf_vit.plotting.pictures import Picture, stretch_limits
from perf_vit.reporting.page import Row, figure_of, hex_color
from perf_vit.reporting.preview import Preview, picture_layer, pixel_size, read_picture
from perf_vit.types import IGNORE_INDEX, GeoImage, Source, Window

__all__ = [
    "MATCH_LEGEND",
    "Extremes",
    "ImageSamples",
    "MapSamples",
    "Sample",
    "class_legend",
    "imagery",
    "mean_iou",
    "object_sample",
    "sample_rows",
    "text_sample",
]

T = TypeVar("T")

_OVERVIEW_PX = 2048

_STRETCH_PX = 1024

_CELL_PX = (128, 512)

# Pictures of single samples side by side.
_NUM_COLUMNS = 4

# Cells with fewer labelled pixels say little.
_LEAST_LABELLED = 0.02


class Extremes(Generic[T]):
    """The items of lowest and highest score among many.

    Args:
        num: Number of items of each kind.
    """

    def __init__(self, num: int = 4) -> None:
        self.num = num
        self._low: list[tuple[float, int, T]] = []
        self._high: list[tuple[float, int, T]] = []
        self._num_offered = 0

    def offer(self, score: float, item: T) -> None:
        """Keep an item if its score is among the lowest or highest so far; NaN is none."""
        if math.isnan(score):
            return
        self._num_offered += 1
        order = self._num_offered
        for heap, key in ((self._low, -score), (self._high, score)):
            # Earlier items win ties.
            (heapq.heappush if len(heap) < self.num else heapq.heappushpop)(heap, (key, -order, item))

    @property
    def worst(self) -> list[T]:
        """Items of lowest score, the lowest first; of few items, half."""
        found = sorted(self._low, key=lambda each: each[:2], reverse=True)
        return [item for _, _, item in found][: -(-self._num_offered // 2)]

    @property
    def best(self) -> list[T]:
        """Items of highest score, the highest first, without those that are among the worst."""
        worst = {id(item) for item in self.worst}
        found = sorted(self._high, key=lambda each: each[:2], reverse=True)
        return [item for _, _, item in found if id(item) not in worst]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample, whose pictures are drawn when they are asked for.

    Attributes:
        title: What it is, with its score.
        draw: Gives its panels by caption.
        lossless: Captions of drawings; other panels are imagery.
        pixel_size: Size of a pixel of the panels and its unit, for a scale bar.
    """

    title: str
    draw: Callable[[], dict[str, Picture]]
    lossless: Sequence[str] = ()
    pixel_size: tuple[float, str] | None = None


def sample_rows(samples: Sequence[Sample]) -> list[Row]:
    """Draw samples, each as a row, those of one picture side by side; what can't be read any more is left out."""
    rows = []
    for sample in samples:
        try:
            panels = sample.draw()
        except InputError:
            continue
        figures = [
            figure_of(picture, caption, lossy=caption not in sample.lossless, pixel_size=sample.pixel_size)
            for caption, picture in panels.items()
        ]
        rows.append(Row(figures=figures, title=sample.title))
    if rows and all(len(row.figures) == 1 for row in rows):
        return [Row(figures=[replace(row.figures[0], caption=row.title) for row in rows], num_columns=_NUM_COLUMNS)]
    return rows


@dataclass
class ImageSamples:
    """Images or slides of lowest and highest score.

    Args:
        legend: Names and colours, in CSS.
        num: Number of samples of each kind.
    """

    legend: Sequence[tuple[str, str]] = ()
    num: int = 4

    def __post_init__(self) -> None:
        self._extremes: Extremes[Sample] = Extremes(self.num)

    def offer(self, score: float, sample: Sample) -> None:
        """Keep a sample if its score is among the lowest or highest so far."""
        self._extremes.offer(score, sample)

    @property
    def worst(self) -> list[Sample]:
        """Samples of lowest score."""
        return self._extremes.worst

    @property
    def best(self) -> list[Sample]:
        """Samples of highest score."""
        return self._extremes.best

    def preview(self) -> None:
        """Nothing: there are several inputs."""


def class_legend(classes: Sequence[str], colors: Any) -> list[tuple[str, str]]:
    """Return names and colours for the legend of a section."""
    return [(name, hex_color(colors[index])) for index, name in enumerate(classes)]


def imagery(source: Source) -> Callable[[GeoImage], Picture]:
    """Return a function that draws parts of a source, all with the same stretch.

    Raises:
        InputError: The source can't be read.
    """
    bands = natural_bands(source)
    is_shown_as_it_is = source.dtype == np.uint8 and source.num_bands >= 3
    limits = None if is_shown_as_it_is else stretch_limits(source.read_reduced(_STRETCH_PX), bands)
    return lambda image: rgb_from(image, bands, limits)


def mean_iou(
    predicted: npt.NDArray[Any], truth: npt.NDArray[Any], num_classes: int, *, multilabel: bool = False
) -> float:
    """Return the mean IoU of the classes that occur in a tile; NaN with few labelled pixels.

    Args:
        predicted: Class indices, [H, W]; with `multilabel`, 0 and 1 per class, [K, H, W].
        truth: Labels in the form of `predicted`; `IGNORE_INDEX` marks unlabelled pixels.
        num_classes: Number of classes.
        multilabel: Whether a pixel may have several classes.
    """
    labelled = truth != IGNORE_INDEX
    if labelled.sum() < max(1, _LEAST_LABELLED * labelled.size):
        return math.nan
    scores = []
    for index in range(num_classes):
        found, true = (each[index] == 1 if multilabel else each == index for each in (predicted, truth))
        known = labelled[index] if multilabel else labelled
        if union := ((found | true) & known).sum():
            scores.append((found & true & known).sum() / union)
    return float(np.mean(scores)) if scores else math.nan


@dataclass
class _Cell:
    """A part of a map with its truth.

    Attributes:
        source: Source of the map.
        window: The part.
        predicted: Classes, [h, w], or 0 and 1 per class, [K, h, w].
        truth: Labels in the form of `predicted`.
        iou: Mean IoU of the classes that occur.
    """

    source: Source
    window: Window
    predicted: npt.NDArray[Any]
    truth: npt.NDArray[Any]
    iou: float


@dataclass
class MapSamples:
    """Cells of lowest and highest IoU of class maps that come strip by strip, and an overview of one map.

    Memory is that of a row of cells, the chosen cells and the overview.

    Args:
        classes: Class names.
        background: Index of the background class; None for none.
        multilabel: Whether a pixel may have several classes.
        cell_px: Side of a cell in pixels.
        overview: Whether to keep an overview, of the only source.
    """

    classes: Sequence[str]
    background: int | None = None
    multilabel: bool = False
    cell_px: int = 256
    overview: bool = False
    _extremes: Extremes[_Cell] = field(default_factory=Extremes)
    _source: Source | None = None
    _extent: Window | None = None
    _strips: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = field(default_factory=list)
    _reduced: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]] = field(default_factory=list)
    _num_rows: int = 0
    _shape: tuple[int, int] = (0, 0)
    _drawing: dict[str, Callable[[GeoImage], Picture]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cell_px = min(max(self.cell_px, _CELL_PX[0]), _CELL_PX[1])

    def begin(self, source: Source, extent: Window) -> None:
        """Begin a map of a part of a source."""
        self._source, self._extent = source, extent
        self._strips, self._num_rows = [], 0
        is_small = max(extent.shape) < 1.5 * self.cell_px
        self._shape = extent.shape if is_small else (self.cell_px, self.cell_px)

    def add(self, predicted: npt.NDArray[Any], truth: npt.NDArray[Any]) -> None:
        """Add the next rows of the map, [h, width] or [K, h, width]."""
        assert self._extent is not None
        if self.overview:
            step = self._step
            first = -self._rows_done % step
            # Copies: a view would keep all rows of the map.
            rows = slice(first, None, step), slice(None, None, step)
            self._reduced.append((predicted[..., *rows].astype(np.uint8), truth[..., *rows].astype(np.uint8)))
        self._strips.append((predicted.astype(np.uint8), truth.astype(np.uint8)))
        while sum(each.shape[-2] for each, _ in self._strips) >= self._shape[0]:
            self._take(self._shape[0])

    def end(self) -> None:
        """End the map."""
        if self._strips and (rest := sum(each.shape[-2] for each, _ in self._strips)):
            self._take(rest)

    @property
    def _rows_done(self) -> int:
        return self._num_rows + sum(each.shape[-2] for each, _ in self._strips)

    @property
    def _step(self) -> int:
        assert self._extent is not None
        return max(1, math.ceil(max(self._extent.shape) / _OVERVIEW_PX))

    def _take(self, height: int) -> None:
        """Score the cells of the next rows."""
        assert self._source is not None
        assert self._extent is not None
        joined = [np.concatenate([pair[part] for pair in self._strips], axis=-2) for part in (0, 1)]
        rest = [each[..., height:, :] for each in joined]
        self._strips = [(rest[0], rest[1])] if rest[0].shape[-2] else []
        for col in range(0, self._extent.width, self._shape[1]):
            predicted, truth = (each[..., :height, col : col + self._shape[1]] for each in joined)
            place = self._extent.row + self._num_rows, self._extent.col + col
            window = Window(*place, height, predicted.shape[-1])
            iou = mean_iou(predicted, truth, len(self.classes), multilabel=self.multilabel)
            cell = _Cell(self._source, window, predicted.copy(), truth.copy(), iou)
            self._extremes.offer(cell.iou, cell)
        self._num_rows += height

    @property
    def names(self) -> list[str]:
        """Names of the legend, in the order of `colors`."""
        return ["none", *self.classes] if self.multilabel else list(self.classes)

    @property
    def colors(self) -> dict[int, Color]:
        """Colour of each shown class."""
        return default_colormap(len(self.names), 0 if self.multilabel else self.background)

    @property
    def legend(self) -> list[tuple[str, str]]:
        """Names and colours of classes and errors."""
        return [*class_legend(self.names, self.colors), ("error", hex_color(ERROR_COLOR))]

    @property
    def worst(self) -> list[Sample]:
        """Cells of lowest IoU."""
        return [self._sample(cell) for cell in self._extremes.worst]

    @property
    def best(self) -> list[Sample]:
        """Cells of highest IoU."""
        return [self._sample(cell) for cell in self._extremes.best]

    def _sample(self, cell: _Cell) -> Sample:
        place = f"{Path(cell.source.path).name}, row {cell.window.row}, column {cell.window.col}"

        def draw() -> dict[str, Picture]:
            seen = self._imagery(cell.source)(cell.source.read(cell.window))
            truth, predicted = (on_white(self._painted(each)) for each in (cell.truth, cell.predicted))
            errors = error_panel(seen, cell.truth, cell.predicted)
            return {"image": seen, "labels": truth, "prediction": predicted, "errors": errors}

        return Sample(
            title=f"mean IoU {cell.iou:.3f}: {place}",
            draw=draw,
            lossless=("labels", "prediction", "errors"),
            pixel_size=pixel_size(cell.source),
        )

    def _imagery(self, source: Source) -> Callable[[GeoImage], Picture]:
        """How a source is drawn, which takes a look at all of it, once."""
        if source.path not in self._drawing:
            self._drawing[source.path] = imagery(source)
        return self._drawing[source.path]

    def _painted(self, labels: npt.NDArray[Any]) -> Picture:
        shown = last_true(labels) if self.multilabel else labels
        return colorize(shown.astype(np.uint8), self.colors)

    def preview(self) -> Preview | None:
        """A zoomable picture of the map, its labels and its errors; None for several maps."""
        if not self._reduced or self._source is None or self._extent is None:
            return None
        source, extent = self._source, self._extent
        predicted, truth = (np.concatenate([pair[part] for pair in self._reduced], axis=-2) for part in (0, 1))
        try:
            seen = read_picture(source, self._imagery(source), _OVERVIEW_PX, extent)
        except InputError:
            return None
        wrong = (predicted != truth) & (truth != IGNORE_INDEX)
        errors = np.zeros((*wrong.shape[-2:], 4), np.uint8)
        errors[wrong.any(axis=0) if wrong.ndim == 3 else wrong] = (*ERROR_COLOR, 255)
        layers = [
            picture_layer("image", seen),
            picture_layer("labels", self._painted(truth), shown=False),
            picture_layer("prediction", self._painted(predicted), opacity=0.5, shown=False),
            picture_layer("errors", errors, opacity=0.7),
        ]
        return Preview(size=extent.shape, layers=layers, pixel_size=pixel_size(source))


_IMAGE_PX = 768

_THUMBNAIL_PX = 320

# Sky blue, vermilion and yellow of Okabe and Ito.
_HIT, _FALSE, _MISSED = (86, 180, 233), (213, 94, 0), (240, 228, 66)

MATCH_LEGEND = [("found", hex_color(_HIT)), ("false alarm", hex_color(_FALSE)), ("missed", hex_color(_MISSED))]
"""Legend of the errors of a detector."""


def object_sample(
    title: str,
    open_source: Callable[[], Source],
    truth: tuple[npt.NDArray[Any], npt.NDArray[Any]],
    found: tuple[npt.NDArray[Any], npt.NDArray[Any]],
    labels: tuple[npt.NDArray[Any], npt.NDArray[Any]],
    num_classes: int,
) -> Sample:
    """Return an image with its labelled objects, its detections and its errors.

    Args:
        title: What it is, with its score.
        open_source: Opens the image.
        truth: Outlines of labelled objects, and whether each was found.
        found: Outlines of detections, and whether each is right.
        labels: Class indices of labelled objects and of detections.
        num_classes: Number of classes.
    """
    colors = default_colormap(num_classes)

    def draw() -> dict[str, Picture]:
        source = open_source()
        try:
            seen = rgb_from(source.read_reduced(_IMAGE_PX), natural_bands(source))
            scale = seen.shape[1] / source.width, seen.shape[0] / source.height
        finally:
            source.close()
        of_class = [[colors[int(label)] for label in each] for each in labels]
        missed = [shape for shape, is_found in zip(*truth, strict=True) if not is_found]
        errors = [*missed, *found[0]]
        of_error = [_MISSED] * len(missed) + [_HIT if is_right else _FALSE for is_right in found[1]]
        return {
            "image": seen,
            "labels": outlined_polygons(seen, truth[0], of_class[0], scale),
            "prediction": outlined_polygons(seen, found[0], of_class[1], scale),
            "errors": outlined_polygons(seen, errors, of_error, scale),
        }

    return Sample(title=title, draw=draw)


def text_sample(title: str, open_source: Callable[[], Source], caption: str = "image") -> Sample:
    """Return an image whose title says all of it.

    Args:
        title: What it is, and what was predicted.
        open_source: Opens the image.
        caption: Caption of the image.
    """

    def draw() -> dict[str, Picture]:
        source = open_source()
        try:
            return {caption: rgb_from(source.read_reduced(_THUMBNAIL_PX), natural_bands(source))}
        finally:
            source.close()

    return Sample(title=title, draw=draw)
