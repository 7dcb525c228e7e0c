"""Config keys from the dataclasses and their docstrings: type, default and meaning of each, and a JSON schema."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from perf_vit.config.values import MISSING, dataclass_in, hints_of, options_of_hint, shown, type_in_words

__all__ = ["ConfigKey", "config_keys", "field_meanings", "json_schema"]


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
    hints, meanings = hints_of(schema), field_meanings(schema)
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


_INTERPOLATION = {"type": "string", "pattern": r"\$\{.+\}|^\?\?\?$"}


def json_schema(schemas: Mapping[str, type], default: str) -> dict[str, Any]:
    """Return a JSON schema of config files, with which editors complete and check keys.

    Keys that a run requires may be left out of a file, as the command line or an `extends` gives them.

    Args:
        schemas: Dataclass of the configs of each task, by the value of the key `task`.
        default: Task of configs without this key.
    """
    definitions: dict[str, Any] = {}
    for schema in schemas.values():
        _define(schema, definitions)
    for schema in schemas.values():
        properties = definitions[schema.__name__]["properties"]
        properties["task"] = {"enum": [task for task, each in schemas.items() if each is schema]}
        properties["extends"] = {"description": "Config that this one changes.", "type": "string"}
    by_task = [
        {"if": {"properties": {"task": {"const": task}}, "required": ["task"]}, "then": _reference(schema)}
        for task, schema in schemas.items()
    ]
    elsewhere = {"anyOf": [{"required": ["task"]}, {"required": ["extends"]}]}
    others = {"if": {"not": elsewhere}, "then": _reference(schemas[default])}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Config of perf-vit",
        "type": "object",
        "properties": {"task": {"enum": list(schemas), "default": default}},
        "allOf": [*by_task, others],
        "$defs": definitions,
    }


def _reference(schema: type) -> dict[str, str]:
    return {"$ref": f"#/$defs/{schema.__name__}"}


def _define(schema: type, definitions: dict[str, Any]) -> None:
    if schema.__name__ in definitions:
        return
    definitions[schema.__name__] = {}
    hints, meanings = hints_of(schema), field_meanings(schema)
    properties = {}
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        described = {"description": meanings.get(field.name, "")}
        if field.default is not dataclasses.MISSING and field.default != MISSING:
            described["default"] = field.default
        properties[field.name] = {**described, **_schema_of(hint, definitions)}
    definitions[schema.__name__] = {
        "title": schema.__name__,
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


_SIMPLE: dict[Any, dict[str, Any]] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    str: {"type": ["string", "number", "boolean"]},
    type(None): {"type": "null"},
}


def _schema_of(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    choices = [each for option in options_of_hint(hint) for each in _choices(option, definitions)]
    if {} in choices:
        return {}
    return {"anyOf": [*choices, _INTERPOLATION]}


def _choices(hint: Any, definitions: dict[str, Any]) -> list[dict[str, Any]]:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    nested = dataclass_in(hint)
    if nested is not None:
        _define(nested, definitions)
        short = getattr(nested, "short_schema", None)
        return [_reference(nested), *([] if short is None else [short()])]
    if origin is Literal:
        return [{"enum": list(inner)}]
    if origin in (list, tuple):
        is_fixed = origin is tuple and inner[-1] is not Ellipsis
        items = _schema_of(inner[0], definitions)
        sizes = {"minItems": len(inner), "maxItems": len(inner)} if is_fixed else {}
        return [{"type": "array", "items": items, **sizes}, *([] if is_fixed else _choices(inner[0], definitions))]
    if origin in (dict, Mapping):
        return [{"type": "object"}]
    return [_SIMPLE.get(hint, {})]
