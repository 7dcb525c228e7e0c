"""Bags of slides: windows with tissue and their stored features."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from perf_vit.data.base import shuffled_indices
from perf_vit.errors import InputError, OutputError
from perf_vit.files import staged
from perf_vit.finite import check_finite
from perf_vit.labels.tables import CsvRow, class_index, read_csv_rows
from perf_vit.models import SlideFeatures
from perf_vit.plotting import save_png
from perf_vit.sources import NamedImages, fingerprint, image_name, slide_members
from perf_vit.types import Window

__all__ = [
    "Bag",
    "EmbeddingStore",
    "SlideBags",
    "SlideTargets",
    "collate_bags",
    "read_slide_table",
    "slide_place",
]

FloatArray = npt.NDArray[np.float32]

_KEY_DIGITS = 16


class EmbeddingStore:
    """Folder of `.npz` files with the features of slides for one encoder; each file is complete or absent.

    File names contain a hash of the encoder, the window options and the slide: the names, sizes and modification times
    of all its files, such as the chunks of a Zarr, the data folder of MIRAX or the files of a DICOM series, and pieces
    of their content. So features of another encoder, option, slide or slide version are never returned. A store looks
    again at the files of a slide when its main file or folder changes.

    Of slides that are read with tissue, a picture of the same name, `.png`, shows the outline.

    Args:
        folder: Folder; created with the first file.
        encoder_id: Identifier of the encoder and its weights.
        options: Options that determine a slide's windows, as plain values.
    """

    def __init__(self, folder: str | Path, encoder_id: str, options: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self._meaning = json.dumps([encoder_id, dict(options)], sort_keys=True)
        self._paths: dict[tuple[str, int | None, int | None], Path] = {}

    def path(self, slide: str) -> Path:
        """Return the path of a slide's features, whether or not the file exists."""
        stat = os.stat(slide) if os.path.exists(slide) else None
        key = slide, stat and stat.st_size, stat and stat.st_mtime_ns
        if key not in self._paths:
            digest = hashlib.sha256(json.dumps([self._meaning, _identity(slide)]).encode()).hexdigest()
            self._paths[key] = self.folder / f"{image_name(slide)}-{digest[:_KEY_DIGITS]}.npz"
        return self._paths[key]

    def has(self, slide: str) -> bool:
        """Return whether a slide's features exist."""
        return self.path(slide).is_file()

    def read(self, slide: str) -> SlideFeatures:
        """Read the features of a slide.

        Raises:
            InputError: The features are missing, damaged or not finite.
        """
        path = self.path(slide)
        try:
            with np.load(path, allow_pickle=False) as file:
                features, rectangles = file["features"], file["windows"]
        except FileNotFoundError as error:
            raise InputError(f"the features of {slide} are not in {self.folder}; restart the run") from error
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} is damaged: {error}; delete it and restart the run") from error
        windows = tuple(Window(*rectangle) for rectangle in rectangles.tolist())
        _check_features(slide, features, windows, hint=f"delete {path} and restart the run")
        return SlideFeatures(features, windows)

    def write(
        self,
        slide: str,
        features: FloatArray,
        windows: Sequence[Window],
        picture: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        """Write the features of a slide.

        Args:
            slide: Slide.
            features: Features, [N, D].
            windows: N windows.
            picture: Slide with the outline of its tissue, [H, W, 3], to be written next to the features.

        Raises:
            NotFiniteError: Features are infinite or not a number.
            OutputError: The folder can't be written, e.g. because the disk is full.
        """
        _check_features(slide, features, windows)
        path = self.path(slide)
        if picture is not None:
            # First, as the file of features tells that all is there.
            save_png(path.with_suffix(".png"), picture)
        rectangles = np.array([[w.row, w.col, w.height, w.width] for w in windows], np.int64)
        with staged(path) as folder:
            try:
                with (folder / path.name).open("wb") as file:
                    np.savez(file, features=features, windows=rectangles)
            except OSError as error:
                raise OutputError(f"can't write {path}: {error.strerror}") from error


def _identity(slide: str) -> list[Any]:
    """Return what tells a slide from another version of it, as plain values."""
    members = slide_members(slide)
    # URLs have no files.
    root = slide if os.path.isdir(slide) else os.path.dirname(slide)
    stats = [(os.path.relpath(member, root), os.stat(member)) for member in members]
    content = ""
    # A file that can't be read has no features; reading it says why.
    with suppress(OSError):
        content = fingerprint([slide] if os.path.isdir(slide) else members)
    return [Path(slide).name if members else slide, content, *([n, s.st_size, s.st_mtime_ns] for n, s in stats)]


def _check_features(slide: str, features: FloatArray, windows: Sequence[Window], hint: str | None = None) -> None:
    check_finite(features, "features", lambda index: f"{slide}, window {windows[index]},", hint)


Bag = tuple[Tensor, Tensor]
"""Features [N, D] and class index."""


@dataclass(frozen=True, slots=True)
class SlideTargets:
    """Labelled slides.

    Attributes:
        paths: Paths of the slides.
        labels: Class indices, [n].
        classes: Class names.
    """

    paths: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def part(self, indices: Sequence[int]) -> SlideTargets:
        """Select slides by index."""
        chosen = list(indices)
        return SlideTargets(tuple(self.paths[index] for index in chosen), self.labels[chosen], self.classes)


def read_slide_table(
    table: str | Path,
    slides: str | Path,
    classes: Sequence[str] | None = None,
    *,
    image_column: str = "slide",
    label_column: str = "label",
) -> SlideTargets:
    """Read a CSV file with the class of each slide.

    Args:
        table: CSV file.
        slides: Folder of the slides; their names may omit the suffix.
        classes: Class names in the order of the indices; None for all that occur, sorted by name.
        image_column: Column with slide names.
        label_column: Column with class names.

    Raises:
        InputError: A file, column, slide or class is missing, or a slide is listed twice.
    """
    rows = read_csv_rows(table, [image_column, label_column])
    names = [row.values[label_column] for row in rows]
    classes = tuple(sorted(set(names)) if classes is None else classes)
    labels = [class_index(name, classes, row.location) for name, row in zip(names, rows, strict=True)]
    paths: list[str] = []
    named: dict[str, str] = {}
    images = NamedImages(Path(slides))
    for row in rows:
        paths.append(_find(row, images, image_column))
        other = named.setdefault(slide_place(paths[-1]), row.location)
        if other != row.location:
            raise InputError(f"{row.location} names {paths[-1]}, as does {other}; give each slide once")
    return SlideTargets(tuple(paths), np.array(labels, np.int64), classes)


def slide_place(path: str) -> str:
    """Return the path that a slide has however it is spelled; a URL is its own."""
    return path if "://" in path else os.path.realpath(path)


def _find(row: CsvRow, images: NamedImages, column: str) -> str:
    name = row.values[column]
    if "://" in name:
        return name
    near = images.find(name)
    if len(near) == 1:
        return str(near[0])
    several = f", but {' and '.join(path.name for path in near[:2])}; give the ending" if near else ""
    raise InputError(
        f"{row.location} names the slide {name}, which is not in {images.folder}{several or '; check data.train.image'}"
    )


class SlideBags(Dataset[Any]):
    """Bags of features, one per slide.

    With a seed, slides are shuffled in each pass and large bags are random subsets of the slide's windows; item i
    depends on (seed, i) only.

    Args:
        slides: Slides with their labels.
        store: Store with their features.
        max_windows: Maximum number of windows per bag, drawn again each time; None for all.
        seed: Seed of order and windows; None to keep the given order.

    Raises:
        InputError: Features are missing or damaged (when they are read).
    """

    def __init__(
        self, slides: SlideTargets, store: EmbeddingStore, *, max_windows: int | None = None, seed: int | None = None
    ) -> None:
        self.slides = slides
        self.store = store
        self.max_windows = max_windows
        self.seed = seed

    def __len__(self) -> int:
        return len(self.slides)

    def __getitem__(self, index: int) -> Any:
        """Return a `Bag`; with a seed, any index >= 0 is allowed."""
        found, kept, label = self._drawn(index)
        return torch.from_numpy(found.features if kept is None else found.features[kept]), label

    def _drawn(self, index: int) -> tuple[SlideFeatures, npt.NDArray[np.int64] | None, Tensor]:
        """Return a slide, the indices of its drawn windows, None for all, and its class index."""
        chosen = self._chosen(index)
        found, kept = self.store.read(self.slides.paths[chosen]), None
        if self.max_windows is not None and len(found.windows) > self.max_windows:
            rng = np.random.default_rng((self.seed or 0, index))
            kept = np.sort(rng.choice(len(found.windows), self.max_windows, replace=False))
        return found, kept, torch.tensor(self.slides.labels[chosen])

    def describe(self, index: int) -> str:
        """Return the path of the slide of a sample."""
        return self.slides.paths[self._chosen(index)]

    def _chosen(self, index: int) -> int:
        if self.seed is None:
            return index
        turn, position = divmod(index, len(self.slides))
        return int(shuffled_indices(self.seed, turn, len(self.slides))[position])


def collate_bags(bags: Sequence[Bag]) -> tuple[Tensor, Tensor, Tensor]:
    """Collate bags to features [B, N, D] padded to the largest bag, a mask of actual windows [B, N] and labels [B]."""
    features, labels = zip(*bags, strict=True)
    sizes = torch.tensor([len(each) for each in features])
    mask = torch.arange(int(sizes.max())) < sizes[:, None]
    return pad_sequence(list(features), batch_first=True), mask, torch.stack(labels)
