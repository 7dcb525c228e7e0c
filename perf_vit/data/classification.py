"""Data module and configs of image classification and regression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from torch.utils.data import DataLoader

from perf_vit.data.augmentation import make_augmentation, make_stain_jitter
from perf_vit.data.base import (
    EpochDataModule,
    EpochLoader,
    ShareLoader,
    given_normalizer,
    measure_bands,
    sample_images,
    warn_of_mixed_mpp,
)
from perf_vit.data.classification_tiles import (
    ClassificationImages,
    ClassificationSample,
    ClassificationTiles,
    ClassificationViews,
)
from perf_vit.data.config import SplitConfig, TileDataConfig, check_base
from perf_vit.data.splits import HoldOutConfig, check_groups_apart, read_groups, split_items, warn_of_shared_places
from perf_vit.errors import ConfigError
from perf_vit.labels.tables import ImageTargets, read_class_folders, read_class_table, read_target_table
from perf_vit.models import InputBands, accepts_bands, collate_tiles, middle_window
from perf_vit.sources import open_input
from perf_vit.types import InputOptions, Source

__all__ = [
    "ClassificationDataConfig",
    "ClassificationDataModule",
    "ClassificationSplitConfig",
    "ImageDataConfig",
    "RegressionDataConfig",
    "build_classification_datamodule",
    "read_image_targets",
]


@dataclass(kw_only=True)
class ClassificationSplitConfig(SplitConfig):
    """Labelled images.

    Attributes:
        image: Folder, image file, glob, or list of these.
        labels: CSV file; None for a folder with one subfolder of images per class.
    """

    labels: str | None = None


@dataclass(kw_only=True)
class ImageDataConfig(TileDataConfig, HoldOutConfig):
    """Data of image classification and regression; `TileDataConfig` and `HoldOutConfig` have further keys.

    Attributes:
        train: Training images.
        val: Validation images; None for a part of `train`.
        group_column: CSV column with the patient, place or another group whose images all belong in the same split;
            None if each image is a group of its own.
        image_column: CSV column with image names.
        resize: Whether to resize whole images to a tile; otherwise a tile is a crop at full resolution, random in
            training and central otherwise, and smaller images are padded.
        tiles_per_epoch: Number of training tiles per epoch; None for one per image.
    """

    train: ClassificationSplitConfig
    val: ClassificationSplitConfig | None = None
    group_column: str | None = None
    image_column: str = "image"
    resize: bool = False
    tiles_per_epoch: int | None = None
    batch_size: int = 16


@dataclass(kw_only=True)
class ClassificationDataConfig(ImageDataConfig):
    """Images and their classes.

    Attributes:
        classes: Class names; None for all that occur in `train`, sorted by name. With `multilabel`, the CSV columns of
            0 and 1.
        multilabel: Whether an image may have any number of classes.
        label_column: CSV column with class names.
        sampler: Sampler of training images: random (each image once per epoch, shuffled) or balanced (classes equally
            often).
    """

    classes: list[str] | None = None
    multilabel: bool = False
    label_column: str = "label"
    sampler: Literal["random", "balanced"] = "random"


@dataclass(kw_only=True)
class RegressionDataConfig(ImageDataConfig):
    """Images and their regression targets.

    Attributes:
        targets: CSV columns, one per target.
        crop: Whether targets also describe each crop of an image, as a mean height or a share does and a count doesn't.
            Otherwise images must fit in a tile, or be resized to one with `resize`.
    """

    targets: list[str]
    crop: bool = False


class ClassificationDataModule(EpochDataModule):
    """Data module of image classification and regression: augmented training tiles, one validation tile per image.

    Attributes:
        train: Tiles of the training images.
        val: Tiles of the validation images.
        names: Names of the classes or targets.
        normalizer: Normalizer, as given or measured on the training images.
        trained_on: Bands of the training images.
    """

    def __init__(
        self,
        train: ClassificationTiles,
        val: ClassificationViews,
        *,
        trained_on: InputBands,
        batch_size: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        self.train = train
        self.val = val
        self.names = train.images.labelled.names
        self.normalizer = train.normalizer
        self.trained_on = trained_on
        self.batch_size = batch_size
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[ClassificationSample]:
        """Return the loader of augmented tiles, new ones each epoch; drops a smaller last batch (batch statistics)."""
        return self.train_loader(
            EpochLoader(
                self.train, batch_size=self.loader_batch_size, num_workers=self.num_workers, collate_fn=collate_tiles
            )
        )

    def val_dataloader(self) -> DataLoader[ClassificationSample]:
        """Return the loader of the validation images, in order."""
        return ShareLoader(
            self.val,
            batch_size=self.loader_batch_size,
            num_workers=self.num_workers,
            collate_fn=collate_tiles,
        )


def build_classification_datamodule(config: ImageDataConfig, seed: int) -> ClassificationDataModule:
    """Read labels, open images and measure band statistics that the config doesn't give.

    Args:
        config: Data config.
        seed: Seed of order, crops, augmentation and validation split.

    Raises:
        ConfigError: Values are inconsistent.
        InputError: Files can't be read or are inconsistent.
    """
    _check(config)
    labelled = read_image_targets(config, config.train)
    if isinstance(config, ClassificationDataConfig) and not config.multilabel and len(labelled.names) < 2:
        raise ConfigError(f"all images of data.train are of the class {labelled.names[0]}; expected at least two")
    train, val = _open_images(config, *_split(labelled, config, seed))
    tiles_per_epoch = _tiles_per_epoch(config, len(train))
    whole = _needs_whole_images(config, [*train.sources, *val.sources])
    given = given_normalizer(config.mean, config.std, train.num_bands)
    seen = sample_images(train.read_reduced, train.labelled.paths, seed)
    normalizer, trained_on = measure_bands(seen, train.sources, given)
    return ClassificationDataModule(
        ClassificationTiles(
            train,
            normalizer,
            make_augmentation(config.augment),
            tile_px=config.tile_px,
            resize=config.resize,
            tiles_per_epoch=tiles_per_epoch,
            seed=seed,
            balanced=isinstance(config, ClassificationDataConfig) and config.sampler == "balanced",
            scale=config.augment.scale,
            whole=whole,
            stain=make_stain_jitter(config.augment, train.sources, train.num_bands),
        ),
        ClassificationViews(val, normalizer, tile_px=config.tile_px, resize=config.resize, whole=whole),
        trained_on=trained_on,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
    )


def _open_images(
    config: ImageDataConfig, train_part: ImageTargets, val_part: ImageTargets
) -> tuple[ClassificationImages, ClassificationImages]:
    """Open the training and validation images and check that they fit together."""
    opener = partial(open_input, options=InputOptions.from_config(config))
    train, val = (ClassificationImages(part, opener) for part in (train_part, val_part))
    if not accepts_bands(val.num_bands, train.num_bands):
        raise ConfigError(
            f"data.val has images of {val.num_bands} bands, data.train of {train.num_bands}; choose common ones with "
            "data.bands"
        )
    places = ([(one, one.extent) for one in images.sources] for images in (train, val))
    hint = (
        "choose other images for one of them"
        if config.val
        else "hold out images of a place together, by data.group_column"
    )
    warn_of_shared_places(*places, hint=hint)
    if not config.resize:
        warn_of_mixed_mpp([*train.sources, *val.sources], "write them at one pixel size, or give data.resize")
    return train, val


def _split(labelled: ImageTargets, config: ImageDataConfig, seed: int) -> tuple[ImageTargets, ImageTargets]:
    """Return the training and validation images."""
    column = config.group_column
    groups = None if column is None else read_groups(config.train.labels, column)
    if config.val is not None:
        if column is not None and groups is not None:
            check_groups_apart(groups, read_groups(config.val.labels, column, "val"), column)
        return labelled, read_image_targets(config, config.val, names=labelled.names, allow_missing=True)
    kinds = labelled.targets.astype(np.int64) if labelled.targets.ndim == 1 else None
    key = f"data.group_column {column}"
    train, val = split_items(len(labelled), config, seed, "images", labels=kinds, groups=groups, key=key)
    return labelled.part(train), labelled.part(val)


def _needs_whole_images(config: ImageDataConfig, sources: Sequence[Source]) -> bool:
    """Return whether each tile must hold its whole image, in pixels of the image.

    Raises:
        InputError: It must, and an image is larger than a tile.
    """
    whole = isinstance(config, RegressionDataConfig) and not config.crop and not config.resize
    for source in sources if whole else ():
        middle_window(source, config.tile_px, whole=True)
    return whole


def _tiles_per_epoch(config: ImageDataConfig, num_images: int) -> int:
    tiles_per_epoch = config.tiles_per_epoch or num_images
    batch_size, key = (
        config.process_batch_size(),
        "batch_size" if config.global_batch_size is None else "global_batch_size",
    )
    if tiles_per_epoch < batch_size:
        raise ConfigError(
            f"data.{key} must be at most the {tiles_per_epoch} tiles of an epoch, got {batch_size}; take a "
            "smaller one, or give data.tiles_per_epoch"
        )
    return tiles_per_epoch


def read_image_targets(
    config: ImageDataConfig,
    split: ClassificationSplitConfig,
    names: Sequence[str] | None = None,
    *,
    allow_missing: bool = False,
) -> ImageTargets:
    """Read the labelled images of a split.

    Args:
        config: Data config.
        split: Images and labels.
        names: Class names that replace those of the config.
        allow_missing: Whether folders may lack images of some classes.

    Raises:
        ConfigError: The labels need a CSV file, and there is none.
        InputError: Files can't be read or are inconsistent.
    """
    if isinstance(config, RegressionDataConfig):
        if split.labels is None:
            raise ConfigError("regression needs a CSV file; give data.train.labels, and data.val.labels with data.val")
        return read_target_table(split.labels, split.image, config.targets, image_column=config.image_column)
    assert isinstance(config, ClassificationDataConfig)
    classes = names or config.classes
    if split.labels is None:
        if config.multilabel:
            raise ConfigError("data.multilabel needs a CSV file; give data.train.labels")
        return read_class_folders(split.image, classes, allow_missing=allow_missing)
    return read_class_table(
        split.labels,
        split.image,
        classes,
        multilabel=config.multilabel,
        image_column=config.image_column,
        label_column=config.label_column,
    )


def _check(config: ImageDataConfig) -> None:
    check_base(config)
    config.check_hold_out(config.val)
    if config.augment.resolution is not None:
        raise ConfigError("data.augment.resolution is for segmentation and detection; use data.augment.scale")
    if isinstance(config, ClassificationDataConfig):
        classes = config.classes
        if classes is not None and (len(classes) < 2 - config.multilabel or len(set(classes)) != len(classes)):
            raise ConfigError(f"data.classes must name at least two classes, each once, got {classes}")
        if config.multilabel and classes is None:
            raise ConfigError("data.multilabel needs data.classes, the columns of 0 and 1")
        if config.sampler not in ("random", "balanced") or (config.sampler == "balanced" and config.multilabel):
            raise ConfigError(f"data.sampler must be random, or balanced for single-label images, got {config.sampler}")
    if isinstance(config, RegressionDataConfig) and config.resize and not config.crop and config.augment.scale[1] > 1:
        raise ConfigError(
            f"data.augment.scale up to {config.augment.scale[1]:g} cuts images whose targets are those of the whole; "
            "leave it out, or give data.crop=true if targets also describe each crop"
        )
    if isinstance(config, RegressionDataConfig) and not config.targets:
        raise ConfigError("data.targets must name at least one column of the CSV file")
    if config.tiles_per_epoch is not None and config.tiles_per_epoch < 1:
        raise ConfigError(f"data.tiles_per_epoch must be at least 1, got {config.tiles_per_epoch}")
