"""Measure what processes lose by sharing an image, and what they send to each other.

    python tools/benchmarks/shared_scene.py --side 4096 --rounds 2
    python tools/benchmarks/shared_scene.py --side 4096 --side 8192 --rounds 0

Each of several one-thread processes (gloo) runs a ViT over an image of its own; then the same number of them share one
image, in turns. Throughput is tokens of all images in a second of the slowest process, from the first pixel to the mean
of the tokens; all processes start together. The images are those of `whole_scene.py`, with tokens in memory. Waits are
the time in collective operations, most of it until the slower process arrives. Without rounds only the bytes that each
process sends in a block are measured.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table

from perf_vit.streaming import ImageTokens, stream_tokens

Scene = runpy.run_path(str(Path(__file__).parent / "whole_scene.py"))["Scene"]


def main(
    side: Annotated[list[int] | None, typer.Option(help="Pixels a side; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of own images and a shared one.")] = 2,
    processes: Annotated[int, typer.Option(help="Number of processes.")] = 2,
    model: Annotated[str, typer.Option(help="timm name.")] = "performer_vit_tiny_patch16_224",
    depth: Annotated[int, typer.Option(help="Number of blocks.")] = 12,
    rank: Annotated[int, typer.Option(hidden=True)] = -1,
    store: Annotated[Path, typer.Option(hidden=True)] = Path(),
) -> None:
    """Compare processes that share an image with processes that have one each."""
    sides = side or [4096]
    if rank >= 0:
        encoder = model, depth
        print(json.dumps([each for px in sides for each in measure(encoder, px, rounds, rank, processes, store)]))
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            __file__,
            *(f"--side={px}" for px in sides),
            f"--rounds={rounds}",
            f"--model={model}",
            f"--depth={depth}",
        ]
        command += [f"--processes={processes}", f"--store={folder}"]
        running = [
            subprocess.Popen([*command, f"--rank={index}"], stdout=subprocess.PIPE, text=True)
            for index in range(processes)
        ]
        outputs = [each.communicate()[0] for each in running]
    if any(each.returncode for each in running):
        raise typer.Exit(1)
    show([json.loads(each.splitlines()[-1]) for each in outputs])


class Collectives:
    """Counts the collective operations of this process and their time, from its making on."""

    def __init__(self) -> None:
        self.number, self.seconds, self._all_reduce = 0, 0.0, dist.all_reduce
        dist.all_reduce = self._timed

    def _timed(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        done = self._all_reduce(*arguments)
        self.number, self.seconds = self.number + 1, self.seconds + time.perf_counter() - start
        return done

    def stop(self) -> None:
        """Stop counting."""
        dist.all_reduce = self._all_reduce


def measure(
    encoder: tuple[str, int], side: int, rounds: int, rank: int, number: int, folder: Path
) -> list[dict[str, Any]]:
    """Run turns in this process and return a row for each."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vit = timm.create_model(encoder[0], depth=encoder[1], num_classes=0, dynamic_img_size=True).eval()
    rows = []
    for turn in range(max(1, 2 * rounds)):
        is_shared = turn % 2 == 1 or rounds == 0
        start_together(folder / f"{side}_{turn}", rank, number)
        if not is_shared:
            dist.destroy_process_group()
        collectives, start, cpu = Collectives(), time.perf_counter(), time.process_time()
        found, _ = stream_tokens(vit, ImageTokens(vit, Scene(side), lambda image: image.pixels))
        sent = found.processes.num_bytes / len(vit.blocks)
        found.mean()
        row = {"side": side, "shared": is_shared, "tokens": found.layout.num_tokens, "bytes": sent}
        row |= {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        collectives.stop()
        rows.append({**row, "collectives": collectives.number, "waits": collectives.seconds})
        if is_shared:
            dist.destroy_process_group()
    return rows


def start_together(path: Path, rank: int, number: int) -> None:
    """Make a process group and wait for all processes."""
    dist.init_process_group("gloo", store=dist.FileStore(str(path), number), rank=rank, world_size=number)
    dist.barrier()


def show(rows_by_process: list[list[dict[str, Any]]]) -> None:
    """Print a table of all turns."""
    table = Table(
        "side", "images", "seconds", "CPU s of each", "tokens a second", "bytes a block", "collectives", "waits s"
    )
    for turn in zip(*rows_by_process, strict=True):
        images = 1 if turn[0]["shared"] else len(turn)
        seconds = max(row["seconds"] for row in turn)
        cpu = ", ".join(f"{row['cpu']:.1f}" for row in turn)
        speed = images * turn[0]["tokens"] / seconds
        sent = f"{turn[0]['bytes']:,.0f}" if turn[0]["shared"] else ""
        waits = ", ".join(f"{row['waits']:.2f}" for row in turn)
        of_all = str(turn[0]["collectives"]), waits
        table.add_row(str(turn[0]["side"]), str(images), f"{seconds:.1f}", cpu, f"{speed:,.0f}", sent, *of_all)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
