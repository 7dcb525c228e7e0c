"""Text that leaves the program: for people without control characters, for programs as strict JSON."""

from __future__ import annotations

import json
import math
import re
from typing import Any

__all__ = ["to_json", "visible", "without_nan", "xml_text"]

# C0 and C1 controls, line and paragraph separators, and characters that turn the direction of what follows.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# XML 1.0, section 2.2; metadata of TIFF are XML.
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_SURROGATES = re.compile("[\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Escape what a terminal, a picture or UTF-8 can't show: "a\nb" becomes "a\\nb".

    Bytes of file names that aren't UTF-8 are escaped as Python has them, "\udce4".
    """
    return _UNSEEN.sub(_escaped, text)


def xml_text(text: str) -> str:
    r"""Escape the characters that XML can't hold, as "\x1b"; all others stay."""
    return _NOT_XML.sub(_escaped, text)


def without_nan(value: Any) -> Any:
    """The same dicts, lists and numbers with None for NaN and infinities; tuples become lists."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any, indent: int | None = None, *, ascii_only: bool = False) -> str:
    """Strict JSON that any encoding of Unicode can hold; NaN and infinities, which JSON doesn't have, become null.

    Args:
        value: plain values.
        indent: spaces a level; None for one line.
        ascii_only: escape all other characters, for a stream of unknown encoding.
    """
    text = json.dumps(without_nan(value), indent=indent, ensure_ascii=ascii_only, allow_nan=False)
    return _SURROGATES.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()
