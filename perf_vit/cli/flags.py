"""Options in errors, under their names in Python, as the flags of the command line."""

from __future__ import annotations

import re
from typing import Any

from perf_vit.errors import OptionError, PerfVitError

__all__ = ["with_flags"]

_OPTION = re.compile(r"`(\w+)(?:=([^`]+))?`")


def with_flags(error: PerfVitError, text: str, command: Any) -> str:
    """What an error says, with flags for the options that stand in backticks: `--overwrite` for `overwrite=True`.

    Args:
        error: Error; the message of an `OptionError` begins with the name of an option.
        text: Its message.
        command: Group of all commands.
    """
    flags = {str(each.name): each for sub in command.commands.values() for each in sub.params}
    if isinstance(error, OptionError):
        name, _, rest = text.partition(" ")
        text = f"`{name}` {rest}"

    def flag(match: re.Match[str]) -> str:
        name, value = match[1], match[2]
        if name not in flags:
            return match[0]
        parameter = flags[name]
        if value == "False":
            return str((parameter.secondary_opts or parameter.opts)[0])
        first = str(parameter.opts[0])
        return first if value in (None, "True") else f"{first} {value}"

    return _OPTION.sub(flag, text)
