"""Keys of data configs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from perf_vit.data.augmentation import AugmentConfig, check_augment
from perf_vit.data.samplers import SAMPLERS
from perf_vit.errors import ConfigError
from perf_vit.types import IGNORE_INDEX

__all__ = [
    "BaseDataConfig",
    "SegmentationDataConfig",
    "SegmentationSplitConfig",
    "SplitConfig",
    "TileDataConfig",
    "check_base",
    "check_data",
    "image_paths",
    "label_options",
]


@dataclass(kw_only=True)
class SplitConfig:
    """Images to train or validate on.

    Attributes:
        image: File, folder, glob, or list of these.
    """

    image: str | list[str]

    @staticmethod
    def from_short(value: Any, key: str) -> dict[str, Any] | None:
        """Return the keys that a path in place of a mapping stands for: `image`."""
        return {"image": value} if isinstance(value, str) and value.lower() not in ("none", "null") else None

    def __post_init__(self) -> None:
        paths = image_paths(self.image)
        if not paths or not all(isinstance(path, str) for path in paths):
            raise ConfigError(f"image must be a file, a folder, a glob, or a list of these, got {self.image!r:.100}")


@dataclass(kw_only=True)
class BaseDataConfig:
    """Bands and tiles, for all tasks.

    Attributes:
        bands: 1-based bands to use; None for all.
        mean: Mean of each band in the images' units, for standardisation, e.g. that of the backbone's pretraining; None
            to measure it on training images.
        std: Standard deviation of each band; required with `mean`.
        tile_px: Tile size in pixels; a multiple of the backbone's patch size.
        batch_size: Number of tiles per step, of each process.
        global_batch_size: Number of tiles per step of all processes together, instead of `batch_size`; a multiple of
            the number of processes. Keeps the step and its learning rate when the number of devices changes.
        num_workers: Number of loader processes; 0 loads in the training process.
    """

    bands: list[int] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    tile_px: int = 224
    batch_size: int = 4
    global_batch_size: int | None = None
    num_workers: int = 0

    def process_batch_size(self, num_processes: int = 1) -> int:
        """Return the number of tiles per step of one of several processes."""
        return self.batch_size if self.global_batch_size is None else -(-self.global_batch_size // num_processes)


@dataclass(kw_only=True)
class TileDataConfig(BaseDataConfig):
    """Labelled tiles, for tasks that train a backbone on them.

    Attributes:
        nodata: Value of missing pixels, which replaces the one declared in files.
        augment: Augmentation of training tiles.
    """

    nodata: float | None = None
    augment: AugmentConfig = field(default_factory=AugmentConfig)


def image_paths(image: str | Sequence[str]) -> list[str]:
    """Return the paths and globs of an `image` key."""
    return list(image) if isinstance(image, list | tuple) else [image]  # type: ignore[list-item]


def check_base(config: BaseDataConfig, least: Mapping[str, int] | None = None) -> None:
    """Check sizes and augmentation.

    Args:
        config: Data config of any task.
        least: Minimum values of further keys.

    Raises:
        ConfigError: A value is out of range.
    """
    if isinstance(config, TileDataConfig):
        check_augment(config.augment)
    if config.global_batch_size is not None and config.global_batch_size < 1:
        raise ConfigError(f"data.global_batch_size must be at least 1, got {config.global_batch_size}")
    for key, smallest in {"tile_px": 1, "batch_size": 1, "num_workers": 0, **(least or {})}.items():
        if getattr(config, key) < smallest:
            raise ConfigError(f"data.{key} must be at least {smallest}, got {getattr(config, key)}")


@dataclass(kw_only=True)
class SegmentationSplitConfig(SplitConfig):
    """A labelled raster or a region of it, or a folder of images with a label file each.

    Attributes:
        image: Raster in any format of rasterio, slide (with `data.mpp`), or folder, glob or list of rasters. With a
            single label file, several rasters are a mosaic.
        labels: Mask raster, or vector file in any CRS; for slides, polygons in QuPath's coordinates. Or folder of label
            files with the names of their images except for the suffix.
        region: [row, col, height, width] in pixels; None for the whole raster. One raster can be split into training
            and validation by two regions.
    """

    labels: str
    region: list[int] | None = None


@dataclass(kw_only=True)
class SegmentationDataConfig(TileDataConfig):
    """Data of segmentation; `TileDataConfig` has further keys.

    Attributes:
        train: Raster or folder to train on.
        val: Raster or folder to validate on.
        classes: Class names; labels are indices into them.
        extra_train: Further rasters and folders to train on, with the same number of bands; images give tiles in
            proportion to their size.
        values: Value of each class in the label file; None for 0, 1, 2, ...
        ignore_values: Label values that mark unlabelled pixels, in addition to the nodata value of the file; for
            polygons also text, and null for features without a value. QuPath's class `Ignore*` is one of them.
        skip_classes: Classes of polygons to leave out, as if they were not there; null for those without a class.
        attribute: Vector column with class names or values; None if polygons are the one of two classes that isn't the
            background.
        background: Background class, which pixels outside of polygons get and which is left out of the polygons of a
            predicted map. `ignore` leaves pixels outside of polygons unlabelled; `none`, with `multilabel`, gives them
            no class. None if no class is background; required for polygon labels.
        all_touched: Whether polygons label all pixels that they touch, instead of those whose centre they contain.
        multilabel: Whether a pixel may have several classes or none: labels are overlapping polygons, or a raster with
            a band of 0 and 1 per class. There is no background class then.
        resolution: Pixel size to read rasters at, in CRS units; None for their own. Prediction reads at the same
            resolution.
        mpp: Resolution to read slides at, in micrometres per pixel; None if images are rasters. Prediction reads at the
            same resolution.
        slide_mpp: Micrometres per pixel of slides' level 0 for files that state none; `objective` for 10 divided by the
            magnification of the objective.
        slide_mpp_override: Micrometres per pixel of slides' level 0, whatever files state. Not kept with the model.
        tissue: "auto" or "otsu" to train and validate on the tissue of slides only.
        sampler: Sampler of training tiles: random (anywhere), balanced (a random pixel of a class, classes equally
            often, at a random position in the tile) or grid (all tiles of a grid once per epoch).
        tiles_per_epoch: Number of training tiles per epoch; the grid sampler uses as many as cover the regions.
    """

    train: SegmentationSplitConfig
    val: SegmentationSplitConfig
    classes: list[str]
    extra_train: list[SegmentationSplitConfig] = field(default_factory=list)
    values: list[int] | None = None
    ignore_values: list[int | float | str | None] = field(default_factory=list)
    skip_classes: list[str | None] = field(default_factory=list)
    attribute: str | None = None
    background: str | None = None
    all_touched: bool = False
    multilabel: bool = False
    resolution: float | None = None
    mpp: float | None = None
    slide_mpp: float | Literal["objective"] | None = None
    slide_mpp_override: float | None = None
    tissue: str | None = None
    tile_px: int = 512
    sampler: Literal["random", "balanced", "grid"] = "random"
    tiles_per_epoch: int = 200


def label_options(config: SegmentationDataConfig) -> dict[str, Any]:
    """Return the label settings as keyword arguments of `perf_vit.labels.open_labels`."""
    return {
        "attribute": config.attribute,
        "values": config.values,
        "ignore_values": list(config.ignore_values),
        "skip_classes": list(config.skip_classes),
        "all_touched": config.all_touched,
    }


def check_data(config: SegmentationDataConfig) -> None:
    """Check that the values are consistent.

    Raises:
        ConfigError: A value is out of range or doesn't fit another.
    """
    of_slides = [name for name in ("slide_mpp", "slide_mpp_override", "tissue") if getattr(config, name) is not None]
    if config.mpp is None and of_slides:
        raise ConfigError(f"data.{of_slides[0]} is for slides, which need data.mpp; give it, such as 0.5")
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
    if config.skip_classes and config.attribute is None:
        raise ConfigError("data.skip_classes are of polygons, whose classes data.attribute tells; give it")
    known = [*(["none"] if config.multilabel else config.classes), "ignore"]
    if config.background is not None and config.background not in known:
        raise ConfigError(
            f"data.background must be one of {', '.join(known)}, or left out where no class is background, got "
            f"{config.background}"
        )
    # The grid sampler ignores tiles_per_epoch.
    check_base(config, {"tiles_per_epoch": 0 if config.sampler == "grid" else config.process_batch_size()})
