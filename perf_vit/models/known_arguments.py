"""Arguments that come from a config: names that the function doesn't have, and values that it fails on."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from perf_vit.errors import ConfigError, PerfVitError, reason_line

__all__ = ["built_from", "check_known"]


@contextmanager
def built_from(keys: str) -> Iterator[None]:
    """Report what a network's constructor raises as one line about the config.

    Constructors check few of their arguments, and fail anywhere.

    Args:
        keys: where the arguments come from, "model.head fcos".

    Raises:
        ConfigError: names the keys; errors of this package pass as they are.
    """
    try:
        yield
    except PerfVitError:
        raise
    except Exception as error:
        raise ConfigError(f"{keys}: {reason_line(error)}") from error


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
