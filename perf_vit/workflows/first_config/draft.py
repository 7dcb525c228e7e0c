"""What a first config is made from, and what all tasks need of the images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from perf_vit.errors import OptionError
from perf_vit.files import write_text
from perf_vit.sources import describe_source
from perf_vit.sources.image_search import image_root
from perf_vit.text import number_text
from perf_vit.types import Source

__all__ = [
    "BACKBONE_NOTE",
    "Draft",
    "Files",
    "augmentation_for",
    "bands_note",
    "data_values",
    "image_fact",
    "nested",
    "rounded",
    "shares_fact",
    "split_indices",
    "tile_size",
]

BACKBONE_NOTE = (
    "Any timm model, or a folder of `perf-vit convert`; with model.pretrained=true, timm's weights are loaded."
)
"""Comment of `model.backbone` in tasks with maps of features."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """The user's files, as given.

    Attributes:
        task: Name of the task.
        image: Images to train on.
        labels: Their labels; None for images in folders by class.
        val_image: Images to validate on; None for a part of `image`.
        val_labels: Labels of `val_image`.
        label_format: Format of labels of objects; None to recognise it.
        attribute: Column of polygons with class names; None to look for one.
        config: Path of the config to write.
        run: Run folder.
    """

    task: str
    image: str | list[str]
    labels: str | None
    val_image: str | None
    val_labels: str | None
    label_format: str | None
    attribute: str | None
    config: Path
    run: str

    def __post_init__(self) -> None:
        if self.val_labels is not None and self.val_image is None:
            raise OptionError("val_labels needs `val_image`, the images that they belong to; give both")

    @property
    def images(self) -> list[str]:
        """The images as a list."""
        return [self.image] if isinstance(self.image, str) else self.image

    @property
    def first_image(self) -> str:
        """The image, or the first of several."""
        return self.images[0]

    @property
    def all_images(self) -> str:
        """The image, or the folder that contains several; the first of several that have no common folder."""
        if len(self.images) == 1:
            return self.first_image
        roots = [image_root(image) for image in self.images]
        try:
            common = Path(os.path.commonpath([os.path.abspath(root) for root in roots]))
        except ValueError:
            return self.first_image
        if common == Path(common.anchor):
            return self.first_image
        return (
            common.as_posix() if any(root.is_absolute() for root in roots) else Path(os.path.relpath(common)).as_posix()
        )

    def name(self, path: str) -> str:
        """Return the name of an image in lists: relative to the folder of images, or its path if there are several."""
        root, found = image_root(self.first_image), Path(path)
        if len(self.images) == 1 and found != root and found.is_relative_to(root):
            return found.relative_to(root).as_posix()
        return found.as_posix()

    def beside(self, ending: str) -> str:
        """Path of another file next to the config, with a posix separator."""
        return self.config.with_name(f"{self.config.stem}{ending}").as_posix()

    def required_labels(self, what: str) -> str:
        """The labels.

        Raises:
            OptionError: None are given.
        """
        if self.labels is None:
            raise OptionError(f"labels must be given for {self.task.replace('_', ' ')}: {what}")
        return self.labels


@dataclass(kw_only=True)
class Draft:
    """Content of a first config.

    Attributes:
        values: Values by dotted key, in the order of the config.
        notes: Comments by dotted key, in place of the key's meaning.
        facts: What was found in the files, a line each.
        files: Texts of further files by path.
        evaluate: Arguments of `perf-vit evaluate` that name what is scored.
        predict: Arguments of `perf-vit predict` that name inputs and outputs.
    """

    values: dict[str, Any]
    facts: list[str]
    notes: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    evaluate: list[str] = field(default_factory=list)
    predict: list[str] = field(default_factory=list)


def image_fact(source: Source) -> str:
    """Describe an image in one line."""
    info = describe_source(source)
    names = [name for name in info.band_names if not name.startswith("band_")]
    bands = f"{len(info.band_names)} band{'s' if len(info.band_names) > 1 else ''} of {info.dtype}"
    resolution = None
    if info.mpp is not None:
        resolution = f"{info.mpp:.3g} um a pixel"
    elif info.resolution_xy is not None:
        resolution = f"{info.resolution_xy[0]:.4g} {info.units or ''} a pixel".replace("  ", " ")
    parts = [
        f"{bands} ({', '.join(names[:12])})" if names else bands,
        f"{info.height:,} rows x {info.width:,} columns",
        resolution,
        info.crs or "no CRS",
        None if info.nodata is None else f"nodata {number_text(info.nodata)}",
        info.mask,
    ]
    return f"{Path(info.path).name}: {', '.join(part for part in parts if part)}"


def shares_fact(names: Sequence[str], counts: Sequence[int], unit: str) -> list[str]:
    """List classes with counts and shares, a line each."""
    total, width = max(1, sum(counts)), max(map(len, names))
    pairs = zip(names, counts, strict=True)
    return [f"  {name:<{width}}  {count:>12,} {unit}  {count / total:7.2%}" for name, count in pairs]


def tile_size(sides: Sequence[int], multiple: int, largest: int) -> int:
    """Return the largest tile size that fits the shortest side: a multiple, of at least 64 pixels."""
    least = -(-64 // multiple) * multiple
    return max(least, min(largest, min(sides)) // multiple * multiple)


def augmentation_for(source: Source) -> dict[str, Any]:
    """Return random changes that suit an image: more for photographs than for calibrated bands."""
    if source.num_bands == 3 and source.dtype == np.uint8:
        return {"flips": True, "scale": [0.7, 1.4], "gain": 0.2, "offset": 0.3}
    return {"flips": True, "gain": 0.1, "offset": 0.1}


def bands_note(names: Sequence[str]) -> dict[str, str]:
    """Return a comment with the names of bands that have some."""
    return {} if all(name.startswith("band_") for name in names) else {"data.bands": f"{', '.join(names)}."}


@contextmanager
def data_values(draft: Draft) -> Iterator[dict[str, Any]]:
    """Yield the values of `data` as nested mappings, with the lists of images, which don't exist yet, in a folder."""
    with TemporaryDirectory() as folder:
        places = {name: str(Path(folder, str(number))) for number, name in enumerate(draft.files)}
        for name, place in places.items():
            write_text(place, draft.files[name])
        yield nested(
            {key: places.get(value, value) if isinstance(value, str) else value for key, value in draft.values.items()},
            "data",
        )


def nested(values: dict[str, Any], section: str) -> dict[str, Any]:
    """Return the values of a section as nested mappings, from values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        first, *path = key.split(".")
        if first != section:
            continue
        place = found
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = value
    return found


def rounded(values: Sequence[float]) -> list[float]:
    """Round to four digits."""
    return [float(f"{value:.4g}") for value in values]


def split_indices(labels: Sequence[int], share: float = 0.25) -> list[int]:
    """Choose samples to validate on: a share of each class, the same ones each time.

    A class of one sample stays in training.
    """
    rng, given = np.random.default_rng(0), np.asarray(labels)
    chosen: list[int] = []
    for label in np.unique(given):
        members = rng.permutation(np.flatnonzero(given == label))
        chosen += members[: min(len(members) - 1, max(1, round(len(members) * share)))].tolist()
    return sorted(chosen)
