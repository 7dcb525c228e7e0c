"""The errors a user can cause: each message says what was expected, what came and what to do next."""

__all__ = ["BusyError", "CheckpointError", "ConfigError", "DataWarning", "InputError", "OutputError", "PerfVitError"]


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
