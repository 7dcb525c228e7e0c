"""Store of slide features, computed once and kept as files."""

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
    """Features of the windows of a slide.

    Attributes:
        features: Features, [N, D].
        windows: N windows, in pixels of the slide at the resolution it was read at.
    """

    features: FloatArray
    windows: tuple[Window, ...]


class EmbeddingStore:
    """Folder of `.npz` files with the features of slides for one encoder; each file is complete or absent.

    File names contain a hash of the encoder, the window options, and the name, size and modification time of the slide,
    so features of another encoder, option or slide version are never returned.

    Args:
        folder: Folder; created with the first file.
        encoder_id: Identifier of the encoder and its weights.
        options: Options that determine a slide's windows, as plain values.
    """

    def __init__(self, folder: str | Path, encoder_id: str, options: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self._meaning = json.dumps([encoder_id, dict(options)], sort_keys=True)

    def path(self, slide: str) -> Path:
        """Return the path of a slide's features, whether or not the file exists."""
        name = Path(slide).name
        try:
            status = os.stat(slide)
            identity = [name, status.st_size, status.st_mtime_ns]
        except OSError:
            # URLs have no modification time.
            identity = [slide]
        digest = hashlib.sha256(json.dumps([self._meaning, identity]).encode()).hexdigest()
        return self.folder / f"{Path(slide).stem}-{digest[:_KEY_DIGITS]}.npz"

    def has(self, slide: str) -> bool:
        """Return whether a slide's features exist."""
        return self.path(slide).is_file()

    def read(self, slide: str) -> SlideFeatures:
        """Read the features of a slide.

        Raises:
            InputError: The features are missing or damaged.
        """
        path = self.path(slide)
        try:
            with np.load(path, allow_pickle=False) as file:
                features, rectangles = file["features"], file["windows"]
        except FileNotFoundError as error:
            raise InputError(f"the features of {slide} are not in {self.folder}; restart the run") from error
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{path} is damaged: {error}; delete it and restart the run") from error
        return SlideFeatures(features, tuple(Window(*rectangle) for rectangle in rectangles.tolist()))

    def write(self, slide: str, features: FloatArray, windows: Sequence[Window]) -> None:
        """Write the features of a slide.

        Raises:
            OutputError: The folder can't be written, e.g. because the disk is full.
        """
        path = self.path(slide)
        rectangles = np.array([[w.row, w.col, w.height, w.width] for w in windows], np.int64)
        with staged(path) as folder:
            try:
                with (folder / path.name).open("wb") as file:
                    np.savez(file, features=features, windows=rectangles)
            except OSError as error:
                raise OutputError(f"can't write {path}: {error.strerror}") from error
