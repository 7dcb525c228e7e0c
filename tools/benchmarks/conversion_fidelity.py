"""What a pretrained ViT keeps when its attention is made linear, without any training.

    python tools/benchmarks/conversion_fidelity.py --weights vit.safetensors --size 518 a.tif b.tif slide.svs

Compares final tokens of the converted model with those of the softmax model on crops of real images, over several draws
of the projections, and prints a table: cosine of patch tokens and of the class token (means, worst image), seconds an
image. The weights are a timm state dict; images are whatever rasterio reads, three bands of 8 bits.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import rasterio
import torch
import typer
from pretrained_vit import CONVERSIONS, check_names, converted, load_vit, normalize
from rasterio.windows import Window
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import perf_vit
from perf_vit.workflows.conversion_report import machine_name
from perf_vit.workflows.progress import console, errors

POPULAR = "performer-pytorch"


class PopularAttention(nn.Module):
    """The attention of performer-pytorch, with its defaults, in the place of timm's."""

    def __init__(self, attention: nn.Module, num_features: int = 256) -> None:
        super().__init__()
        from performer_pytorch import FastAttention

        self.inner = attention
        self.attend = FastAttention(dim_heads=attention.head_dim, nb_features=num_features)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        inner = self.inner
        q, k, v = inner.qkv(x).unflatten(-1, (3, inner.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return inner.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))


def main(
    images: Annotated[list[Path] | None, typer.Argument(help="Rasters or slides; two crops are taken of each.")] = None,
    corners: Annotated[list[Path] | None, typer.Option(help="A raster of which the four corners are taken.")] = None,
    *,
    weights: Annotated[Path, typer.Option(help="State dict, .safetensors.")],
    model_name: Annotated[str, typer.Option(help="timm's name of the model.")] = "vit_small_patch14_dinov2",
    size: Annotated[int, typer.Option(help="Side of a crop in pixels.")] = 518,
    draws: Annotated[int, typer.Option(help="Draws of the projections.")] = 3,
    out: Annotated[Path | None, typer.Option(help="CSV file for the table.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Conversions, or folders of such; repeat it.")] = None,
) -> None:
    """Print a table of fidelity."""
    model = load_vit(model_name, weights, size)
    crops = [crop for path in images or [] for crop in read_crops(path, size)]
    crops += [crop for path in corners or [] for crop in read_crops(path, size, CORNERS)]
    exact, seconds = tokens_of(model, crops)
    rows = [("softmax", 1.0, 1.0, 1.0, 1.0, seconds)]
    for name, make in conversions(model, only).items():
        with errors.status(name):
            rows.append((name, *fidelity(make, crops, exact, draws)))
    show(rows, f"{model_name}, {size} px, {len(crops)} images, {draws} draws, {machine_name('cpu')}")
    if out is not None:
        with out.open("w", newline="") as file:
            csv.writer(file).writerows([("attention", "patch", "worst", "class", "worst", "seconds"), *rows])


def conversions(model: nn.Module, only: list[str] | None) -> dict[str, Callable[[int], nn.Module]]:
    """Name -> (seed -> converted model)."""
    check_names([name for name in only or [] if name != POPULAR])
    makers: dict[str, Callable[[int], nn.Module]] = {
        name: lambda seed, name=name: converted(model, name, seed) for name in only or CONVERSIONS if name != POPULAR
    }
    if not only or POPULAR in only:
        try:
            import performer_pytorch  # noqa: F401

            makers[POPULAR] = lambda seed: popular(model, seed)
        except ImportError:
            errors.print(f"{POPULAR} is not installed, so it is left out")
    return makers


def popular(model: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    copied = perf_vit.linearize(model, "softmax")
    for block in copied.blocks:
        block.attn = PopularAttention(block.attn)
    return copied.eval()


DIAGONAL = ((1, 1), (2, 2))
CORNERS = ((0, 0), (0, 3), (3, 0), (3, 3))


def read_crops(path: Path, size: int, thirds: Sequence[tuple[int, int]] = DIAGONAL) -> Iterator[Tensor]:
    """Crops, [3, size, size], so many thirds of the way from the top and from the left; by default on the diagonal."""
    with rasterio.open(path) as source:
        for down, across in thirds:
            row, column = (source.height - size) * down // 3, (source.width - size) * across // 3
            pixels = source.read([1, 2, 3], window=Window(max(column, 0), max(row, 0), size, size))
            if pixels.shape[1:] != (size, size):
                raise typer.BadParameter(f"expected {size} x {size} px at least, got {path} with less")
            yield normalize(pixels)


@torch.no_grad()
def tokens_of(model: nn.Module, crops: list[Tensor]) -> tuple[list[Tensor], float]:
    """Final tokens of each crop, [N, C], and seconds a crop."""
    start = time.perf_counter()
    tokens = [model.forward_features(crop.unsqueeze(0))[0] for crop in crops]
    return tokens, (time.perf_counter() - start) / len(crops)


def fidelity(
    make: Callable[[int], nn.Module], crops: list[Tensor], exact: list[Tensor], draws: int
) -> tuple[float, float, float, float, float]:
    """Mean and worst cosine of patch tokens, then of the class token, and the least seconds a crop."""
    patch, class_, seconds = [], [], []
    for seed in range(draws):
        tokens, time_ = tokens_of(make(seed), crops)
        seconds.append(time_)
        for a, b in zip(tokens, exact, strict=True):
            cosine = F.cosine_similarity(a, b, dim=-1)
            patch.append(cosine[1:].mean().item())
            class_.append(cosine[0].item())
    return float(np.mean(patch)), min(patch), float(np.mean(class_)), min(class_), min(seconds)


def show(rows: list[tuple[Any, ...]], title: str) -> None:
    table = Table(title=title)
    for header in ("attention", "patch tokens", "worst", "class token", "worst", "s"):
        table.add_column(header, justify="left" if header == "attention" else "right")
    for name, *cosines, seconds in rows:
        table.add_row(name, *(f"{cosine:.4f}" for cosine in cosines), f"{seconds:.2f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
