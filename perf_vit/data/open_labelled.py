"""Labelled rasters, slides and folders of images, opened as a config says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from perf_vit.data.augmenting import pixel_size
from perf_vit.data.label_folders import find_label_pairs, is_labelled_folder
from perf_vit.data.window_config import SegmentationDataConfig, SegmentationSplitConfig, label_options
from perf_vit.data.windows import LabelledSource
from perf_vit.errors import ConfigError
from perf_vit.io import LabelFiles, LabelSource, RasterSource, SlideSource, open_input, open_labels
from perf_vit.types import InputOptions, InputPath, OpenInput, Source, Window

__all__ = ["open_labelled", "open_pairs", "region_window"]


def open_labelled(
    config: SegmentationDataConfig, region: SegmentationSplitConfig, key: str, *, train: bool
) -> list[LabelledSource]:
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
    windows: list[Window] = []

    def open_image(image: InputPath) -> RasterSource | SlideSource:
        source, window = _placed(config, image, region.region, key, train=train)
        windows.append(window)
        return source

    is_folder = is_labelled_folder(region.image, region.labels)
    if is_folder and region.region is not None:
        raise ConfigError(f"{key}.region is a part of one raster, and {region.image} is a folder; leave it out")
    pairs = open_pairs(region.image, region.labels, open_image, config, label_options(config))
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
) -> list[tuple[RasterSource | SlideSource, LabelSource]]:
    """Open an image and its labels; or all images of a folder, closed, each with those of its name.

    Args:
        image: a raster or slide, or a folder, glob or list of them.
        labels: a mask or polygons, or a folder of them.
        open_image: opens an image by its path.
        meaning: a data config or spec: the attributes classes, background and multilabel say what labels mean.
        options: further keyword arguments of `perf_vit.io.open_labels`.

    Raises:
        InputError: files that can't be read or don't fit each other.
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
        # There may be more images than a process may hold open.
        sources[-1].close()
    files = LabelFiles([file for _, file in pairs], sources, **options)
    files.look()
    return [(source, files[index]) for index, source in enumerate(sources)]


def _opened(image: InputPath, open_image: OpenInput) -> RasterSource | SlideSource:
    source = open_image(image)
    # Labels need to know where a file's pixels lie.
    assert isinstance(source, RasterSource | SlideSource)
    return source


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
    config: SegmentationDataConfig, image: InputPath, region: list[int] | None, key: str, *, train: bool
) -> tuple[RasterSource | SlideSource, Window]:
    """An image and the part of it that may be used; closed, as there may be more than a process may hold open."""
    options = InputOptions.from_config(config)
    source = open_input(image, options)
    window = region_window(region, source, f"{key}.region")
    read_at = config.mpp or config.resolution
    if train and read_at is not None and config.augment.resolution is not None:
        finest = max(config.augment.resolution[0], _own_side(image, options, source) or 0)
        if finest < read_at:
            source.close()
            finer = replace(options, resolution=finest) if config.mpp is None else replace(options, mpp=finest)
            source = open_input(image, finer)
            window = _scaled(window, read_at / finest, source.extent)
    source.close()
    return source, window


def _own_side(image: InputPath, options: InputOptions, source: Source) -> float | None:
    if isinstance(source, SlideSource):
        assert source.slide_mpp is not None
        return math.sqrt(math.prod(source.slide_mpp))
    own = open_input(image, replace(options, resolution=None))
    own.close()
    return pixel_size(own)


def _scaled(window: Window, factor: float, extent: Window) -> Window:
    """The same part of a source whose pixels are a factor smaller."""
    row, col, row_stop, col_stop = (
        round(pixel * factor) for pixel in (window.row, window.col, window.row_stop, window.col_stop)
    )
    scaled = Window(row, col, row_stop - row, col_stop - col).intersect(extent)
    assert scaled is not None
    return scaled
