"""A whole source through a trained segmenter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perf_vit.errors import InputError
from perf_vit.inference.dense import predict_map
from perf_vit.inference.dense_output import DenseOutput, OutputKind, class_output
from perf_vit.inference.engine import Strip, predict_strips
from perf_vit.inference.map_job import MapJob
from perf_vit.models import Segmenter, segmenter_id
from perf_vit.types import InputPath, Source, Window

__all__ = ["predict", "segment_job", "segment_strips"]


def predict(
    model: Segmenter,
    source: InputPath | Source,
    out: str | Path,
    *,
    kind: OutputKind = "classes",
    threshold: float = 0.5,
    window_size: int | None = None,
    overlap: int | None = None,
    overwrite: bool = False,
    **engine: Any,
) -> Path:
    """Predict a whole source with a segmenter and write a georeferenced map.

    The map is a Cloud-Optimised GeoTIFF on the source's grid. It appears under its name when it is complete; an
    interrupted run goes on where it was.

    Args:
        model: from `perf_vit.load_segmenter`.
        source: Raster, slide or mosaic: what `perf_vit.open_source` opens, or what it returned. It is read as the model
            was trained: bands, nodata, pixel size and tissue. Options that it was opened with come before the model's.
        out: path of the map; its folder is made if need be.
        kind: "classes", one uint8 band of class indices with a colour table and nodata 255; "probabilities", one
            float32 band a class with nodata NaN; or "probabilities-uint8", in steps of 1/254 with nodata 255. Of a
            multi-label model, "classes" is a uint8 band of 0 and 1 a class.
        threshold: with that, the probability above which a class is true.
        window_size: side of a window in pixels, a multiple of the patch size; the training tile's by default.
        overlap: pixels that neighbouring windows share; a quarter of the window by default.
        overwrite: replace what is in the map's place. Without it, the map of the same input, model and settings is left
            as it is, and any other file is refused.
        **engine: batch_size, device, precision, blend, flips, num_readers, resume, on_error, on_damage and on_window of
            `perf_vit.inference.predict_map`.

    Returns:
        The path of the map.

    Raises:
        InputError: the source's bands are not the model's, the window size doesn't fit the patch size, or a window
            can't be read.
        OutputError: as `predict_map` says.
    """
    opened = model.spec.open(source)
    try:
        return predict_map(
            model,
            opened,
            model.spec.normalizer,
            out,
            output=_output(model, kind, threshold),
            model_id=segmenter_id(model),
            overwrite=overwrite,
            **_windows(model, opened, window_size, overlap),
            **engine,
        )
    finally:
        if opened is not source:
            opened.close()


def segment_job(
    model: Segmenter,
    source: Source,
    out: str | Path,
    *,
    kind: OutputKind = "classes",
    threshold: float = 0.5,
    window_size: int | None = None,
    overlap: int | None = None,
    model_id: str | None = None,
    **settings: Any,
) -> MapJob:
    """What `predict` makes, for those who run it in parts.

    Args:
        model: as for `predict`.
        source: as for `predict`.
        out: as for `predict`.
        kind: as for `predict`.
        threshold: as for `predict`.
        window_size: as for `predict`.
        overlap: as for `predict`.
        model_id: of `segmenter_id`, for those who know it: it takes a look at all weights.
        **settings: blend, flips, precision, device and on_error of `MapJob`.

    Raises:
        InputError: the source's bands are not the model's, or the window size doesn't fit the patch size.
        OutputError: the map would replace its input, or isn't named .tif.
    """
    return MapJob(
        source=source,
        out=Path(out),
        output=_output(model, kind, threshold),
        model_id=model_id or segmenter_id(model),
        **_windows(model, source, window_size, overlap),
        **settings,
    )


def segment_strips(
    model: Segmenter,
    source: Source,
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
    windows = _windows(model, source, window_size, overlap)
    return predict_strips(model, source, model.spec.normalizer, extent=extent, **windows, **engine)


def _output(model: Segmenter, kind: OutputKind, threshold: float) -> DenseOutput:
    spec = model.spec
    return class_output(
        kind, spec.classes, background=spec.background_index, multilabel=spec.multilabel, threshold=threshold
    )


def _windows(model: Segmenter, source: Source, window_size: int | None, overlap: int | None) -> dict[str, Any]:
    """The engine's windows that a model can take, after a look at the source's bands."""
    model.spec.check_bands(source)
    size = model.spec.tile_px if window_size is None else window_size
    multiple = model.size_multiple
    if size < 1 or size % multiple:
        nearest = max(1, round(size / multiple)) * multiple
        raise InputError(f"window_size must be a multiple of the patch size {multiple}, got {size}; try {nearest}")
    return {
        "window_size": size,
        "overlap": size // 4 if overlap is None else overlap,
        "num_channels": len(model.spec.classes),
    }
