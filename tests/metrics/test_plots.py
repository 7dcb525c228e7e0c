"""Pictures of confusion matrices."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perf_vit.metrics import save_confusion_matrix
from perf_vit.metrics.plots import _short


@pytest.mark.parametrize("num_classes", [1, 2, 33])
def test_a_confusion_matrix_becomes_a_picture_at_any_class_count(tmp_path: Path, num_classes: int) -> None:
    counts = np.random.default_rng(0).integers(0, 10**7, (num_classes, num_classes))
    counts[0] = 0
    path = tmp_path / "confusion.png"
    save_confusion_matrix(counts, [f"class {index}" for index in range(num_classes)], path)
    assert np.asarray(Image.open(path)).std() > 0


def test_a_picture_needs_a_name_for_each_class(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        save_confusion_matrix(np.eye(3), ["a", "b"], tmp_path / "confusion.png")


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0"), (9999, "9999"), (45_210, "45.2k"), (812_000, "812k"), (7_300_000, "7.3M")]
)
def test_counts_are_written_short(count: int, shown: str) -> None:
    assert _short(count) == shown
