"""Random crops of images without labels."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from perf_vit.errors import InputError
from perf_vit.io import FOLDER_SUFFIXES, IMAGE_SUFFIXES, files_below, is_image_name, open_source
from perf_vit.tiling import random_window
from perf_vit.transforms import Normalizer
from perf_vit.types import Source

__all__ = ["UnlabelledCrops", "find_images"]


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """The images that some files and folders hold.

    A file is taken as it is. A folder is searched, subfolders included, for rasters, slides and photos by their
    endings; hidden files and what other programs leave behind are passed over. Masks that lie among the images are
    found too, so keep them elsewhere or name the files.

    Args:
        paths: files and folders.

    Returns:
        Each image once, in the order of the paths and sorted by name within a folder.

    Raises:
        InputError: no path, a path that doesn't exist, or a folder without images.
    """
    if not paths:
        raise InputError("expected files or folders with images, got none")
    found = [image for path in map(Path, paths) for image in _images_at(path)]
    return list(dict.fromkeys(found))


def _images_at(path: Path) -> list[Path]:
    if path.is_file() or (path.is_dir() and path.suffix.lower() in FOLDER_SUFFIXES):
        return [path]
    if not path.is_dir():
        raise InputError(f"no image file or folder {path}; check the path")
    found = files_below(path, is_image_name)
    if not found:
        raise InputError(f"no images in {path}; expected files that end in {', '.join(sorted(IMAGE_SUFFIXES))}")
    return found


class UnlabelledCrops(Dataset[Tensor]):
    """Crops at random places of random images; item i is a function of (seed, i) alone.

    Every image is drawn with the same probability, whatever its size. A crop of which less than half holds data is
    drawn anew, up to ten times.

    Args:
        images: rasters, photos and slides, as `find_images` lists them; slides are read at level 0.
        normalizer: one mean and standard deviation a band, in the images' units.
        size_px: side of a crop, in pixels.
        length: number of crops.
        seed: decides images, places and symmetries, whatever the number of workers.
        bands: 1-based bands to read; the first ones, as many as the normalizer has, if None.
        symmetries: turn and mirror each crop into one of the eight symmetries of the square.

    Raises:
        InputError: no image, or one that can't be opened, lacks the bands or is smaller than a crop.
    """

    def __init__(
        self,
        images: Sequence[Path],
        normalizer: Normalizer,
        *,
        size_px: int,
        length: int,
        seed: int,
        bands: Sequence[int] | None = None,
        symmetries: bool = True,
    ) -> None:
        if not images:
            raise InputError("expected images to take crops of, got none")
        chosen = tuple(bands) if bands is not None else tuple(range(1, len(normalizer.mean) + 1))
        self.sources = [_open(path, chosen) for path in images]
        _check_sizes(self.sources, size_px)
        self.normalizer = normalizer
        self.size_px = size_px
        self.length = length
        self.seed = seed
        self.symmetries = symmetries

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        """Crop [C, size_px, size_px] float32, standardised; any index >= 0 is allowed."""
        rng = np.random.default_rng((self.seed, index))
        for _ in range(10):
            source = self.sources[int(rng.integers(len(self.sources)))]
            # Closed after each crop: there may be more images than a process may hold open.
            with closing(source):
                image = source.read(random_window(source.extent, self.size_px, rng))
            if image.valid.mean() >= 0.5:
                break
        pixels = self.normalizer(image)
        return torch.from_numpy(_turned(pixels, int(rng.integers(8))) if self.symmetries else pixels)


def _open(path: Path, bands: tuple[int, ...]) -> Source:
    with closing(open_source(path, bands=bands)) as source:
        return source


def _check_sizes(sources: Sequence[Source], size_px: int) -> None:
    small = [source for source in sources if min(source.size) < size_px]
    if small:
        height, width = small[0].size
        raise InputError(
            f"crops of {size_px} px need images as large, got {len(small)} of {len(sources)} that are smaller, the "
            f"first {small[0].path} with {height} x {width} px; leave them out or take smaller crops"
        )


def _turned(pixels: npt.NDArray[np.float32], symmetry: int) -> npt.NDArray[np.float32]:
    """One of the eight symmetries of a square [C, H, H]."""
    mirrored = pixels[:, :, ::-1] if symmetry >= 4 else pixels
    return np.ascontiguousarray(np.rot90(mirrored, symmetry % 4, axes=(1, 2)))
