"""Measure how many slides, and how many tiles, one core prepares for a model.

    python tools/benchmarks/slide_throughput.py --folder /scratch

The slide is generated: a pyramidal JPEG of 40,000 x 40,000 px at 0.25 micrometres per pixel, of which 30 % is tissue.
`preparing` opens it, finds its tissue and lists the tiles; `reading` decodes these tiles at 0.5 micrometres per pixel,
with and without stain augmentation and standardisation, and hands them to an encoder that costs nothing. Everything
runs in one thread, so a figure is that of one core; CPU time is printed beside the wall clock.
"""

from __future__ import annotations

import runpy
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import perf_vit
from perf_vit.inference.slide_classification import embed_windows
from perf_vit.models import tissue_windows
from perf_vit.transforms import Normalizer, StainJitter
from perf_vit.types import GeoImage, Window

T = TypeVar("T")

TILE_PX, MPP = 256, 0.5
NORMALIZER = Normalizer(mean=(180.0, 150.0, 190.0), std=(40.0, 50.0, 35.0))


def main(
    folder: Annotated[Path, typer.Option(help="Folder for the slide, which is kept.")],
    side: Annotated[int, typer.Option(help="Pixels a side.")] = 40_000,
    tissue: Annotated[str, typer.Option(help="How tissue is found.")] = "auto",
    tiles: Annotated[int, typer.Option(help="Tiles that are read.")] = 2000,
    repeats: Annotated[int, typer.Option(help="Runs of each; the fastest counts.")] = 3,
) -> None:
    """Print slides a core-hour and tiles a core-second."""
    torch.set_num_threads(1)
    path = folder / f"slide_{side}.svs"
    if not path.exists():
        make = runpy.run_path(str(Path(__file__).parents[2] / "tests" / "support" / "synthetic_slide.py"))["make_slide"]
        make(path, side, side, mpp=0.25, tissue_share=0.3)
    prepared, windows = timed(lambda: prepare(path, tissue), repeats)
    share = len(windows) * (TILE_PX * MPP / 0.25) ** 2 / side**2
    assert 0.2 < share < 0.45, f"tissue of 30 % was generated, {share:.0%} was found"
    some = windows[:: max(1, len(windows) // tiles)][:tiles]
    jitter = StainJitter(0.2)
    ways: dict[str, Callable[[GeoImage], np.ndarray]] = {
        "decode": lambda image: image.pixels[:, :1, :1].astype(np.float32),
        "decode, standardise": NORMALIZER,
        "decode, stain augmentation, standardise": lambda image: NORMALIZER(jitter(image, seed=0)),
    }
    table = Table(
        "what", "seconds", "CPU seconds", "rate", title=f"{side:,} px, {len(windows):,} tiles of {TILE_PX} px"
    )
    table.add_row("open, find tissue, list tiles", *seconds(prepared), f"{3600 / prepared[1]:,.0f} slides a core-hour")
    for name, way in ways.items():
        spent, _ = timed(lambda way=way: read(path, some, way), repeats)
        table.add_row(name, *seconds(spent), f"{len(some) / spent[1]:,.0f} tiles a core-second")
        whole = prepared[1] + spent[1] / len(some) * len(windows)
        table.add_row(f"a whole slide: {name}", "", f"{whole:,.1f}", f"{3600 / whole:,.1f} slides a core-hour")
    Console().print(table)


def timed(function: Callable[[], T], repeats: int) -> tuple[tuple[float, float], T]:
    """Return wall clock and CPU time of the fastest of several runs, in seconds, and the result of the last."""
    spent = []
    for _ in range(repeats):
        start, cpu = time.perf_counter(), time.process_time()
        found = function()
        spent.append((time.perf_counter() - start, time.process_time() - cpu))
    return min(spent, key=lambda each: each[1]), found


def prepare(path: Path, tissue: str) -> list[Window]:
    """Open a slide, find its tissue and return the windows to read."""
    with closing(perf_vit.open(path, mpp=MPP, tissue=tissue)) as source:
        return list(tissue_windows(source, TILE_PX, 0.5))


def read(path: Path, windows: list[Window], normalize: Callable[[GeoImage], np.ndarray]) -> np.ndarray:
    """Read windows with one thread and give them to an encoder that costs nothing."""
    with closing(perf_vit.open(path, mpp=MPP)) as source:
        return embed_windows(first_pixel, source, normalize, windows, num_readers=1)


def first_pixel(batch: Tensor) -> Tensor:
    """Return the first pixel of each tile, [B, C]."""
    return batch[:, :, 0, 0]


def seconds(spent: tuple[float, float]) -> tuple[str, str]:
    """Format wall clock and CPU time."""
    return f"{spent[0]:.2f}", f"{spent[1]:.2f}"


if __name__ == "__main__":
    typer.run(main)
