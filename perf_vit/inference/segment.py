"""A whole source through a trained segmenter, into a Cloud-Optimised GeoTIFF."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perf_vit._version import __version__
from perf_vit.errors import InputError, OutputError
from perf_vit.inference.engine import Strip, predict_strips
from perf_vit.io import CogWriter, RasterSource, default_colormap
from perf_vit.models import Segmenter
from perf_vit.types import IGNORE_INDEX, Window

__all__ = ["class_probabilities", "predict", "segment_strips"]


def predict(
    model: Segmenter,
    source: RasterSource,
    out: str | Path,
    *,
    probabilities: bool = False,
    window_size: int | None = None,
    overlap: int | None = None,
    batch_size: int = 1,
    device: str | torch.device = "cpu",
    precision: torch.dtype = torch.float32,
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Predict a whole source and write a georeferenced map.

    The map is a Cloud-Optimised GeoTIFF on the source's grid: one uint8 band of class indices with a colour table and
    nodata 255, or one float32 band of probabilities a class with nodata NaN. It appears under its name when it is
    complete.

    Args:
        model: from `perf_vit.load_segmenter`.
        source: from `perf_vit.open_source`, with the bands that the model was trained on.
        out: path of the map; its folder is made if need be.
        probabilities: write probabilities instead of classes.
        window_size: side of a window in pixels, a multiple of the patch size; the training tile's by default.
        overlap: pixels that neighbouring windows share; a quarter of the window by default.
        batch_size: windows a forward pass.
        device: where to run.
        precision: torch.float32, or torch.bfloat16 / torch.float16 for autocast.
        on_window: called with (windows done, windows in all), for a progress bar.

    Returns:
        The path of the map.

    Raises:
        InputError: the source's bands are not the model's, or the window size doesn't fit the patch size.
        OutputError: the map can't be written there, would replace its input, or isn't named .tif.
    """
    _check_output(Path(out), source)
    strips = segment_strips(
        model,
        source,
        extent=source.extent,
        window_size=window_size,
        overlap=overlap,
        batch_size=batch_size,
        device=device,
        precision=precision,
        on_window=on_window,
    )
    with _map_writer(Path(out), source, model.spec.classes, probabilities=probabilities) as writer:
        for strip in strips:
            block = class_probabilities(strip) if probabilities else class_map(strip)[None]
            writer.write(strip.window.row, block)
    return Path(out)


def _map_writer(out: Path, source: RasterSource, classes: Sequence[str], *, probabilities: bool) -> CogWriter:
    layout: dict[str, Any] = (
        {"num_bands": len(classes), "dtype": "float32", "nodata": float("nan"), "band_names": classes}
        if probabilities
        else {
            "num_bands": 1,
            "dtype": "uint8",
            "nodata": IGNORE_INDEX,
            "band_names": ["class"],
            "colormap": default_colormap(len(classes)),
        }
    )
    return CogWriter(
        out,
        height=source.height,
        width=source.width,
        crs=source.crs,
        transform=source.transform,
        tags={"PERF_VIT_VERSION": __version__, "PERF_VIT_CLASSES": ",".join(classes)},
        **layout,
    )


def _check_output(out: Path, source: RasterSource) -> None:
    if out.suffix.lower() not in {".tif", ".tiff"}:
        raise OutputError(f"the map is a GeoTIFF: its name must end in .tif, got {out}; try {out.with_suffix('.tif')}")
    if out.exists() and Path(source.path).exists() and out.samefile(source.path):
        raise OutputError(f"the map would replace its own input {out}; choose another output")


def segment_strips(
    model: Segmenter,
    source: RasterSource,
    *,
    extent: Window,
    window_size: int | None = None,
    overlap: int | None = None,
    **engine: Any,
) -> Iterator[Strip]:
    """`predict_strips` with a segmenter's own normalisation and window size.

    Strips hold blended logits. Arguments are checked at the call, before the first window is read.

    Raises:
        InputError: as `predict` says.
    """
    num_bands, expected = source.num_bands, len(model.spec.normalizer.mean)
    if num_bands != expected:
        raise InputError(
            f"the model was trained on {expected} bands, {source.path} has {num_bands}; give a raster with those bands"
        )
    size = window_size or model.spec.tile_px
    multiple = model.size_multiple
    if size < 1 or size % multiple:
        nearest = max(1, round(size / multiple)) * multiple
        raise InputError(f"window_size must be a multiple of the patch size {multiple}, got {size}; try {nearest}")
    return predict_strips(
        model,
        source,
        model.spec.normalizer,
        extent=extent,
        num_channels=len(model.spec.classes),
        window_size=size,
        overlap=size // 4 if overlap is None else overlap,
        **engine,
    )


def class_map(strip: Strip) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The class of largest score, `IGNORE_INDEX` where there is no data: [h, w]."""
    return np.where(strip.valid, strip.scores.argmax(0).astype(np.uint8), np.uint8(IGNORE_INDEX))


def class_probabilities(strip: Strip) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Softmax of the scores, NaN where there is no data: [K, h, w]."""
    shifted = np.exp(strip.scores - strip.scores.max(0))
    return np.where(strip.valid, shifted / shifted.sum(0), np.float32("nan"))
