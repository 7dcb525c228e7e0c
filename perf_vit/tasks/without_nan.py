"""Scores as JSON can hold them."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["without_nan"]


def without_nan(value: Any) -> Any:
    """The same dicts, lists and numbers with None in place of NaN, which JSON doesn't have; tuples become lists."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
