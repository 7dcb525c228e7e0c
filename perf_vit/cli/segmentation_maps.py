"""A checkpoint as a maker of maps, in this process or in others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perf_vit.errors import ConfigError, InputError, reason_line
from perf_vit.inference import (
    MapInput,
    MapJob,
    MapResult,
    OutputKind,
    check_partial_folder,
    make_map,
    map_exists,
    segment_job,
)
from perf_vit.io import (
    check_vector_output,
    existing_outputs,
    polygonize_classes,
    write_map_quicklook,
    write_objects,
)
from perf_vit.models import Segmenter, load_segmenter, segmenter_id
from perf_vit.transforms import InputCheck

__all__ = ["POLYGON_SUFFIXES", "SegmentationMaps", "on_device", "resolved_precision"]

POLYGON_SUFFIXES = ("gpkg", "geojson", "parquet", "json")
"""Of files of polygons beside a map."""

_PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


def resolved_precision(name: str) -> torch.dtype:
    """The command line's word for a precision.

    Raises:
        ConfigError: no such precision.
    """
    if name not in _PRECISIONS:
        raise ConfigError(f"--precision must be one of {', '.join(_PRECISIONS)}, got {name}")
    return _PRECISIONS[name]


def on_device(model: nn.Module, device: str) -> str:
    """Put a model on a device, "auto" for a GPU if there is one; the device's name.

    Raises:
        ConfigError: there is no such device.
    """
    device = resolved_device(device)
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device}: {reason_line(error)}") from error
    return device


def resolved_device(device: str) -> str:
    """Instead of "auto", a GPU if there is one."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


class SegmentationMaps:
    """Makes maps of inputs; pickled, it is a few words, and the model is loaded at the first use on the other side.

    Args:
        checkpoint: that `perf-vit train` wrote.
        kind: of the maps.
        quicklook: write one beside each map, with the suffix .png.
        polygons: write the areas of the classes beside each map, with this suffix: gpkg, geojson, ...
        source: options of `perf_vit.open_source`.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: 32, bf16 or 16.
        batch_size: windows a forward pass.
        num_readers: threads that read.
        resume: go on with unfinished maps.
        overwrite: make maps that are there again, and replace what else is in their place.
        threshold: of a multi-label model's classes, the probability above which one is true; 0.5 by default.
        **settings: window_size, overlap, blend, flips and on_error of `perf_vit.inference.segment_job`.
    """

    def __init__(
        self,
        checkpoint: Path,
        *,
        kind: OutputKind = "classes",
        quicklook: bool = True,
        polygons: str | None = None,
        source: Mapping[str, Any] | None = None,
        device: str = "auto",
        precision: str = "32",
        batch_size: int = 1,
        num_readers: int = 2,
        resume: bool = True,
        overwrite: bool = False,
        threshold: float | None = None,
        **settings: Any,
    ) -> None:
        self.checkpoint = checkpoint.absolute()
        if polygons is not None and (polygons not in POLYGON_SUFFIXES or kind != "classes"):
            got = f"got {polygons}" if polygons not in POLYGON_SUFFIXES else f"which {kind} have none of"
            raise ConfigError(f"--polygons must be one of {', '.join(POLYGON_SUFFIXES)}, of --kind classes, {got}")
        self._quicklook = quicklook
        self._polygons = polygons
        self._source = dict(source or {})
        self._resume = resume
        self._overwrite = overwrite
        self._rows = {"batch_size": batch_size, "num_readers": num_readers}
        self._threshold = threshold
        self._settings = {"kind": kind, "precision": resolved_precision(precision), **settings}
        self._device = resolved_device(device)
        self.on_window: Callable[[int, int], None] | None = None

    @cached_property
    def model(self) -> Segmenter:
        """Not on its device yet.

        Raises:
            CheckpointError: it can't be read.
        """
        return load_segmenter(self.checkpoint)

    @cached_property
    def _check_input(self) -> InputCheck:
        return InputCheck(self.model.spec.trained_on)

    @cached_property
    def model_id(self) -> str:
        """See `perf_vit.models.segmenter_id`."""
        return segmenter_id(self.model)

    def job(self, item: MapInput) -> MapJob:
        """What is to be made of an input.

        Raises:
            ConfigError: polygons or a threshold of a model that has none.
            InputError: it can't be opened, or doesn't fit the model.
            OutputError: the map would replace it, or isn't named .tif, or its polygons have no place in their format.
        """
        # Compared with the training images where a map of it is made.
        source = self.model.spec.open(item.path, check=InputCheck(None), **self._source)
        if self._polygons:
            check_vector_output(item.output.with_suffix(f".{self._polygons}"), source)
        return segment_job(
            self.model,
            source,
            item.output,
            model_id=self.model_id,
            device=self._device,
            threshold=self._label_threshold,
            **self._settings,
        )

    def beside(self, out: Path) -> list[Path]:
        """Files that are written with a map."""
        suffixes = [*(["png"] if self._quicklook else []), *([self._polygons] if self._polygons else [])]
        return [out.with_suffix(f".{suffix}") for suffix in suffixes]

    def check(self, inputs: Sequence[MapInput]) -> None:
        """Refuse inputs whose outputs would replace files, before anything is computed.

        Raises:
            OutputError: names the file.
        """
        for item in inputs:
            check_partial_folder(item.output)
            beside = self.beside(item.output)
            if not existing_outputs([item.output, *beside]):
                continue
            # An input that can't be opened is told of in its turn.
            with suppress(InputError):
                job = self.job(item)
                map_exists(job, beside=beside, overwrite=self._overwrite)
                job.source.close()

    @property
    def _label_threshold(self) -> float:
        """The probability above which a class of a multi-label model is true.

        Raises:
            ConfigError: what only one kind of model has was asked of the other.
        """
        multilabel = self.model.spec.multilabel
        if multilabel and self._polygons:
            raise ConfigError("--polygons are of classes that exclude each other; this model's classes don't")
        if not multilabel and self._threshold is not None:
            raise ConfigError("--score-threshold is for objects and for classes that don't exclude each other")
        return 0.5 if self._threshold is None else self._threshold

    def make(
        self,
        job: MapJob,
        write_rows: Callable[[Path], None] | None = None,
        *,
        on_window: Callable[[int, int], None] | None = None,
    ) -> MapResult:
        """Make a map and the files beside it; where the map is there, those that are missing.

        A damaged input may have no quicklook.

        Args:
            job: of `job`.
            write_rows: for `perf_vit.inference.make_map`; in this process by default.
            on_window: for a progress bar.

        Raises:
            PerfVitError: as `perf_vit.inference.make_map` says.
        """
        forward = {**self._rows, **({"on_window": on_window} if on_window else {})}

        def write(folder: Path) -> None:
            # Only of maps that are made.
            self._check_input(job.source)
            if write_rows is None:
                self._write(job, folder, None, **forward)
            else:
                write_rows(folder)

        beside = self.beside(job.out)
        result = make_map(job, write, resume=self._resume, overwrite=self._overwrite, beside=beside)
        missing = [path.suffix.removeprefix(".") for path in beside if result.made or not path.exists()]
        if "png" in missing:
            # What an earlier run couldn't read is not known here.
            may_be_damaged = not result.made and job.on_error == "skip"
            self._write_quicklook(job, damaged=bool(result.damaged) or may_be_damaged)
        if self._polygons in missing:
            self._write_polygons(job, job.out.with_suffix(f".{self._polygons}"))
        job.source.close()
        return result

    def _write_polygons(self, job: MapJob, path: Path) -> None:
        spec = self.model.spec
        background = spec.background_index
        polygons, labels = polygonize_classes(job.out, skip=() if background is None else (background,))
        write_objects(
            path, polygons, None, labels, spec.classes, source=job.source, object_type="annotation",
            background=background,
        )  # fmt: skip

    def _write_quicklook(self, job: MapJob, *, damaged: bool) -> None:
        path = job.out.with_suffix(".png")
        try:
            spec = self.model.spec
            write_map_quicklook(
                job.source, job.out, path, spec.classes, background=spec.background_index, multilabel=spec.multilabel
            )
        except InputError:
            if not damaged:
                raise
            # The picture of the whole scene needs pixels that can't be read; an earlier map's would mislead.
            path.unlink(missing_ok=True)

    def __call__(self, item: MapInput) -> MapResult:
        """The map of one input of many."""
        return self.make(self.job(item), on_window=self.on_window)

    def write_rows(self, item: MapInput, folder: Path, rows: tuple[int, int]) -> None:
        """Some rows of a map that is begun elsewhere, into its folder."""
        self._write(self.job(item), folder, rows, **self._rows)

    def _write(self, job: MapJob, folder: Path, rows: tuple[int, int] | None, **forward: Any) -> None:
        on_device(self.model, self._device)
        job.write_rows(folder, self.model, self.model.spec.normalizer, rows, **forward)

    def __getstate__(self) -> dict[str, Any]:
        mine = {name: value for name, value in vars(self).items() if name not in {"model", "model_id"}}
        return {**mine, "on_window": None}
