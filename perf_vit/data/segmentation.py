"""Data module of segmentation: labelled regions of rasters and slides as tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch.utils.data import ConcatDataset, DataLoader

from perf_vit.data.augmentation import make_augmentation, make_stain_jitter, pixel_size, pixel_sizes
from perf_vit.data.base import (
    EpochDataModule,
    EpochLoader,
    ShareLoader,
    given_normalizer,
    measure_bands,
    sample_images,
    warn_of_mixed_mpp,
)
from perf_vit.data.class_pixels import (
    check_labelled,
    find_class_pixels,
    find_labelled_pixels,
    labelled_share,
    warn_of_absent_classes,
)
from perf_vit.data.config import SegmentationDataConfig, SegmentationSplitConfig, check_data, label_options
from perf_vit.data.samplers import ClassSampler, GridSampler, SegmentationSampler
from perf_vit.data.segmentation_tiles import (
    LabelledSource,
    LabelledTile,
    SegmentationGrid,
    SegmentationTiles,
    window_px,
)
from perf_vit.data.splits import warn_of_shared_places
from perf_vit.errors import ConfigError
from perf_vit.labels import LabelFiles, LabelSource, is_labelled_folder, open_labels, warn_of_polygons_outside
from perf_vit.labels.image_folder import find_label_pairs
from perf_vit.models import InputBands, collate_tiles
from perf_vit.sources import RasterSource, common_unit, open_input
from perf_vit.sources.pixel_size import warn_of_ground_size
from perf_vit.sources.slides import SlideSource
from perf_vit.transforms import Normalizer
from perf_vit.types import GeoImage, InputOptions, InputPath, OpenInput, Source, Window

__all__ = [
    "Grids",
    "SegmentationDataModule",
    "build_segmentation_datamodule",
    "open_labelled",
    "open_pairs",
    "region_window",
]

Grids: TypeAlias = SegmentationGrid | ConcatDataset[LabelledTile]
"""Grid tiles of one or several sources."""


class SegmentationDataModule(EpochDataModule):
    """Data module of segmentation: augmented training tiles, grids of validation tiles.

    Attributes:
        classes: Class names, in the order of the class indices.
        normalizer: Normalizer, as given or measured on the training region.
        trained_on: Bands of the training region.
        tile_px: Tile size in pixels.
    """

    def __init__(
        self,
        train: SegmentationTiles,
        val: Grids,
        *,
        classes: tuple[str, ...],
        normalizer: Normalizer,
        trained_on: InputBands,
        tile_px: int,
        batch_size: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        self.train = train
        self.val = val
        self.classes = classes
        self.normalizer = normalizer
        self.trained_on = trained_on
        self.tile_px = tile_px
        self.batch_size = batch_size
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[LabelledTile]:
        """Return the loader of augmented tiles, new ones each epoch.

        A smaller last batch is dropped (batch statistics), except with the grid sampler.
        """
        return self.train_loader(
            EpochLoader(
                self.train,
                batch_size=self.loader_batch_size,
                num_workers=self.num_workers,
                collate_fn=collate_tiles,
                drop_last=not isinstance(self.train.sampler, GridSampler),
            )
        )

    def val_dataloader(self) -> DataLoader[LabelledTile]:
        """Return the loader of the validation tiles, in order."""
        return ShareLoader(
            self.val,
            batch_size=self.loader_batch_size,
            num_workers=self.num_workers,
            collate_fn=collate_tiles,
        )


def open_labelled(
    config: SegmentationDataConfig,
    region: SegmentationSplitConfig,
    key: str,
    *,
    train: bool,
    on_image: Callable[[int, int], None] | None = None,
) -> list[LabelledSource]:
    """Open a raster or slide with its labels, or all images of a folder.

    Args:
        config: Data config.
        region: Split to open.
        key: Name of the config key, for errors.
        train: Whether to read finer pixels if the file has them and the augmentation needs them.
        on_image: Function called with the number of images of a folder that are open and of all.

    Raises:
        ConfigError: The region doesn't fit.
        InputError: Files can't be read or are inconsistent.
    """
    windows: list[Window] = []

    def open_image(image: InputPath) -> RasterSource | SlideSource:
        source, window = _placed(config, image, region.region, key, train=train)
        windows.append(window)
        return source

    is_folder = is_labelled_folder(region.image, region.labels)
    if is_folder and region.region is not None:
        raise ConfigError(f"{key}.region is a part of one raster, and {region.image} is a folder; leave it out")
    pairs = open_pairs(region.image, region.labels, open_image, config, label_options(config), on_image)
    return [
        LabelledSource(source, labels, window, keep_open=not is_folder)
        for (source, labels), window in zip(pairs, windows, strict=True)
    ]


def open_pairs(
    image: InputPath,
    labels: str | Path,
    open_image: OpenInput,
    meaning: Any,
    options: Mapping[str, Any],
    on_image: Callable[[int, int], None] | None = None,
) -> list[tuple[RasterSource | SlideSource, LabelSource]]:
    """Open an image and its labels, or all images of a folder (closed) with the label files of the same name.

    Args:
        image: Raster or slide, or folder, glob or list of them.
        labels: Mask or polygons, or folder of them.
        open_image: Function that opens an image by path.
        meaning: Data config or spec with the attributes classes, background and multilabel, which define the labels.
        options: Further keyword arguments of `perf_vit.labels.open_labels`.
        on_image: Function called with the number of images of a folder that are open and of all.

    Raises:
        InputError: Files can't be read or are inconsistent.
    """
    named = ("classes", "background", "multilabel")
    options = {**{name: getattr(meaning, name) for name in named}, **options}
    if not is_labelled_folder(image, labels):
        source = _opened(image, open_image)
        return [(source, open_labels(labels, source, **options))]
    pairs = find_label_pairs(image, labels)
    sources = []
    for path, _ in pairs:
        sources.append(_opened(path, open_image))
        # There may be more images than the limit of open files.
        sources[-1].close()
        if on_image is not None:
            on_image(len(sources), len(pairs))
    files = LabelFiles([file for _, file in pairs], sources, **options)
    files.spot_check()
    return [(source, files[index]) for index, source in enumerate(sources)]


def _opened(image: InputPath, open_image: OpenInput) -> RasterSource | SlideSource:
    source = open_image(image)
    # Labels need the pixel grid of the file.
    assert isinstance(source, RasterSource | SlideSource)
    return source


def region_window(region: list[int] | None, source: Source, key: str) -> Window:
    """Return the window of a region given in a config or on the command line, checked against the source.

    Args:
        region: [row, col, height, width] in pixels; None for the whole source.
        source: Raster that contains it.
        key: Name of the config key, for errors.

    Raises:
        ConfigError: The region doesn't have four numbers or isn't inside the source.
    """
    if region is None:
        return source.extent
    if len(region) != 4:
        raise ConfigError(f"{key} must be [row, col, height, width], got {list(region)}")
    window = Window(*region)
    if window.intersect(source.extent) != window:
        raise ConfigError(
            f"{key} [row, col, height, width] = {list(region)} must lie inside {source.path}, "
            f"which is {source.height} rows x {source.width} columns"
        )
    return window


def _placed(
    config: SegmentationDataConfig, image: InputPath, region: list[int] | None, key: str, *, train: bool
) -> tuple[RasterSource | SlideSource, Window]:
    """Open an image and return it closed (there may be more images than the limit of open files), with its region."""
    options = InputOptions.from_config(config)
    source = open_input(image, options)
    window = region_window(region, source, f"{key}.region")
    read_at = config.mpp or config.resolution
    if train and read_at is not None and config.augment.resolution is not None:
        finest = max(config.augment.resolution[0], _native_pixel_size(image, options, source) or 0)
        if finest < read_at:
            source.close()
            coarse = source
            finer = replace(options, resolution=finest) if config.mpp is None else replace(options, mpp=finest)
            source = open_input(image, finer)
            window = _scaled(window, _pixel_sides(coarse) / _pixel_sides(source), source.extent)
    source.close()
    return source, window


def _native_pixel_size(image: InputPath, options: InputOptions, source: Source) -> float | None:
    if isinstance(source, SlideSource):
        assert source.slide_mpp is not None
        return math.sqrt(math.prod(source.slide_mpp))
    own = open_input(image, replace(options, resolution=None))
    own.close()
    return pixel_size(own)


def _pixel_sides(source: RasterSource | SlideSource) -> npt.NDArray[np.float64]:
    """Return the width and height of a pixel as it is read; a level of a slide may be 1 % off the size asked for."""
    if isinstance(source, SlideSource):
        return np.array(source.downsample_xy)
    t = source.transform
    return np.hypot([t.a, t.b], [t.d, t.e])


def _scaled(window: Window, factor_xy: npt.NDArray[np.float64], extent: Window) -> Window:
    """Return the corresponding window of a source whose pixels are smaller by a factor for each axis."""
    x, y = factor_xy.tolist()
    row, col = round(window.row * y), round(window.col * x)
    row_stop, col_stop = round(window.row_stop * y), round(window.col_stop * x)
    scaled = Window(row, col, row_stop - row, col_stop - col).intersect(extent)
    assert scaled is not None
    return scaled


# Enough pixels for a mean with three digits, few enough to read within a second.
_STATISTICS_PX = 2048


def build_segmentation_datamodule(
    config: SegmentationDataConfig,
    seed: int,
    on_window: Callable[[int, int], None] | None = None,
    *,
    opened: tuple[list[LabelledSource], list[LabelledSource]] | None = None,
) -> SegmentationDataModule:
    """Open rasters and labels and measure band statistics that the config doesn't give.

    Args:
        config: Data config.
        seed: Seed of tiles and augmentation.
        on_window: Function called with the number of windows done and the total, while the balanced sampler searches
            for pixels of the classes.
        opened: Training and validation sources of the config that are open already; None to open them.

    Raises:
        ConfigError: Values are inconsistent.
        InputError: Files can't be read or are inconsistent.
    """
    check_data(config)
    rasters, val = opened or _open_all(config)
    sources = [one.source for one in rasters]
    num_bands = sources[0].num_bands
    stain = make_stain_jitter(config.augment, sources, num_bands)
    sizes = pixel_sizes(config.augment, sources)
    _check_all(config, rasters, val)
    sampler = _make_sampler(rasters, config, sizes, seed, on_window)
    _warn_of_absent_classes(config, rasters, val, sampler)
    given = given_normalizer(config.mean, config.std, num_bands)
    normalizer, trained_on = measure_bands(_seen(rasters, seed), sources, given)
    return SegmentationDataModule(
        SegmentationTiles(
            rasters,
            normalizer,
            make_augmentation(config.augment),
            tile_px=config.tile_px,
            tiles_per_epoch=len(sampler) if isinstance(sampler, GridSampler) else config.tiles_per_epoch,
            seed=seed,
            scale=config.augment.scale,
            stain=stain,
            resolution=config.augment.resolution,
            pixel_sizes=sizes,
            sampler=sampler,
        ),
        _grids(val, normalizer, config.tile_px),
        classes=tuple(config.classes),
        normalizer=normalizer,
        trained_on=trained_on,
        tile_px=config.tile_px,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
    )


def _open_all(config: SegmentationDataConfig) -> tuple[list[LabelledSource], list[LabelledSource]]:
    """Open all training and validation sources and check that they have the same number of bands."""
    train = {"data.train": open_labelled(config, config.train, "data.train", train=True)}
    val = {"data.val": open_labelled(config, config.val, "data.val", train=False)}
    for index, region in enumerate(config.extra_train):
        key = f"data.extra_train[{index}]"
        train[key] = open_labelled(config, region, key, train=True)
    for key, group in (train | val).items():
        _check_bands(group, key, train["data.train"][0].source)
    if config.resolution is not None:
        sources = [one.source for group in (train | val).values() for one in group]
        common_unit([(source.path, source.crs) for source in sources])
        for source in sources:
            middle = source.transform @ (source.width / 2, source.height / 2)
            warn_of_ground_size(source.crs, config.resolution, source.path, middle)
    return [one for group in train.values() for one in group], val["data.val"]


def _check_all(config: SegmentationDataConfig, train: list[LabelledSource], val: list[LabelledSource]) -> None:
    """Check that there are labels, and warn of pixel sizes, places and polygons that don't fit.

    Raises:
        InputError: Nothing is labelled.
    """
    if config.mpp is None:
        warn_of_mixed_mpp(one.source for one in (*train, *val))
    check_labelled(train, config, "train")
    check_labelled(val, config, "val")
    warn_of_shared_places(*([(one.source, one.region) for one in part] for part in (train, val)))
    warn_of_polygons_outside(one.labels for one in (*train, *val))


def _warn_of_absent_classes(
    config: SegmentationDataConfig,
    train: list[LabelledSource],
    val: list[LabelledSource],
    sampler: SegmentationSampler | None,
) -> None:
    of_classes = sampler if config.sampler == "balanced" else None
    warn_of_absent_classes(train, config, "train", of_classes)  # type: ignore[arg-type]
    warn_of_absent_classes(val, config, "val")


def _check_bands(group: Sequence[LabelledSource], key: str, first: Source) -> None:
    """Check that all images have as many bands as the first.

    Raises:
        ConfigError: The number of bands of an image differs.
    """
    others = [one.source for one in group if one.source.num_bands != first.num_bands]
    if not others:
        return
    if len(group) == 1:
        text = f"{key}.image has {others[0].num_bands} bands, data.train.image {first.num_bands}"
    else:
        text = (
            f"{len(others)} of {len(group)} images of {key} have another number of bands than {first.path}, "
            f"{first.num_bands}: the first, {others[0].path}, has {others[0].num_bands}"
        )
    raise ConfigError(f"{text}; choose common ones with data.bands")


def _grids(sources: Sequence[LabelledSource], normalizer: Normalizer, tile_px: int) -> Grids:
    """Return the tiles of all sources, one source after the other."""
    grids = [SegmentationGrid(one, normalizer, tile_px=tile_px) for one in sources]
    return grids[0] if len(grids) == 1 else ConcatDataset(grids)


def _seen(rasters: Sequence[LabelledSource], seed: int) -> list[GeoImage]:
    """Read all rasters, or a random sample of the images of folders, at low resolution."""
    if all(one.keep_open for one in rasters):
        return [one.read_reduced(_STATISTICS_PX) for one in rasters]
    paths = [one.source.path for one in rasters]
    return sample_images(lambda index, size_px: rasters[index].read_reduced(size_px), paths, seed)


# With fewer labelled windows than that, ten random ones may all be empty.
_SPARSE = 0.5


def _make_sampler(
    rasters: Sequence[LabelledSource],
    config: SegmentationDataConfig,
    sizes: Sequence[float] | None,
    seed: int,
    on_window: Callable[[int, int], None] | None,
) -> SegmentationSampler | None:
    """Build the configured sampler; None for random windows, most of which have labels."""
    regions = [one.region for one in rasters]
    if config.sampler == "grid":
        bounds = config.augment.resolution
        # With a range of pixel sizes, tiles of the geometric mean cover the regions.
        middle = None if bounds is None else math.sqrt(math.prod(bounds))
        each = [None] * len(regions) if sizes is None else list(sizes)
        tiles_px = [window_px(config.tile_px, middle, own) for own in each]
        return GridSampler(regions, tiles_px, seed, lambda source, tile: rasters[source].may_teach(tile))
    if config.sampler == "balanced":
        num_classes = len(config.classes)
        pixels = find_class_pixels(rasters, num_classes, multilabel=config.multilabel, seed=seed, on_window=on_window)
        return ClassSampler(regions, pixels)
    if labelled_share(rasters, config.tile_px, seed) < _SPARSE:
        return ClassSampler(regions, [find_labelled_pixels(rasters, seed=seed, on_window=on_window)])
    return None
