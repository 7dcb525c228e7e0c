"""Generated scene with small labelled targets, for the demo and tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import rasterio
from affine import Affine
from rasterio.features import rasterize
from scipy.ndimage import gaussian_filter
from shapely import Polygon, affinity, box

__all__ = ["ShipScene", "make_ship_scene"]

CRS = "EPSG:32637"
NODATA = 0
# Mean digital numbers of blue, green, red and near infrared for water, land, ship, wake and cloud.
_SPECTRA = {
    "water": (620, 480, 320, 180),
    "land": (700, 860, 780, 2100),
    "ship": (1500, 1450, 1400, 1300),
    "cloud": (1520, 1480, 1430, 1320),
}


@dataclass(frozen=True, slots=True)
class ShipScene:
    """Files of a generated scene.

    Attributes:
        image: GeoTIFF with 4 bands of uint16, nodata 0 with a slanted nodata border, UTM, pixels of 3.0 x 3.2 m.
        labels: GeoJSON file of ship outlines, in longitude and latitude.
        size_px: Height and width in pixels.
        num_targets: Number of ships.
    """

    image: Path
    labels: Path
    size_px: int
    num_targets: int


def make_ship_scene(folder: Path, *, seed: int = 0, size_px: int = 1024, num_targets: int = 150) -> ShipScene:
    """Write a scene of sea with islands, clouds and ships of 4 to 6 by 10 to 18 pixels.

    Clouds are about as bright and as large as ships; they differ in outline only.

    Args:
        folder: Output folder; created if missing, earlier files are replaced.
        seed: Random seed.
        size_px: Height and width in pixels.
        num_targets: Number of ships to place; fewer are placed if there is too little water.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    transform = Affine(3.0, 0, 401_000, 0, -3.2, 4_510_000)
    land = _blobs(rng, size_px, sigma=size_px / 14, share=0.22)
    ships = _place_ships(rng, land, num_targets)
    clouds = _blobs(rng, size_px, sigma=3.0, share=0.012) & ~land
    pixels = _paint(rng, land, clouds, ships)
    _cut_border(pixels)

    image, labels = folder / "scene.tif", folder / "ships.geojson"
    _write_image(image, pixels, transform)
    outlines = [affinity.affine_transform(s, (transform.a, 0, 0, transform.e, transform.c, transform.f)) for s in ships]
    frame = gpd.GeoDataFrame({"class": ["ship"] * len(ships)}, geometry=outlines, crs=CRS)
    labels.unlink(missing_ok=True)
    frame.to_crs("EPSG:4326").to_file(labels, driver="GeoJSON")
    return ShipScene(image, labels, size_px, len(ships))


def _blobs(rng: np.random.Generator, size: int, sigma: float, share: float) -> npt.NDArray[np.bool_]:
    field = gaussian_filter(rng.standard_normal((size, size)), sigma, mode="wrap")
    return field > np.quantile(field, 1 - share)


def _place_ships(rng: np.random.Generator, land: npt.NDArray[np.bool_], count: int) -> list[Polygon]:
    """Place rotated hulls in pixel coordinates (x = column, y = row), on water and apart from each other."""
    size = len(land)
    taken = land.copy()
    ships: list[Polygon] = []
    for _ in range(count * 20):
        if len(ships) == count:
            break
        width, length = rng.uniform(4, 6), rng.uniform(10, 18)
        x, y = rng.uniform(12, size - 12, 2)
        hull = affinity.rotate(box(x - width / 2, y - length / 2, x + width / 2, y + length / 2), rng.uniform(0, 180))
        row, col, reach = int(y), int(x), 14
        around = taken[max(0, row - reach) : row + reach, max(0, col - reach) : col + reach]
        if not around.any():
            ships.append(hull)
            around[:] = True
    return ships


def _paint(
    rng: np.random.Generator, land: npt.NDArray[np.bool_], clouds: npt.NDArray[np.bool_], ships: list[Polygon]
) -> npt.NDArray[np.uint16]:
    size = len(land)
    alpha = {"land": land.astype(float), "cloud": clouds.astype(float)}
    alpha["ship"] = rasterize(ships, (size, size), dtype="uint8").astype(float) if ships else np.zeros((size, size))
    pixels = np.empty((4, size, size))
    pixels[:] = np.reshape(_SPECTRA["water"], (4, 1, 1))
    for name in ("land", "cloud", "ship"):
        pixels += alpha[name] * (np.reshape(_SPECTRA[name], (4, 1, 1)) - pixels)
    # Optics, then terrain relief at two scales, then sensor noise.
    pixels = gaussian_filter(pixels, (0, 0.6, 0.6))
    texture = sum(gaussian_filter(rng.standard_normal((size, size)), s) * s for s in (1.5, 8.0))
    pixels *= 1 + 0.12 * texture
    pixels += rng.normal(0, 25, pixels.shape)
    return pixels.clip(1, 65535).astype(np.uint16)


def _cut_border(pixels: npt.NDArray[np.uint16]) -> None:
    """Set a slanted nodata border on the left and right, as of an orbit."""
    size = pixels.shape[-1]
    slant = np.arange(size) * 0.06
    columns = np.arange(size)[None, :]
    outside = (columns < slant[:, None]) | (columns >= size - slant[::-1, None])
    pixels[:, outside] = NODATA


def _write_image(path: Path, pixels: npt.NDArray[np.uint16], transform: Affine) -> None:
    profile = {"driver": "GTiff", "dtype": "uint16", "count": 4, "crs": CRS, "transform": transform, "nodata": NODATA}
    size = pixels.shape[-1]
    with rasterio.open(path, "w", height=size, width=size, tiled=True, compress="deflate", **profile) as dataset:
        dataset.write(pixels)
        for index, name in enumerate(("blue", "green", "red", "nir"), 1):
            dataset.set_band_description(index, name)
