"""Specification of a model's input, and opening of inputs by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from perf_vit.errors import InputError
from perf_vit.transforms import InputBands, InputCheck, Normalizer, accepts_bands
from perf_vit.types import InputOptions, InputPath, Source

__all__ = ["InputSpec", "TaskSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec(InputOptions):
    """Input of a model, saved with its weights.

    Attributes:
        classes: Names of the classes or targets, in the order of the outputs.
        normalizer: Band statistics of the training images; None for no normalisation.
        tile_px: Size of the square tiles of the training, in pixels.
        trained_on: Names, dtype and value ranges of the bands of the training images, to warn about different input;
            None if unknown.
        label_options: Options with which its label files are read.

    The other attributes are those of `InputOptions`.
    """

    takes_grey: ClassVar[bool] = False
    """Whether a model of three bands accepts a grey image, repeated for all three."""

    classes: tuple[str, ...] = ()
    normalizer: Normalizer | None = None
    tile_px: int | None = None
    trained_on: InputBands | None = None
    label_options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_data_config(cls, config: Any, data: Any, **more: Any) -> Self:
        """Make the spec of a model to be trained.

        Args:
            config: Data config; its keys with the names of fields set them.
            data: Data module; its attributes with the names of fields, such as `normalizer`, take precedence over
                `config`.
            **more: Values of other fields.
        """
        found = {each.name: getattr(data, each.name, getattr(config, each.name, MISSING)) for each in fields(cls)}
        found |= more
        return cls(**{name: _without_lists(value) for name, value in found.items() if value is not MISSING})

    def open(self, path: InputPath | Source, *, check: InputCheck | None = None, **overrides: Any) -> Source:
        """Open an input as in training: bands, nodata, pixel size, tissue.

        A source from `perf_vit.open` is reopened if its options differ from the model's; options given to
        `open_source` take precedence. Other sources are used unchanged.

        Args:
            path: Input of `perf_vit.open`, or a source.
            check: Comparison with the training images, shared by the inputs of a run so that it warns once;
                `InputCheck(None)` disables it. None for a new one.
            **overrides: Options of `perf_vit.open` that take precedence over the model's; None is ignored.

        Raises:
            InputError: The input can't be opened or its number of bands differs from the training images.
        """
        source = self._opened(path, overrides)
        try:
            self.check_bands(source)
        except InputError:
            source.close()
            raise
        (InputCheck(self.trained_on) if check is None else check)(source)
        return source

    def check_bands(self, source: Source) -> None:
        """Check that a source has the number of bands of the training images.

        Raises:
            InputError: The number of bands differs.
        """
        if self.normalizer is None:
            return
        expected, got = len(self.normalizer.mean), source.num_bands
        if got == expected or (self.takes_grey and accepts_bands(got, expected)):
            return
        raise InputError(
            f"the model was trained on {expected} bands, {source.path} has {got}; give an input with those bands"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for a checkpoint."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Make a spec from the result of `to_dict`."""
        read: dict[str, Callable[[Any], Any]] = {
            "normalizer": Normalizer.from_dict,
            "trained_on": InputBands.from_dict,
        }
        given = {name: value for name, value in values.items() if value is not None}
        return cls(**{name: read.get(name, _without_lists)(value) for name, value in given.items()})

    def _opened(self, path: InputPath | Source, overrides: dict[str, Any]) -> Source:
        # Imported lazily, so that loading a network doesn't import rasterio.
        from perf_vit.sources import merged_options, open_input

        if isinstance(path, str | Path | Sequence):
            return open_input(path, self, overrides)
        opened_from = getattr(path, "opened_from", None)
        given = getattr(path, "options", {})
        overrides = {name: value for name, value in overrides.items() if value is not None}
        wanted = merged_options(self, {**given, **overrides})
        if opened_from is None or wanted == dict(given):
            return path
        return open_input(opened_from, self, wanted)


def _without_lists(value: Any) -> Any:
    # Configs and JSON have no tuples.
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec(InputSpec):
    """Input of a model of one of the package's tasks, with required classes, statistics and tile size."""

    classes: tuple[str, ...]
    normalizer: Normalizer
    tile_px: int
