"""Registry of object label formats, as named by `data.format` of configs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from perf_vit.errors import ConfigError
from perf_vit.labels.image_folder import ImageFolder
from perf_vit.labels.objects.records import RawLabels
from perf_vit.registry import Registry

__all__ = ["LABEL_FORMATS", "LabelFormat", "LabelOptions", "register_label_format"]


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """Options of formats whose files don't hold all that labels need.

    Attributes:
        classes: Class names in the order of their indices, None for those of the files.
        attribute: Column of polygons that holds class names, None for one class.
    """

    classes: Sequence[str] | None = None
    attribute: str | None = None

    @property
    def first_class(self) -> str:
        """Name of the class of objects that have no class of their own."""
        return self.classes[0] if self.classes else "object"

    def require_one_class(self, labels: str, hint: str = "") -> None:
        """Check that there is one class, as the files don't distinguish classes.

        Args:
            labels: Name of the labels, for the error.
            hint: Advice for the error.

        Raises:
            ConfigError: There are several classes.
        """
        if self.classes and len(self.classes) > 1:
            raise ConfigError(f"{labels} are of one class, got {len(self.classes)} classes{hint}")


ReadLabels = Callable[[Path, ImageFolder, LabelOptions], RawLabels]


@dataclass(frozen=True)
class LabelFormat:
    """A reader of labels.

    Attributes:
        read: Called with the path of the labels, the folder of images and the options.
        one_file: Whether one file holds the labels of all images, by their names.
    """

    read: ReadLabels
    one_file: bool


LABEL_FORMATS: Registry[LabelFormat] = Registry("format of labels", ConfigError)
"""Formats by name."""


def register_label_format(name: str, *, one_file: bool = False) -> Callable[[ReadLabels], ReadLabels]:
    """Decorate a function (path of labels, folder of images, options) -> `RawLabels` to read a format.

    Args:
        name: Name of the format.
        one_file: Whether one file holds the labels of all images, by their names, rather than a folder of one each.

    Raises:
        ValueError: The name is taken.
    """

    def register(read: ReadLabels) -> ReadLabels:
        LABEL_FORMATS.add(name, LabelFormat(read, one_file))
        return read

    return register
