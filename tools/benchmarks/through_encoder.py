"""Measure training steps of a slide classifier through its encoder: time and peak memory by number of tiles.

    python tools/benchmarks/through_encoder.py --folder /scratch --tiles 1000 --tiles 4000 --tiles 16000

Each number of tiles runs in a process of its own, on a generated slide of tissue without glass. A step reads the tiles
from the file twice. Memory is the anonymous part of the resident set (RssAnon of /proc), above what the process holds
after its imports. The first step makes gradients and momenta; the second is timed.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Annotated

import numpy as np
import tifffile
import torch
import typer
from anonymous_memory import AnonymousPeak
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from perf_vit.data.slide_windows import SlideWindows
from perf_vit.models import (
    SlideClassificationModelConfig,
    SlideClassificationSpec,
    build_slide_classifier,
)
from perf_vit.tiling import grid_windows
from perf_vit.transforms import Normalizer

TILE_PX = 64
FILE_TILE_PX = 256


def main(
    folder: Annotated[Path, typer.Option(help="Folder for the generated slides.")],
    tiles: Annotated[list[int] | None, typer.Option(help="Tiles of the slide; repeatable.")] = None,
    backbone: Annotated[str, typer.Option(help="timm name of the encoder.")] = "performer_vit_tiny_patch16_224",
    depth: Annotated[int, typer.Option(help="Blocks of the encoder.")] = 4,
    batch_size: Annotated[int, typer.Option(help="Tiles in an encoder batch.")] = 32,
    steps: Annotated[int, typer.Option(help="Training steps; the last is timed.")] = 2,
    plain: Annotated[bool, typer.Option(help="Plain back-propagation through all tiles at once.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file for the rows.")] = None,
    alone: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Train on slides of several sizes, and print time and peak memory."""
    numbers = tiles or [1000, 4000, 16_000]
    if alone:
        print(json.dumps(measure(folder, numbers[0], (backbone, depth), batch_size, steps, plain=plain)))
        return
    rows = []
    for each in numbers:
        make_slide(folder, each)
        options = [
            "--folder",
            str(folder),
            "--tiles",
            str(each),
            "--backbone",
            backbone,
            "--depth",
            str(depth),
            "--alone",
        ]
        options += ["--batch-size", str(batch_size), "--steps", str(steps), *(["--plain"] if plain else [])]
        ran = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(ran.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), file=sys.stderr)
    if out is not None:
        out.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" for value in row.values()))
    Console().print(table)


def slide_path(folder: Path, number: int) -> Path:
    """Return the path of the slide with a number of tiles."""
    return folder / f"tiles_{number}.tif"


def make_slide(folder: Path, number: int) -> None:
    """Write a tiled slide of noise over waves, of at least `number` tiles, unless it is there."""
    path = slide_path(folder, number)
    if path.exists():
        return
    per_side = -(-math.isqrt(number - 1) // 4) * 4 + 4
    side = per_side * TILE_PX // FILE_TILE_PX * FILE_TILE_PX

    def blocks() -> object:
        for index in range((side // FILE_TILE_PX) ** 2):
            rng = np.random.default_rng(index)
            yield rng.integers(60, 255, (FILE_TILE_PX, FILE_TILE_PX, 3), np.uint8)

    per_cm = 1e4 / 0.5
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        writer.write(
            blocks(),
            shape=(side, side, 3),
            dtype=np.uint8,
            tile=(FILE_TILE_PX, FILE_TILE_PX),
            photometric="rgb",
            compression="zlib",
            resolution=(per_cm, per_cm),
            resolutionunit="CENTIMETER",
            metadata=None,
        )


def measure(
    folder: Path, number: int, encoder: tuple[str, int], batch_size: int, steps: int, *, plain: bool
) -> dict[str, float | int]:
    """Run training steps and return the row of the table."""
    torch.manual_seed(0)
    memory = AnonymousPeak()
    normalizer = Normalizer((157.0,) * 3, (56.0,) * 3)
    spec = SlideClassificationSpec(classes=("a", "b"), normalizer=normalizer, tile_px=TILE_PX, mpp=0.5)
    backbone, depth = encoder
    config = SlideClassificationModelConfig(
        backbone=backbone, backbone_kwargs={"depth": depth}, pool="avg", through_encoder=True
    )
    model = build_slide_classifier(config, spec).train()
    with closing(spec.open(slide_path(folder, number))) as source:
        windows = grid_windows(source.extent, TILE_PX, overlap=0)[:number]
    assert len(windows) == number, "the slide must have the tiles"
    rectangles = np.array([[each.row, each.col, each.height, each.width] for each in windows], np.int64)
    del windows
    slide = SlideWindows(str(slide_path(folder, number)), rectangles, spec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    seconds = cpu_seconds = 0.0
    for step in range(steps):
        start, cpu = time.perf_counter(), time.process_time()
        if plain:
            pixels = torch.cat([each for each, _ in slide.batches(batch_size)])
            mask = torch.ones(1, number, dtype=torch.bool)
            logits = model(model.encode(pixels)[None], mask)[0][0]
        else:
            logits = model.classify_windows(lambda: slide.batches(batch_size), seed=step)
        loss = F.cross_entropy(logits[None], torch.tensor([1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    peak_mib = memory.stop()
    assert math.isfinite(loss.item()), "the loss must be finite"
    return {
        "tiles": number,
        "seconds": seconds,
        "ms a tile": seconds / number * 1e3,
        "CPU ms a tile": cpu_seconds / number * 1e3,
        "peak MiB": peak_mib,
        "features MiB": number * model.embed_dim * 4 / 2**20,
    }


if __name__ == "__main__":
    typer.run(main)
