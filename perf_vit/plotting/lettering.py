"""Names as pictures can show them: one font, and escapes for what it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

from perf_vit.text import visible

__all__ = ["add_legend", "figure_height", "figure_name", "lettered", "lettering_font"]

# A longer name would leave no room for what is drawn.
_MAX_CHARS = 40


def lettered(name: str) -> str:
    r"""A name for a picture: characters without a letter in the font are escaped, as "\u6f22", and long names cut.

    Boxes in their place would make all such names look the same.
    """
    shown = "".join(char if _has_letter(char) else char.encode("unicode_escape").decode() for char in visible(name))
    return shown if len(shown) <= _MAX_CHARS else f"{shown[: _MAX_CHARS - 1]}…"


def lettering_font(size: int) -> ImageFont.FreeTypeFont:
    """The font of all pictures, which has Latin, Greek, Cyrillic, Arabic and Hebrew letters, in pixels of height."""
    return ImageFont.truetype(str(_font_file()), size)


@cache
def _has_letter(char: str) -> bool:
    return bool(_letters().get_char_index(ord(char)))


@cache
def _letters() -> FT2Font:
    return FT2Font(str(_font_file()))


def _font_file() -> Path:
    # It comes with matplotlib, whose figures use it too.
    return Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


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
