"""The objects of one input: what decides them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from perf_vit.inference.jobs.identity import SourceIdentity
from perf_vit.inference.jobs.job import RecordedJob
from perf_vit.inference.options import DetectionPredictOptions
from perf_vit.types import Source

__all__ = ["ObjectJob"]


@dataclass(frozen=True, kw_only=True)
class ObjectJob(RecordedJob):
    """The file of a source's objects.

    Attributes:
        source: Raster, mosaic or slide.
        out: Path of the file, whose suffix chooses the format.
        settings: Plain values that decide the objects, with the model.
        meaning: Plain values that decide how they are written.
        options: Options of the prediction.
        device: Device that the model runs on.
    """

    source: Source
    out: Path
    settings: Mapping[str, Any]
    meaning: Mapping[str, Any]
    options: DetectionPredictOptions
    device: str = "cpu"

    @property
    def input_files(self) -> Sequence[str]:
        """Paths of the source, several of a mosaic."""
        return tuple(getattr(self.source, "paths", (self.source.path,)))

    @property
    def begun_with(self) -> Mapping[str, Any]:
        """Plain values that decide the objects of a window."""
        return {**self.settings, "device": torch.device(self.device).type, **self._source_identity.settings}

    @property
    def identity(self) -> Mapping[str, Any]:
        """Plain values that decide the file."""
        return {**self.settings, **self.meaning, **self._source_identity.tags}

    def changed_since(self, out: Path) -> bool:
        """Whether a file of the source is newer than an output."""
        return self._source_identity.changed_since(out)

    @cached_property
    def _source_identity(self) -> SourceIdentity:
        return SourceIdentity(self.source)
