"""Names in matplotlib's figures, which takes some for formulas and hides others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perf_vit.io import lettered

__all__ = ["add_legend", "figure_height", "figure_name"]


def figure_name(name: str) -> str:
    r"""A name as figures show it literally: a pair of $ would begin and end a formula, \$ is a dollar."""
    return lettered(name).replace("$", r"\$")


def figure_height(num_labels: int) -> float:
    """Inches that a figure needs for a legend of as many labels."""
    return max(5.0, 1.5 + 0.22 * num_labels)


def add_legend(axes: Any, lines: Sequence[Any], labels: Sequence[str]) -> None:
    """Add a legend with all labels, those that begin with an underscore too, which matplotlib leaves out."""
    legend = axes.legend(lines, [f"line {number}" for number in range(len(lines))])
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)
