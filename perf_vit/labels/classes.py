"""Mapping of label values to classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from perf_vit.errors import InputError
from perf_vit.sources._qupath import is_ignored_class
from perf_vit.text import number_text
from perf_vit.types import IGNORE_INDEX, BoolArray, LabelArray

__all__ = ["LabelClasses"]


@dataclass(frozen=True, slots=True)
class LabelClasses:
    """Class names, the label value of each class, and the values of unlabelled pixels.

    Attributes:
        names: Class names; None if not given.
        values: Label value of class 0, 1, ...
        ignore_values: Values read as `IGNORE_INDEX`; for polygons also text, and None for features without a value.
        explicit: Whether names or values were given; otherwise each value up to 254 is a class.
        skip_classes: Values of polygons that are left out, as if they were not there.
    """

    names: tuple[str, ...] | None
    values: tuple[float, ...]
    ignore_values: tuple[float | str | None, ...]
    explicit: bool
    skip_classes: tuple[float | str | None, ...] = ()

    @classmethod
    def make(
        cls,
        names: Sequence[str] | None,
        values: Sequence[float] | None,
        ignore_values: Sequence[float | str | None],
        skip_classes: Sequence[float | str | None] = (),
    ) -> Self:
        """Build the mapping, with defaults for what is not given.

        Raises:
            InputError: The number of values differs from that of classes, values repeat, or there are more than 255
                classes.
        """
        explicit = names is not None or values is not None
        num_classes = len(names) if names is not None else IGNORE_INDEX
        chosen = tuple(range(num_classes)) if values is None else tuple(values)
        if names is not None and len(chosen) != num_classes:
            raise InputError(f"values must give one value for each of {num_classes} classes, got {len(chosen)}")
        if len(set(chosen)) != len(chosen) or len(chosen) > IGNORE_INDEX:
            raise InputError(f"values must be up to {IGNORE_INDEX} different numbers, got {list(chosen)}")
        return cls(None if names is None else tuple(names), chosen, tuple(ignore_values), explicit, tuple(skip_classes))

    def indices_of(self, pixels: npt.NDArray[Any], valid: BoolArray, path: str) -> LabelArray:
        """Map label values to class indices.

        Args:
            pixels: Label values, [H, W].
            valid: Valid pixels, [H, W].
            path: Name of the file, for errors.

        Returns:
            Class indices, [H, W]; `IGNORE_INDEX` for invalid pixels and ignored values.

        Raises:
            InputError: The value of a valid pixel is neither a class nor ignored.
        """
        labels = np.full(pixels.shape, IGNORE_INDEX, np.uint8)
        unknown = valid.copy()
        for index, value in enumerate(self.values):
            match = pixels == value
            labels[match & valid] = index
            unknown &= ~match
        for value in (value for value in self.ignore_values if not isinstance(value, str | None)):
            match = pixels == value
            labels[match] = IGNORE_INDEX
            unknown &= ~match
        if unknown.any():
            found = np.unique(pixels[unknown]).tolist()
            raise InputError(
                f"{path} has {_listed('value', found)}, which is neither a class ({self.described_values()}) nor "
                "nodata; add it to values or ignore_values"
            )
        return labels

    def index_of(self, value: Any) -> int | None:
        """Return the class index of a class name or value, `IGNORE_INDEX` for ignored values, None for unknown ones.

        Text that isn't a class name is parsed as a number, as in GIS exports of ids. QuPath's class `Ignore*` is
        ignored, unless it is one of the names.
        """
        if value in self.ignore_values:
            return IGNORE_INDEX
        if not isinstance(value, str):
            return self.values.index(value) if value in self.values else None
        if self.names is not None and value in self.names:
            return self.names.index(value)
        if is_ignored_class(value):
            return IGNORE_INDEX
        number = _number(value)
        return None if number is None else self.index_of(number)

    def described_values(self) -> str:
        """Format the values of the classes as text."""
        if len(self.values) > 12:
            return f"{len(self.values)} values from {number_text(min(self.values))} to {number_text(max(self.values))}"
        return _listed("value", self.values)


def _listed(noun: str, values: Sequence[float]) -> str:
    shown = ", ".join(number_text(value) for value in values[:12])
    return f"{noun}{'s' if len(values) > 1 else ''} {shown}{', ...' if len(values) > 12 else ''}"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
