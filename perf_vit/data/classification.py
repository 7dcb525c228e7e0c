"""The Lightning data module of whole images with one label each, and its configs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch.utils.data import DataLoader

from perf_vit.data.augmentation import make_stain_jitter
from perf_vit.data.base import (
    EpochDataModule,
    ShareSampler,
    collate_tiles,
    given_normalizer,
    measure_bands,
    seen_images,
)
from perf_vit.data.classification_tiles import (
    ClassificationImages,
    ClassificationTiles,
    ClassificationViews,
    SceneSample,
)
from perf_vit.data.config import SplitConfig, TileDataConfig, check_base
from perf_vit.errors import ConfigError
from perf_vit.labels.tables import ImageTargets, read_class_folders, read_class_table, read_target_table
from perf_vit.sources import open_input
from perf_vit.transforms import Augmentation, InputBands, bands_fit
from perf_vit.types import InputOptions

__all__ = [
    "ClassificationDataConfig",
    "ClassificationDataModule",
    "ClassificationSplitConfig",
    "ImageDataConfig",
    "RegressionDataConfig",
    "build_classification_datamodule",
    "read_image_targets",
    "split_off",
]


@dataclass(kw_only=True)
class ClassificationSplitConfig(SplitConfig):
    """Labelled images.

    Attributes:
        image: a folder, one image, a glob, or a list of these.
        labels: a CSV file; left out, the folder holds folders that are named after the class of their images.
    """

    labels: str | None = None


@dataclass(kw_only=True)
class ImageDataConfig(TileDataConfig):
    """Where whole images come from, and how they become tiles; `TileDataConfig` has further keys.

    Attributes:
        train: images trained on.
        val: images validated on; a part of `train` that the seed decides if left out.
        val_share: of the images of `train`, where `val` is left out.
        image_column: of CSV files, that names the image.
        resize: resize whole images to a tile; else a tile is a part at full resolution, at random while training, the
            middle otherwise, and images that are smaller are padded.
        tiles_per_epoch: training tiles an epoch; one an image if left out.
    """

    train: ClassificationSplitConfig
    val: ClassificationSplitConfig | None = None
    val_share: float = 0.2
    image_column: str = "image"
    resize: bool = False
    tiles_per_epoch: int | None = None
    batch_size: int = 16


@dataclass(kw_only=True)
class ClassificationDataConfig(ImageDataConfig):
    """Where images and their classes come from.

    Attributes:
        classes: names; those that occur in `train`, by name, if left out. For several classes an image, the CSV file's
            columns of 0 and 1.
        multilabel: images of any number of classes.
        label_column: of CSV files, that names the class.
        sampler: random, each image once an epoch in random order, or balanced, each class as often as the others.
    """

    classes: list[str] | None = None
    multilabel: bool = False
    label_column: str = "label"
    sampler: str = "random"


@dataclass(kw_only=True)
class RegressionDataConfig(ImageDataConfig):
    """Where images and their regression targets come from.

    Attributes:
        targets: columns of the CSV files, one a target.
    """

    targets: list[str]


class ClassificationDataModule(EpochDataModule):
    """Augmented tiles to train on, one tile an image to validate on.

    Attributes:
        train: tiles of the training images.
        val: views of the validation images.
        names: of the classes or targets.
        normalizer: as given, or measured on training images.
        trained_on: bands of the training images.
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

    def train_dataloader(self) -> DataLoader[SceneSample]:
        """Augmented tiles, others each epoch; a last smaller batch is dropped (batch statistics)."""
        return self.train_loader(
            self.train, batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=collate_tiles
        )

    def val_dataloader(self) -> DataLoader[SceneSample]:
        """The validation images, in order."""
        return DataLoader(
            self.val,
            batch_size=self.batch_size,
            sampler=ShareSampler(len(self.val)),
            num_workers=self.num_workers,
            collate_fn=collate_tiles,
        )


def build_classification_datamodule(config: ImageDataConfig, seed: int) -> ClassificationDataModule:
    """Read labels, open images and measure what statistics of the bands the config leaves out.

    Raises:
        ConfigError: values that don't fit each other.
        InputError: files that can't be read or don't fit each other.
    """
    _check(config)
    labelled = read_image_targets(config, config.train)
    if isinstance(config, ClassificationDataConfig) and not config.multilabel and len(labelled.names) < 2:
        raise ConfigError(f"all images of data.train are of the class {labelled.names[0]}; expected at least two")
    if config.val is None:
        chosen, rest = split_off(len(labelled), config.val_share, seed, "images")
        train_part, val_part = labelled.part(chosen), labelled.part(rest)
    else:
        train_part, val_part = (
            labelled,
            read_image_targets(config, config.val, names=labelled.names, allow_missing=True),
        )
    opener = partial(open_input, options=InputOptions.from_config(config))
    train, val = (ClassificationImages(part, opener) for part in (train_part, val_part))
    if not bands_fit(val.num_bands, train.num_bands):
        raise ConfigError(
            f"data.val has images of {val.num_bands} bands, data.train of {train.num_bands}; choose common ones with "
            "data.bands"
        )
    length = config.tiles_per_epoch or len(train)
    if length < config.batch_size:
        raise ConfigError(
            f"data.batch_size must be at most the {length} tiles of an epoch, got {config.batch_size}; take a smaller "
            "one, or give data.tiles_per_epoch"
        )
    given = given_normalizer(config.mean, config.std, train.num_bands)
    seen = seen_images(train.read_reduced, train_part.paths, seed)
    normalizer, trained_on = measure_bands(seen, train.sources, given)
    augment = config.augment
    return ClassificationDataModule(
        ClassificationTiles(
            train,
            normalizer,
            Augmentation(
                flips=augment.flips,
                scale=augment.scale,
                gain=augment.gain,
                offset=augment.offset,
                shuffle=augment.shuffle,
            ),
            tile_px=config.tile_px,
            resize=config.resize,
            length=length,
            seed=seed,
            balanced=isinstance(config, ClassificationDataConfig) and config.sampler == "balanced",
            stain=make_stain_jitter(augment, train.sources, train.num_bands),
        ),
        ClassificationViews(val, normalizer, tile_px=config.tile_px, resize=config.resize),
        trained_on=trained_on,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
    )


def read_image_targets(
    config: ImageDataConfig,
    split: ClassificationSplitConfig,
    names: Sequence[str] | None = None,
    *,
    allow_missing: bool = False,
) -> ImageTargets:
    """The labelled images of a split.

    Args:
        config: what the labels are.
        split: where images and labels lie.
        names: of classes, instead of those of the config.
        allow_missing: folders by class needn't have images of all classes.

    Raises:
        ConfigError: targets without a CSV file.
        InputError: files that can't be read or don't fit each other.
    """
    if isinstance(config, RegressionDataConfig):
        if split.labels is None:
            raise ConfigError("targets come from a CSV file; give data.train.labels, and data.val.labels with data.val")
        return read_target_table(split.labels, split.image, config.targets, image_column=config.image_column)
    assert isinstance(config, ClassificationDataConfig)
    classes = names or config.classes
    if split.labels is None:
        if config.multilabel:
            raise ConfigError("several classes an image come from a CSV file; give data.train.labels")
        return read_class_folders(split.image, classes, allow_missing=allow_missing)
    return read_class_table(
        split.labels,
        split.image,
        classes,
        multilabel=config.multilabel,
        image_column=config.image_column,
        label_column=config.label_column,
    )


def split_off(length: int, val_share: float, seed: int, what: str) -> tuple[list[int], list[int]]:
    """Indices to train and to validate on, both in order.

    Raises:
        ConfigError: one of both would be empty.
    """
    num_val = max(1, round(length * val_share))
    if num_val >= length:
        raise ConfigError(f"data.val_share {val_share:g} of {length} {what} leaves none to train on; give data.val")
    order = np.random.default_rng(seed).permutation(length)
    return sorted(order[num_val:].tolist()), sorted(order[:num_val].tolist())


def _check(config: ImageDataConfig) -> None:
    check_base(config)
    if config.augment.resolution is not None:
        raise ConfigError(
            "data.augment.resolution is for segmentation and detection; give data.augment.scale, which are factors"
        )
    if isinstance(config, ClassificationDataConfig):
        classes = config.classes
        if classes is not None and (len(classes) < 2 - config.multilabel or len(set(classes)) != len(classes)):
            raise ConfigError(f"data.classes must name at least two classes, each once, got {classes}")
        if config.multilabel and classes is None:
            raise ConfigError("data.multilabel needs data.classes, the columns of 0 and 1")
        if config.sampler not in ("random", "balanced") or (config.sampler == "balanced" and config.multilabel):
            raise ConfigError(f"data.sampler must be random, or balanced for one class an image, got {config.sampler}")
    if isinstance(config, RegressionDataConfig) and not config.targets:
        raise ConfigError("data.targets must name at least one column of the CSV file")
    if not 0 <= config.val_share <= 1:
        raise ConfigError(f"data.val_share must lie between 0 and 1, got {config.val_share:g}")
    if config.tiles_per_epoch is not None and config.tiles_per_epoch < 1:
        raise ConfigError(f"data.tiles_per_epoch must be at least 1, got {config.tiles_per_epoch}")
