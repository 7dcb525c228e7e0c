"""The errors a user can cause: each message says what was expected, what came and what to do next."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "BusyError",
    "CheckpointError",
    "ConfigError",
    "DamagedDataError",
    "DataWarning",
    "InputError",
    "OptionError",
    "OutputError",
    "PerfVitError",
    "UnreachableError",
    "parsing",
    "reason_line",
    "warn_once",
]


class PerfVitError(ValueError):
    """Base of every error that a user can cause and mend; the command line prints it as one line."""


class ConfigError(PerfVitError):
    """A config file, key or value that does not fit its schema."""


class OptionError(ConfigError):
    """An option of a call that doesn't fit; its message begins with the option's name, which is a flag's, too."""


class DataWarning(UserWarning):
    """Something of the data is left out, changed or doubtful: what, how much of it, and an example."""


class InputError(PerfVitError):
    """An image or label file that can't be read, or that doesn't fit the others."""


class DamagedDataError(InputError):
    """Pixels of an open file that can't be decoded; other windows of it may be whole."""


class UnreachableError(InputError):
    """Pixels that a server didn't deliver: the data may be whole, and a later try may get them."""


class OutputError(PerfVitError):
    """A result that can't be written where it was asked for."""


class BusyError(OutputError):
    """A result that another process is writing just now."""


class CheckpointError(PerfVitError):
    """A checkpoint that can't be read, or that doesn't fit the data it is used on."""


_warned: set[str] = set()


def warn_once(kind: str, message: str) -> None:
    """Give the first `DataWarning` of a kind in this process: one file stands for all others like it."""
    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(message, DataWarning, stacklevel=3)


@contextmanager
def parsing(path: str | Path, kind: str, error: type[PerfVitError] = InputError) -> Iterator[None]:
    """Report what a library raises on a damaged file as one line that names the file.

    Parsers of damaged bytes raise whatever their code comes upon, so every exception inside is one of the file.

    Args:
        path: of the file.
        kind: what it is read as, "JSON".
        error: what to raise.

    Raises:
        PerfVitError: of the class `error`; those raised inside pass as they are.
    """
    try:
        yield
    except PerfVitError:
        raise
    except (FileNotFoundError, PermissionError, IsADirectoryError) as cause:
        raise error(f"can't read {path} as {kind}: {cause.strerror or reason_line(cause)}") from cause
    except Exception as cause:
        raise error(f"can't read {path} as {kind}: {reason_line(cause)}; it may be damaged") from cause


def reason_line(cause: Exception) -> str:
    """The first line of a library's message, after the class of the error where that says more."""
    lines = str(cause).strip().splitlines()
    name = type(cause).__name__
    if isinstance(cause, OSError | ValueError | RuntimeError | TypeError) and lines:
        return lines[0].rstrip(".")
    return f"{name}: {lines[0]}" if lines else name
