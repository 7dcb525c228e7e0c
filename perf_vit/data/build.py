"""Data modules from configs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from torch.utils.data import ConcatDataset

from perf_vit.data.augmenting import make_stain_jitter, pixel_sizes
from perf_vit.data.band_statistics import given_normalizer, measure_bands, seen_images
from perf_vit.data.class_pixels import count_labelled_pixels
from perf_vit.data.class_places import find_class_pixels
from perf_vit.data.datamodule import Grids, SegmentationDataModule
from perf_vit.data.open_labelled import open_labelled
from perf_vit.data.window_config import SegmentationDataConfig, check_data
from perf_vit.data.window_places import ClassPlaces, GridPlaces, WindowPlaces
from perf_vit.data.windows import GridWindows, LabelledSource, RandomWindows, window_px
from perf_vit.errors import ConfigError, DataWarning, InputError
from perf_vit.io import common_unit, warn_of_polygons_beside
from perf_vit.transforms import Augmentation, Normalizer
from perf_vit.types import GeoImage, Source

__all__ = ["build_segmentation_datamodule"]

# Enough pixels for a mean to three digits, few enough to read in a second.
_STATISTICS_PX = 2048
# Of 512 x 512 pixels, to see which classes there are.
_WINDOWS_LOOKED_AT = 64
_IMAGES_LOOKED_AT = 64


def build_segmentation_datamodule(
    config: SegmentationDataConfig, seed: int, on_window: Callable[[int, int], None] | None = None
) -> SegmentationDataModule:
    """Open the rasters and their labels and measure the bands' statistics where they aren't given.

    Args:
        config: what to open.
        seed: decides tiles and augmentation.
        on_window: called with windows done and all of them while pixels of the classes are looked for, for the
            sampler balanced.

    Raises:
        ConfigError: values that don't fit each other.
        InputError: files that can't be read or don't fit each other.
    """
    check_data(config)
    rasters, val = _open_all(config)
    sources = [one.source for one in rasters]
    num_bands = sources[0].num_bands
    stain = make_stain_jitter(config.augment, sources, num_bands)
    sides = pixel_sizes(config.augment, sources)
    _check_labelled(rasters, config, "train")
    _check_labelled(val, config, "val")
    warn_of_polygons_beside(one.labels for one in (*rasters, *val))
    places = _make_places(rasters, config, sides, seed, on_window)
    _warn_of_absent_classes(rasters, config, "train", places)
    _warn_of_absent_classes(val, config, "val")
    given = given_normalizer(config.mean, config.std, num_bands)
    normalizer, trained_on = measure_bands(_seen(rasters, seed), sources, given)
    augmentation = Augmentation(
        flips=config.augment.flips,
        scale=config.augment.scale,
        gain=config.augment.gain,
        offset=config.augment.offset,
        shuffle=config.augment.shuffle,
    )
    return SegmentationDataModule(
        RandomWindows(
            rasters,
            normalizer,
            augmentation,
            tile_px=config.tile_px,
            length=len(places) if isinstance(places, GridPlaces) else config.tiles_per_epoch,
            seed=seed,
            stain=stain,
            resolution=config.augment.resolution,
            pixel_sizes=sides,
            places=places,
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
    """What is trained and validated on, all with one number of bands."""
    train = {"data.train": open_labelled(config, config.train, "data.train", train=True)}
    val = {"data.val": open_labelled(config, config.val, "data.val", train=False)}
    for index, region in enumerate(config.extra_train):
        key = f"data.extra_train[{index}]"
        train[key] = open_labelled(config, region, key, train=True)
    for key, group in (train | val).items():
        _check_bands(group, key, train["data.train"][0].source)
    if config.resolution is not None:
        common_unit([(one.source.path, one.source.crs) for group in (train | val).values() for one in group])
    return [one for group in train.values() for one in group], val["data.val"]


def _check_bands(group: Sequence[LabelledSource], key: str, first: Source) -> None:
    """Refuse images with another number of bands than the first.

    Raises:
        ConfigError: how many there are, and which.
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
    """The tiles of all sources, one source after the other."""
    grids = [GridWindows(one, normalizer, tile_px=tile_px) for one in sources]
    return grids[0] if len(grids) == 1 else ConcatDataset(grids)


def _seen(rasters: Sequence[LabelledSource], seed: int) -> list[GeoImage]:
    """All rasters, or some images of folders that the seed decides, of low resolution."""
    if all(one.keep_open for one in rasters):
        return [one.read_reduced(_STATISTICS_PX) for one in rasters]
    paths = [one.source.path for one in rasters]
    return seen_images(lambda index, size_px: rasters[index].read_reduced(size_px), paths, seed)


def _make_places(
    rasters: Sequence[LabelledSource],
    config: SegmentationDataConfig,
    sides: Sequence[float] | None,
    seed: int,
    on_window: Callable[[int, int], None] | None,
) -> WindowPlaces | None:
    """Where the config's sampler lays windows; None for anywhere."""
    regions = [one.region for one in rasters]
    if config.sampler == "grid":
        bounds = config.augment.resolution
        # Of tiles with pixels of several sizes, those of the middle one cover the regions.
        side = None if bounds is None else math.sqrt(math.prod(bounds))
        each = [None] * len(regions) if sides is None else list(sides)
        return GridPlaces(regions, [window_px(config.tile_px, side, own) for own in each], seed)
    if config.sampler == "balanced":
        num_classes = len(config.classes)
        pixels = find_class_pixels(rasters, num_classes, multilabel=config.multilabel, seed=seed, on_window=on_window)
        return ClassPlaces(regions, pixels)
    return None


def _check_labelled(sources: Sequence[LabelledSource], config: SegmentationDataConfig, part: str) -> None:
    """Refuse rasters of which no pixel can be learnt from, and tell of some among others; 64 stand for more.

    Raises:
        InputError: no raster has a pixel that is valid and labelled.
    """
    order = np.random.default_rng(0).permutation(len(sources)).tolist()
    chosen = [sources[index] for index in sorted(order[:_IMAGES_LOOKED_AT])]
    bare = [one for one in chosen if not one.has_labels(config.tile_px)]
    rest = (sources[index] for index in order[_IMAGES_LOOKED_AT:])
    if len(bare) == len(chosen) and not any(one.has_labels(config.tile_px) for one in rest):
        raise InputError(
            f"data.{part} has no window with a pixel that is valid and labelled: {bare[0].source.path}"
            f"{f' and {len(sources) - 1} more' if len(sources) > 1 else ''}; check nodata, region and labels"
        )
    if bare:
        looked_at = " that were looked at" if len(chosen) < len(sources) else ""
        warnings.warn(
            f"{len(bare)} of {len(chosen)} rasters to {part} on{looked_at} have no pixel that is valid and labelled, "
            f"the first {bare[0].source.path}",
            DataWarning,
            stacklevel=3,
        )


def _warn_of_absent_classes(
    sources: Sequence[LabelledSource], config: SegmentationDataConfig, part: str, places: WindowPlaces | None = None
) -> None:
    """Tell of classes that no pixel was found of; where there are many pixels, some windows stand for all."""
    if isinstance(places, ClassPlaces):
        pixels, among = places.num_pixels[: len(config.classes)], f"all labelled ones of data.{part}"
    else:
        pixels, labelled = count_labelled_pixels(sources, len(config.classes), max_windows=_WINDOWS_LOOKED_AT)
        # Where labels are few and far between, none may have been looked at.
        if not labelled:
            return
        among = f"{labelled:,} labelled ones of data.{part} that were looked at"
    absent = [name for name, count in zip(config.classes, pixels, strict=True) if not count]
    if absent:
        warnings.warn(
            f"{len(absent)} of {len(pixels)} classes have no pixel among {among}: {', '.join(absent)}",
            DataWarning,
            stacklevel=3,
        )
