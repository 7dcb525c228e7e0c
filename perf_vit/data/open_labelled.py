"""Labelled rasters, slides and folders of images, opened as a config says."""

from __future__ import annotations

import math

from perf_vit.data.augmenting import pixel_side
from perf_vit.data.label_folders import find_label_pairs, is_labelled_folder
from perf_vit.data.window_config import DataConfig, RegionConfig, label_options
from perf_vit.data.windows import LabelledSource
from perf_vit.errors import ConfigError
from perf_vit.io import LabelFiles, RasterSource, SlideSource, open_labels, open_raster, open_source
from perf_vit.types import Source, Window

__all__ = ["open_labelled", "region_window"]


def open_labelled(config: DataConfig, region: RegionConfig, key: str, *, train: bool) -> list[LabelledSource]:
    """Open a raster or slide with its labels, or all images of a folder.

    Args:
        config: how to read them.
        region: what to open.
        key: what to call it in an error.
        train: with finer pixels where the file has them and augmentation wants them.

    Raises:
        ConfigError: a region that doesn't fit.
        InputError: files that can't be read or don't fit each other.
    """
    options = {
        "classes": config.classes,
        "background": config.background,
        "multilabel": config.multilabel,
        **label_options(config),
    }
    if not is_labelled_folder(region.image, region.labels):
        source, window = _placed(config, region, key, train=train)
        return [LabelledSource(source, open_labels(region.labels, source, **options), window)]
    if region.region is not None:
        raise ConfigError(f"{key}.region is a part of one raster, and {region.image} is a folder; leave it out")
    pairs = find_label_pairs(region.image, region.labels)
    placed = [
        _placed(config, RegionConfig(image=str(image), labels=str(labels)), key, train=train) for image, labels in pairs
    ]
    files = LabelFiles([labels for _, labels in pairs], [source for source, _ in placed], **options)
    files.look()
    return [
        LabelledSource(source, files[index], window, keep_open=False) for index, (source, window) in enumerate(placed)
    ]


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


def _placed(
    config: DataConfig, region: RegionConfig, key: str, *, train: bool
) -> tuple[RasterSource | SlideSource, Window]:
    """An image and the part of it that may be used; closed, as there may be more than a process may hold open."""
    read_at = config.mpp or config.resolution
    source = _open_image(config, region, read_at)
    window = region_window(region.region, source, f"{key}.region")
    if train and read_at is not None and config.augment.resolution is not None:
        finest = max(config.augment.resolution[0], _own_side(config, region, source) or 0)
        if finest < read_at:
            source.close()
            source = _open_image(config, region, finest)
            window = _scaled(window, read_at / finest, source.extent)
    source.close()
    return source, window


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
