"""Data module and config of object detection."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Literal

from torch.utils.data import DataLoader

from perf_vit.data.augmentation import make_stain_jitter, pixel_sizes
from perf_vit.data.base import (
    EpochDataModule,
    EpochLoader,
    ShareLoader,
    given_normalizer,
    measure_bands,
    sample_images,
    warn_of_mixed_mpp,
)
from perf_vit.data.config import SplitConfig, TileDataConfig, check_base
from perf_vit.data.detection_tiles import (
    DetectionBatch,
    DetectionGrid,
    DetectionImages,
    DetectionTiles,
    check_object_validity,
    collate_objects,
)
from perf_vit.data.samplers import OBJECT_SAMPLERS, make_sampler
from perf_vit.data.splits import HoldOutConfig, check_groups_apart, split_items, warn_of_shared_places
from perf_vit.errors import ConfigError, InputError
from perf_vit.labels.objects import ImageRecord, ObjectIndex, read_object_labels
from perf_vit.labels.tables import read_csv_rows
from perf_vit.models import InputBands, accepts_bands
from perf_vit.sources import open_input
from perf_vit.transforms import Augmentation
from perf_vit.types import InputOptions, OpenInput

__all__ = [
    "DetectionDataConfig",
    "DetectionDataModule",
    "DetectionSplitConfig",
    "build_detection_datamodule",
    "read_names",
]


@dataclass(kw_only=True)
class DetectionSplitConfig(SplitConfig):
    """Images and the labels of their objects.

    Attributes:
        image: Folder of images, image file, glob, or list of these.
        labels: Label file, or folder with one label file per image, depending on the format.
        label_format: Format of the labels: coco, voc, yolo, dota, instances, polygons or csv; see
            `perf_vit.labels.objects.read_object_labels`.
        names: Text file with one image name per line, with or without suffix; None for all labelled images.
    """

    labels: str
    label_format: str = "coco"
    names: str | None = None


@dataclass(kw_only=True)
class DetectionDataConfig(TileDataConfig, HoldOutConfig):
    """Data of object detection; `TileDataConfig` and `HoldOutConfig` have further keys.

    Attributes:
        train: Training images.
        classes: Class names; labels are indices into them.
        val: Validation images; None for a part of `train`.
        groups: CSV file with the columns `image` and `group`: the patient, place or another group of each image, whose
            images all belong in the same split. None if each image is a group of its own.
        skip_classes: Names of labelled objects to leave out, as if they were background.
        attribute: Column with class names (polygons format); None for a single class.
        mpp: Resolution to read slides at, in micrometres per pixel; None for level 0, and for rasters. Labels are in
            QuPath's coordinates, whatever the resolution. Prediction reads at the same resolution.
        slide_mpp: Micrometres per pixel of slides' level 0 for files that state none; `objective` for 10 divided by the
            magnification of the objective.
        slide_mpp_override: Micrometres per pixel of slides' level 0, whatever files state. Not kept with the model.
        sampler: Sampler of training tiles: random (anywhere), objects (around objects, drawn equally often) or balanced
            (around objects, classes drawn equally often).
        random_share: Fraction of tiles drawn anywhere by the samplers objects and balanced.
        min_visible: Objects with a smaller visible fraction in a training tile are ignored there; in validation, the
            tile with the object's centre counts it.
        tiles_per_epoch: Number of training tiles per epoch.
    """

    train: DetectionSplitConfig
    classes: list[str]
    val: DetectionSplitConfig | None = None
    groups: str | None = None
    skip_classes: list[str] = field(default_factory=list)
    attribute: str | None = None
    mpp: float | None = None
    slide_mpp: float | Literal["objective"] | None = None
    slide_mpp_override: float | None = None
    tile_px: int = 512
    sampler: Literal["random", "objects", "balanced"] = "objects"
    random_share: float = 0.25
    min_visible: float = 0.3
    tiles_per_epoch: int = 200


class DetectionDataModule(EpochDataModule):
    """Data module of object detection: augmented training tiles, grids of validation tiles.

    Attributes:
        train: Tiles of the training images.
        val: Grid tiles of the validation images.
        classes: Class names, in the order of the class indices.
        normalizer: Normalizer, as given or measured on the training images.
        tile_px: Tile size in pixels.
        train_index: Objects of the training images, with counts.
        val_index: Objects of the validation images, with counts.
        trained_on: Bands of the training images.
    """

    def __init__(
        self,
        train: DetectionTiles,
        val: DetectionGrid,
        *,
        train_index: ObjectIndex,
        val_index: ObjectIndex,
        trained_on: InputBands,
        batch_size: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        self.train = train
        self.val = val
        self.train_index = train_index
        self.val_index = val_index
        self.trained_on = trained_on
        self.classes = train_index.classes
        self.normalizer = train.normalizer
        self.tile_px = train.tile_px
        self.batch_size = batch_size
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[DetectionBatch]:
        """Return the loader of augmented tiles, new ones each epoch; drops a smaller last batch (batch statistics)."""
        return self.train_loader(
            EpochLoader(
                self.train, batch_size=self.loader_batch_size, num_workers=self.num_workers, collate_fn=collate_objects
            )
        )

    def val_dataloader(self) -> DataLoader[DetectionBatch]:
        """Return the loader of the validation tiles, in order."""
        return ShareLoader(
            self.val,
            batch_size=self.loader_batch_size,
            num_workers=self.num_workers,
            collate_fn=collate_objects,
        )


def build_detection_datamodule(
    config: DetectionDataConfig, seed: int, *, oriented: bool = False
) -> DetectionDataModule:
    """Read labels, check them against the images and measure band statistics that the config doesn't give.

    Args:
        config: Data config.
        seed: Seed of tiles, augmentation and validation split.
        oriented: Whether a head for oriented boxes is trained; polygons are converted to oriented boxes.

    Raises:
        ConfigError: Values are inconsistent.
        InputError: Files can't be read or are inconsistent.
    """
    _check(config)
    train_index, val_index = _indices(config, seed, oriented=oriented)
    train, val = _open_images(config, train_index, val_index)
    for images, part in ((train, "training"), (val, "validation")):
        check_object_validity(images, part, seed)
    seen = sample_images(train.read_reduced, [record.path for record in train.records], seed)
    given = given_normalizer(config.mean, config.std, train.num_bands)
    normalizer, trained_on = measure_bands(seen, train.sources, given)
    augment = config.augment
    colors = Augmentation(flips=False, gain=augment.gain, offset=augment.offset, shuffle=augment.shuffle)
    windows = DetectionTiles(
        train,
        make_sampler(config.sampler, train_index.records, config.tile_px, config.random_share),
        normalizer,
        tile_px=config.tile_px,
        tiles_per_epoch=config.tiles_per_epoch,
        seed=seed,
        flips=augment.flips,
        scale=augment.scale,
        colors=colors if augment.gain or augment.offset or augment.shuffle else None,
        stain=make_stain_jitter(augment, train.sources, train.num_bands),
        resolution=augment.resolution,
        pixel_sizes=pixel_sizes(augment, train.sources),
    )
    return DetectionDataModule(
        windows,
        DetectionGrid(val, normalizer, tile_px=config.tile_px),
        train_index=train_index,
        val_index=val_index,
        trained_on=trained_on,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
    )


def _open_images(
    config: DetectionDataConfig, train_index: ObjectIndex, val_index: ObjectIndex
) -> tuple[DetectionImages, DetectionImages]:
    """Open the training and validation images and check that they have the same number of bands."""
    train, val = (
        DetectionImages(index.records, open_input=_opener(config, mpp), min_visible=config.min_visible)
        for index, mpp in ((train_index, _training_mpp(config)), (val_index, config.mpp))
    )
    places = ([(one, one.extent) for one in images.sources] for images in (train, val))
    hint = (
        "choose other images for one of them" if config.val else "hold out images of a place together, by data.groups"
    )
    warn_of_shared_places(*places, hint=hint)
    for index, part in ((train_index, "train"), (val_index, "val")):
        _check_objects(index, part)
    if config.mpp is None:
        warn_of_mixed_mpp([*train.sources, *val.sources])
    if not accepts_bands(val.num_bands, train.num_bands):
        raise ConfigError(
            f"the validation images have {val.num_bands} bands, the training images {train.num_bands}; choose common "
            "ones with data.bands"
        )
    return train, val


def read_names(path: str | Path, key: str) -> list[str]:
    """Read a list of image names, one per line.

    Args:
        path: Text file.
        key: Name of the config key, for errors.

    Raises:
        ConfigError: The file can't be read or has no names.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read {key} {path}: {error}") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ConfigError(f"{key} {path} names no image; expected one name per line")
    return names


def _indices(config: DetectionDataConfig, seed: int, *, oriented: bool) -> tuple[ObjectIndex, ObjectIndex]:
    read = functools.partial(_read, config, oriented=oriented)
    train = read(config.train, "data.train", _training_mpp(config))
    if config.val is not None:
        val = read(config.val, "data.val", config.mpp)
        if config.groups is not None:
            check_groups_apart(_groups_of(train, config.groups), _groups_of(val, config.groups), "group")
        return train, val
    groups = None if config.groups is None else _groups_of(train, config.groups)
    key = None if config.groups is None else f"data.groups {config.groups}"
    chosen = set(split_items(len(train), config, seed, "images", groups=groups, key=key)[1])
    val = train if _training_mpp(config) == config.mpp else read(config.train, "data.train", config.mpp)
    return (
        replace(train, records=_part(train, chosen, inside=False)),
        replace(val, records=_part(val, chosen, inside=True)),
    )


def _groups_of(index: ObjectIndex, table: str) -> list[str]:
    """Return the group of each image, which the table names with or without suffix, and folders where names repeat.

    Raises:
        InputError: The table can't be read, lacks an image, or gives one two groups.
    """
    given: dict[str, list[tuple[tuple[str, ...], str]]] = {}
    for row in read_csv_rows(table, ["image", "group"]):
        parts = PurePath(row.values["image"]).parts
        given.setdefault(parts[-1], []).append((parts[:-1], row.values["group"]))
    groups = []
    for record in index:
        path = PurePath(record.path)
        rows = [*given.get(path.name, []), *given.get(path.stem, [])]
        fitting = [
            (folders, group)
            for folders, group in rows
            if path.parts[:-1][len(path.parts) - 1 - len(folders) :] == folders
        ]
        depth = max((len(folders) for folders, _ in fitting), default=0)
        found = {group for folders, group in fitting if len(folders) == depth}
        if len(found) != 1:
            what = "no row" if not found else f"{len(found)} groups"
            raise InputError(f"data.groups {table} has {what} for {record.path}; give each image one, with its folder")
        groups.append(found.pop())
    return groups


def _check_objects(index: ObjectIndex, part: str) -> None:
    """Check that there are objects to learn from or to score with."""
    if not any(index.class_counts().values()):
        what = "to learn from" if part == "train" else "to score with"
        raise InputError(
            f"expected objects {what} in the images of data.{part}, got none in {len(index)} images"
            f"{' (all are ignored)' if any(record.ignored.any() for record in index) else ''}; check the labels"
            f"{', or the images: data.val names them, data.val_share and seed choose them' if part == 'val' else ''}"
        )


def _part(index: ObjectIndex, chosen: set[int], *, inside: bool) -> tuple[ImageRecord, ...]:
    return tuple(record for position, record in enumerate(index) if (position in chosen) is inside)


def _training_mpp(config: DetectionDataConfig) -> float | None:
    """Return the resolution to read training slides at: the finest of the augmentation range, to avoid upsampling."""
    if config.mpp is None or config.augment.resolution is None:
        return config.mpp
    return min(config.mpp, config.augment.resolution[0])


def _read(
    config: DetectionDataConfig, split: DetectionSplitConfig, key: str, mpp: float | None, *, oriented: bool
) -> ObjectIndex:
    return read_object_labels(
        split.labels,
        split.image,
        label_format=split.label_format,
        classes=config.classes,
        skip_classes=config.skip_classes,
        attribute=config.attribute,
        names=None if split.names is None else read_names(split.names, f"{key}.names"),
        open_input=_opener(config, mpp),
        oriented=oriented,
    )


def _opener(config: DetectionDataConfig, mpp: float | None) -> OpenInput:
    """Return a function that opens images as configured, slides at `mpp` micrometres per pixel."""
    return functools.partial(open_input, options=replace(InputOptions.from_config(config), mpp=mpp))


def _check(config: DetectionDataConfig) -> None:
    if not config.classes or len(set(config.classes)) != len(config.classes):
        raise ConfigError(f"data.classes must name at least one class, each once, got {config.classes}")
    if config.sampler not in OBJECT_SAMPLERS:
        raise ConfigError(f"data.sampler must be one of {', '.join(OBJECT_SAMPLERS)}, got {config.sampler}")
    of_slides = [name for name in ("mpp", "slide_mpp", "slide_mpp_override") if getattr(config, name) is not None]
    if config.nodata is not None and of_slides:
        raise ConfigError(f"data.nodata is for rasters, data.{of_slides[0]} for slides; leave one out")
    config.check_hold_out(config.val)
    for key in ("random_share", "min_visible"):
        if not 0 <= getattr(config, key) <= 1:
            raise ConfigError(f"data.{key} must lie between 0 and 1, got {getattr(config, key):g}")
    check_base(config, {"tiles_per_epoch": config.process_batch_size()})
