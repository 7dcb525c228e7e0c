"""Text output: printable text, XML and strict JSON."""

from __future__ import annotations

import json
import math
import re
from typing import Any

__all__ = ["number_text", "printable", "to_json", "without_nan", "xml_text"]

# C0 and C1 controls, line and paragraph separators, bidirectional controls, surrogates.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# XML 1.0, section 2.2; TIFF metadata is XML.
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
# Integers below are numbers of float64, and shorter than with an exponent.
_MOST_DIGITS = 1e15
_SURROGATES = re.compile("[\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Escape characters that terminals, pictures or UTF-8 can't represent: "a\nb" becomes "a\\nb".

    Bytes of file names that aren't UTF-8 are escaped as Python's surrogates, "\udce4".
    """
    return _UNSEEN.sub(_escaped, text)


def number_text(value: float) -> str:
    """Format a number with all digits that tell it from others: "255", "16777215", "-3.4028234663852886e+38"."""
    value = float(value)
    return f"{value:.0f}" if value.is_integer() and abs(value) < _MOST_DIGITS else repr(value)


def xml_text(text: str) -> str:
    r"""Escape the characters that XML doesn't allow, such as "\x1b"."""
    return _NOT_XML.sub(_escaped, text)


def without_nan(value: Any) -> Any:
    """Replace NaN and infinities in nested dicts and lists by None; tuples become lists."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any, indent: int | None = None, *, ascii_only: bool = False) -> str:
    """Serialise plain values as strict JSON, with null for NaN and infinities.

    Args:
        value: Plain values.
        indent: Number of spaces per level; None for one line.
        ascii_only: Whether to escape non-ASCII characters, for a stream of unknown encoding.
    """
    text = json.dumps(without_nan(value), indent=indent, ensure_ascii=ascii_only, allow_nan=False)
    return _SURROGATES.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()
