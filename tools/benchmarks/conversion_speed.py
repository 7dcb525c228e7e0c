"""What a converted ViT costs beside the softmax model: seconds of a forward pass and memory, over sizes of the image.

    python tools/benchmarks/conversion_speed.py --weights vit.safetensors --size 1022 --size 2044 --size 4088

All models in turns in one process, so that whatever else the machine does hits all alike; the medians count. Softmax
is run up to `--softmax-up-to` pixels and extrapolated beyond by a L + b L^2 through its two largest measured sizes.
Memory is what a forward pass adds to the resident memory of a process of its own at its peak. Pixels are noise: time
and memory don't depend on them.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import threading
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from pretrained_vit import load_vit
from rich.table import Table
from torch import Tensor, nn

import perf_vit
from perf_vit.workflows.conversion_report import machine_name
from perf_vit.workflows.progress import console, errors

MIXERS = ("softmax", "performer", "clustered")


def main(
    weights: Annotated[Path, typer.Option(help="State dict, .safetensors.")],
    model_name: Annotated[str, typer.Option(help="timm's name of the model.")] = "vit_small_patch14_dinov2",
    size: Annotated[list[int] | None, typer.Option(help="Side of an image in pixels; repeat it.")] = None,
    softmax_up_to: Annotated[int, typer.Option(help="The largest size that softmax is run at.")] = 2044,
    runs: Annotated[int, typer.Option(help="Timed passes of each model, after one that isn't.")] = 3,
    softmax_runs: Annotated[int, typer.Option(help="Those of softmax.")] = 2,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Measure memory, too.")] = True,
) -> None:
    """Print a table of times and one of memory."""
    sizes = sorted(size or [1022, 2044])
    arguments = (model_name, weights)
    seconds = {size: times(*arguments, size, softmax_up_to, runs, softmax_runs) for size in sizes}
    tokens = {size: tokens_of(*arguments, size) for size in sizes}
    for size in sizes:
        if "softmax" not in seconds[size]:
            seconds[size]["softmax"] = extrapolated(
                tokens, {s: t["softmax"] for s, t in seconds.items() if s < size}, size
            )
    show(seconds, softmax_up_to, f"{model_name}, {machine_name('cpu')}, {torch.get_num_threads()} threads")
    if memory:
        show_memory(*arguments, [size for size in sizes if size <= softmax_up_to])


def model_of(model_name: str, weights: Path, size: int, attention: str) -> nn.Module:
    model = load_vit(model_name, weights, size)
    return model if attention == "softmax" else perf_vit.linearize(model, attention)


def picture(size: int) -> Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def tokens_of(model_name: str, weights: Path, size: int) -> int:
    rows, columns = load_vit(model_name, weights, size).patch_embed.grid_size
    return int(rows * columns)


@torch.inference_mode()
def times(
    model_name: str, weights: Path, size: int, softmax_up_to: int, runs: int, softmax_runs: int
) -> dict[str, float]:
    """Median seconds by attention."""
    image = picture(size)
    attentions = [name for name in MIXERS if name != "softmax" or size <= softmax_up_to]
    models = {name: model_of(model_name, weights, size, name) for name in attentions}
    measured: dict[str, list[float]] = {name: [] for name in attentions}
    for run in range(runs + 1):
        for name, model in models.items():
            # A first pass of softmax would take minutes to change nothing.
            if (name == "softmax") and run >= softmax_runs:
                continue
            with errors.status(f"{size} px, {name}, pass {run + 1}"):
                start = time.perf_counter()
                model.forward_features(image)
                if run or name == "softmax":
                    measured[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in measured.items()}


def extrapolated(tokens: dict[int, int], softmax: dict[int, float], size: int) -> float:
    """A L + b L^2 through the two largest measured sizes."""
    if len(softmax) < 2:
        raise typer.BadParameter(f"softmax at {size} px is extrapolated from two smaller sizes, got {len(softmax)}")
    (first, second), length = sorted(softmax)[-2:], tokens[size]
    lengths = [tokens[first], tokens[second]]
    rates = [softmax[first] / lengths[0], softmax[second] / lengths[1]]
    slope = (rates[1] - rates[0]) / (lengths[1] - lengths[0])
    return length * (rates[0] + slope * (length - lengths[0]))


def show(seconds: dict[int, dict[str, float]], softmax_up_to: int, title: str) -> None:
    table = Table(title=f"Seconds of a forward pass; {title}")
    for header in ("px", *(word for name in MIXERS for word in ([name] if name == "softmax" else [name, "x"]))):
        table.add_column(header, justify="right")
    for size, each in seconds.items():
        row = [str(size), f"{each['softmax']:.2f}" + ("" if size <= softmax_up_to else " extrapolated")]
        for name in MIXERS[1:]:
            row += [f"{each[name]:.2f}", f"{each['softmax'] / each[name]:.1f}"]
        table.add_row(*row)
    console.print(table)
    console.print("x: times as fast as softmax")


def show_memory(model_name: str, weights: Path, sizes: list[int]) -> None:
    table = Table(title="MiB that a forward pass adds at its peak")
    for header in ("px", *MIXERS):
        table.add_column(header, justify="right")
    fresh = multiprocessing.get_context("spawn")
    for size in sizes:
        row = [str(size)]
        for name in MIXERS:
            with errors.status(f"memory, {size} px, {name}"), fresh.Pool(1) as pool:
                row.append(f"{pool.apply(peak_mib, (model_name, weights, size, name)):.0f}")
        table.add_row(*row)
    console.print(table)


@torch.inference_mode()
def peak_mib(model_name: str, weights: Path, size: int, attention: str) -> float:
    """What one forward pass adds to this process's resident memory."""
    model, image = model_of(model_name, weights, size, attention), picture(size)
    before, done = resident_mib(), threading.Event()
    seen = [before]

    def watch() -> None:
        while not done.wait(0.01):
            seen.append(resident_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model.forward_features(image)
    done.set()
    watcher.join()
    return max(seen) - before


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    typer.run(main)
