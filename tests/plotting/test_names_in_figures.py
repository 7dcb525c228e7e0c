"""Names of classes in figures: all of them, as they are."""

import warnings

import numpy as np
import pytest
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from matplotlib.text import Text
from nasty_names import NASTY_NAMES, UNSEEN_NAMES

from perf_vit.metrics import DetectionMetrics, plot_precision_recall, save_confusion_matrix, save_precision_recall
from perf_vit.types import Detections, ObjectLabels

SHOWN = {**{name: name for name in NASTY_NAMES}, **UNSEEN_NAMES, "漢": r"\u6f22", "🌳": r"\U0001f333"}
SHOWN["n" * 200] = "n" * 39 + "…"
CURVE = (np.linspace(0, 1, 5), np.linspace(1, 0, 5))


def _draw_confusion(names, path) -> None:
    save_confusion_matrix(np.eye(len(names)), names, path)


def _draw_curves(names, path) -> None:
    save_precision_recall(names, [CURVE] * len(names), [0.5] * len(names), path, "pixels")


def _draw_detections(names, path) -> None:
    metrics = DetectionMetrics(names, "boxes")
    boxes = np.array([[0, 0, 9, 9]] * len(names), np.float32) + 20 * np.arange(len(names))[:, None]
    labels = np.arange(len(names))
    metrics.update(
        [Detections(boxes_xyxy=boxes, scores=np.full(len(names), 0.9), labels=labels)],
        [ObjectLabels(boxes_xyxy=boxes, labels=labels, ignored=np.zeros(len(names), bool))],
    )
    plot_precision_recall(metrics.compute(), path)


@pytest.mark.parametrize("draw", [_draw_confusion, _draw_curves, _draw_detections])
def test_all_names_are_in_a_figure_as_they_are(draw, tmp_path, monkeypatch) -> None:
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    with warnings.catch_warnings():
        # A letter that the font lacks, or a layout without room, is a warning.
        warnings.simplefilter("error")
        draw(list(SHOWN), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0
    texts = [text.get_text() for text in figures[0].findobj(Text) if text.get_text()]
    assert not [text for text in texts if is_math_text(text)]
    drawn = {text.replace(r"\$", "$").partition(", AP")[0] for text in texts}
    assert set(SHOWN.values()) <= drawn
