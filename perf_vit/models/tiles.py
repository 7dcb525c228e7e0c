"""Tiles as models take them, which training and prediction read in the same way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from perf_vit.errors import InputError
from perf_vit.models.input_spec import repeat_grey_band
from perf_vit.sources import open_source
from perf_vit.tiling import grid_windows, random_window
from perf_vit.transforms import Normalizer, resize_masked, turn
from perf_vit.types import BoolArray, GeoImage, Source, Window

__all__ = [
    "SlideFeatures",
    "UnlabelledCrops",
    "image_tile",
    "middle_window",
    "reduced",
    "standard_tile",
    "standardized",
    "tissue_windows",
]

FloatArray = npt.NDArray[np.float32]


def standardized(image: GeoImage, normalizer: Normalizer) -> FloatArray:
    """Standardise a detector's input [C, H, W], in the same way for training, validation, evaluation and prediction.

    Args:
        image: Image with the normalizer's bands, or a grey one if these are three.
        normalizer: Normalizer of the pixels; invalid ones become 0.

    Raises:
        InputError: The number of bands differs.
    """
    return normalizer(repeat_grey_band(image, len(normalizer.mean)))


def middle_window(source: Source, tile_px: int, *, whole: bool = False) -> Window:
    """Return the central window of an image; along axes shorter than a tile it starts at 0.

    Args:
        source: Image.
        tile_px: Tile size in pixels.
        whole: Whether the window must hold the whole image.

    Raises:
        InputError: It must, and the image is larger than a tile.
    """
    if whole and max(source.size) > tile_px:
        raise InputError(
            f"{source.path} has {source.height} x {source.width} px, more than the tile of {tile_px} px that must hold "
            "the whole image, as its target is that of the whole; train with a larger data.tile_px, with "
            "data.resize=true, or, if targets also describe each crop (a mean, not a count), with data.crop=true"
        )
    row, col = (max(0, (side - tile_px) // 2) for side in source.size)
    return Window(row, col, tile_px, tile_px)


def image_tile(
    source: Source,
    normalizer: Normalizer,
    tile_px: int,
    window: Window | None,
) -> tuple[FloatArray, BoolArray]:
    """Read a standardised tile of an image.

    Args:
        source: Image.
        normalizer: Normalizer of the pixels; invalid ones become 0.
        tile_px: Tile size in pixels.
        window: Part of the image; None to resize the whole image (bilinear, antialiased).

    Returns:
        Pixels [C, tile_px, tile_px] and valid mask [tile_px, tile_px].

    Raises:
        InputError: The image can't be read, has no valid pixel there, or has another number of bands.
    """
    image = reduced(source, tile_px) if window is None else source.read(window)
    pixels, mask = standard_tile(image, source.path, normalizer, tile_px, resize=window is None)
    return pixels, np.asarray(mask.any(0))


def standard_tile(
    image: GeoImage,
    path: str,
    normalizer: Normalizer,
    tile_px: int,
    *,
    resize: bool,
    recolor: Callable[[GeoImage], GeoImage] | None = None,
) -> tuple[FloatArray, BoolArray]:
    """Build the tile of an image and its mask; `recolor` changes colours before standardisation.

    Raises:
        InputError: There is no valid pixel, or the number of bands differs.
    """
    if not image.valid.any():
        raise InputError(f"{path} has no valid pixel in its tile of {tile_px} px; leave it out, or check nodata")
    image = repeat_grey_band(image, len(normalizer.mean))
    if recolor is not None:
        image = recolor(image)
    try:
        pixels = normalizer(image)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return resize_masked(pixels, image.mask, tile_px, tile_px) if resize else (pixels, image.mask)


def reduced(source: Source, tile_px: int, window: Window | None = None) -> GeoImage:
    """Read a whole image, or a window inside it, at a resolution from which it is resized to a tile."""
    place = source.extent if window is None else window
    # Larger images are reduced while reading, to at least twice the tile size, so that the final resizing stays sharp.
    shortest = min(place.shape)
    size_px = max(1, -(-max(place.shape) * min(shortest, 2 * tile_px) // shortest))
    return source.read_reduced(size_px) if window is None else source.read_reduced(size_px, window)


class UnlabelledCrops(Dataset[tuple[Tensor, Tensor]]):
    """Random crops of random images; item i depends on (seed, i) only.

    All images are equally likely, whatever their size. Crops with less than half valid pixels are drawn again, up to
    ten times.

    Args:
        images: Rasters, photos and slides, as listed by `find_images`; slides are read at level 0.
        normalizer: Mean and standard deviation of each band, in the images' units.
        tile_px: Crop size in pixels.
        length: Number of crops.
        seed: Seed of images, positions and symmetries, whatever the number of workers.
        bands: 1-based bands to read; None for the first ones, as many as the normalizer has.
        symmetries: Whether to apply the eight symmetries of the square.

    Raises:
        InputError: There is no image, or one can't be opened, lacks the bands or is smaller than a crop.
    """

    def __init__(
        self,
        images: Sequence[Path],
        normalizer: Normalizer,
        *,
        tile_px: int,
        length: int,
        seed: int,
        bands: Sequence[int] | None = None,
        symmetries: bool = True,
    ) -> None:
        if not images:
            raise InputError("expected images to take crops from, got none")
        chosen = tuple(bands) if bands is not None else tuple(range(1, len(normalizer.mean) + 1))
        self.sources = [_open(path, chosen) for path in images]
        _check_sizes(self.sources, tile_px)
        self.normalizer = normalizer
        self.tile_px = tile_px
        self.length = length
        self.seed = seed
        self.symmetries = symmetries

    def check_bytes(self, hint: str) -> None:
        """Check that the images have 8 bits, as the statistics of pretrained models are for such.

        Args:
            hint: What to do, for the error.

        Raises:
            InputError: An image has another type.
        """
        for source in self.sources:
            if source.dtype != np.uint8:
                raise InputError(
                    f"the model's own mean and std are for 8-bit images, got {source.path} of {source.dtype}; {hint}"
                )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a standardised crop [C, tile_px, tile_px] float32 and its valid pixels [tile_px, tile_px].

        Any index >= 0 is allowed.
        """
        rng = np.random.default_rng((self.seed, index))
        for _ in range(10):
            source = self.sources[int(rng.integers(len(self.sources)))]
            # Close after each crop, as there may be more images than the limit of open files.
            with closing(source):
                image = source.read(random_window(source.extent, self.tile_px, rng))
            if image.valid.mean() >= 0.5:
                break
        symmetry = int(rng.integers(8)) if self.symmetries else 0
        pixels, valid = turn(self.normalizer(image), symmetry), turn(image.valid, symmetry)
        return torch.from_numpy(pixels), torch.from_numpy(valid)


def _open(path: Path, bands: tuple[int, ...]) -> Source:
    with closing(open_source(path, bands=bands)) as source:
        return source


def _check_sizes(sources: Sequence[Source], tile_px: int) -> None:
    small = [source for source in sources if min(source.size) < tile_px]
    if small:
        height, width = small[0].size
        raise InputError(
            f"crops of {tile_px} px need images of that size, got {len(small)} of {len(sources)} smaller ones, the "
            f"first {small[0].path} with {height} x {width} px; leave them out or take smaller crops"
        )


@dataclass(frozen=True, slots=True)
class SlideFeatures:
    """Features of the windows of a slide.

    Attributes:
        features: Features, [N, D].
        windows: N windows, in pixels of the slide at the resolution it was read at.
        picture: Slide with the outline of its tissue, [H, W, 3]; None without `tissue`, or if it is not known.
    """

    features: FloatArray
    windows: tuple[Window, ...]
    picture: npt.NDArray[np.uint8] | None = None


# Pixels of the reduced mask along a window, for fractions to about a percent.
_MASK_PX = 8

_MAX_MASK_PX = 8192


def tissue_windows(source: Source, tile_px: int, min_tissue: float) -> list[Window]:
    """Return the windows of a grid without overlap that show enough tissue, row by row.

    Tissue fractions are those of the valid mask at low resolution, about 8 pixels along a window.

    Args:
        source: Slide opened with `tissue`, so that only tissue is valid; or any other source.
        tile_px: Window size in pixels.
        min_tissue: Minimum fraction of valid pixels, 0 to 1; windows without valid pixels are always left out.

    Raises:
        InputError: No window has enough valid pixels, or the slide can't be read.
    """
    windows = grid_windows(source.extent, tile_px, overlap=0)
    size_px = min(_MAX_MASK_PX, -(-max(source.size) * _MASK_PX // tile_px))
    mask = source.read_reduced(size_px).valid
    shares = _shares(mask, windows, source.height, source.width)
    chosen = [window for window, share in zip(windows, shares, strict=True) if share > 0 and share >= min_tissue]
    if not chosen:
        raise InputError(
            f"no window of {tile_px} px in {source.path} has {min_tissue:.0%} of tissue, the most is "
            f"{max(shares):.0%}; look at {_plot_call(source)}, lower data.min_tissue, or leave the slide out"
        )
    return chosen


def _plot_call(source: Source) -> str:
    """Return the call that draws a slide with the outline of its tissue."""
    tissue = getattr(source, "options", {}).get("tissue")
    return f"perf_vit.open({source.path!r}{'' if tissue is None else f', tissue={tissue!r}'}).plot()"


def _shares(mask: BoolArray, windows: Sequence[Window], height: int, width: int) -> npt.NDArray[np.float64]:
    """Return the fraction of valid pixels in each window; pixels outside the source are not valid."""
    rows, cols = mask.shape
    summed = np.zeros((rows + 1, cols + 1))
    summed[1:, 1:] = mask.cumsum(0).cumsum(1)
    edges = np.array([[w.row, w.row_stop, w.col, w.col_stop] for w in windows], np.float64)
    scale = np.array([rows / height, rows / height, cols / width, cols / width])
    limits = np.array([rows, rows, cols, cols])
    top, bottom, left, right = np.clip(np.rint(edges * scale), 0, limits).astype(np.int64).T
    # Windows smaller than a mask pixel cover one pixel.
    top, left = np.minimum(top, rows - 1), np.minimum(left, cols - 1)
    bottom, right = np.maximum(bottom, top + 1), np.maximum(right, left + 1)
    valid = summed[bottom, right] - summed[top, right] - summed[bottom, left] + summed[top, left]
    inside = np.minimum(edges[:, 1], height) - edges[:, 0], np.minimum(edges[:, 3], width) - edges[:, 2]
    covered = inside[0] * inside[1] / ((edges[:, 1] - edges[:, 0]) * (edges[:, 3] - edges[:, 2]))
    return np.asarray(valid / ((bottom - top) * (right - left)) * covered)
