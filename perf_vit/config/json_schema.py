"""JSON schema of config files, from the dataclasses and their docstrings."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

from perf_vit.config.reference import field_meanings
from perf_vit.config.values import MISSING, dataclass_in, options_of_hint

__all__ = ["json_schema"]

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
    hints, meanings = typing.get_type_hints(schema), field_meanings(schema)
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
