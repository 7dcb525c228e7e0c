"""A whole source through any tile model, into a map that a crash doesn't cost."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from perf_vit._version import __version__
from perf_vit.errors import OutputError, PerfVitError
from perf_vit.inference.dense_output import DenseOutput
from perf_vit.inference.engine import Strip, TileModel, predict_strips
from perf_vit.inference.journal import open_journal
from perf_vit.inference.reader import Reads, SalvagingReader
from perf_vit.io import StripStore, bounded_cache, write_cog
from perf_vit.tiling import Blend
from perf_vit.types import GeoImage, Source, Window

__all__ = ["OnError", "predict_map"]

FloatArray = npt.NDArray[np.float32]

OnError = Literal["stop", "skip"]

# One strip is encoded and written while the next is waiting.
_WRITER_DEPTH = 2


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
        on_error: "stop" at a window that can't be read, or "skip" what is damaged of it, as nodata.
        on_damage: with "skip", called with each damaged piece and the reason; from several threads.
        on_window: called with (windows done, windows in all), for a progress bar.

    Returns:
        The path of the map.

    Raises:
        InputError: a window can't be read, or the model's output has another shape.
        OutputError: the map can't be written there, would replace its input, isn't named .tif, is being written by
            another process, or was begun with other settings.
    """
    out = Path(out)
    _check_output(out, source)
    if on_error not in ("stop", "skip"):
        raise PerfVitError(f"on_error must be stop or skip, got {on_error}")
    settings = {
        "model": model_id,
        "window_size": window_size,
        "overlap": overlap,
        "blend": blend,
        "flips": flips,
        "precision": str(precision).removeprefix("torch."),
    }
    tags = {"PERF_VIT_VERSION": __version__, **{f"PERF_VIT_{name.upper()}": str(v) for name, v in settings.items()}}
    layout = output.layout(source, tags)
    reader: Reads = SalvagingReader(source, on_damage) if on_error == "skip" else source
    with bounded_cache(), open_journal(out) as journal:
        identity = {"device": torch.device(device).type, "on_error": on_error, "bands": list(output.band_names)}
        journal.begin({**settings, **identity, **_input_identity(source), "version": __version__}, resume=resume)
        store = StripStore(journal.folder, layout, out)
        strips = predict_strips(
            model,
            reader,
            normalize,
            extent=source.extent,
            num_channels=num_channels,
            window_size=window_size,
            overlap=overlap,
            start_row=store.num_rows_from_top(),
            blend=blend,
            flips=flips,
            batch_size=batch_size,
            num_readers=num_readers,
            device=device,
            precision=precision,
            on_window=on_window,
        )
        _write_behind(strips, lambda strip: store.write(strip.window.row, output.encode(strip)))
        made = journal.folder / out.name
        write_cog(store, layout, made, out)
        journal.complete(made)
    return out


def _write_behind(strips: Iterable[Strip], write: Callable[[Strip], None]) -> None:
    """Write strips in a thread of its own, in order, while the model goes on."""
    writing: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="perf_vit-writer") as pool:
        for strip in strips:
            writing.append(pool.submit(write, strip))
            if len(writing) >= _WRITER_DEPTH:
                writing.popleft().result()
        for written in writing:
            written.result()


def _input_identity(source: Source) -> dict[str, Any]:
    """What tells an input from a changed one, without reading all of it."""
    path = Path(source.path)
    stat = path.stat() if path.exists() else None
    return {
        "input": str(source.path),
        "input_bytes": stat and stat.st_size,
        "input_modified_ns": stat and stat.st_mtime_ns,
        "input_layout": [source.num_bands, source.height, source.width, str(source.dtype)],
    }


def _check_output(out: Path, source: Source) -> None:
    if out.suffix.lower() not in {".tif", ".tiff"}:
        raise OutputError(f"the map is a GeoTIFF: its name must end in .tif, got {out}; try {out.with_suffix('.tif')}")
    if out.exists() and Path(source.path).exists() and out.samefile(source.path):
        raise OutputError(f"the map would replace its own input {out}; choose another output")
