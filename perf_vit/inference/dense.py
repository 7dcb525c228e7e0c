"""A whole source through any tile model, into a map that a crash doesn't cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from perf_vit.inference.dense_output import DenseOutput
from perf_vit.inference.engine import TileModel
from perf_vit.inference.map_job import MapJob, OnError, make_map
from perf_vit.tiling import Blend
from perf_vit.types import GeoImage, Source, Window

__all__ = ["predict_map"]

FloatArray = npt.NDArray[np.float32]


def predict_map(
    model: TileModel,
    source: Source,
    normalize: Callable[[GeoImage], FloatArray],
    out: str | Path,
    *,
    output: DenseOutput,
    model_id: str,
    num_channels: int,
    window_size: int,
    overlap: int,
    blend: Blend = "hann",
    flips: bool = False,
    precision: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    batch_size: int = 1,
    num_readers: int = 2,
    resume: bool = True,
    overwrite: bool = False,
    on_error: OnError = "stop",
    on_damage: Callable[[Window, str], None] = lambda window, reason: None,
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Predict a whole source and write a map of it as a Cloud-Optimised GeoTIFF.

    Finished rows go into the folder `OUT.partial`, each strip a file that is complete or absent. After a crash, a full
    disk or an interrupt the same call goes on there, and the map is the same bytes as an uninterrupted run's. The map
    appears under its name when it is complete, and the folder is gone.

    Args:
        model: tiles to scores; see `predict_strips`.
        source: from `perf_vit.open_source`.
        normalize: a window's pixels to the model's input, [C, h, w].
        out: path of the map, .tif; its folder is made if need be.
        output: how scores become pixels.
        model_id: tells this model and its weights from others; kept in the map's tags.
        num_channels: K, the channels of the model's output.
        window_size: side of a window, in pixels.
        overlap: pixels that neighbouring windows share.
        blend: "hann" or "gaussian" weights.
        flips: average the scores of a tile and its three mirror images.
        precision: torch.float32, or torch.bfloat16 / torch.float16 for autocast.
        device: where to run.
        batch_size: windows a forward pass.
        num_readers: threads that read.
        resume: go on with an unfinished map; else begin anew.
        overwrite: replace what is in the map's place. Without it, the map of the same input, model and settings is left
            as it is, and any other file is refused.
        on_error: "stop" at a window that can't be read, or "skip" what is damaged of it, as nodata.
        on_damage: with "skip", called with each damaged piece and the reason once the map is finished, also with those
            that an interrupted run met.
        on_window: called with (windows done, windows in all), for a progress bar.

    Returns:
        The path of the map.

    Raises:
        InputError: a window can't be read, or the model's output has another shape.
        OutputError: the map can't be written there, would replace its input or, without `overwrite`, another file,
            isn't named .tif, or was begun with other settings; as BusyError, if another process is writing it.
    """
    job = MapJob(
        source=source,
        out=Path(out),
        output=output,
        model_id=model_id,
        num_channels=num_channels,
        window_size=window_size,
        overlap=overlap,
        blend=blend,
        flips=flips,
        precision=precision,
        device=device,
        on_error=on_error,
    )

    def write_rows(folder: Path) -> None:
        job.write_rows(folder, model, normalize, batch_size=batch_size, num_readers=num_readers, on_window=on_window)

    for piece in make_map(job, write_rows, resume=resume, overwrite=overwrite).damaged:
        on_damage(piece.window, piece.reason)
    return job.out
