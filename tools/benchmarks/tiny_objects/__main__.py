"""Is downsampling good enough when the object is tiny? Four networks of the same parameters on tiles of tiny cells.

    python tools/benchmarks/tiny_objects train BCCD --variant performer --seed 0 --out runs/tiny
    python tools/benchmarks/tiny_objects report runs/tiny --picture docs/images/tiny_objects.png
    python tools/benchmarks/tiny_objects show BCCD tile.png

Each run is a process of its own, of one thread; its CPU time is what it took of the machine. Everything random follows
the seed: the weights, which are the same for all variants, and the tiles.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import cv2
import figure
import numpy as np
import torch
import typer
from mosaic import Smear, make_mosaic, read_smears, shrunk
from rich.progress import track
from scores import SizeScores
from torch import Tensor
from variants import VARIANTS, Variant, build_variant

from perf_vit.models import Detector
from perf_vit.tasks.optim import warmup_cosine
from perf_vit.types import Detections, ObjectLabels
from perf_vit.workflows.progress import console

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

# Statistics of training photographs: standardisation needs them only roughly.
MEAN, STD = (170.0, 150.0, 190.0), (45.0, 50.0, 25.0)
TEST_SEED = 1_000_000


@app.command()
def train(
    bccd: Annotated[Path, typer.Argument(help="The BCCD data set's folder.")],
    variant: Annotated[str, typer.Option(help=f"One of {', '.join(VARIANTS)}.")],
    out: Annotated[Path, typer.Option(help="Folder that gets VARIANT_SEED.json.")],
    seed: Annotated[int, typer.Option(help="Decides weights and tiles.")] = 0,
    steps: Annotated[int, typer.Option(help="Of one tile each, at the end.")] = 30,
    small_steps: Annotated[int, typer.Option(help="Before them, of tiles a quarter as wide and high.")] = 640,
    side: Annotated[int, typer.Option(help="Of the tiles, in pixels.")] = 1024,
    num_tests: Annotated[int, typer.Option(help="Tiles of the test photographs.")] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    name: Annotated[str | None, typer.Option(help="Of the row in the report, if not the variant's.")] = None,
    title: Annotated[str | None, typer.Option(help="The same for readers.")] = None,
) -> None:
    """Train one variant on mosaics of one part of the photographs and score it on mosaics of the other."""
    torch.set_num_threads(1)
    row, training = VARIANTS[variant], read_smears(bccd)
    torch.manual_seed(seed)
    model = build_variant(row, MEAN, STD, side)
    before = _peak_mib()
    seconds, losses = _fit(model, row, training[0], seed, [side // 4] * small_steps + [side] * steps, lr)
    memory = _peak_mib() - before
    scores, test_seconds = _test(model, row, training[1], side, num_tests)
    result = {
        "variant": name or variant,
        "title": title or row.title,
        "seed": seed,
        "small_steps": small_steps,
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_cpu_s": seconds,
        "test_cpu_s_per_tile": test_seconds,
        "train_peak_mib": memory,
        "loss": float(np.mean(losses[-20:])),
        **scores.to_dict(),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name or variant}_{seed}.json").write_text(json.dumps(result, indent=1))
    console.print(result)


@app.command()
def report(
    runs: Annotated[Path, typer.Argument(help="Folder of the results.")],
    picture: Annotated[Path | None, typer.Option(help="PNG of recall by size.")] = None,
) -> None:
    """Print the table of all results in a folder, and draw recall by size."""
    results = [json.loads(path.read_text()) for path in sorted(runs.glob("*.json"))]
    console.print(figure.table(results), highlight=False, markup=False, soft_wrap=True)
    if picture:
        figure.draw(results, picture)


@app.command()
def show(
    bccd: Annotated[Path, typer.Argument(help="The BCCD data set's folder.")],
    out: Annotated[Path, typer.Argument(help="PNG of a tile and its boxes.")],
    side: Annotated[int, typer.Option(help="Of the tile, in pixels.")] = 1024,
) -> None:
    """Draw a test tile with its boxes."""
    image, labels = make_mosaic(read_smears(bccd)[1], side, TEST_SEED)
    drawn = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    colors = ((0, 0, 200), (200, 0, 0), (0, 140, 0))
    for box, label in zip(labels.boxes_xyxy.round().astype(int), labels.labels, strict=True):
        cv2.rectangle(drawn, box[:2].tolist(), box[2:].tolist(), colors[label], 1)
    cv2.imwrite(str(out), drawn)


def _fit(
    model: Detector, variant: Variant, smears: list[Smear], seed: int, sides: list[int], lr: float
) -> tuple[float, list[float]]:
    """Train; CPU seconds of the steps alone, and the losses.

    Args:
        model: to train.
        variant: how it sees tiles.
        smears: to make tiles of.
        seed: decides the tiles.
        sides: of each step's tile, in pixels.
        lr: peak learning rate; it follows the share of all pixels that were seen.
    """
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=lr, weight_decay=0.05)
    pixels = np.cumsum(np.square(sides))
    seconds, losses = 0.0, []
    for step, side in enumerate(track(sides, f"{variant.name} {seed}", console=console)):
        image, labels = _input(variant, smears, side, seed * len(sides) + step)
        start = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup_cosine(int(pixels[step] - side**2), int(pixels[-1]), 0.05)
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.stack(list(model.losses([image], [labels]).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds += time.process_time() - start
        losses.append(float(loss.detach()))
        if step % 20 == 19:
            console.print(f"{variant.name} {seed}: step {step + 1}, loss {np.mean(losses[-20:]):.3f}, {seconds:.0f} s")
    return seconds, losses


@torch.inference_mode()
def _test(
    model: Detector, variant: Variant, smears: list[Smear], side: int, num_tests: int
) -> tuple[SizeScores, float]:
    scores, seconds = SizeScores(), 0.0
    model.eval()
    for index in range(num_tests):
        image, _ = _input(variant, smears, side, TEST_SEED + index)
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            (found,) = model(image[None])
        seconds += time.process_time() - start
        truth = make_mosaic(smears, side, TEST_SEED + index)[1]
        scores.update(_enlarged(found, variant.shrink), truth)
    return scores, seconds / num_tests


def _input(variant: Variant, smears: list[Smear], side: int, seed: int) -> tuple[Tensor, ObjectLabels]:
    image, labels = make_mosaic(smears, side, seed)
    if variant.shrink > 1:
        image, labels = shrunk(image, labels, variant.shrink)
    standardised = (image - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(np.ascontiguousarray(standardised.transpose(2, 0, 1))), labels


def _enlarged(found: Detections, factor: int) -> Detections:
    return Detections(scores=found.scores, labels=found.labels, boxes_xyxy=found.boxes_xyxy * factor)


def _peak_mib() -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    app()
