"""Values of configs: types in words, and conversion of what a user wrote to the type of a key."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Literal, TypeVar, cast

from perf_vit.errors import ConfigError
from perf_vit.registry import did_you_mean

__all__ = [
    "MISSING",
    "build_config",
    "check_values",
    "dataclass_in",
    "dataclass_of_items",
    "hints_of",
    "options_of_hint",
    "shown",
    "type_in_words",
]

T = TypeVar("T")

MISSING = "???"
"""Value of a key that isn't given yet."""

_NOTHING = ("none", "null")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")


@cache
def hints_of(schema: Any) -> Mapping[str, Any]:
    """Return the types of a dataclass's fields by name; a config asks for them many times."""
    return types.MappingProxyType(typing.get_type_hints(schema))


def options_of_hint(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def dataclass_in(hint: Any) -> type | None:
    """Return the dataclass of a type hint, also of `X | None`."""
    return next((each for each in options_of_hint(hint) if _is_dataclass(each)), None)


def dataclass_of_items(hint: Any) -> type | None:
    """Return the dataclass of the items of a list or tuple, also of `list[X] | None`."""
    lists = (each for each in options_of_hint(hint) if typing.get_origin(each) in (list, tuple))
    return next((item for each in lists for item in typing.get_args(each) if _is_dataclass(item)), None)


def _is_dataclass(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def shown(value: Any) -> str:
    """Return a value as a config writes it, shortened."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"[:100]
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {shown(each)}' for key, each in value.items())}}}"[:100]
    return f"{value!r:.100}"


def type_in_words(hint: Any) -> str:
    """Describe a type for users, such as "a list of whole numbers, as in [1, 2]"."""
    options = options_of_hint(hint)
    if len(options) > 1:
        return " or ".join(["null" if each is types.NoneType else type_in_words(each) for each in options])
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}" if len(inner) > 1 else str(inner[0])
    if origin is tuple and inner[-1] is not Ellipsis:
        example = "0.5, 2" if inner == (float, float) else ", ".join(_EXAMPLES.get(each, "a") for each in inner)
        return (
            f"{len(inner)} {_PLURALS.get(inner[0], 'values') if len(set(inner)) == 1 else 'values'} as in [{example}]"
        )
    if origin in (tuple, list):
        return _list_in_words(inner[0])
    if origin in (dict, Mapping):
        return "a mapping as in {name: value}"
    if _is_dataclass(hint):
        return f"a mapping as in {_example_of(hint)}"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    types.NoneType: "null",
    Any: "any value",
}
_PLURALS: dict[Any, str] = {int: "whole numbers", float: "numbers", bool: "of true and false", str: "texts"}
_EXAMPLES: dict[Any, str] = {int: "1", float: "0.5", bool: "true", str: "a"}
_LISTS: dict[Any, str] = {
    int: "a list of whole numbers as in [1, 2]",
    float: "a list of numbers as in [0.5, 1]",
    str: "a list of names as in [a, b]",
}


def _list_in_words(item: Any) -> str:
    return _LISTS.get(item, f"a list of {type_in_words(item)}" if _is_dataclass(item) else "a list as in [1, a]")


def _example_of(schema: Any) -> str:
    name = dataclasses.fields(schema)[0].name
    return f"{{{name}: {_EXAMPLES.get(options_of_hint(hints_of(schema)[name])[0], '...')}}}"


def check_values(instance: Any, prefix: str = "") -> None:
    """Check the values of a dataclass against the types of its fields.

    Dataclasses don't check types. Integers are accepted as floats, and tuples as lists; `Any` and types that configs
    don't use accept everything.

    Args:
        instance: Dataclass instance, possibly nested.
        prefix: Prefix of field names in the message, such as "data.".

    Raises:
        ConfigError: A value has another type; the message names the field, the type and the value.
    """
    schema: Any = type(instance)
    hints = hints_of(schema)
    for field in dataclasses.fields(instance):
        value, hint = getattr(instance, field.name), hints[field.name]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            check_values(value, f"{prefix}{field.name}.")
        elif not _fits(value, hint):
            raise _misfit(value, hint, f"{prefix}{field.name}")


def _misfit(value: Any, hint: Any, key: str) -> ConfigError:
    names = _known_names(hint)
    near = did_you_mean(value, names) if isinstance(value, str) and names else ""
    return ConfigError(f"{key} must be {type_in_words(hint)}, got {shown(value)}{near}")


def _known_names(hint: Any) -> list[str]:
    return [
        name
        for each in options_of_hint(hint)
        if typing.get_origin(each) is Literal
        for name in typing.get_args(each)
        if isinstance(name, str)
    ]


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple and inner[-1] is not Ellipsis:
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(_fits, value, inner))
    if origin in (tuple, list):
        # Configs made in Python may hold either.
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
    return not dataclasses.is_dataclass(hint) or isinstance(value, cast(type, hint))


class _MisfitError(Exception):
    """Value that isn't of a type and can't be converted to it."""


def _as_meant(value: Any, hint: Any, key: str, missing: list[str]) -> Any:
    try:
        return _converted(value, hint, key, missing)
    except _MisfitError as error:
        raise _misfit(value, hint, key) from error


def build_config(schema: type[T], values: Mapping[str, Any], origin: str = "the config") -> T:
    """Build a dataclass from plain values as a user wrote them.

    A single value where a list is expected is a list of one, "none" is null where text isn't expected, numbers may be
    text, and whole numbers may be written as 1e3. A dataclass with a static method `from_short` takes other values than
    mappings, too.

    Args:
        schema: Dataclass, possibly nested, that has all keys of the values.
        values: Values by key; "???" counts as not given, and defaults stand in for keys that aren't.
        origin: Name of the config for the message about missing keys.

    Raises:
        ConfigError: Values don't fit, or required ones are missing; the message names the key and what was expected, or
            all missing keys.
    """
    missing: list[str] = []
    built = _built(schema, values, "", missing)
    if missing:
        raise ConfigError(f"{origin}: give {' '.join(f'{name}=...' for name in sorted(missing))}")
    return cast(T, built)


def _built(schema: Any, values: Mapping[Any, Any], key: str, missing: list[str]) -> Any:
    hints, given = hints_of(schema), {}
    num_missing = len(missing)
    for field in dataclasses.fields(schema):
        name = f"{key}.{field.name}" if key else field.name
        if field.name in values and values[field.name] != MISSING:
            given[field.name] = _as_meant(values[field.name], hints[field.name], name, missing)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            missing.extend(_required(hints[field.name], name))
    if len(missing) > num_missing:
        return None
    try:
        return schema(**given)
    except ConfigError as error:
        raise ConfigError(f"{key}.{error}" if key else str(error)) from error


def _required(hint: Any, key: str) -> Iterator[str]:
    """Yield the required keys of a key that isn't given."""
    schema = hint if _is_dataclass(hint) else None
    if schema is None:
        yield key
        return
    hints = hints_of(schema)
    for field in dataclasses.fields(schema):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            yield from _required(hints[field.name], f"{key}.{field.name}")


def _converted(value: Any, hint: Any, key: str, missing: list[str]) -> Any:
    options = options_of_hint(hint)
    if len(options) > 1:
        return _one_of(value, options, key, missing)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if _is_dataclass(hint):
        return _group(value, hint, key, missing)
    if origin is Literal:
        return _literal(value, inner)
    if origin in (tuple, list):
        return _items(value, hint, key, missing)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _MisfitError
        return {
            _converted(name, inner[0], key, missing): _converted(each, inner[1], key, missing)
            for name, each in value.items()
        }
    return _SCALARS.get(hint, lambda given: given)(value)


def _one_of(value: Any, options: Sequence[Any], key: str, missing: list[str]) -> Any:
    """Convert to the first member of a union that a value is of, or else that it can be converted to."""
    takes_text = str in options
    if types.NoneType in options and isinstance(value, str) and not takes_text and value.lower() in _NOTHING:
        return None
    if value is False and types.NoneType in options and bool not in options and any(map(_is_dataclass, options)):
        return None
    for option in options:
        if _fits(value, option):
            # A whole number is a number, too.
            return _converted(value, option, key, missing)
    for option in options:
        try:
            return _converted(value, option, key, missing)
        except _MisfitError:
            continue
    raise _MisfitError


def _group(value: Any, schema: Any, key: str, missing: list[str]) -> Any:
    if isinstance(value, schema):
        return value
    short = getattr(schema, "from_short", None)
    if not isinstance(value, Mapping):
        value = None if short is None else short(value, key)
    if value is None:
        raise _MisfitError
    return _built(schema, value, key, missing)


def _literal(value: Any, known: Sequence[Any]) -> Any:
    if value in known:
        return value
    text = str(value).lower()
    for each in known:
        if str(each).lower() == text:
            return each
    raise _MisfitError


def _items(value: Any, hint: Any, key: str, missing: list[str]) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    is_fixed = origin is tuple and inner[-1] is not Ellipsis
    if not isinstance(value, list | tuple):
        if value is None or is_fixed or (isinstance(value, Mapping) and not _is_dataclass(inner[0])):
            raise _MisfitError
        value = [value]
    if is_fixed and len(value) != len(inner):
        raise _MisfitError
    items = inner if is_fixed else [inner[0]] * len(value)
    names = [f"{key}[{place}]" if _is_dataclass(item) else key for place, item in enumerate(items)]
    converted = [_converted(each, item, name, missing) for each, item, name in zip(value, items, names, strict=True)]
    return tuple(converted) if origin is tuple else converted


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return shown(value)
    if isinstance(value, str | int | float):
        return str(value)
    raise _MisfitError


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _MisfitError
    try:
        return float(value)
    except (ValueError, OverflowError) as error:
        raise _MisfitError from error


def _whole_number(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _number(value)
    if not math.isfinite(number) or number != int(number):
        raise _MisfitError
    return int(number)


def _truth(value: Any) -> bool:
    text = str(value).lower()
    if text in (*_TRUE, "1"):
        return True
    if text in (*_FALSE, "0"):
        return False
    raise _MisfitError


def _none(value: Any) -> None:
    if value is not None:
        raise _MisfitError


_SCALARS: dict[Any, Callable[[Any], Any]] = {
    str: _text,
    float: _number,
    int: _whole_number,
    bool: _truth,
    types.NoneType: _none,
}
