"""What a map holds: blended scores turned into the pixels of a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from perf_vit.errors import PerfVitError
from perf_vit.inference.engine import Strip
from perf_vit.io import RasterLayout, default_colormap
from perf_vit.types import IGNORE_INDEX, Source

__all__ = ["DenseOutput", "OutputKind", "class_map", "class_output", "class_probabilities", "quantised_probabilities"]

OutputKind = Literal["classes", "probabilities", "probabilities-uint8"]

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
        colormap: value to (red, green, blue, alpha), None for none.
        scale: what pixels are to be multiplied with to get their value.
        overviews: how to make them.
        tags: metadata of the file.
    """

    encode: Callable[[Strip], npt.NDArray[Any]]
    band_names: Sequence[str]
    dtype: npt.DTypeLike
    nodata: float | None
    colormap: Mapping[int, tuple[int, ...]] | None = None
    scale: float = 1.0
    overviews: Literal["nearest", "average"] | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    def layout(self, source: Source, tags: Mapping[str, str]) -> RasterLayout:
        """The file on a source's grid, with further tags."""
        return RasterLayout(
            height=source.height,
            width=source.width,
            num_bands=len(self.band_names),
            dtype=np.dtype(self.dtype),
            crs=source.crs,
            transform=source.transform,
            nodata=self.nodata,
            colormap=self.colormap,
            band_names=tuple(self.band_names),
            tags={**self.tags, **tags},
            scale=self.scale,
            overviews=self.overviews,
        )


def class_output(kind: OutputKind, classes: Sequence[str]) -> DenseOutput:
    """The output of a semantic segmenter, whose scores are one logit a class.

    "classes" is one uint8 band of class indices with a colour table and nodata 255, "probabilities" one float32 band
    a class with nodata NaN, "probabilities-uint8" the same in 254 steps with nodata 255: a quarter of the size.

    Raises:
        PerfVitError: none of these.
    """
    tags = {"PERF_VIT_CLASSES": ",".join(classes)}
    if kind == "classes":
        return DenseOutput(
            encode=lambda strip: class_map(strip)[None],
            band_names=["class"],
            dtype="uint8",
            nodata=IGNORE_INDEX,
            colormap=default_colormap(len(classes)),
            tags=tags,
        )
    if kind == "probabilities":
        return DenseOutput(
            encode=class_probabilities, band_names=classes, dtype="float32", nodata=float("nan"), tags=tags
        )
    if kind == "probabilities-uint8":
        return DenseOutput(
            encode=quantised_probabilities,
            band_names=classes,
            dtype="uint8",
            nodata=IGNORE_INDEX,
            scale=1 / _LEVELS,
            overviews="average",
            tags=tags,
        )
    raise PerfVitError(f"expected classes, probabilities or probabilities-uint8 as the kind of the map, got {kind}")


def class_map(strip: Strip) -> npt.NDArray[np.uint8]:
    """The class of largest score, `IGNORE_INDEX` where there is no data: [h, w]."""
    return np.where(strip.valid, strip.scores.argmax(0).astype(np.uint8), np.uint8(IGNORE_INDEX))


def class_probabilities(strip: Strip) -> npt.NDArray[np.float32]:
    """Softmax of the scores, NaN where there is no data: [K, h, w]."""
    shifted = np.exp(strip.scores - strip.scores.max(0))
    return np.where(strip.valid, shifted / shifted.sum(0), np.float32("nan"))


def quantised_probabilities(strip: Strip) -> npt.NDArray[np.uint8]:
    """Softmax of the scores times 254, rounded, 255 where there is no data: [K, h, w]."""
    shifted = np.exp(strip.scores - strip.scores.max(0))
    shifted *= _LEVELS / shifted.sum(0)
    return np.where(strip.valid, np.rint(shifted).astype(np.uint8), np.uint8(IGNORE_INDEX))
