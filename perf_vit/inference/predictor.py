"""A model with its options: what the predictors of all tasks share."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from torch import nn

from perf_vit.errors import CheckpointError, InputError, OptionError
from perf_vit.inference.batch import InputReport, PredictOne, in_turn, report_of
from perf_vit.inference.inputs import MapInput
from perf_vit.inference.jobs import JobResult
from perf_vit.inference.jobs.job import Job
from perf_vit.inference.jobs.journal import check_partial_folder
from perf_vit.inference.options import PredictOptions, move_to_device, own_device, resolve_device
from perf_vit.models import InputCheck, network_id
from perf_vit.registry import Registry
from perf_vit.tiling import grid_windows
from perf_vit.types import TISSUE_METHODS, Source
from perf_vit.writers import existing_outputs

__all__ = [
    "PREDICTORS",
    "InputPredictor",
    "OnProgress",
    "Predictor",
    "check_window_size",
    "ignore_progress",
    "register_predictor",
]

Model = TypeVar("Model", bound=nn.Module)
Options = TypeVar("Options", bound=PredictOptions)

OnProgress = Callable[[int, int], None]
"""Called with what is done and how much there is, for a progress bar."""


def check_window_size(model: nn.Module, window_size: int) -> None:
    """Refuse windows of another size than the only one that a network's backbone takes.

    Args:
        model: Network of a task, or any other one.
        window_size: Window size in pixels.

    Raises:
        OptionError: The backbone takes another size only.
    """
    backbone = getattr(model, "backbone", None)
    embed: Any = getattr(getattr(backbone, "model", backbone), "patch_embed", None)
    size = getattr(embed, "img_size", None) if getattr(embed, "strict_img_size", False) else None
    if size is not None and window_size != (only := max(size) * getattr(model, "reduce", 1)):
        raise OptionError(f"window_size must be {only}, as the backbone takes no other size, got {window_size}")


def ignore_progress(done: int, total: int) -> None:
    """Show no progress."""


class Predictor(ABC, Generic[Model, Options]):
    """A model and the options of its predictions.

    Pickled, a checkpoint travels as its path and is loaded at the first use.

    Args:
        model: A model with its input spec, or the path of a checkpoint.
        options: Options of the prediction.
    """

    def __init__(self, model: Model | str | Path, options: Options) -> None:
        self.options = options
        self._given = Path(model) if isinstance(model, str | Path) else model

    @cached_property
    def model(self) -> Model:
        """The model, on whatever device it is.

        Raises:
            CheckpointError: It can't be read.
        """
        return self.load(self._given) if isinstance(self._given, Path) else self._given

    @abstractmethod
    def load(self, checkpoint: Path) -> Model:
        """The model of a checkpoint.

        Raises:
            CheckpointError: It can't be read.
        """

    @property
    def checkpoint(self) -> Path | None:
        """Path of the checkpoint, None for a model that was given itself."""
        return self._given if isinstance(self._given, Path) else None

    @cached_property
    def model_id(self) -> str:
        """Twelve hex digits that another network, other weights or another spec would not have."""
        spec: Any = self.model.spec
        return network_id(self.model, spec.to_dict())

    @property
    def read_files(self) -> list[str | Path]:
        """Files that are read besides inputs: the checkpoint, outlines of tissue."""
        tissue = self.options.input_options.get("tissue")
        return [each for each in (self.checkpoint, tissue) if each is not None and each not in TISSUE_METHODS]

    def on(self, device: str) -> Self:
        """The same predictor on another device."""
        return self.with_options(replace(self.options, device=device))

    def with_options(self, options: Options) -> Self:
        """The same predictor with other options."""
        return type(self)(self._given, options)

    def ready(self) -> str:
        """Put the model on its device, in evaluation mode; give the device's name.

        Raises:
            OptionError: There is no such device.
        """
        if self.model.training:
            self.model.eval()
        return move_to_device(self.model, self._wanted_device)

    @property
    def device(self) -> str:
        """Name of the device that the model runs on."""
        return resolve_device(self._wanted_device)

    @property
    def _wanted_device(self) -> str:
        """Device of the options, for "auto" the accelerator that a given model is on."""
        own = own_device(self._given) if isinstance(self._given, nn.Module) else None
        is_auto = self.options.device == "auto" and own is not None and own.type not in ("cpu", "meta")
        return str(own) if is_auto else self.options.device

    @cached_property
    def check_input(self) -> InputCheck:
        """Comparison of inputs with the training images, which warns once."""
        spec: Any = self.model.spec
        return InputCheck(spec.trained_on)

    @property
    def model_settings(self) -> dict[str, Any]:
        """Plain values that decide what the model says."""
        return {"model": self.model_id, "precision": str(self.options.dtype).removeprefix("torch.")}

    def described(self) -> dict[str, Any]:
        """The model and the options, for reports."""
        checkpoint = self.checkpoint and str(self.checkpoint.absolute())
        return {"model": self.model_id, "checkpoint": checkpoint, "settings": self.options.to_dict()}

    def __getstate__(self) -> dict[str, Any]:
        here = {"check_input", "on_window", *({"model", "model_id"} if self.checkpoint else ())}
        found = {name: value for name, value in vars(self).items() if name not in here}
        # Workers stand in other folders.
        given = {name: getattr(self.options, name, None) for name in ("tissue", "coco_images")}
        files = {name: os.path.abspath(path) for name, path in given.items() if path and os.path.isfile(path)}
        found["options"] = replace(self.options, **files)
        return {**found, "_given": self.checkpoint.absolute()} if self.checkpoint else found


PREDICTORS: Registry[tuple[type[Predictor[Any, Any]], type[PredictOptions]]] = Registry(
    "task of a checkpoint", CheckpointError
)
"""Class of the predictor of each task and of its options, by the name of the task."""


def register_predictor(task: str, predictor: type[Predictor[Any, Any]], options: type[PredictOptions]) -> None:
    """Register the predictor of a task.

    Args:
        task: Name of the task.
        predictor: Class of its predictor.
        options: Class of the options of its predictor.

    Raises:
        ValueError: If the name is taken.
    """
    PREDICTORS.add(task, (predictor, options))


class InputPredictor(Predictor[Model, Options]):
    """A predictor that makes the outputs of one input at a time."""

    @abstractmethod
    def run(self, source: Any, out: str | Path, *, on_progress: OnProgress = ignore_progress) -> JobResult:
        """Make the outputs of an input, as far as they aren't there.

        Args:
            source: What `perf_vit.open` opens, or a source.
            out: Path of the main output.
            on_progress: Called with (windows done, windows in all).

        Raises:
            BusyError: Another process makes them.
            InputError: The input can't be read, or doesn't fit the model.
            OutputError: An output can't be written, would replace an input or, without `overwrite`, another file.
        """

    def open(self, source: Any) -> Source:
        """An input as the model was trained, with the options that come before.

        Raises:
            InputError: It can't be opened, or has other bands.
        """
        spec: Any = self.model.spec
        opened: Source = spec.open(source, check=InputCheck(None), **self.options.input_options)
        return opened

    @contextmanager
    def opened(self, source: Any) -> Iterator[Source]:
        """Open an input for a while; a source that is open already stays open."""
        opened = self.open(source)
        try:
            yield opened
        finally:
            if opened is not source:
                opened.close()

    @abstractmethod
    def outputs(self, out: Path) -> list[Path]:
        """All files that may be written for an output."""

    @abstractmethod
    def job(self, source: Any, out: str | Path) -> Job:
        """What is to be made of an input.

        Raises:
            InputError: The input can't be opened, or doesn't fit the model.
            OutputError: The output can't be made of this input.
        """

    def check(self, inputs: Sequence[MapInput]) -> dict[MapInput, InputReport]:
        """Refuse inputs whose outputs would replace other files, before anything is computed.

        Returns:
            Reports of inputs whose outputs are all there: they need not be opened again.

        Raises:
            OutputError: Names the first file.
        """
        there = {}
        for item in inputs:
            start, outputs = time.monotonic(), self.outputs(item.output)
            for out in outputs:
                check_partial_folder(out)
            if not existing_outputs(outputs):
                continue
            # An input that can't be opened is reported in its turn.
            with suppress(InputError), self.opened(item.path) as source:
                job = self.job(source, item.output)
                if job.check() and job.is_complete():
                    result = JobResult(made=False, **self.size_of(job))
                    there[item] = report_of(item, result, time.monotonic() - start)
        return there

    def size_of(self, job: Any) -> dict[str, Any]:
        """Outputs, windows and pixels of a job, as fields of its result."""
        spec: Any = self.model.spec
        options: Any = self.options
        source = job.source
        num_windows = len(grid_windows(source.extent, *options.windows(spec.tile_px)))
        beside = tuple(path for path in job.beside if path.exists())
        size = {"num_windows": num_windows, "num_pixels": source.height * source.width}
        return {"out": job.out, "beside": beside, **size}

    def folder_files(self, folder: Path) -> list[Path]:
        """Files in the folder of many inputs that are of all of them."""
        return []

    def check_folder(self, folder: Path) -> None:
        """Refuse other files in the places of `folder_files`, before anything is computed."""

    def finish_folder(self, inputs: Sequence[MapInput], folder: Path) -> None:
        """Write the files of many inputs that are of all of them."""

    def __call__(self, item: MapInput, on_progress: OnProgress = ignore_progress) -> JobResult:
        """Make the outputs of one input of many."""
        return self.run(item.path, item.output, on_progress=on_progress)

    def each(
        self, predict_one: PredictOne, inputs: Sequence[MapInput], *, on_progress: OnProgress = ignore_progress
    ) -> Generator[InputReport, None, None]:
        """Make the outputs of inputs in this process, for `predict_many`: one after the other, unless overridden.

        Args:
            predict_one: Makes those of one.
            inputs: Inputs.
            on_progress: Called with (windows done, windows in all) of the current input.
        """
        return in_turn(predict_one, inputs)
