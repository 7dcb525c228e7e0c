"""Features of slides' windows, computed once and kept as files."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from perf_vit.errors import InputError, OutputError
from perf_vit.files import staged
from perf_vit.types import Window

__all__ = ["EmbeddingStore", "SlideFeatures"]

FloatArray = npt.NDArray[np.float32]

_KEY_DIGITS = 16


@dataclass(frozen=True, slots=True)
class SlideFeatures:
    """The windows of a slide and their features.

    Attributes:
        features: [N, D].
        windows: N of them, in pixels of the slide at the size that it was read at.
    """

    features: FloatArray
    windows: tuple[Window, ...]


class EmbeddingStore:
    """Features of slides as `.npz` files in a folder: each is complete or absent, and of one encoder.

    A file's name holds a hash of the encoder, of what windows are taken, and of the slide's name, size and time of
    change: of another of these, nothing is found.

    Args:
        folder: made when the first file is written.
        encoder_id: tells an encoder and its weights from others.
        options: that decide a slide's windows, as plain values.
    """

    def __init__(self, folder: str | Path, encoder_id: str, options: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self._meaning = json.dumps([encoder_id, dict(options)], sort_keys=True)

    def path(self, slide: str) -> Path:
        """Where the features of a slide are, or would be."""
        name = Path(slide).name
        try:
            status = os.stat(slide)
            identity = [name, status.st_size, status.st_mtime_ns]
        except OSError:
            # A URL has no time of change.
            identity = [slide]
        digest = hashlib.sha256(json.dumps([self._meaning, identity]).encode()).hexdigest()
        return self.folder / f"{Path(slide).stem}-{digest[:_KEY_DIGITS]}.npz"

    def has(self, slide: str) -> bool:
        """Whether the features of a slide are there."""
        return self.path(slide).is_file()

    def read(self, slide: str) -> SlideFeatures:
        """The features of a slide.

        Raises:
            InputError: they are not there, or damaged.
        """
        path = self.path(slide)
        try:
            with np.load(path, allow_pickle=False) as file:
                features, places = file["features"], file["windows"]
        except FileNotFoundError as error:
            raise InputError(f"the features of {slide} are not in {self.folder}; start the run anew") from error
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} is damaged: {error}; delete it, and start the run anew") from error
        return SlideFeatures(features, tuple(Window(*place) for place in places.tolist()))

    def write(self, slide: str, features: FloatArray, windows: Sequence[Window]) -> None:
        """Keep the features of a slide.

        Raises:
            OutputError: the folder can't be written, or the disk is full.
        """
        path = self.path(slide)
        places = np.array([[w.row, w.col, w.height, w.width] for w in windows], np.int64)
        with staged(path) as folder:
            try:
                with (folder / path.name).open("wb") as file:
                    np.savez(file, features=features, windows=places)
            except OSError as error:
                raise OutputError(f"can't write {path}: {error.strerror}") from error
