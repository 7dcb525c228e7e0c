"""Reference of config keys: type, default and meaning of each, from the dataclasses and their docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from perf_vit.config.values import dataclass_in, shown, type_in_words

__all__ = ["ConfigKey", "config_keys", "field_meanings"]


@dataclass(frozen=True, kw_only=True)
class ConfigKey:
    """One key of a config.

    Attributes:
        name: Dotted key, such as "data.augment.flips".
        group: Section of the config, such as "data"; "run" for keys outside of all sections.
        type: Type in words.
        default: Default as a config writes it; None for a required key.
        meaning: Meaning, from the docstring of the dataclass that declares the key.
    """

    name: str
    group: str
    type: str
    default: str | None
    meaning: str


def config_keys(schema: type, prefix: str = "") -> list[ConfigKey]:
    """List the keys of a config with type, default and meaning.

    Args:
        schema: Dataclass of the config, such as `perf_vit.workflows.run_config.SegmentationRun`.
        prefix: Prefix of the keys, such as "data.".

    Returns:
        The keys by section, in the order of the fields; a nested dataclass is a key for each of its fields, and one
        that may be null is a key of its own, too.
    """
    keys = list(_keys(schema, prefix))
    return sorted(keys, key=lambda key: _SECTIONS.index(key.group) if key.group in _SECTIONS else len(_SECTIONS))


_SECTIONS = ("run", "data", "model", "optim", "trainer")


def _keys(schema: Any, prefix: str) -> Iterator[ConfigKey]:
    hints, meanings = typing.get_type_hints(schema), field_meanings(schema)
    for field in dataclasses.fields(schema):
        hint, name = hints[field.name], f"{prefix}{field.name}"
        nested = dataclass_in(hint)
        if nested is None or nested is not hint:
            yield ConfigKey(
                name=name,
                group=name.partition(".")[0] if "." in name else "run",
                type=type_in_words(hint).removeprefix("a "),
                default=_default(field),
                meaning=meanings.get(field.name, ""),
            )
        if nested is not None:
            yield from _keys(nested, f"{name}.")


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default is not dataclasses.MISSING:
        return _written(field.default)
    if field.default_factory is dataclasses.MISSING:
        return None
    value = field.default_factory()
    return "{...}" if dataclasses.is_dataclass(value) else _written(value)


def _written(value: Any) -> str:
    return value if isinstance(value, str) and value else shown(value)


_SECTION = re.compile(r"\nAttributes:\n(.*?)(?=\n\S|\Z)", re.DOTALL)
_ENTRY = re.compile(r"^(\w+):[ \n](.*?)(?=^\w+:[ \n]|\Z)", re.DOTALL | re.MULTILINE)


def field_meanings(schema: type) -> dict[str, str]:
    """Return the meaning of each field: its entry under "Attributes:" in the docstring of a class or its base."""
    meanings: dict[str, str] = {}
    for each in reversed(schema.__mro__):
        section = _SECTION.search(f"\n{inspect.cleandoc(each.__doc__ or '')}")
        if section is None or not dataclasses.is_dataclass(each):
            continue
        for name, text in _ENTRY.findall(textwrap.dedent(section[1])):
            # As a config writes it.
            meanings[name] = re.sub(r"\bNone\b", "null", " ".join(text.split()))
    return meanings
