"""Is downsampling good enough when the object is tiny? Networks that differ in one part, on tiles of tiny cells.

    python tools/benchmarks/tiny_objects train BCCD --variant performer --seed 0 --out runs/tiny
    python tools/benchmarks/tiny_objects report runs/tiny --picture docs/images/tiny_objects.png
    python tools/benchmarks/tiny_objects show BCCD tile.png

Each run is a process of its own, of one thread; its CPU time is what it took of the machine. Everything random follows
the seed: the weights, which are the same for all variants without parameters of their own, and the tiles.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import cv2
import figure
import numpy as np
import torch
import typer
from fitting import TEST_SEED, Tile, detect, fit, peak_mib
from mosaic import CLASSES, Smear, make_mosaic, read_smears, shrunk
from scores import SizeScores
from variants import VARIANTS, Variant, build_variant

from perf_vit.workflows.progress import console

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


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
    row, (smears, test_smears) = VARIANTS[variant], read_smears(bccd)
    torch.manual_seed(seed)
    model = build_variant(row, CLASSES, side)
    sides = [side // 4] * small_steps + [side] * steps
    before = peak_mib()
    seconds, losses = fit(
        model,
        lambda step, px: _tile(row, smears, px, seed * len(sides) + step),
        sides,
        lr,
        f"{variant} {seed}",
    )
    memory = peak_mib() - before
    scores, test_seconds = SizeScores(), 0.0
    model.eval()
    for index in range(TEST_SEED, TEST_SEED + num_tests):
        found, took = detect(model, _tile(row, test_smears, side, index)[0], row.shrink)
        scores.update(found, make_mosaic(test_smears, side, index)[1])
        test_seconds += took / num_tests
    result = {
        "variant": name or variant,
        "title": title or row.title,
        "seed": seed,
        "small_steps": small_steps,
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_cpu_s": sum(seconds),
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
    print(figure.table(results))
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


def _tile(variant: Variant, smears: list[Smear], side: int, seed: int) -> Tile:
    tile = make_mosaic(smears, side, seed)
    return shrunk(*tile, variant.shrink) if variant.shrink > 1 else tile


if __name__ == "__main__":
    app()
