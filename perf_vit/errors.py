"""Errors that a user can cause; messages state what was expected, what was given and what to do."""

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
    "MissingPackageError",
    "NotFiniteError",
    "OptionError",
    "OutputError",
    "PerfVitError",
    "UnreachableError",
    "extra",
    "is_out_of_memory",
    "parsing",
    "reason_line",
    "warn_once",
]


class PerfVitError(ValueError):
    """Base class of errors that a user can cause and fix; the command line prints them as one line."""


class ConfigError(PerfVitError):
    """Config file, key or value that doesn't match its schema."""


class OptionError(ConfigError):
    """Invalid option of a call; the message starts with the option's name, which is also the name of its flag."""


class DataWarning(UserWarning):
    """Data that is skipped, changed or suspicious; the message states what, how much of it, and an example."""


class InputError(PerfVitError):
    """Image or label file that can't be read or is inconsistent with others."""


class NotFiniteError(InputError):
    """Values computed from an input that are infinite or not a number."""


class DamagedDataError(InputError):
    """Pixels of an open file that can't be decoded; other windows may be intact."""


class UnreachableError(InputError):
    """Pixels that a server didn't deliver; the data may be intact and a retry may succeed."""


class OutputError(PerfVitError):
    """Result that can't be written to its path."""


class BusyError(OutputError):
    """Result that another process is writing."""


class CheckpointError(PerfVitError):
    """Checkpoint that can't be read or doesn't match the data."""


class MissingPackageError(ImportError, PerfVitError):
    """Package of an extra that can't be imported; the message ends with the pip line that installs it.

    Attributes:
        problem: Package and what is wrong with it, such as "rasterio, which isn't installed".
    """

    problem = ""


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Convert import errors of other packages to a one-line error with the pip line that installs them.

    Of nested blocks the outermost one decides, as its extra contains those of the inner ones.

    Args:
        name: Extra of perf-vit, such as "geo".
        what: Operation, option or module that needs it, such as "training".

    Raises:
        MissingPackageError: A package is missing, too old or broken.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if isinstance(error, MissingPackageError):
            problem = error.problem
        elif package in ("", "perf_vit"):
            raise
        elif isinstance(error, ModuleNotFoundError):
            problem = f"{package}, which isn't installed"
        else:
            problem = f"{package}, which can't be imported ({reason_line(error)})"
        missing = MissingPackageError(f'{what} needs {problem}; pip install "perf-vit[{name}]"', name=package)
        missing.problem = problem
        raise missing from error


_warned: set[str] = set()


def warn_once(kind: str, message: str, category: type[Warning] = DataWarning) -> None:
    """Emit a warning, only the first time for each `kind` in this process."""
    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(message, category, stacklevel=3)


@contextmanager
def parsing(path: str | Path, kind: str, error: type[PerfVitError] = InputError) -> Iterator[None]:
    """Convert exceptions that a library raises on a damaged file to a one-line error that names the file.

    Parsers of damaged bytes raise exceptions of any class, so all of them are converted.

    Args:
        path: Path of the file.
        kind: Format that it is read as, such as "JSON".
        error: Class of the error to raise.

    Raises:
        PerfVitError: Reading fails, of class `error`; a `PerfVitError` raised inside is passed on unchanged.
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
    """Return the first line of an exception's message, prefixed by its class where the message alone is unclear."""
    lines = str(cause).strip().splitlines()
    name = type(cause).__name__
    if isinstance(cause, OSError | ValueError | RuntimeError | TypeError) and lines:
        return lines[0].rstrip(".")
    return f"{name}: {lines[0]}" if lines else name


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory is too small: Python's, or torch's, of a GPU or of the CPU."""
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    # By name, as torch is slow to import; the CPU's allocator has no class of its own.
    is_named = any(each.__name__ == "OutOfMemoryError" for each in type(error).__mro__)
    return is_named or "can't allocate memory" in str(error) or "not enough memory" in str(error)
