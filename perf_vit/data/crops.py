"""Random crops of images without labels."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from perf_vit.errors import InputError
from perf_vit.io import (
    FOLDER_SUFFIXES,
    IMAGE_SUFFIXES,
    files_below,
    is_by_product,
    is_image_name,
    open_source,
    without_repeats,
)
from perf_vit.tiling import random_window
from perf_vit.transforms import Normalizer, turn
from perf_vit.types import Source

__all__ = ["UnlabelledCrops", "find_images", "image_root", "is_glob"]


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """The images that some files, folders and globs name.

    A file is taken as it is. A folder is searched, subfolders included, for rasters, slides and photos by their
    endings; hidden files and what other programs leave behind are passed over, as in globs, where `**` stands for any
    folders. Masks that lie among the images are found too, so keep them elsewhere or name the files.

    Args:
        paths: files, folders and globs.

    Returns:
        Each image once, in the order of the paths and sorted by name within a folder or glob.

    Raises:
        InputError: no path, a path that doesn't exist, or a folder or glob without images.
    """
    if not paths:
        raise InputError("expected files, folders or globs of images, got none")
    found = [image for path in map(Path, paths) for image in _images_at(path)]
    return list(dict.fromkeys(found))


def is_glob(path: str | Path) -> bool:
    """Whether a path has wildcards, and is no file or folder of such a name."""
    return glob.has_magic(str(path)) and not Path(path).exists()


def image_root(path: str | Path) -> Path:
    """The folder that names of images are relative to: a folder itself, a file's, or a glob's part before wildcards."""
    path = Path(path)
    if path.is_dir():
        return path
    return next(parent for parent in path.parents if not is_glob(parent))


def _images_at(path: Path) -> list[Path]:
    if is_glob(path):
        matches = without_repeats(map(Path, glob.glob(str(path), recursive=True)))
        found = [each for each in matches if is_image_name(each.name) and not is_by_product(each.name)]
        if not found:
            raise InputError(f"no image matches {path}; expected files that end in {', '.join(sorted(IMAGE_SUFFIXES))}")
        return found
    if path.is_file() or (path.is_dir() and path.suffix.lower() in FOLDER_SUFFIXES):
        return [path]
    if not path.is_dir():
        raise InputError(f"no image file or folder {path}; check the path")
    found = files_below(path, is_image_name)
    if not found:
        raise InputError(f"no images in {path}; expected files that end in {', '.join(sorted(IMAGE_SUFFIXES))}")
    return found


class UnlabelledCrops(Dataset[tuple[Tensor, Tensor]]):
    """Crops at random places of random images; item i is a function of (seed, i) alone.

    Every image is drawn with the same probability, whatever its size. A crop of which less than half holds data is
    drawn anew, up to ten times.

    Args:
        images: rasters, photos and slides, as `find_images` lists them; slides are read at level 0.
        normalizer: one mean and standard deviation a band, in the images' units.
        tile_px: side of a crop, in pixels.
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
        tile_px: int,
        length: int,
        seed: int,
        bands: Sequence[int] | None = None,
        symmetries: bool = True,
    ) -> None:
        if not images:
            raise InputError("expected images to take crops of, got none")
        chosen = tuple(bands) if bands is not None else tuple(range(1, len(normalizer.mean) + 1))
        self.sources = [_open(path, chosen) for path in images]
        _check_sizes(self.sources, tile_px)
        self.normalizer = normalizer
        self.tile_px = tile_px
        self.length = length
        self.seed = seed
        self.symmetries = symmetries

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Crop [C, tile_px, tile_px] float32, standardised, and valid pixels [tile_px, tile_px]; any index >= 0."""
        rng = np.random.default_rng((self.seed, index))
        for _ in range(10):
            source = self.sources[int(rng.integers(len(self.sources)))]
            # Closed after each crop: there may be more images than a process may hold open.
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
            f"crops of {tile_px} px need images as large, got {len(small)} of {len(sources)} that are smaller, the "
            f"first {small[0].path} with {height} x {width} px; leave them out or take smaller crops"
        )
