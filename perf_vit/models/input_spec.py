"""What a model expects of its input, and the one way to open an input of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from perf_vit.errors import InputError
from perf_vit.transforms import InputBands, InputCheck, Normalizer, bands_fit
from perf_vit.types import InputOptions, InputPath, Source

__all__ = ["InputSpec", "TaskSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec(InputOptions):
    """What a model expects of its input; saved with its weights.

    Attributes:
        classes: names of the classes or targets, in the order of the outputs.
        normalizer: statistics of the training images' bands; None for pixels as they are.
        tile_px: side of the square tiles that the model was trained on, in pixels.
        trained_on: names, dtype and value ranges of the training images' bands, to warn of other input; None where
            nobody knows.
        label_options: options that its label files are read with.

    The others are those of `InputOptions`.
    """

    takes_grey: ClassVar[bool] = False
    """Whether a model of three bands reads a grey image as three equal ones."""

    classes: tuple[str, ...] = ()
    normalizer: Normalizer | None = None
    tile_px: int | None = None
    trained_on: InputBands | None = None
    label_options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_data_config(cls, config: Any, data: Any, **more: Any) -> Self:
        """Make the spec of a model that is to be trained.

        Args:
            config: Data config; its keys of the fields' names say how inputs are opened.
            data: Data module; its attributes of the fields' names, such as `normalizer`, come before the keys.
            **more: Fields that are neither.
        """
        found = {each.name: getattr(data, each.name, getattr(config, each.name, MISSING)) for each in fields(cls)}
        found |= more
        return cls(**{name: _without_lists(value) for name, value in found.items() if value is not MISSING})

    def open(self, path: InputPath | Source, *, check: InputCheck | None = None, **overrides: Any) -> Source:
        """Open an input as the model was trained: bands, nodata, pixel size, tissue.

        A source that `perf_vit.open_source` opened is opened again if its options differ from those of the training;
        those that it was opened with come first. Other sources are taken as they are.

        Args:
            path: What `perf_vit.open_source` opens, or a source.
            check: Comparison with the training images that the inputs of a run share, so that it warns once;
                `InputCheck(None)` for none. By default each input has its own.
            **overrides: Options of `perf_vit.open_source` that come before the model's; None counts as not given.

        Raises:
            InputError: The input can't be opened, or has another number of bands than the training images.
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
        """Refuse a source with another number of bands than the training images.

        Raises:
            InputError: How many bands are expected, and how many it has.
        """
        if self.normalizer is None:
            return
        expected, got = len(self.normalizer.mean), source.num_bands
        if got == expected or (self.takes_grey and bands_fit(got, expected)):
            return
        raise InputError(
            f"the model was trained on {expected} bands, {source.path} has {got}; give an input with those bands"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        read: dict[str, Callable[[Any], Any]] = {
            "normalizer": Normalizer.from_dict,
            "trained_on": InputBands.from_dict,
        }
        given = {name: value for name, value in values.items() if value is not None}
        return cls(**{name: read.get(name, _without_lists)(value) for name, value in given.items()})

    def _opened(self, path: InputPath | Source, overrides: dict[str, Any]) -> Source:
        # Rasters load when one is opened, not when networks do.
        from perf_vit.sources import merged_options, open_input

        if isinstance(path, str | Path | Sequence):
            return open_input(path, self, **overrides)
        opened_from = getattr(path, "opened_from", None)
        given = getattr(path, "options", {})
        wanted = merged_options(self, **{**given, **overrides})
        if opened_from is None or wanted == dict(given):
            return path
        return open_input(opened_from, self, **wanted)


def _without_lists(value: Any) -> Any:
    # Configs and JSON have no tuples.
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec(InputSpec):
    """What a model of one of our tasks expects: classes, statistics and size of a tile are always known."""

    classes: tuple[str, ...]
    normalizer: Normalizer
    tile_px: int
