"""Names of arguments that come from a config, checked against the function that takes them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from perf_vit.errors import ConfigError

__all__ = ["check_known"]


def check_known(function: Callable[..., Any], names: Iterable[str], key: str, *, given: int = 0) -> None:
    """Refuse names that a function has no argument of.

    Args:
        function: a function or class.
        names: of its keyword arguments.
        key: what to call them in an error.
        given: how many of its first arguments don't come by name.

    Raises:
        ConfigError: says which there are, and which of them is nearest.
    """
    parameters = list(inspect.signature(function).parameters.values())[given:]
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{key} are {', '.join(known)}, got {name}{hint}")
