"""The errors a user can cause: each message says what was expected, what came and what to do next."""

import warnings

__all__ = [
    "BusyError",
    "CheckpointError",
    "ConfigError",
    "DataWarning",
    "InputError",
    "OutputError",
    "PerfVitError",
    "warn_once",
]


class PerfVitError(ValueError):
    """Base of every error that a user can cause and mend; the command line prints it as one line."""


class ConfigError(PerfVitError):
    """A config file, key or value that does not fit its schema."""


class DataWarning(UserWarning):
    """Something of the data is left out, changed or doubtful: what, how much of it, and an example."""


class InputError(PerfVitError):
    """An image or label file that can't be read, or that doesn't fit the others."""


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
