"""Make the pictures of the README, which show what a converted ViT sees, and a map that a trained one makes.

    python tools/readme_pictures.py tokens dinov2_linear CMU-1-Small-Region.svs docs/images/tokens.jpg --tissue auto
    python tools/readme_pictures.py tokens dinov2_linear nairobi_0.tif docs/images/nairobi.jpg \\
        --window 2560 256 1526 1526
    python tools/readme_pictures.py map nairobi_0.tif map.tif docs/images/buildings.jpg --window 0 0 4096 4096

A picture has two panels. The left one is a slide or raster. The right one of `tokens` shows the first three principal
components of the patch tokens that the model computes from all of it in one forward pass, as red, green and blue;
`dinov2_linear` is a folder made by `perf-vit convert`. The right one of `map` shows the classes of a map but the first
one, as colours over the image. The map of the README is made by the commands in `configs/segmentation/
buildings_pretrained.yaml` and by `perf-vit predict --overlap 130`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import typer
from PIL import Image
from scipy import ndimage

import perf_vit
from perf_vit.conversion import load_converted
from perf_vit.types import IGNORE_INDEX, Window

# Of the backbone's pretraining, for 8-bit values.
MEAN, STD = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
GAP_PX = 12
PATCH_PX = 14
FILL, OPACITY, EDGE_PX = (0, 102, 255), 0.45, 4

Picture = npt.NDArray[np.uint8]


app = typer.Typer()


@app.command()
def tokens(
    model: Path,
    path: Path,
    out: Path,
    window: Annotated[tuple[int, int, int, int] | None, typer.Option(help="Row, column, height, width.")] = None,
    tissue: Annotated[str | None, typer.Option(help="Tissue of a slide: auto.")] = None,
    block: Annotated[int, typer.Option(help="Block of the tokens, from 0.")] = 7,
    width: Annotated[int, typer.Option(help="Width of a panel in pixels.")] = 440,
) -> None:
    """Show an image and the principal components of its patch tokens, at full resolution."""
    source = perf_vit.open(path, tissue=tissue)
    row, column, *size = window or (0, 0, *source.size)
    height, columns = (side // PATCH_PX * PATCH_PX for side in size)
    image = source.read(Window(row, column, height, columns))
    vit = load_converted(model, img_size=(height, columns)).eval()
    inputs = (image.pixels - MEAN[:, None, None]) / STD[:, None, None]
    with torch.inference_mode():
        (grid,) = vit.forward_intermediates(
            torch.from_numpy(inputs).float()[None], indices=[block], norm=True, intermediates_only=True
        )
    picture = image.pixels.transpose(1, 2, 0)
    _save(out, [picture, components(grid[0].numpy(), image.valid)], width)


@app.command("map")
def draw_map(
    path: Path,
    map_path: Annotated[Path, typer.Argument(metavar="MAP", help="Map of the same scene, by `perf-vit predict`.")],
    out: Path,
    window: Annotated[tuple[int, int, int, int], typer.Option(help="Row, column, height, width, in the scene.")],
    width: Annotated[int, typer.Option(help="Width of a panel in pixels.")] = 440,
) -> None:
    """Show part of a scene, and the classes of its map but the first one over it."""
    source = perf_vit.open(path)
    image = source.read(Window(*window))
    # A map has the pixel size that its model was trained with.
    whole = perf_vit.open(map_path).read().pixels[0]
    classes = whole[np.ix_(*(_nearest(*span) for span in _spans(Window(*window), source.size, whole.shape)))]
    picture = image.pixels.transpose(1, 2, 0)
    inside = (classes > 0) & (classes != IGNORE_INDEX)
    edge = inside & ~ndimage.binary_erosion(inside, iterations=EDGE_PX)
    painted = np.where(inside[..., None], (1 - OPACITY) * picture + OPACITY * np.array(FILL), picture)
    painted[edge] = FILL
    _save(out, [picture, np.round(painted).astype(np.uint8)], width)


def _spans(window: Window, size: tuple[int, int], map_size: tuple[int, ...]) -> list[tuple[int, int, float]]:
    """Return first and last pixel of a window's rows and columns, and how many pixels of the map each of them is."""
    starts, stops = (window.row, window.col), (window.row_stop, window.col_stop)
    return [(*each[:2], each[3] / each[2]) for each in zip(starts, stops, size, map_size, strict=True)]


def _nearest(start: int, stop: int, scale: float) -> npt.NDArray[np.int64]:
    return ((np.arange(start, stop) + 0.5) * scale).astype(np.int64)


def components(tokens: npt.NDArray[np.floating], valid: npt.NDArray[np.bool_]) -> Picture:
    """Return the first three principal components of the valid patches as colours, others white.

    Args:
        tokens: Tokens, [C, H, W].
        valid: Valid pixels, [H * PATCH_PX, W * PATCH_PX].
    """
    rows, columns = tokens.shape[1:]
    is_valid = valid.reshape(rows, PATCH_PX, columns, PATCH_PX).mean(axis=(1, 3)) > 0.5
    flat = tokens[:, is_valid].T.astype(np.float64)
    flat -= flat.mean(axis=0)
    _, vectors = np.linalg.eigh(flat.T @ flat)
    parts = flat @ vectors[:, :-4:-1]
    low, high = np.percentile(parts, (1, 99), axis=0)
    colors = np.full((rows, columns, 3), 255, np.uint8)
    colors[is_valid] = np.round(((parts - low) / (high - low)).clip(0, 1) * 255)
    return colors


def _save(out: Path, pictures: list[Picture], width: int) -> None:
    """Write panels side by side on white, as a JPEG."""
    height = round(width * len(pictures[0]) / len(pictures[0][0]))
    sheet = Image.new("RGB", (len(pictures) * (width + GAP_PX) - GAP_PX, height), "white")
    for index, picture in enumerate(pictures):
        is_enlarged = len(picture) < height
        panel = Image.fromarray(picture).resize(
            (width, height), Image.Resampling.NEAREST if is_enlarged else Image.Resampling.LANCZOS
        )
        sheet.paste(panel, (index * (width + GAP_PX), 0))
    sheet.save(out, quality=85)


if __name__ == "__main__":
    app()
