"""What happens to objects on the way from label files to records, counted, with an example of each."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from perf_vit.data.labels.records import RawImage, RawObject
from perf_vit.errors import DataWarning

__all__ = ["Tally"]


class Tally:
    """Counts by what happened, with the first example; one warning tells them all.

    Attributes:
        counts: by what happened.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, what: str, image: RawImage, happened: npt.NDArray[np.bool_]) -> None:
        """Count the objects of an image to which it happened, [n]."""
        if happened.any():
            self.note(what, int(happened.sum()), _named(image.objects[int(np.argmax(happened))], image))

    def note(self, what: str, number: int, example: str) -> None:
        """Count something, of which the first example is kept."""
        self.counts[what] += number
        self._examples.setdefault(what, example)

    def warn(self, images: Sequence[RawImage], *, stacklevel: int) -> None:
        """Tell what was noted, in one warning; nothing where there is nothing."""
        notable = [f"{self.counts[what]} {what} (first: {example})" for what, example in self._examples.items()]
        if notable:
            warnings.warn(
                f"labels of {len(images)} images, the first {images[0].labels}: kept {self.counts['objects']} objects; "
                + ", ".join(notable),
                DataWarning,
                stacklevel=stacklevel + 1,
            )


def _named(item: RawObject, image: RawImage) -> str:
    place = item.box if item.box is not None else item.corners
    where = "" if place is None else " at " + " ".join(f"{value:g}" for value in np.ravel(place))
    return f"{item.name or 'no name'}{where} in {image.labels}"
