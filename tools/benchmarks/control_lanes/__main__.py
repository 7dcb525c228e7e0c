"""Does a network use what is far away? Lanes of blood smears whose left end decides the class of their platelets.

    python tools/benchmarks/control_lanes train BCCD --variant performer --seed 0 --out runs/lanes
    python tools/benchmarks/control_lanes report runs/lanes --picture docs/images/control_lanes.png
    python tools/benchmarks/control_lanes show BCCD tile.png
    python tools/benchmarks/control_lanes cost BCCD --variant performer

A tile holds eight lanes of 128 px. A lane begins with a control of 64 px, which has a white cell in one lane of four;
all platelets of such a lane are targets, those of other lanes are not. Nothing but the control tells them apart.

Expected before the runs: the Performer finds the class at every distance, where windows fall to chance. It is falsified
if (a) the Performer's AUC of the class (see `DistanceScores`) falls below .75 in a bin of the distance in the mean of
its seeds, or (b) windows of 128 px without registers exceed .65 in a bin beyond the first, or (c) the Performer's AP50
of the target isn't twice that of windows in each bin beyond the first. Expected too, with less confidence: windows with
registers lie between both; S4 and H3, which run along rows, equal the Performer; the ResNet-18 falls to chance beyond
its reach of some 200 px; Linformer, whose sums have fixed places, doesn't tell lanes apart; on tiles shrunk four times
platelets are too small to be found. Of AUCs, `auc_in_tiles` came after the first runs: over tiles, chance is above .5.

Each run is a process of one thread; its CPU time is what it took of the machine. A run that is stopped goes on where it
was; a finished one isn't repeated.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import torch
import typer

sys.path.insert(1, str(Path(__file__).parents[1] / "tiny_objects"))
import lane_figure
from distance_scores import DistanceScores
from fitting import TEST_SEED, Tile, detect, fit, peak_mib
from lane_hint import LaneHint
from lanes import CLASSES, LANE_PX, SHRINK, LaneMaker
from mosaic import read_smears, shrunk
from variants import VARIANTS, build_variant

from perf_vit.models import Detector
from perf_vit.workflows.progress import console

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

SIDES = (128, 256, 512, 1024)
"""Sides of the tiles of the curriculum, in pixels: one lane, two, four and eight."""

BATCH_SIZES = {128: 8, 256: 2}
"""Number of tiles of a step, 1 at other sides."""

SEED_STEP = 10_000
"""Between the tiles of two seeds: a run needs fewer."""

TRAIN_SHARE = 0.5
"""Share of the lanes of training whose control has a white cell; a quarter of those of the test have one."""

Bccd = Annotated[Path, typer.Argument(help="The BCCD data set's folder.")]
VariantName = Annotated[str, typer.Option("--variant", help=f"One of {', '.join(VARIANTS)}.")]


@app.command()
def train(
    bccd: Bccd,
    variant: VariantName,
    out: Annotated[Path, typer.Option(help="Folder that gets VARIANT_SEED.json.")],
    seed: Annotated[int, typer.Option(help="Decides weights and tiles.")] = 0,
    steps: Annotated[
        tuple[int, int, int, int],
        typer.Option(help="Numbers of steps on tiles of 128 px (8 tiles a step), 256 px (2), 512 px and 1,024 px (1)."),
    ] = (100, 150, 80, 0),
    num_tests: Annotated[int, typer.Option(help="Number of test tiles of 1,024 px; more of smaller ones.")] = 8,
    test_px: Annotated[tuple[int, int], typer.Option(help="Sides of the test tiles.")] = (512, 1024),
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
) -> None:
    """Train one variant on lanes of one part of the photographs and score it on lanes of the other."""
    path = out / f"{variant}_{seed}.json"
    if path.exists():
        console.print(f"{path} is finished; delete it to run it again")
        return
    torch.set_num_threads(1)
    row, (makers, sides) = VARIANTS[variant], (_makers(bccd), np.repeat(SIDES, steps).tolist())
    torch.manual_seed(seed)
    model = build_variant(row, CLASSES, SIDES[-1])
    before = peak_mib()
    seconds, losses = fit(
        LaneHint(model, LANE_PX // row.shrink),
        lambda number, px: _tile(makers[0], px, seed * SEED_STEP + number, row.shrink, TRAIN_SHARE),
        sides,
        lr,
        f"{variant} {seed}",
        path.with_suffix(".pt"),
        BATCH_SIZES,
    )
    memory = peak_mib() - before
    model.eval()
    tests = {px: _test(model, makers[1], px, num_tests * SIDES[-1] // px, row.shrink) for px in test_px}
    by_side = defaultdict(float)
    for side, took in zip(sides, seconds, strict=True):
        by_side[str(side)] += took
    result = {
        "variant": variant,
        "title": row.title,
        "seed": seed,
        "steps": list(steps),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_cpu_s": sum(seconds),
        "train_cpu_s_by_side": by_side,
        "train_peak_mib": memory,
        "loss": float(np.mean(losses[-20:])),
        "tests": tests,
    }
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1))
    path.with_suffix(".pt").unlink(missing_ok=True)
    console.print(result)


@app.command()
def report(
    runs: Annotated[Path, typer.Argument(help="Folder of the results.")],
    picture: Annotated[Path | None, typer.Option(help="PNG of the scores by distance.")] = None,
) -> None:
    """Print the tables of all results in a folder, and draw the scores by distance."""
    results = [json.loads(path.read_text()) for path in sorted(runs.glob("*.json"))]
    print(lane_figure.tables(results))
    if picture:
        lane_figure.draw(results, picture)


@app.command()
def show(
    bccd: Bccd,
    out: Annotated[Path, typer.Argument(help="PNG of a tile and its boxes.")],
    side: Annotated[int, typer.Option(help="Side of the tile.")] = SIDES[-1],
) -> None:
    """Draw a test tile: targets red, other platelets green, ignored ones grey."""
    image, labels = _makers(bccd)[1].make(side, side, TEST_SEED)
    drawn = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    colors = ((0, 0, 200), (0, 140, 0))
    for box, label, ignored in zip(labels.boxes_xyxy.round().astype(int), labels.labels, labels.ignored, strict=True):
        cv2.rectangle(drawn, box[:2].tolist(), box[2:].tolist(), (128,) * 3 if ignored else colors[label], 1)
    cv2.imwrite(str(out), drawn)


@app.command()
def cost(
    bccd: Bccd,
    variant: VariantName,
    side: Annotated[list[int] | None, typer.Option(help="Side of the tiles; repeatable.")] = None,
) -> None:
    """Print the CPU seconds of a training step at each size, the second of two."""
    torch.set_num_threads(1)
    row, maker = VARIANTS[variant], _makers(bccd)[0]
    model = build_variant(row, CLASSES, SIDES[-1])
    for px in side or SIDES:
        seconds, _ = fit(
            model, lambda step, px: _tile(maker, px, step, row.shrink), [px] * 2, 1e-3, variant, None, BATCH_SIZES
        )
        console.print(f"{variant}, {px} px: {seconds[-1]:.2f} s; peak {peak_mib():,.0f} MiB")


def _makers(bccd: Path) -> list[LaneMaker]:
    """Return the makers of tiles for training and test."""
    return [LaneMaker(smears) for smears in read_smears(bccd, (SHRINK,))]


def _test(model: Detector, maker: LaneMaker, px: int, num_tiles: int, shrink: int) -> dict[str, Any]:
    """Return the scores on tiles of one size, and the CPU seconds of a tile."""
    scores, seconds = DistanceScores(), 0.0
    for index in range(TEST_SEED, TEST_SEED + num_tiles):
        found, took = detect(model, _tile(maker, px, index, shrink)[0], shrink)
        scores.update(found, maker.make(px, px, index)[1])
        seconds += took / num_tiles
    return {"cpu_s_per_tile": seconds, **scores.to_dict()}


def _tile(maker: LaneMaker, side: int, seed: int, shrink: int, target_share: float = 0.25) -> Tile:
    tile = maker.make(side, side, seed, target_share)
    return shrunk(*tile, shrink) if shrink > 1 else tile


if __name__ == "__main__":
    app()
