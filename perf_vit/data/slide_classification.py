"""The Lightning data module of slides as bags, and its config."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from perf_vit.data.bags import SlideBags, SlideTargets, collate_bags, read_slide_table
from perf_vit.data.base import EpochDataModule, ShareSampler
from perf_vit.data.config import BaseDataConfig, SplitConfig, check_base
from perf_vit.data.embedding_store import EmbeddingStore
from perf_vit.errors import ConfigError

__all__ = [
    "SlideClassificationDataConfig",
    "SlideClassificationDataModule",
    "SlideClassificationSplitConfig",
    "read_slides",
]

BagBatch = tuple[Tensor, Tensor, Tensor]


@dataclass(kw_only=True)
class SlideClassificationSplitConfig(SplitConfig):
    """Labelled slides.

    Attributes:
        image: folder that the names of slides in `labels` are relative to.
        labels: a CSV file with the columns slide and label.
    """

    image: str = "."
    labels: str


@dataclass(kw_only=True)
class SlideClassificationDataConfig(BaseDataConfig):
    """Labelled slides, and how they become bags of windows; `BaseDataConfig` has further keys.

    Windows are what other tasks call tiles. `mean` and `std` are by default those that the encoder was pretrained with
    for slides of red, green and blue of 8 bits.

    Attributes:
        train: slides trained on.
        val: slides validated on; of each class a part of `train` that the seed decides if left out. Slides of one
            patient belong on one side.
        val_share: of the slides of `train`, where `val` is left out.
        classes: names; those that occur in `train`, by name, if left out.
        image_column: of CSV files, that names the slide.
        label_column: of CSV files, that names the class.
        mpp: micrometres per pixel to read slides at; their level 0, or a raster's pixels, with null.
        slide_mpp: micrometres per pixel of level 0 where files don't say.
        tissue: otsu, or null to take windows of glass and of rasters.
        min_tissue: least share of tissue in a window.
        max_windows: of a slide in a training step, drawn anew each time; all if left out.
        embeddings: folder for the windows' features, so that several runs share them; in the run folder if left out.
        embed_batch_size: windows in the encoder at once.
        batch_size: slides a step.
    """

    train: SlideClassificationSplitConfig
    val: SlideClassificationSplitConfig | None = None
    val_share: float = 0.2
    classes: list[str] | None = None
    image_column: str = "slide"
    label_column: str = "label"
    mpp: float | None = 0.5
    slide_mpp: float | None = None
    tissue: str | None = "otsu"
    min_tissue: float = 0.25
    max_windows: int | None = None
    embeddings: str | None = None
    embed_batch_size: int = 16
    batch_size: int = 1


class SlideClassificationDataModule(EpochDataModule):
    """Bags of the training slides in another order each epoch, bags of the validation slides in theirs."""

    def __init__(self, train: SlideBags, val: SlideBags, *, batch_size: int, num_workers: int) -> None:
        super().__init__()
        self.train = train
        self.val = val
        self.batch_size = batch_size
        self.num_workers = num_workers

    @classmethod
    def of(
        cls,
        config: SlideClassificationDataConfig,
        train: SlideTargets,
        val: SlideTargets,
        store: EmbeddingStore,
        seed: int,
    ) -> SlideClassificationDataModule:
        """Both sides of a config, whose features are in the store."""
        return cls(
            SlideBags(train, store, max_windows=config.max_windows, seed=seed),
            SlideBags(val, store),
            batch_size=config.batch_size,
            num_workers=config.num_workers,
        )

    def train_dataloader(self) -> DataLoader[BagBatch]:
        """Bags in another order each epoch."""
        return self.train_loader(
            self.train,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=collate_bags,
            drop_last=False,
        )

    def val_dataloader(self) -> DataLoader[BagBatch]:
        """The validation slides, in order and one by one: bags may be large."""
        return DataLoader(
            self.val,  # type: ignore[arg-type]
            batch_size=1,
            sampler=ShareSampler(len(self.val)),
            num_workers=self.num_workers,
            collate_fn=collate_bags,
        )


def read_slides(config: SlideClassificationDataConfig, seed: int) -> tuple[SlideTargets, SlideTargets]:
    """The slides to train and to validate on.

    Raises:
        ConfigError: values that don't fit each other.
        InputError: files that can't be read or don't fit each other.
    """
    _check(config)
    columns = {"image_column": config.image_column, "label_column": config.label_column}
    train = read_slide_table(config.train.labels, config.train.image, config.classes, **columns)
    if len(train.classes) < 2:
        raise ConfigError(
            f"all slides of {config.train.labels} are of the class {train.classes[0]}; expected at least two"
        )
    if config.val is not None:
        val = read_slide_table(config.val.labels, config.val.image, train.classes, **columns)
        common = sorted(set(train.paths) & set(val.paths))
        if common:
            raise ConfigError(f"{common[0]} is in both data.train and data.val; a slide belongs in one")
        return train, val
    chosen = _stratified(train.labels, config.val_share, seed)
    if not chosen or len(chosen) == len(train):
        raise ConfigError(
            f"data.val_share {config.val_share:g} of {len(train)} slides leaves none to train or validate on; give "
            "data.val"
        )
    return train.part([i for i in range(len(train)) if i not in chosen]), train.part(sorted(chosen))


def _stratified(labels: np.ndarray, share: float, seed: int) -> set[int]:
    """Of each class with at least two slides a share, one at least and not all."""
    rng = np.random.default_rng(seed)
    chosen: set[int] = set()
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        number = min(len(members) - 1, max(1, round(len(members) * share)))
        chosen.update(members[:number].tolist())
    return chosen


def _check(config: SlideClassificationDataConfig) -> None:
    if config.classes is not None and (len(config.classes) < 2 or len(set(config.classes)) != len(config.classes)):
        raise ConfigError(f"data.classes must name at least two classes, each once, got {config.classes}")
    if config.tissue not in ("otsu", None):
        raise ConfigError(f"data.tissue must be otsu or null, got {config.tissue}")
    for key in ("val_share", "min_tissue"):
        if not 0 <= getattr(config, key) <= 1:
            raise ConfigError(f"data.{key} must lie between 0 and 1, got {getattr(config, key):g}")
    check_base(config, {"embed_batch_size": 1})
    if config.max_windows is not None and config.max_windows < 1:
        raise ConfigError(f"data.max_windows must be at least 1, or left out, got {config.max_windows}")
