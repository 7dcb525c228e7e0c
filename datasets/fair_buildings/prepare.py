"""Stitch fAIr's XYZ tiles into rasters: python datasets/fair_buildings/prepare.py FOLDER OUT."""

import re
import shutil
from pathlib import Path

import numpy as np
import rasterio
import typer
from affine import Affine
from PIL import Image
from rasterio.windows import Window

from perf_vit.errors import InputError, PerfVitError
from perf_vit.labels.objects import read_object_labels

# Half the equator of Web Mercator's sphere, in metres: tile 0/0/0 reaches from -EDGE to EDGE on both axes.
EDGE = np.pi * 6_378_137
TILE_PX = 256


def prepare(source: Path, out: Path) -> None:
    """Read SOURCE/*-X-Y-Z.png and SOURCE/labels.geojson, and write OUT/images/NAME.tif and OUT/labels/NAME.geojson.

    NAME is SOURCE's own. Where a tile is missing, the raster is transparent.
    """
    tiles = find_tiles(source)
    labels = source / "labels.geojson"
    if not labels.is_file():
        raise InputError(f"no labels {labels}; expected the folder of a training area, tiles and labels together")
    for name in ("images", "labels"):
        (out / name).mkdir(parents=True, exist_ok=True)
    name = source.resolve().name
    stitch(tiles, out / "images" / f"{name}.tif")
    shutil.copyfile(labels, out / "labels" / f"{name}.geojson")
    index = read_object_labels(
        out / "labels" / f"{name}.geojson",
        out / "images" / f"{name}.tif",
        label_format="polygons",
        classes=["building"],
    )
    print(f"{name}: {len(tiles)} tiles, {index.records[0].extent.shape} px, {index.counts['objects']} buildings")


def find_tiles(source: Path) -> dict[tuple[int, int, int], Path]:
    """Files by (x, y, zoom), all of one zoom."""
    found = {}
    for path in sorted(source.glob("*.png")):
        match = re.search(r"(\d+)-(\d+)-(\d+)$", path.stem)
        if match is None:
            raise InputError(f"{path} must be named like OAM-X-Y-ZOOM.png")
        found[tuple(map(int, match.groups()))] = path
    zooms = sorted({zoom for _, _, zoom in found})
    if len(zooms) != 1:
        raise InputError(f"expected tiles of one zoom in {source}, got {len(found)} tiles of zooms {zooms}")
    return found


def stitch(tiles: dict[tuple[int, int, int], Path], path: Path) -> None:
    """Write a GeoTIFF of three bands and alpha in EPSG:3857, pixels as they are."""
    xs, ys, (zoom, *_) = (sorted({key[axis] for key in tiles}) for axis in range(3))
    pixel_m = 2 * EDGE / 2**zoom / TILE_PX
    corner = Affine(pixel_m, 0, xs[0] * TILE_PX * pixel_m - EDGE, 0, -pixel_m, EDGE - ys[0] * TILE_PX * pixel_m)
    profile = {
        "driver": "GTiff",
        "count": 4,
        "dtype": "uint8",
        "width": (xs[-1] - xs[0] + 1) * TILE_PX,
        "height": (ys[-1] - ys[0] + 1) * TILE_PX,
        "crs": "EPSG:3857",
        "transform": corner,
        "photometric": "rgb",
        "alpha": "yes",
        "tiled": True,
        "compress": "deflate",
        "predictor": 2,
        # Areas of scattered tiles are wide and mostly empty.
        "sparse_ok": True,
        "bigtiff": "if_safer",
    }
    part = path.with_suffix(".part")
    with rasterio.open(part, "w", **profile) as raster:
        for (x, y, _), tile in tiles.items():
            pixels = np.asarray(Image.open(tile).convert("RGBA"))
            if pixels.shape != (TILE_PX, TILE_PX, 4):
                raise InputError(f"{tile} must be {TILE_PX} x {TILE_PX} px, got {pixels.shape[0]} x {pixels.shape[1]}")
            place = Window((x - xs[0]) * TILE_PX, (y - ys[0]) * TILE_PX, TILE_PX, TILE_PX)
            raster.write(pixels.transpose(2, 0, 1), window=place)
    part.replace(path)


if __name__ == "__main__":
    try:
        typer.run(prepare)
    except PerfVitError as error:
        raise SystemExit(f"error: {error}") from None
