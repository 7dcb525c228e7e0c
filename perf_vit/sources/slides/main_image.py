"""Choice of the slide among the images of a file, which may hold label and macro pictures too."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from perf_vit.errors import warn_once

__all__ = ["StoredImage", "choose_image"]

_SIDE_PICTURE = re.compile(r"(?<![a-z])(label|macro|thumb|thumbnail|overview|barcode)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class StoredImage:
    """Image in a file.

    Attributes:
        name: Name, which may be empty.
        size_yx: Number of rows and columns.
    """

    name: str
    size_yx: tuple[int, int]


def choose_image(path: str, images: Sequence[StoredImage]) -> int:
    """Return the index of the largest image that isn't a label, macro, thumbnail or overview by its name.

    Warns if the file holds another one that isn't a smaller copy.

    Args:
        path: Path of the file, for the warning.
        images: Images in the file, at least one.
    """
    # Images may all be named after a file that is called a label.
    named = [index for index, image in enumerate(images) if not _SIDE_PICTURE.search(image.name)]
    slides = named or list(range(len(images)))
    chosen = max(slides, key=lambda index: images[index].size_yx[0] * images[index].size_yx[1])
    full = images[chosen].size_yx
    others = [images[index] for index in slides if index != chosen and not _is_copy(full, images[index].size_yx)]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        warn_once(
            f"images of {path}",
            f"{path} holds {len(others) + 1} images; {_shown(images[chosen])} is read, not {_shown(others[0])}{more}; "
            "write them to files of their own to read them",
        )
    return chosen


def _is_copy(full: tuple[int, int], reduced: tuple[int, int]) -> bool:
    """Return whether an image has the proportions of a larger one, up to a pixel, as levels of a pyramid do."""
    factor = full[0] / reduced[0]
    return factor >= 1.5 and abs(full[1] / factor - reduced[1]) <= 1 + full[1] / full[0]


def _shown(image: StoredImage) -> str:
    height, width = image.size_yx
    return f"{repr(image.name) if image.name else 'one'} of {height:,} x {width:,} px"
