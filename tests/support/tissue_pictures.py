"""Generated pictures of slides at 8 micrometres per pixel, with their tissue."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import gaussian_filter, zoom

__all__ = ["BRIGHTFIELD", "INKS", "TissuePicture", "fluorescence_picture", "stained_picture"]

Field = npt.NDArray[np.float64]

# What stains absorb of red, green and blue (Ruifrok and Johnston 2001).
HAEMATOXYLIN, EOSIN, DAB = np.array([0.65, 0.70, 0.29]), np.array([0.10, 0.95, 0.28]), np.array([0.27, 0.57, 0.78])

INKS = {
    "blue": np.array([0.95, 0.65, 0.12]),
    "violet": np.array([0.95, 0.92, 0.22]),
    "green": np.array([0.90, 0.28, 0.34]),
    "red": np.array([0.12, 0.90, 0.66]),
    "black": np.array([1.10, 1.15, 1.25]),
}


@dataclass(frozen=True)
class TissuePicture:
    """Pixels [C, H, W], the scanned ones, the tissue without ink, and the glass, with ink; [H, W] each."""

    pixels: npt.NDArray[np.generic]
    valid: npt.NDArray[np.bool_]
    tissue: npt.NDArray[np.bool_]
    glass: npt.NDArray[np.bool_]


def clouds(rng: np.random.Generator, shape: tuple[int, int], scale_px: float) -> Field:
    """Smooth noise of mean 0 and deviation 1 with structures of about `scale_px`."""
    coarse = max(1, int(scale_px / 3))
    small = rng.standard_normal(tuple(-(-side // coarse) + 4 for side in shape))
    field = zoom(gaussian_filter(small, scale_px / coarse), coarse, order=1)[: shape[0], : shape[1]]
    return (field - field.mean()) / field.std()


def blobs(rng: np.random.Generator, shape: tuple[int, int], share: float) -> npt.NDArray[np.bool_]:
    """Pieces of tissue with ragged rims, away from the edge of the slide."""
    y, x = np.meshgrid(np.linspace(-1, 1, shape[0]), np.linspace(-1, 1, shape[1]), indexing="ij")
    field = clouds(rng, shape, min(shape) / 8) + 0.12 * clouds(rng, shape, 6) - 2.0 * (np.hypot(y, x) > 0.85)
    mask = field > np.quantile(field, 1 - share)
    smooth = gaussian_filter(mask.astype(float), 2) > 0.5
    return np.asarray(smooth)


def tissue_density(
    rng: np.random.Generator, shape: tuple[int, int], stain: str, strength: float = 1.0
) -> npt.NDArray[np.float64]:
    """Optical densities of tissue, [3, H, W]: regions of cells, fibres, fat, and single nuclei."""
    cells = 1 / (1 + np.exp(-2 * clouds(rng, shape, 20)))
    grain = np.exp(0.35 * clouds(rng, shape, 1.2)) * np.exp(0.2 * clouds(rng, shape, 5))
    nuclei = np.clip(clouds(rng, shape, 1.0), 0, None)
    haematoxylin = (0.05 + 0.30 * cells) * grain + 0.08 * nuclei * cells
    second = (0.05 + 0.18 * (1 - 0.6 * cells)) * np.exp(0.3 * clouds(rng, shape, 2))
    if stain == "he":
        density = haematoxylin * HAEMATOXYLIN[:, None, None] + second * EOSIN[:, None, None]
    else:
        positive = clouds(rng, shape, 30) > 0.9
        dab = 0.5 * gaussian_filter(positive.astype(float), 2) * np.exp(0.4 * clouds(rng, shape, 1.5))
        density = (0.02 + 0.45 * haematoxylin) * HAEMATOXYLIN[:, None, None] + dab * DAB[:, None, None]
        # Proteins scatter some light.
        density += 0.006 * np.exp(0.3 * clouds(rng, shape, 3)) * np.array([0.6, 0.8, 1.0])[:, None, None]
    return strength * density


def fat(rng: np.random.Generator, shape: tuple[int, int]) -> Field:
    """Walls of fat cells of about 80 micrometres: 1 on walls, less inside."""
    field = np.abs(clouds(rng, shape, 3.5))
    return np.clip(1.2 - 2.2 * field, 0.12, 1)


def strokes(rng: np.random.Generator, shape: tuple[int, int], width_px: float, num: int = 1) -> Field:
    """Thickness of ink of curved strokes, with streaks along them and soft rims; 0 to about 1."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(float)
    thickness = np.zeros(shape)
    for _ in range(num):
        angle, phase = rng.uniform(-0.6, 0.6), rng.uniform(0, 6)
        if rng.random() < 0.5:
            along, across = y * np.cos(angle) + x * np.sin(angle), x * np.cos(angle) - y * np.sin(angle)
            middle = rng.uniform(0.1, 0.9) * shape[1] - np.sin(angle) * shape[0] / 2
        else:
            along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
            middle = rng.uniform(0.1, 0.9) * shape[0] - np.sin(angle) * shape[1] / 2
        across = across - middle - 12 * np.sin(along / 70 + phase)
        length = rng.uniform(0.1, 0.3) * max(shape), rng.uniform(0.65, 0.95) * max(shape)
        body = np.clip((width_px / 2 - np.abs(across)) / 1.5 + 0.5, 0, 1)
        body *= np.clip((along - length[0]) / 3, 0, 1) * np.clip((length[1] - along) / 3, 0, 1)
        streaks = 0.85 + 0.15 * np.cos(across * rng.uniform(0.3, 0.8) + 0.02 * along)
        thickness = np.maximum(thickness, body * streaks)
    return thickness * (1 + 0.06 * clouds(rng, shape, 12))


def glass_color(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    return rng.uniform(222, 246) + rng.uniform(-4, 4, 3)


def scan(
    rng: np.random.Generator, density: Field, *, quality: int, glass: npt.NDArray[np.float64] | None = None
) -> npt.NDArray[np.uint8]:
    """Pixels that a scanner makes of densities: light that falls off, noise, dust, lossy compression; [3, H, W]."""
    shape = density.shape[1:]
    y, x = np.meshgrid(np.linspace(-1, 1, shape[0]), np.linspace(-1, 1, shape[1]), indexing="ij")
    light = 1 - rng.uniform(0, 0.05) * (y * y + x * x) / 2 + rng.uniform(-0.02, 0.02) * x
    # Stripes of a line scanner.
    light *= 1 + 0.004 * np.repeat(rng.standard_normal(-(-shape[1] // 40)), 40)[: shape[1]]
    dust = np.zeros(shape)
    for _ in range(shape[0] * shape[1] // 8000):
        dust[rng.integers(shape[0]), rng.integers(shape[1])] = rng.uniform(2, 12)
    density = density + gaussian_filter(dust, 0.8) + 0.004 * np.clip(clouds(rng, shape, 25), 0, None)
    glass = glass_color(rng) if glass is None else glass
    color = glass[:, None, None] * light * 10**-density
    color += rng.normal(0, rng.uniform(0.8, 2.0), color.shape)
    picture = Image.fromarray(np.clip(np.rint(color), 0, 255).astype(np.uint8).transpose(1, 2, 0))
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=quality)
    return np.asarray(Image.open(file)).transpose(2, 0, 1).copy()


Kind = Callable[[np.random.Generator, tuple[int, int]], TissuePicture]


def _on_glass(
    rng: np.random.Generator, shape: tuple[int, int], stain: str = "he", strength: float = 1.0
) -> tuple[Field, npt.NDArray[np.bool_]]:
    mask = blobs(rng, shape, rng.uniform(0.15, 0.4))
    density = tissue_density(rng, shape, stain, strength) * gaussian_filter(mask.astype(float), 0.7)
    if stain == "he" and strength == 1.0:
        fatty = clouds(rng, shape, 40) > 1.2
        density = np.where(fatty, density * fat(rng, shape), density)
    return density, mask


def _picture(
    rng: np.random.Generator, density: Field, tissue: npt.NDArray[np.bool_], ink: npt.NDArray[np.bool_] | None = None
) -> TissuePicture:
    pixels = scan(rng, density, quality=int(rng.integers(65, 92)))
    free = tissue if ink is None else tissue & ~ink
    return TissuePicture(pixels, np.ones(tissue.shape, bool), free, ~tissue)


def _plain(rng: np.random.Generator, shape: tuple[int, int]) -> TissuePicture:
    return _picture(rng, *_on_glass(rng, shape))


def _pale(rng: np.random.Generator, shape: tuple[int, int]) -> TissuePicture:
    return _picture(rng, *_on_glass(rng, shape, strength=rng.uniform(0.22, 0.4)))


def _ihc(rng: np.random.Generator, shape: tuple[int, int]) -> TissuePicture:
    return _picture(rng, *_on_glass(rng, shape, stain="ihc"))


def _pale_counterstain(rng: np.random.Generator, shape: tuple[int, int]) -> TissuePicture:
    return _picture(rng, *_on_glass(rng, shape, stain="ihc", strength=0.75))


def _with_ink(color: str, strength: float = 1.0) -> Kind:
    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> TissuePicture:
        density, tissue = _on_glass(rng, shape, strength=strength)
        ink = strokes(rng, shape, rng.uniform(18, 60), num=2) * rng.uniform(0.7, 1.3)
        return _picture(rng, density + INKS[color][:, None, None] * ink, tissue, ink >= 0.05)

    return draw


def _all_tissue(rng: np.random.Generator, shape: tuple[int, int]) -> TissuePicture:
    density = tissue_density(rng, shape, "he", rng.uniform(0.5, 1.2))
    return _picture(rng, density, np.ones(shape, bool))


def _all_pale_tissue(rng: np.random.Generator, shape: tuple[int, int]) -> TissuePicture:
    return _picture(rng, tissue_density(rng, shape, "he", rng.uniform(0.3, 0.45)), np.ones(shape, bool))


def _all_counterstain(rng: np.random.Generator, shape: tuple[int, int]) -> TissuePicture:
    return _picture(rng, tissue_density(rng, shape, "ihc"), np.ones(shape, bool))


def _all_glass(rng: np.random.Generator, shape: tuple[int, int]) -> TissuePicture:
    return _picture(rng, np.zeros((3, *shape)), np.zeros(shape, bool))


def _padded(value: int | None) -> Kind:
    """Missing blocks of one value; None for unseen ones, which are black."""

    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> TissuePicture:
        made = _plain(rng, shape)
        block = 64
        kept = rng.random((-(-shape[0] // block), -(-shape[1] // block))) < 0.75
        kept[:2] = kept[:, -1:] = False
        held = np.kron(kept, np.ones((block, block), bool))[: shape[0], : shape[1]]
        pixels = np.where(held, made.pixels, value or 0).astype(np.uint8)
        valid = held if value is None else np.ones(shape, bool)
        return TissuePicture(pixels, valid, made.tissue & held, ~(made.tissue & held))

    return draw


def _glass_edge(rng: np.random.Generator, shape: tuple[int, int]) -> TissuePicture:
    """Long dark lines with bright fringes, a darker side beyond the cover slip, cracks and bubbles."""
    density, tissue = _on_glass(rng, shape)
    y, x = np.mgrid[: shape[0], : shape[1]].astype(float)
    edge = shape[1] * rng.uniform(0.04, 0.1) + 0.03 * y + 6 * np.sin(y / 160)
    dark = 0.9 * np.exp(-(((x - edge) / rng.uniform(1.2, 4)) ** 2)) - 0.03 * np.exp(-(((x - edge - 6) / 3) ** 2))
    dark += rng.uniform(0.01, 0.06) * (x < edge)
    top = shape[0] * rng.uniform(0.03, 0.06) + 0.01 * x
    dark += 0.6 * np.exp(-(((y - top) / 1.5) ** 2)) + 0.35 * np.exp(-(((y - top - 14) / 1.0) ** 2))
    for _ in range(3):
        slope, start = rng.uniform(-1, 1), rng.uniform(0.2, 0.8) * shape[1]
        crack = np.abs(x - start - slope * y - 4 * np.sin(y / 25)) / np.hypot(1, slope)
        dark += 0.15 * np.exp(-((crack / 0.8) ** 2))
    for _ in range(3):
        row, col, radius = rng.uniform(0, shape[0]), rng.uniform(0, shape[1]), rng.uniform(10, 30)
        dark += 0.5 * np.exp(-(((np.hypot(y - row, x - col) - radius) / 1.3) ** 2))
    tint = np.array([1.0, 1.02, 1.06])[:, None, None]
    return _picture(rng, density + tint * dark, tissue)


BRIGHTFIELD: dict[str, Kind] = {
    "he": _plain,
    "pale": _pale,
    "ihc": _ihc,
    "pale counterstain": _pale_counterstain,
    **{f"{color} ink": _with_ink(color) for color in INKS},
    "pale beside blue ink": _with_ink("blue", 0.35),
    "all tissue": _all_tissue,
    "all pale tissue": _all_pale_tissue,
    "all counterstain": _all_counterstain,
    "all glass": _all_glass,
    "black padding": _padded(0),
    "white padding": _padded(255),
    "unseen": _padded(None),
    "glass edge": _glass_edge,
}


def stained_picture(kind: str, seed: int, shape: tuple[int, int] = (420, 560)) -> TissuePicture:
    """A stained slide of a kind, with its tissue."""
    return BRIGHTFIELD[kind](np.random.default_rng([seed, *kind.encode()]), shape)


def fluorescence_picture(
    seed: int,
    *,
    num_channels: int,
    dtype: str,
    cover: str = "some",
    shape: tuple[int, int] = (420, 560),
) -> TissuePicture:
    """Channels of a fluorescence scan: a dark offset, light that falls off, nuclei, markers and faint tissue.

    Args:
        seed: Decides everything.
        num_channels: Channels; the first one shows nuclei.
        dtype: "uint8" or "uint16".
        cover: "some", "all" or "none" of the slide is tissue.
        shape: Rows and columns.
    """
    rng = np.random.default_rng([seed, num_channels])
    full = {"uint8": 255, "uint16": 12000}[dtype]
    tissue = {"some": blobs(rng, shape, rng.uniform(0.1, 0.4)), "all": np.ones(shape, bool)}.get(
        cover, np.zeros(shape, bool)
    )
    soft = gaussian_filter(tissue.astype(float), 0.7)
    y, x = np.meshgrid(np.linspace(-1, 1, shape[0]), np.linspace(-1, 1, shape[1]), indexing="ij")
    pixels = np.empty((num_channels, *shape))
    for channel in range(num_channels):
        own = (0.10 if channel == 0 else 0.05) * np.exp(0.4 * clouds(rng, shape, 6))
        spots = np.clip(clouds(rng, shape, 1.0 if channel == 0 else 2.0), 0, None) ** 2
        spots *= 0.15 * (1 if channel == 0 else clouds(rng, shape, 25) > 1)
        light = 1 - rng.uniform(0, 0.25) * (y * y + x * x) / 2
        haze = rng.uniform(0.015, 0.03)
        pixels[channel] = full * light * (haze + soft * (own + spots)) + full * 0.008
    pixels += rng.normal(0, 1, pixels.shape) * np.sqrt(np.maximum(pixels, 0) * full) * 0.01
    values = np.clip(np.rint(pixels), 0, np.iinfo(dtype).max).astype(dtype)
    return TissuePicture(values, np.ones(shape, bool), tissue, ~tissue)
