"""Values of dataclasses held against the types of their fields, for what files fill in."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from perf_vit.errors import ConfigError

__all__ = ["check_values"]


def check_values(instance: Any, prefix: str = "") -> None:
    """Refuse a dataclass with a value that isn't of its field's type.

    Dataclasses themselves check nothing, and OmegaConf lets nested lists pass for lists of text. An integer is a
    floating-point number, too, and a tuple a list; `Any`, and types other than those of configs, fit everything.

    Args:
        instance: of a dataclass, with dataclasses inside.
        prefix: of the names in the message, "data.".

    Raises:
        ConfigError: names the first such field, the type and the value.
    """
    hints = typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value, hint = getattr(instance, field.name), hints[field.name]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            check_values(value, f"{prefix}{field.name}.")
        elif not _fits(value, hint):
            raise ConfigError(f"{prefix}{field.name} must be {_name(hint)}, got {value!r:.100}")


def _name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple and inner[-1] is not Ellipsis:
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(_fits, value, inner))
    if origin in (tuple, list):
        # In Python, whoever makes a config by hand gives either.
        return isinstance(value, tuple | list) and all(_fits(each, inner[0]) for each in value)
    if origin in (dict, Mapping):
        pairs = value.items() if isinstance(value, Mapping) else [(None, None)]
        return isinstance(value, Mapping) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in pairs)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool, types.NoneType):
        return isinstance(value, hint)
    return not dataclasses.is_dataclass(hint) or isinstance(value, typing.cast(type, hint))
