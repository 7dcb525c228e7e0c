"""Measure the forward pass over whole scenes: time a token and peak memory by image size.

    python tools/benchmarks/whole_scene.py --folder /scratch --side 4096 --side 8192 --side 16384 --side 32768

Each size runs in a process of its own. The scene is made while it is read: waves of several lengths under noise that
can't be compressed. Memory is the anonymous part of the resident set (RssAnon of /proc), above what the process holds
after its imports; pages of the tokens' file belong to the system.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import timm
import torch
import typer
from anonymous_memory import AnonymousPeak
from rich.console import Console
from rich.table import Table

import perf_vit
from perf_vit.streaming import ImageTokens, stream_tokens
from perf_vit.types import GeoImage, Window


class Scene:
    """Generated scene of three bands, of which windows are read.

    Args:
        side: Height and width in pixels.
    """

    def __init__(self, side: int) -> None:
        self.height = self.width = side

    def read(self, window: Window) -> GeoImage:
        """Return the pixels of a window, the same however the scene is divided into rows."""
        y = np.arange(window.row, window.row_stop, dtype=np.float32)[:, None]
        x = np.arange(window.col, window.col_stop, dtype=np.float32)
        waves = np.stack([np.sin(y / scale) + np.cos(x / scale) for scale in (40.0, 300.0, 2500.0)])
        rows = [
            np.random.default_rng(row).standard_normal((3, window.width), np.float32) for row in y[:, 0].astype(int)
        ]
        return GeoImage(waves + np.stack(rows, axis=1), np.ones(window.shape, bool))


def main(
    folder: Annotated[Path, typer.Option(help="Folder on a local disk for the tokens.")],
    side: Annotated[list[int] | None, typer.Option(help="Pixels a side; repeatable.")] = None,
    model: Annotated[str, typer.Option(help="timm name, or a folder of `perf-vit convert`.")] = (
        "performer_vit_tiny_patch16_224"
    ),
    dtype: Annotated[str, typer.Option(help="Of stored tokens: float32, bfloat16, float16.")] = "float32",
    out: Annotated[Path | None, typer.Option(help="JSON file for the rows.")] = None,
    alone: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Run a ViT over scenes of several sizes, and print time a token and peak memory."""
    sides = side or [4096, 8192]
    if alone:
        print(json.dumps(measure(model, sides[0], folder, dtype)))
        return
    rows = []
    for each in sides:
        options = ["--folder", str(folder), "--side", str(each), "--model", model, "--dtype", dtype, "--alone"]
        ran = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(ran.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), file=sys.stderr)
    if out is not None:
        out.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    table = Table("side", "tokens", "seconds", "us a token", "CPU us a token", "peak MiB", "file GiB")
    for row in rows:
        table.add_row(*(f"{row[name]:,.4g}" if isinstance(row[name], float) else f"{row[name]:,}" for name in row))
    Console().print(table)


def measure(name: str, side: int, folder: Path, dtype: str) -> dict[str, float]:
    """Run a model over a scene and return the row of the table."""
    torch.manual_seed(0)
    if Path(name).is_dir():
        vit = perf_vit.conversion.load_converted(name, dynamic_img_size=True).eval()
    else:
        vit = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
    memory = AnonymousPeak()
    start, cpu = time.perf_counter(), time.process_time()
    image = ImageTokens(vit, Scene(side), lambda found: found.pixels)
    found, _ = stream_tokens(vit, image, folder=folder, dtype=getattr(torch, dtype))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    peak_mib = memory.stop()
    assert torch.isfinite(found.mean()).all(), "tokens must be finite"
    number = found.layout.num_tokens
    found.store.remove()
    return {
        "side": side,
        "tokens": number,
        "seconds": seconds,
        "us": seconds / number * 1e6,
        "cpu_us": cpu_seconds / number * 1e6,
        "peak_mib": peak_mib,
        "file_gib": found.store.num_bytes / 2**30,
    }


if __name__ == "__main__":
    typer.run(main)
