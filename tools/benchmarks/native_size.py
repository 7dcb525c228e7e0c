"""A frozen, pretrained ViT beyond its native size: which layers should see the whole window, and what that is worth.

    python tools/benchmarks/native_size.py probe --weights vit.safetensors --out probe.jsonl \
        --scene a.tif --labels a.geojson --scene b.tif --labels b.geojson --scene c.tif --labels c.geojson
    python tools/benchmarks/native_size.py blend --weights vit.safetensors --scene a.tif --scene b.tif --out blend.jsonl

`probe` trains a linear layer on the tokens of all scenes but one and scores its map of that one, for each scene in
turn: softmax in windows of the native size, the default conversion and `linearize(native_size=..)` in larger ones, at
the pixels of the scenes and at pixels twice as large. Each model is scored by a layer of its own and by that of the
softmax model ("drop-in"). Scores are those of pixels twice as large as the scenes', whatever the model saw. `blend`
compares the final tokens of one forward pass with those of softmax in overlapping windows of the native size, and their
CPU times. Every result is written at once, a JSON line each. Images have three bands of 8 bits, label 1 is building.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from patch_probe import Probe
from pretrained_vit import load_vit, normalize
from torch import Tensor, nn
from torch.nn import functional as F

import perf_vit
from perf_vit.labels import open_labels
from perf_vit.sources import open_source
from perf_vit.tiling import grid_windows, hann_weights
from perf_vit.types import IGNORE_INDEX, Window

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)

SOFTMAX, DEFAULT = "softmax", "default"
# Scores are those of pixels of so many pixels of the scenes.
SCORED = 2

Weights = Annotated[Path, typer.Option(help="State dict, .safetensors.")]
Scenes = Annotated[list[Path], typer.Option(help="Raster; repeat it.")]
Models = Annotated[
    str, typer.Option(help="softmax, default, or layers that see the whole window: none, all, 2.5.8.11.")
]
Out = Annotated[Path, typer.Option(help="File to which results are added, JSON lines.")]


@dataclass(frozen=True, eq=False)
class Scene:
    """Pixels of a scene and their labels.

    Attributes:
        name: Name of the file.
        pixels: [3, H, W], 8 bits; H and W are multiples of a patch of pixels twice as large.
        building: Pixels that are building, [H, W].
        valid: Pixels with a label, [H, W].
    """

    name: str
    pixels: npt.NDArray[np.uint8]
    building: npt.NDArray[np.bool_]
    valid: npt.NDArray[np.bool_]

    def shares(self, factor: int, patch: int) -> tuple[Tensor, Tensor]:
        """Share of building of each patch, and patches with a label, [rows, columns] each."""
        building, valid = (_means(x, factor * patch) for x in (self.building & self.valid, self.valid))
        return torch.from_numpy(building / np.maximum(valid, 1e-6)).float(), torch.from_numpy(valid > 0)

    def scored(self) -> tuple[Tensor, Tensor]:
        """Building and labelled pixels of the size that is scored, [H / 2, W / 2] each."""
        building, valid = (torch.from_numpy(_means(x, SCORED)) for x in (self.building, self.valid))
        return building >= 0.5, valid == 1


def _means(x: npt.NDArray[Any], factor: int) -> npt.NDArray[np.float64]:
    height, width = x.shape
    means: npt.NDArray[np.float64] = x.reshape(height // factor, factor, width // factor, factor).mean((1, 3))
    return means


def blocks_of(model: Any) -> list[int]:
    """Blocks that a linear layer reads: every third, the last one included."""
    return list(range(len(model.blocks)))[2::3]


def read_scene(path: Path, labels: Path | None, multiple: int, max_rows: int) -> Scene:
    """Read the first rows of a scene."""
    source = open_source(path, bands=[1, 2, 3])
    window = Window(0, 0, min(source.height, max_rows) // multiple * multiple, source.width // multiple * multiple)
    image = source.read(window)
    truth = np.zeros(window.shape, np.int64) if labels is None else open_labels(labels, source).read(window)
    return Scene(path.stem, image.pixels, truth == 1, image.valid & (truth != IGNORE_INDEX))


def scaled(pixels: npt.NDArray[np.uint8], factor: int) -> npt.NDArray[np.uint8]:
    """Average squares of pixels."""
    return pixels if factor == 1 else np.stack([_means(band, factor).round().astype(np.uint8) for band in pixels])


def model_of(name: str, softmax: Any) -> nn.Module:
    """Convert the softmax model as its name says; "interpolated" keeps positions that cover the image."""
    if name in (SOFTMAX, DEFAULT):
        return softmax if name == SOFTMAX else perf_vit.linearize(softmax)
    options: dict[str, Any] = {"native_size": softmax.patch_embed.grid_size[0]}
    layers, _, window = name.removeprefix("interpolated:").partition("/")
    every = range(len(softmax.blocks))
    chosen = {"none": (), "all": tuple(every)}.get(layers) or [int(x) for x in layers.split(".") if x.isdigit()]
    if window:
        options["window_size"] = int(window)
    if name.startswith("interpolated:"):
        windows = {"mixer": "registers", "window_size": options.pop("native_size")}
        return perf_vit.linearize(softmax, per_layer={i: windows for i in every if i not in chosen}, **options)
    return perf_vit.linearize(softmax, layers=chosen, **options)


@dataclass
class Maps:
    """Tokens of scenes at one size of pixels, of the blocks that a linear layer reads: [rows, columns, C] by scene."""

    tokens: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    patches: int = 0


@torch.no_grad()
def tokens_of(model: Any, scenes: Sequence[Scene], factor: int, size: int) -> Maps:
    """Tokens after `blocks_of`, through the last norm; windows at the edge reach back, and patches count once."""
    made, blocks = Maps(), blocks_of(model)
    for scene in scenes:
        pixels, patch = scaled(scene.pixels, factor), model.patch_embed.patch_size[0]
        rows, columns = (side // patch for side in pixels.shape[1:])
        kept = torch.zeros(rows, columns, len(blocks) * model.embed_dim, dtype=torch.float16)
        for place in grid_windows(Window(0, 0, rows, columns), size // patch, overlap=0):
            down, across = (x for x in place.slices_in(Window(0, 0, 10**9, 10**9)))
            down, across = slice(down.start, min(down.stop, rows)), slice(across.start, min(across.stop, columns))
            cut = pixels[:, down.start * patch : down.stop * patch, across.start * patch : across.stop * patch]
            start = time.process_time()
            found = model.forward_intermediates(
                normalize(cut)[None], indices=blocks, norm=True, output_fmt="NCHW", intermediates_only=True
            )
            made.seconds += time.process_time() - start
            made.patches += found[0].shape[2] * found[0].shape[3]
            kept[down, across] = torch.cat(found, dim=1)[0].permute(1, 2, 0).half()
        made.tokens[scene.name] = kept
    return made


def sample(scenes: Sequence[Scene], made: Maps, factor: int, patch: int, number: int) -> tuple[Tensor, Tensor]:
    """Tokens and shares of a sample of labelled patches of all scenes, [P, C] and [P]."""
    generator = torch.Generator().manual_seed(0)
    tokens, shares = [], []
    for scene in scenes:
        share, labelled = scene.shares(factor, patch)
        tokens.append(made.tokens[scene.name][labelled])
        shares.append(share[labelled])
    chosen = torch.randperm(sum(len(x) for x in shares), generator=generator)[:number].sort().values
    return torch.cat(tokens)[chosen].float(), torch.cat(shares)[chosen]


def pixel_logits(probe: Probe, scene: Scene, made: Maps, factor: int, patch: int) -> tuple[Tensor, Tensor]:
    """Logits and truth of all labelled pixels of the size that is scored."""
    logits = torch.stack([probe(row.float()) for row in made.tokens[scene.name]])
    up = F.interpolate(logits[None, None], scale_factor=factor * patch // SCORED, mode="bilinear")[0, 0]
    building, valid = scene.scored()
    return up[valid], building[valid]


def best_iou(logits: Tensor, truth: Tensor) -> tuple[float, float]:
    """Largest IoU over thresholds, and its threshold."""
    order = logits.argsort(descending=True)
    hits = truth[order].cumsum(0).double()
    iou = hits / (truth.sum() + torch.arange(1, len(hits) + 1) - hits)
    best = int(iou.argmax())
    return float(iou[best]), float(logits[order[best]])


def auc_of(logits: Tensor, truth: Tensor) -> float:
    """ROC AUC."""
    ordered = truth[logits.argsort()].double()
    positives, negatives = ordered.sum(), (1 - ordered).sum()
    return float((ordered * (1 - ordered).cumsum(0)).sum() / (positives * negatives))


def scores(probe: Probe, test: Scene, train: Sequence[Scene], made: Maps, factor: int, patch: int) -> dict[str, float]:
    """IoU of the held-out scene at its best threshold and at that of the training scenes, and ROC AUC."""
    logits, truth = pixel_logits(probe, test, made, factor, patch)
    seen = [pixel_logits(probe, scene, made, factor, patch) for scene in train]
    threshold = best_iou(*(torch.cat(x) for x in zip(*seen, strict=True)))[1]
    chosen = logits >= threshold
    fixed = (chosen & truth).sum() / (chosen | truth).sum()
    return {"best_iou": best_iou(logits, truth)[0], "iou": float(fixed), "auc": auc_of(logits, truth)}


@app.command()
def probe(
    weights: Weights,
    scene: Scenes,
    labels: Annotated[list[Path], typer.Option(help="Its labels, mask or polygons; in the same order.")],
    out: Out,
    models: Models = "softmax,default,none,2.5.8.11",
    factors: Annotated[str, typer.Option(help="Sizes of pixels, in pixels of the scenes.")] = "1,2",
    size: Annotated[int, typer.Option(help="Side of a window in pixels; softmax has its native size.")] = 1036,
    native_px: Annotated[int, typer.Option(help="Side of the pretraining's images in pixels.")] = 518,
    max_rows: Annotated[int, typer.Option(help="Rows of a scene to read.")] = 2048,
    train_patches: Annotated[int, typer.Option(help="Patches that a linear layer is trained on.")] = 16_000,
    l2: Annotated[str, typer.Option(help="Weights of the L2 penalty; each is scored.")] = "0.01,0.1,1",
    model_name: Annotated[str, typer.Option(help="timm's name of the model.")] = "vit_small_patch14_dinov2",
) -> None:
    """Score linear layers on scenes that they were not trained on."""
    softmax = load_vit(model_name, weights, native_px, any_size=True)
    patch = softmax.patch_embed.patch_size[0]
    scenes = [read_scene(*pair, SCORED * patch, max_rows) for pair in zip(scene, labels, strict=True)]
    for factor in map(int, factors.split(",")):
        exact: dict[tuple[str, float], Probe] = {}
        for name in models.split(","):
            made = tokens_of(model_of(name, softmax), scenes, factor, native_px if name == SOFTMAX else size)
            common = {"model": name, "factor": factor, "ms_per_patch": 1000 * made.seconds / made.patches}
            for held_out in scenes:
                train = [each for each in scenes if each is not held_out]
                seen = sample(train, made, factor, patch, train_patches)
                for penalty in map(float, l2.split(",")):
                    own = Probe.fit(*seen, penalty)
                    known = exact.setdefault((held_out.name, penalty), own)
                    for kind, used in (("own", own), ("drop-in", known)):
                        found = scores(used, held_out, train, made, factor, patch)
                        write({**common, "l2": penalty, "held_out": held_out.name, "layer": kind, **found}, out)


def write(result: dict[str, Any], out: Path) -> None:
    print(json.dumps(result), flush=True)
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


@torch.no_grad()
def blended(model: Any, image: Tensor, overlap: float) -> Tensor:
    """Final tokens of overlapping windows of the native size, averaged with Hann weights, [rows, columns, C]."""
    patch, side = model.patch_embed.patch_size[0], model.patch_embed.grid_size[0]
    rows, columns = (length // patch for length in image.shape[-2:])
    total, weight = torch.zeros(rows, columns, model.embed_dim), torch.zeros(rows, columns, 1)
    hann = torch.from_numpy(hann_weights(side))[..., None]
    for row in starts(rows, side, overlap):
        for column in starts(columns, side, overlap):
            cut = image[:, :, row * patch : (row + side) * patch, column * patch : (column + side) * patch]
            tokens = model.forward_features(cut)[0, model.num_prefix_tokens :].unflatten(0, (side, side))
            total[row : row + side, column : column + side] += hann * tokens
            weight[row : row + side, column : column + side] += hann
    return total / weight


def starts(length: int, side: int, overlap: float) -> list[int]:
    """First patches of the fewest windows that overlap by a share of their side at least, evenly spaced."""
    number = 1 + int(np.ceil((length - side) / (side * (1 - overlap))))
    return [round(x) for x in np.linspace(0, length - side, number)]


@app.command()
def blend(
    weights: Weights,
    scene: Scenes,
    out: Out,
    models: Models = "default,none,2.5.8.11",
    size: Annotated[int, typer.Option(help="Side of the image in pixels.")] = 2072,
    overlap: Annotated[float, typer.Option(help="Overlap of windows, a share of their side.")] = 0.25,
    native_px: Annotated[int, typer.Option(help="Side of the pretraining's images in pixels.")] = 518,
    model_name: Annotated[str, typer.Option(help="timm's name of the model.")] = "vit_small_patch14_dinov2",
) -> None:
    """Compare one forward pass with softmax in overlapping windows: cosine of the final tokens, and CPU time."""
    softmax = load_vit(model_name, weights, native_px, any_size=True)
    converted = {name: model_of(name, softmax) for name in models.split(",")}
    for path, place, image in crops(scene, size, softmax.patch_embed.patch_size[0]):
        start = time.process_time()
        expected = blended(softmax, image, overlap)
        taken = time.process_time() - start
        for name, model in converted.items():
            start = time.process_time()
            with torch.no_grad():
                tokens = model.forward_features(image)[0, softmax.num_prefix_tokens :].view_as(expected)  # type: ignore[operator]
            seconds = time.process_time() - start
            cosine = F.cosine_similarity(tokens, expected, dim=-1).mean().item()
            common = {"model": name, "scene": path.stem, "place": place, "px": list(image.shape[-2:])}
            write({**common, "cosine": cosine, "seconds": seconds, "windows": taken, "ratio": seconds / taken}, out)


def crops(paths: Sequence[Path], size: int, patch: int) -> Iterator[tuple[Path, tuple[int, int], Tensor]]:
    """First and last crop of each scene; one of a scene that is no larger."""
    for path in paths:
        source = open_source(path, bands=[1, 2, 3])
        height, width = (min(size, side // patch * patch) for side in (source.height, source.width))
        places = {(0, 0), (source.height - height, source.width - width)} if source.height >= 2 * height else {(0, 0)}
        for row, col in sorted(places):
            yield path, (row, col), normalize(source.read(Window(row, col, height, width)).pixels)[None]


if __name__ == "__main__":
    app()
