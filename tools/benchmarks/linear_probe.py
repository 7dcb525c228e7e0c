"""What a linear probe for buildings sees in a pretrained ViT, before and after its attention is made linear.

    python tools/benchmarks/linear_probe.py --weights vit.safetensors --size 518 \
        --train a.tif --train-labels a_mask.tif --test b.tif --test-labels b_mask.tif

A logistic regression from single patch tokens of frozen blocks to the patch's share of building, trained on some scenes
and scored on others. Converted models are scored by the probe of the softmax model ("drop-in"), and by a probe trained
on their own features ("own"), over several draws of the projections. Prints a table of ROC AUC and average precision;
differences from softmax come with their 95 % interval when the windows of the test scenes are drawn anew. Labels are
whatever `perf_vit.labels.open_labels` reads, label 1 is building. Images have three bands of 8 bits.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import typer
from patch_probe import Probe, resampled_auc, scores_of
from pretrained_vit import CONVERSIONS, check_names, converted, load_vit, normalize
from rich.table import Table
from torch import Tensor, nn

from perf_vit.labels import open_labels
from perf_vit.sources import open_source
from perf_vit.tiling import grid_windows
from perf_vit.types import IGNORE_INDEX, Window
from perf_vit.workflows.progress import console, errors

ALL = "all"
NUM_RESAMPLES = 500
DROP_IN, OWN = "drop-in", "own"


@dataclass(frozen=True, eq=False)
class Tile:
    """One input of the model, with the labels of its patches, row by row.

    Attributes:
        pixels: [3, size, size], 8 bits.
        share: part of each patch's valid pixels that is building, [N].
        counts: patches that have valid pixels and lie in no earlier tile, [N].
    """

    pixels: npt.NDArray[np.uint8]
    share: Tensor
    counts: Tensor


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels of the patches that count, over all tiles.

    Attributes:
        share: part of the patch that is building, [P].
        tile: number of the patch's tile, [P].
    """

    share: Tensor
    tile: Tensor

    @property
    def positive(self) -> Tensor:
        """Patches that are building for the most part, [P]."""
        return self.share > 0.5


@dataclass(frozen=True)
class Row:
    """Scores of one probe; `draw` is a number or "mean", which alone has an interval."""

    attention: str
    probe: str
    blocks: str
    draw: str
    auc: float
    average_precision: float
    difference: float = 0.0
    low: float | None = None
    high: float | None = None


def main(
    weights: Annotated[Path, typer.Option(help="State dict, .safetensors.")],
    train: Annotated[list[Path], typer.Option(help="Raster to train on; repeat it.")],
    train_labels: Annotated[list[Path], typer.Option(help="Its labels, mask or polygons; in the same order.")],
    test: Annotated[list[Path], typer.Option(help="Raster to score on; repeat it.")],
    test_labels: Annotated[list[Path], typer.Option(help="Its labels; in the same order.")],
    model_name: Annotated[str, typer.Option(help="timm's name of the model.")] = "vit_small_patch14_dinov2",
    size: Annotated[int, typer.Option(help="Side of a window in pixels, a multiple of the patch.")] = 518,
    blocks: Annotated[str, typer.Option(help="Blocks to read, from 0.")] = "2,5,8,11",
    draws: Annotated[int, typer.Option(help="Draws of the projections.")] = 3,
    l2: Annotated[float, typer.Option(help="Weight of the probe's L2 penalty.")] = 0.01,
    out: Annotated[Path | None, typer.Option(help="CSV file for all numbers.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Conversions, or folders of such; repeat it.")] = None,
) -> None:
    """Print a table of what probes see."""
    check_names(only or [])
    model = load_vit(model_name, weights, size)
    places = [int(block) for block in blocks.split(",")]
    train_tiles, test_tiles = (
        read_scenes(*paths, size, model) for paths in ((train, train_labels), (test, test_labels))
    )
    comparison = Comparison(model, train_tiles, test_tiles, places, l2)
    rows = comparison.softmax()
    for name in only or CONVERSIONS:
        with errors.status(name):
            rows += comparison.converted(name, draws)
    prevalence = comparison.test.positive.float().mean().item()
    console.print(
        f"{model_name}, {size} px, {len(train_tiles)} and {len(test_tiles)} windows, {len(comparison.train.share):,} "
        f"and {len(comparison.test.share):,} patches, {prevalence:.1%} building in the test, {draws} draws"
    )
    show(rows, ("auc", "average_precision"))
    if out is not None:
        write_rows(rows, out)


def read_scenes(images: Sequence[Path], labels: Sequence[Path], size: int, model: nn.Module) -> list[Tile]:
    if len(images) != len(labels):
        raise typer.BadParameter(f"expected labels for each of {len(images)} images, got {len(labels)}")
    patch = model.patch_embed.patch_size[0]
    if size % patch:
        raise typer.BadParameter(f"--size must be a multiple of {patch}, got {size}; try {size // patch * patch}")
    return [tile for pair in zip(images, labels, strict=True) for tile in read_tiles(*pair, size, patch)]


def read_tiles(path: Path, labels_path: Path, size: int, patch: int) -> Iterator[Tile]:
    """Windows over the scene, from which a border narrower than a patch is left.

    Windows begin on the grid of patches, so the last ones of a row or column, which reach back over their neighbours,
    see some of the same patches; only the first time counts.
    """
    source = open_source(path, bands=[1, 2, 3])
    labels = open_labels(labels_path, source)
    extent = Window(0, 0, source.height // patch * patch, source.width // patch * patch)
    if min(extent.shape) < size:
        raise typer.BadParameter(f"expected {size} x {size} px at least, got {path} with less; try a smaller --size")
    fresh = np.ones((extent.height // patch, extent.width // patch), dtype=bool)
    for window in grid_windows(extent, size, overlap=0):
        image = source.read(window)
        truth = np.where(image.valid, labels.read(window), IGNORE_INDEX)
        valid, building = (_sum_patches(mask, patch) for mask in (truth != IGNORE_INDEX, truth == 1))
        rows, cols = (slice(place.start // patch, place.stop // patch) for place in window.slices_in(extent))
        counts = fresh[rows, cols] & (valid > 0)
        fresh[rows, cols] = False
        share = building / np.maximum(valid, 1)
        yield Tile(image.pixels, torch.from_numpy(share).float().flatten(), torch.from_numpy(counts).flatten())


def _sum_patches(mask: npt.NDArray[np.bool_], patch: int) -> npt.NDArray[np.int64]:
    height, width = mask.shape
    return mask.reshape(height // patch, patch, width // patch, patch).sum(axis=(1, 3))


def labels_of(tiles: Sequence[Tile]) -> Labels:
    return Labels(
        share=torch.cat([tile.share[tile.counts] for tile in tiles]),
        tile=torch.cat([torch.full((int(tile.counts.sum()),), number) for number, tile in enumerate(tiles)]),
    )


@torch.no_grad()
def features_of(model: nn.Module, tiles: Sequence[Tile], blocks: Sequence[int]) -> dict[str, Tensor]:
    """Patch tokens after each block, through the model's last layer norm, [P, C], and all side by side."""
    found: list[list[Tensor]] = []
    for tile in tiles:
        tokens = model.forward_intermediates(
            normalize(tile.pixels).unsqueeze(0),
            indices=list(blocks),
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        found.append([x[0, tile.counts] for x in tokens])
    features = {str(block): torch.cat(x) for block, x in zip(blocks, zip(*found, strict=True), strict=True)}
    return {**features, ALL: torch.cat(list(features.values()), dim=1)}


class Comparison:
    """Probes of the softmax model, and what they and others see in converted ones."""

    def __init__(
        self, model: nn.Module, train_tiles: list[Tile], test_tiles: list[Tile], blocks: Sequence[int], l2: float
    ) -> None:
        self.model, self.train_tiles, self.test_tiles, self.blocks, self.l2 = model, train_tiles, test_tiles, blocks, l2
        self.train, self.test = labels_of(train_tiles), labels_of(test_tiles)
        rng = np.random.default_rng(0)
        # How often each window of the test is drawn, [resamples, windows].
        tiles = len(test_tiles)
        self.resamples = torch.from_numpy(rng.multinomial(tiles, np.full(tiles, 1 / tiles), NUM_RESAMPLES))
        self.probes: dict[str, Probe] = {}
        self.exact: dict[str, tuple[Row, Tensor]] = {}

    def softmax(self) -> list[Row]:
        """Train the probes of the softmax model and score them; to be called first."""
        self.probes = self._fit(features_of(self.model, self.train_tiles, self.blocks))
        for blocks, features in features_of(self.model, self.test_tiles, self.blocks).items():
            scores = self.probes[blocks](features)
            auc, precision = scores_of(scores, self.test.positive)
            row = Row("softmax", OWN, blocks, "mean", auc, precision)
            self.exact[blocks] = row, self._resampled(scores)
        return [row for row, _ in self.exact.values()]

    def converted(self, name: str, draws: int) -> list[Row]:
        """Scores of each draw and of their mean, by the probe of the softmax model and by one of their own."""
        rows: list[Row] = []
        resampled: dict[tuple[str, str], list[Tensor]] = {}
        for seed in range(draws):
            model = converted(self.model, name, seed)
            own = self._fit(features_of(model, self.train_tiles, self.blocks))
            for blocks, features in features_of(model, self.test_tiles, self.blocks).items():
                exact, exact_resampled = self.exact[blocks]
                for probe, probes in ((DROP_IN, self.probes), (OWN, own)):
                    scores = probes[blocks](features)
                    auc, precision = scores_of(scores, self.test.positive)
                    rows.append(Row(name, probe, blocks, str(seed), auc, precision, auc - exact.auc))
                    resampled.setdefault((probe, blocks), []).append(self._resampled(scores) - exact_resampled)
        return rows + [mean_row(rows, probe, blocks, x) for (probe, blocks), x in resampled.items()]

    def _fit(self, features: dict[str, Tensor]) -> dict[str, Probe]:
        return {blocks: Probe.fit(x, self.train.share, self.l2) for blocks, x in features.items()}

    def _resampled(self, scores: Tensor) -> Tensor:
        return resampled_auc(scores, self.test.positive, self.test.tile, self.resamples)


def mean_row(rows: Sequence[Row], probe: str, blocks: str, differences: Sequence[Tensor]) -> Row:
    """Mean over draws; the interval is that of the mean difference over resamples of the windows, [resamples] each."""
    chosen = [row for row in rows if (row.probe, row.blocks) == (probe, blocks)]
    auc, precision, difference = (
        float(np.mean([getattr(row, key) for row in chosen])) for key in ("auc", "average_precision", "difference")
    )
    low, high = np.nanquantile(torch.stack(list(differences)).mean(dim=0).numpy(), (0.025, 0.975))
    return Row(chosen[0].attention, probe, blocks, "mean", auc, precision, difference, float(low), float(high))


def show(rows: Sequence[Row], quantities: Sequence[str]) -> None:
    """A table of means for each quantity, and one of the draws' differences with all blocks side by side."""
    blocks = list(dict.fromkeys(row.blocks for row in rows))
    kinds = list(dict.fromkeys((row.attention, row.probe) for row in rows))
    for quantity in quantities:
        table = _table(quantity.replace("auc", "ROC AUC").replace("_", " "), blocks)
        for kind in kinds:
            means = [row for row in rows if (row.attention, row.probe, row.draw) == (*kind, "mean")]
            table.add_row(*kind, *(f"{getattr(row, quantity):.4f}" for row in means))
        console.print(table)
    table = _table("difference in ROC AUC from softmax, 95 % over windows, each draw", [*blocks, f"draws, {ALL}"])
    for kind in kinds:
        own = [row for row in rows if (row.attention, row.probe) == kind]
        means = [f"{x.difference:+.4f} {x.low:+.4f} {x.high:+.4f}" for x in own if x.low is not None]
        if means:
            drawn = [f"{row.difference:+.4f}" for row in own if row.blocks == ALL and row.draw != "mean"]
            table.add_row(*kind, *means, " ".join(drawn))
    console.print(table)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title)
    for header in ("attention", "probe"):
        table.add_column(header)
    for header in columns:
        table.add_column(header, justify="right")
    return table


def write_rows(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in dataclasses.fields(Row))
        writer.writerows([f"{x:.5f}" if isinstance(x, float) else x for x in dataclasses.astuple(row)] for row in rows)


if __name__ == "__main__":
    typer.run(main)
