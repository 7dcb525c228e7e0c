"""Data module and config of slide classification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader

from perf_vit.data.augmentation import AugmentConfig, check_augment
from perf_vit.data.bags import EmbeddingStore, SlideBags, SlideTargets, collate_bags, read_slide_table, slide_place
from perf_vit.data.base import EpochDataModule, EpochLoader, ShareLoader
from perf_vit.data.config import BaseDataConfig, SplitConfig, check_base
from perf_vit.data.slide_windows import WindowBags, WindowBatch, collate_windows
from perf_vit.data.splits import HoldOutConfig, check_groups_apart, read_groups, split_items
from perf_vit.errors import ConfigError
from perf_vit.models import SlideClassificationSpec
from perf_vit.types import TISSUE_METHODS

__all__ = [
    "SlideClassificationDataConfig",
    "SlideClassificationDataModule",
    "SlideClassificationSplitConfig",
    "read_slides",
]

BagBatch = tuple[Tensor, Tensor, Tensor] | WindowBatch


@dataclass(kw_only=True)
class SlideClassificationSplitConfig(SplitConfig):
    """Labelled slides.

    Attributes:
        image: Folder that the slide names in `labels` are relative to; for validation that of training by default, else
            the current one.
        labels: CSV file with the columns slide and label.
    """

    image: str | None = None  # type: ignore[assignment]
    labels: str

    def __post_init__(self) -> None:
        if self.image is not None:
            super().__post_init__()


@dataclass(kw_only=True)
class SlideClassificationDataConfig(BaseDataConfig, HoldOutConfig):
    """Labelled slides as bags of tissue windows; `BaseDataConfig` and `HoldOutConfig` have further keys.

    Windows correspond to the tiles of other tasks. For 8-bit RGB slides, `mean` and `std` default to those of the
    encoder's pretraining.

    Attributes:
        train: Training slides.
        val: Validation slides; None for a part of `train`.
        group_column: CSV column with the patient, or another group whose slides all belong in the same split; None if
            each slide is a group of its own.
        classes: Class names; None for all that occur in `train`, sorted by name.
        image_column: CSV column with slide names.
        label_column: CSV column with class names.
        mpp: Resolution to read slides at, in micrometres per pixel; None for level 0, or for a raster's own pixels.
        slide_mpp: Micrometres per pixel of level 0 for files that state none; `objective` for 10 divided by the
            magnification of the objective.
        slide_mpp_override: Micrometres per pixel of level 0, whatever files state. Not kept with the model.
        tissue: "auto" or "otsu" for tissue windows only; None to include windows of glass, and for rasters.
        min_tissue: Minimum fraction of tissue in a window.
        max_windows: Maximum number of windows of a slide in a training step, drawn again each time; None for all.
        embeddings: Folder for the windows' features, to share them between runs; None for the run folder. Not for
            `model.through_encoder`, which keeps none.
        embed_batch_size: Number of windows per encoder batch; with `model.through_encoder` it decides the memory of a
            step.
        augment: Augmentation of training windows with `model.through_encoder`, without `resolution`; None for none.
        on_error: "stop" to refuse training when slides can't be embedded, once all others are; or "skip" to leave them
            out, and with `model.through_encoder` damaged pixels of the others.
        batch_size: Number of slides per step.
    """

    train: SlideClassificationSplitConfig
    val: SlideClassificationSplitConfig | None = None
    group_column: str | None = None
    classes: list[str] | None = None
    image_column: str = "slide"
    label_column: str = "label"
    mpp: float | None = 0.5
    slide_mpp: float | Literal["objective"] | None = None
    slide_mpp_override: float | None = None
    tissue: str | None = "auto"
    min_tissue: float = 0.25
    max_windows: int | None = None
    embeddings: str | None = None
    embed_batch_size: int = 16
    augment: AugmentConfig | None = None
    on_error: str = "stop"
    batch_size: int = 1


class SlideClassificationDataModule(EpochDataModule):
    """Data module of slide classification: training slides, shuffled each epoch, and validation slides.

    Args:
        train: Training slides as bags of features, or of windows that are read in each step.
        val: Validation slides in the same form.
        batch_size: Number of slides in a batch.
        num_workers: Number of loader processes.
    """

    def __init__(self, train: SlideBags, val: SlideBags, *, batch_size: int, num_workers: int) -> None:
        super().__init__()
        self.train = train
        self.val = val
        self.batch_size = batch_size
        self.num_workers = num_workers
        self._collate = collate_windows if isinstance(train, WindowBags) else collate_bags

    @classmethod
    def of(
        cls,
        config: SlideClassificationDataConfig,
        train: SlideTargets,
        val: SlideTargets,
        store: EmbeddingStore,
        seed: int,
        spec: SlideClassificationSpec | None = None,
    ) -> SlideClassificationDataModule:
        """Build the data module of a config.

        Args:
            config: Config.
            train: Training slides.
            val: Validation slides.
            store: Folder with the features of all slides, or with their windows only.
            seed: Seed of order and windows.
            spec: How windows are read in each step; None to use the features in the store.
        """
        drawn: dict[str, Any] = {"max_windows": config.max_windows, "seed": seed}
        if spec is None:
            bags = SlideBags(train, store, **drawn), SlideBags(val, store)
        else:
            override, salvages = config.slide_mpp_override, config.on_error == "skip"
            train_bags = WindowBags(train, store, spec, override, **drawn, augment=config.augment, salvages=salvages)
            bags = train_bags, WindowBags(val, store, spec, override, salvages=salvages)
        return cls(*bags, batch_size=config.batch_size, num_workers=config.num_workers)

    def train_dataloader(self) -> DataLoader[BagBatch]:
        """Return the loader of training bags, in a new order each epoch."""
        return self.train_loader(
            EpochLoader(
                self.train,
                batch_size=self.loader_batch_size,
                num_workers=self.num_workers,
                collate_fn=self._collate,
                drop_last=False,
            )
        )

    def val_dataloader(self) -> DataLoader[BagBatch]:
        """Return the loader of the validation slides, in order and one per batch, as bags may be large."""
        return ShareLoader(
            self.val,
            batch_size=1,
            num_workers=self.num_workers,
            collate_fn=self._collate,
        )


def read_slides(config: SlideClassificationDataConfig, seed: int) -> tuple[SlideTargets, SlideTargets]:
    """Read the slides to train and to validate on.

    Raises:
        ConfigError: Values are inconsistent.
        InputError: Files can't be read or are inconsistent.
    """
    _check(config)
    columns = {"image_column": config.image_column, "label_column": config.label_column}
    folder = config.train.image or "."
    train = read_slide_table(config.train.labels, folder, config.classes, **columns)
    if len(train.classes) < 2:
        raise ConfigError(
            f"all slides of {config.train.labels} are of the class {train.classes[0]}; expected at least two"
        )
    if config.val is not None:
        val = read_slide_table(config.val.labels, config.val.image or folder, train.classes, **columns)
        trained = set(map(slide_place, train.paths))
        common = sorted(path for path in val.paths if slide_place(path) in trained)
        if common:
            raise ConfigError(f"{common[0]} is in both data.train and data.val; keep it in one of them")
        if config.group_column is not None:
            given = read_groups(config.train.labels, config.group_column)
            others = read_groups(config.val.labels, config.group_column, "val")
            check_groups_apart(given, others, config.group_column)
        return train, val
    column = config.group_column
    groups = None if column is None else read_groups(config.train.labels, column)
    key = f"data.group_column {column}"
    parts = split_items(len(train), config, seed, "slides", labels=train.labels, groups=groups, key=key)
    return train.part(parts[0]), train.part(parts[1])


def _check(config: SlideClassificationDataConfig) -> None:
    if config.classes is not None and (len(config.classes) < 2 or len(set(config.classes)) != len(config.classes)):
        raise ConfigError(f"data.classes must name at least two classes, each once, got {config.classes}")
    if config.tissue not in (*TISSUE_METHODS, None):
        raise ConfigError(f"data.tissue must be auto, otsu or null, got {config.tissue}")
    if config.on_error not in ("stop", "skip"):
        raise ConfigError(f"data.on_error must be stop or skip, got {config.on_error}")
    config.check_hold_out(config.val)
    if not 0 <= config.min_tissue <= 1:
        raise ConfigError(f"data.min_tissue must lie between 0 and 1, got {config.min_tissue:g}")
    check_base(config, {"embed_batch_size": 1})
    if config.augment is not None:
        check_augment(config.augment)
        if config.augment.resolution is not None:
            raise ConfigError("data.augment.resolution is not for slide classification; use data.augment.scale")
    if config.max_windows is not None and config.max_windows < 1:
        raise ConfigError(f"data.max_windows must be at least 1, or left out, got {config.max_windows}")
