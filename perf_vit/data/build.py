"""Data modules from configs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from perf_vit.data.augmenting import AugmentConfig, check_augment, make_stain_jitter, pixel_side, pixel_sides
from perf_vit.data.band_statistics import given_normalizer
from perf_vit.data.class_pixels import count_labelled_pixels
from perf_vit.data.class_places import find_class_pixels
from perf_vit.data.datamodule import WindowDataModule
from perf_vit.data.window_places import SAMPLERS, ClassPlaces, GridPlaces, WindowPlaces
from perf_vit.data.windows import GridWindows, LabelledSource, RandomWindows, window_px
from perf_vit.errors import ConfigError, DataWarning, InputError
from perf_vit.io import RasterSource, SlideSource, open_labels, open_raster, open_source, warn_of_polygons_beside
from perf_vit.transforms import Augmentation, Normalizer
from perf_vit.types import IGNORE_INDEX, Source, Window

__all__ = ["DataConfig", "RegionConfig", "build_datamodule", "region_window"]

# Enough pixels for a mean to three digits, few enough to read in a second.
_STATISTICS_PX = 2048
# Of 512 x 512 pixels, to see which classes there are.
_WINDOWS_LOOKED_AT = 64


@dataclass(kw_only=True)
class RegionConfig:
    """One labelled raster, or a part of it.

    Attributes:
        image: a raster that rasterio opens; or a slide, with `data.mpp`.
        labels: a mask raster, or a vector file in any CRS; of a slide, polygons in pixels of level 0.
        region: [row, col, height, width] in pixels; the whole raster if left out. Training on one side of a line
            and validating on the other is two regions of one raster.
    """

    image: str
    labels: str
    region: list[int] | None = None


@dataclass(kw_only=True)
class DataConfig:
    """Where tiles and labels come from.

    Attributes:
        train: the raster trained on.
        val: the raster validated on.
        extra_train: further rasters trained on, with as many bands; each gives tiles in proportion to its size.
        classes: class names; labels are indices into them.
        values: the label file's value of each class; 0, 1, 2, ... if left out.
        ignore_values: label values that mean "no label here", beside the label file's own nodata.
        attribute: the vector column that holds class names or values; without it every polygon is class 1.
        background: class of the pixels under no polygon, or null where polygons are only samples.
        multilabel: several classes, or none, may be true at a pixel: labels are overlapping polygons, or a raster with
            a band of 0 and 1 a class. There is no class for the background then.
        bands: 1-based bands to use; all of them if left out.
        nodata: value of missing pixels where the raster doesn't declare one.
        resolution: side of a pixel to read rasters at, in units of their CRS; their own if left out. Prediction reads
            at the same.
        mpp: micrometres per pixel to read slides at; left out, images are rasters. Prediction reads at the same.
        slide_mpp: micrometres per pixel of slides' level 0 where files don't say.
        tissue: "otsu" to train and validate on slides' tissue alone.
        mean: of each band, in the rasters' units, for standardisation; measured on the training rasters if left out.
            A pretrained backbone may want those of its own training.
        std: standard deviation of each band; goes with `mean`.
        tile_px: side of a tile, in pixels; a multiple of the backbone's patch size.
        sampler: where training tiles lie: random (anywhere), balanced (a class is drawn, each as often as the others,
            and then one of its pixels, which lies anywhere in the tile) or grid (every tile of a grid once an epoch).
        tiles_per_epoch: training tiles an epoch; a grid has as many as cover the regions.
        batch_size: tiles a step.
        num_workers: loader processes; 0 loads in the training process.
        augment: applied to training tiles.
    """

    train: RegionConfig
    val: RegionConfig
    classes: list[str]
    extra_train: list[RegionConfig] = field(default_factory=list)
    values: list[int] | None = None
    ignore_values: list[int] = field(default_factory=list)
    attribute: str | None = None
    background: int | None = 0
    multilabel: bool = False
    bands: list[int] | None = None
    nodata: float | None = None
    resolution: float | None = None
    mpp: float | None = None
    slide_mpp: float | None = None
    tissue: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    tile_px: int = 512
    sampler: str = "random"
    tiles_per_epoch: int = 200
    batch_size: int = 4
    num_workers: int = 0
    augment: AugmentConfig = field(default_factory=AugmentConfig)


def build_datamodule(
    config: DataConfig, seed: int, on_window: Callable[[int, int], None] | None = None
) -> WindowDataModule:
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
    _check(config)
    train, val = _open_to_train(config, config.train, "data.train"), _open(config, config.val, "data.val")
    extra = [_open_to_train(config, region, f"data.extra_train[{i}]") for i, region in enumerate(config.extra_train)]
    for source, key in ((val, "data.val"), *((more, f"data.extra_train[{i}]") for i, more in enumerate(extra))):
        if source.source.num_bands != train.source.num_bands:
            raise ConfigError(
                f"{key}.image has {source.source.num_bands} bands, data.train.image {train.source.num_bands}; "
                "choose common ones with data.bands"
            )
    rasters = [train, *extra]
    sources = [one.source for one in rasters]
    stain = make_stain_jitter(config.augment, sources, train.source.num_bands)
    sides = pixel_sides(config.augment, sources)
    _check_labelled(rasters, config, "train")
    _check_labelled([val], config, "val")
    warn_of_polygons_beside(one.labels for one in (*rasters, val))
    places = _make_places(rasters, config, sides, seed, on_window)
    _warn_of_absent_classes(rasters, config, "train", places)
    _warn_of_absent_classes([val], config, "val")
    normalizer = given_normalizer(config.mean, config.std, rasters[0].source.num_bands) or _measured(rasters)
    augmentation = Augmentation(
        flips=config.augment.flips,
        scale=config.augment.scale,
        gain=config.augment.gain,
        offset=config.augment.offset,
        shuffle=config.augment.shuffle,
    )
    return WindowDataModule(
        RandomWindows(
            rasters,
            normalizer,
            augmentation,
            tile_px=config.tile_px,
            length=len(places) if isinstance(places, GridPlaces) else config.tiles_per_epoch,
            seed=seed,
            stain=stain,
            resolution=config.augment.resolution,
            pixel_sides=sides,
            places=places,
        ),
        GridWindows(val, normalizer, tile_px=config.tile_px),
        classes=tuple(config.classes),
        normalizer=normalizer,
        tile_px=config.tile_px,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
    )


def region_window(region: list[int] | None, source: Source, key: str) -> Window:
    """The window that a config or command line asks for, checked against the source.

    Args:
        region: [row, col, height, width] in pixels, or None for the whole source.
        source: the raster that it lies in.
        key: what to call it in an error.

    Raises:
        ConfigError: not four numbers, or not inside the source.
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


def _measured(rasters: list[LabelledSource]) -> Normalizer:
    return Normalizer.from_images([one.source.read_reduced(_STATISTICS_PX, one.region) for one in rasters])


def _make_places(
    rasters: Sequence[LabelledSource],
    config: DataConfig,
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


def label_options(config: DataConfig) -> dict[str, Any]:
    """How label files are read, as plain keyword arguments of `perf_vit.io.open_labels`."""
    return {
        "attribute": config.attribute,
        "values": config.values,
        "ignore_values": list(config.ignore_values),
        "background": config.background,
    }


def _open(config: DataConfig, region: RegionConfig, key: str) -> LabelledSource:
    source = _open_image(config, region, config.mpp or config.resolution)
    return _labelled(config, region, source, region_window(region.region, source, f"{key}.region"))


def _open_to_train(config: DataConfig, region: RegionConfig, key: str) -> LabelledSource:
    """As `_open`, with finer pixels where the file has them and augmentation wants them."""
    labelled = _open(config, region, key)
    read_at = config.mpp or config.resolution
    if read_at is None or config.augment.resolution is None:
        return labelled
    finest = max(config.augment.resolution[0], _own_side(config, region, labelled.source) or 0)
    if finest >= read_at:
        return labelled
    source = _open_image(config, region, finest)
    return _labelled(config, region, source, _scaled(labelled.region, read_at / finest, source.extent))


def _open_image(config: DataConfig, region: RegionConfig, side: float | None) -> RasterSource | SlideSource:
    if config.mpp is None:
        return open_raster(region.image, bands=config.bands, nodata=config.nodata, resolution=side)
    source = open_source(region.image, bands=config.bands, mpp=side, slide_mpp=config.slide_mpp, tissue=config.tissue)
    # A raster refuses these options.
    assert isinstance(source, SlideSource)
    return source


def _own_side(config: DataConfig, region: RegionConfig, source: Source) -> float | None:
    if isinstance(source, SlideSource):
        assert source.slide_mpp is not None
        return math.sqrt(math.prod(source.slide_mpp))
    with open_raster(region.image, bands=config.bands) as own:
        return pixel_side(own)


def _scaled(window: Window, factor: float, extent: Window) -> Window:
    """The same part of a source whose pixels are a factor smaller."""
    row, col, row_stop, col_stop = (
        round(pixel * factor) for pixel in (window.row, window.col, window.row_stop, window.col_stop)
    )
    scaled = Window(row, col, row_stop - row, col_stop - col).intersect(extent)
    assert scaled is not None
    return scaled


def _labelled(
    config: DataConfig, region: RegionConfig, source: RasterSource | SlideSource, window: Window
) -> LabelledSource:
    labels = open_labels(
        region.labels, source, classes=config.classes, multilabel=config.multilabel, **label_options(config)
    )
    return LabelledSource(source, labels, window)


def _check_labelled(sources: Sequence[LabelledSource], config: DataConfig, part: str) -> None:
    """Refuse rasters of which no pixel can be learnt from, and tell of some among others.

    Raises:
        InputError: no raster has a pixel that is valid and labelled.
    """
    bare = [one for one in sources if not one.has_labels(config.tile_px)]
    if len(bare) == len(sources):
        raise InputError(
            f"data.{part} has no window with a pixel that is valid and labelled: {bare[0].source.path}"
            f"{f' and {len(bare) - 1} more' if len(bare) > 1 else ''}; check nodata, region and labels"
        )
    if bare:
        warnings.warn(
            f"{len(bare)} of {len(sources)} rasters to {part} on have no pixel that is valid and labelled, the first "
            f"{bare[0].source.path}",
            DataWarning,
            stacklevel=3,
        )


def _warn_of_absent_classes(
    sources: Sequence[LabelledSource], config: DataConfig, part: str, places: WindowPlaces | None = None
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


def _check(config: DataConfig) -> None:
    check_augment(config.augment)
    if config.mpp is None and (config.slide_mpp is not None or config.tissue is not None):
        raise ConfigError("data.slide_mpp and data.tissue are for slides, which need data.mpp; give it, such as 0.5")
    if config.mpp is not None and (config.nodata is not None or config.resolution is not None):
        raise ConfigError("data.nodata and data.resolution are for rasters, data.mpp for slides; leave one out")
    if config.sampler not in SAMPLERS:
        raise ConfigError(f"data.sampler must be one of {', '.join(SAMPLERS)}, got {config.sampler}")
    num_classes = len(config.classes)
    least_classes = 1 if config.multilabel else 2
    if not least_classes <= num_classes <= IGNORE_INDEX:
        raise ConfigError(f"data.classes must name {least_classes} to {IGNORE_INDEX} classes, got {num_classes}")
    if config.values is not None and len(config.values) != num_classes:
        raise ConfigError(f"data.values must give one value a class, got {len(config.values)} for {num_classes}")
    if config.background is not None and not 0 <= config.background < num_classes:
        raise ConfigError(f"data.background must be a class index below {num_classes}, got {config.background}")
    # A grid doesn't look at the number of tiles.
    least_tiles = 0 if config.sampler == "grid" else config.batch_size
    for key, least in (("tile_px", 1), ("tiles_per_epoch", least_tiles), ("batch_size", 1), ("num_workers", 0)):
        if getattr(config, key) < least:
            raise ConfigError(f"data.{key} must be at least {least}, got {getattr(config, key)}")
