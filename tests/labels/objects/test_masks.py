"""Run lengths of masks."""

import pytest

from perf_vit.errors import InputError
from perf_vit.labels.objects.masks import Rle


@pytest.mark.parametrize(
    ("size", "counts", "match"),
    [
        # Within what a file may say, before any memory is taken.
        ([2**20, 2**20], [2**40], "expected at most 1073741824"),
        ([4, 5], [3, 18], "whose runs sum to 21"),
        ([4, 5], [-3, 23], "it is damaged"),
    ],
)
def test_masks_that_no_image_has_are_refused(size, counts, match) -> None:
    with pytest.raises(InputError, match=match):
        Rle.make({"size": size, "counts": counts}, "labels.json")
