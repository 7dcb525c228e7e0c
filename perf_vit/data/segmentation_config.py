"""What configs say about the data of maps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from perf_vit.data.config import SplitConfig, TileDataConfig, check_base
from perf_vit.data.samplers import SAMPLERS
from perf_vit.errors import ConfigError
from perf_vit.types import IGNORE_INDEX

__all__ = ["SegmentationDataConfig", "SegmentationSplitConfig", "check_data", "label_options"]


@dataclass(kw_only=True)
class SegmentationSplitConfig(SplitConfig):
    """One labelled raster, or a part of it; or a folder of images, each with labels of its own.

    Attributes:
        image: a raster that rasterio opens; or a slide, with `data.mpp`; or a folder, a glob or a list of rasters. With
            one label file, several rasters are one mosaic.
        labels: a mask raster, or a vector file in any CRS; of a slide, polygons in pixels of level 0. Or a folder of
            label files, which have their images' names but for the ending.
        region: [row, col, height, width] in pixels; the whole raster if left out. Training on one side of a line
            and validating on the other is two regions of one raster.
    """

    labels: str
    region: list[int] | None = None


@dataclass(kw_only=True)
class SegmentationDataConfig(TileDataConfig):
    """Where tiles and labels come from; `TileDataConfig` has further keys.

    Attributes:
        train: the raster or folder trained on.
        val: the raster or folder validated on.
        extra_train: further rasters and folders trained on, with as many bands; each image gives tiles in proportion
            to its size.
        classes: class names; labels are indices into them.
        values: the label file's value of each class; 0, 1, 2, ... if left out.
        ignore_values: label values that mean "no label here", beside the label file's own nodata; of polygons also
            text, and null for features without a value.
        attribute: the vector column that holds class names or values; without it polygons are the one of
            two classes that is not background.
        background: name of the class that is background: that of pixels under no polygon, left out where the areas of
            a map are written. `ignore` where pixels under no polygon carry no label, `none` with `multilabel` where no
            class is true there. No class is background if left out; labels that are polygons need it.
        all_touched: polygons label every pixel that they touch, not only those whose centre they hold.
        multilabel: several classes, or none, may be true at a pixel: labels are overlapping polygons, or a raster with
            a band of 0 and 1 a class. There is no class for the background then.
        resolution: pixel size to read rasters at, in units of their CRS; their own if left out. Prediction reads
            at the same.
        mpp: micrometres per pixel to read slides at; left out, images are rasters. Prediction reads at the same.
        slide_mpp: micrometres per pixel of slides' level 0 where files don't say.
        tissue: "otsu" to train and validate on slides' tissue alone.
        sampler: where training tiles lie: random (anywhere), balanced (a class is drawn, each as often as the others,
            and then one of its pixels, which lies anywhere in the tile) or grid (every tile of a grid once an epoch).
        tiles_per_epoch: training tiles an epoch; a grid has as many as cover the regions.
    """

    train: SegmentationSplitConfig
    val: SegmentationSplitConfig
    classes: list[str]
    extra_train: list[SegmentationSplitConfig] = field(default_factory=list)
    values: list[int] | None = None
    ignore_values: list[Any] = field(default_factory=list)
    attribute: str | None = None
    background: str | None = None
    all_touched: bool = False
    multilabel: bool = False
    resolution: float | None = None
    mpp: float | None = None
    slide_mpp: float | None = None
    tissue: str | None = None
    tile_px: int = 512
    sampler: str = "random"
    tiles_per_epoch: int = 200


def label_options(config: SegmentationDataConfig) -> dict[str, Any]:
    """How label files are read, as plain keyword arguments of `perf_vit.labels.open_labels`."""
    return {
        "attribute": config.attribute,
        "values": config.values,
        "ignore_values": list(config.ignore_values),
        "all_touched": config.all_touched,
    }


def check_data(config: SegmentationDataConfig) -> None:
    """Refuse values that don't fit each other.

    Raises:
        ConfigError: which, and what is expected.
    """
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
    if not all(isinstance(value, int | float | str | None) for value in config.ignore_values):
        raise ConfigError(f"data.ignore_values must be numbers, text or null, got {list(config.ignore_values)}")
    known = [*(["none"] if config.multilabel else config.classes), "ignore"]
    if config.background is not None and config.background not in known:
        raise ConfigError(
            f"data.background must be one of {', '.join(known)}, or left out where no class is background, got "
            f"{config.background}"
        )
    # A grid doesn't look at the number of tiles.
    check_base(config, {"tiles_per_epoch": 0 if config.sampler == "grid" else config.batch_size})
