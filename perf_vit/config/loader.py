"""YAML + dotted overrides -> an instance of a dataclass schema, with errors that name the key."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from perf_vit.config.shipped import find_config
from perf_vit.config.values import check_values
from perf_vit.config.yaml_text import check_interpolations, load_yaml
from perf_vit.errors import ConfigError, reason_line

__all__ = ["config_value", "dump_config", "is_dumped", "load_config"]

T = TypeVar("T")

_DUMPED = "# Resolved config of a run of perf-vit.\n"


def load_config(path: str | Path, schema: type[T], overrides: Sequence[str] = ()) -> T:
    """Load a YAML file onto a schema.

    A top-level `extends: other.yaml` (relative to the file, or a shipped name) is loaded first and overridden key by
    key. Keys that the schema doesn't have, values of another type and required values left out are errors. `${key}` is
    the value of another key; resolvers such as `${oc.env:NAME}` are for overrides alone.

    Args:
        path: a YAML file, or the name of a shipped config.
        schema: a dataclass, nested as deeply as the YAML.
        overrides: "dotted.key=value" pairs, applied last; values are parsed as YAML.

    Returns:
        An instance of the schema, nested dataclasses included.

    Raises:
        ConfigError: one line that names the key or file.
    """
    merged = _merged(path, overrides)
    for prefix, keys, known in _unknown_keys(merged, schema):
        raise ConfigError(_unknown_key_message(prefix, keys, known))
    with _one_line(path):
        typed = OmegaConf.merge(OmegaConf.structured(schema), merged)
        missing = sorted(OmegaConf.missing_keys(typed))
        if missing:
            raise ConfigError(f"{path}: give {' '.join(f'{key}=...' for key in missing)}")
        loaded = cast(T, OmegaConf.to_object(typed))
    _make_tuples(loaded)
    check_values(loaded)
    return loaded


def config_value(path: str | Path, key: str, overrides: Sequence[str] = (), default: Any = None) -> Any:
    """One top-level value of a YAML file, with bases and overrides, before its schema is known.

    Raises:
        ConfigError: one line that names the key or file.
    """
    with _one_line(path):
        return _merged(path, overrides).get(key, default)


def dump_config(config: Any, path: Path) -> None:
    """Write a schema instance as YAML that `load_config` reads back and `is_dumped` recognises."""
    path.write_text(_DUMPED + OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def is_dumped(path: Path) -> bool:
    """Whether a file was written by `dump_config`, as its first line says."""
    try:
        with path.open("rb") as file:
            return file.read(len(_DUMPED)) == _DUMPED.encode()
    except OSError:
        return False


@contextmanager
def _one_line(path: str | Path) -> Iterator[None]:
    """What OmegaConf says of values that don't fit, with the key, as a `ConfigError`."""
    try:
        yield
    except OmegaConfBaseException as error:
        text = str(error.msg or error).strip().splitlines()
        raise ConfigError(f"{error.full_key or path}: {text[0] if text else type(error).__name__}") from error
    # Integers of more digits than a float holds, text without an encoding: OmegaConf passes these on.
    except (ArithmeticError, UnicodeError) as error:
        raise ConfigError(f"{path}: {reason_line(error)}") from error


def _merged(path: str | Path, overrides: Sequence[str]) -> DictConfig:
    with _one_line(path):
        merged = OmegaConf.create(_read_with_bases(find_config(path), seen=()))
        merged.merge_with(_parse_overrides(overrides))
        return merged


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path} extends itself; remove the circle")
    content = _read_yaml(path)
    base = content.pop("extends", None)
    if base is None:
        return content
    beside = path.parent / str(base)
    parent = _read_with_bases(beside if beside.is_file() else find_config(str(base)), (*seen, path.resolve()))
    merged = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.merge(parent, content)))
    check_interpolations(merged, path)
    return merged


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    # The parser raises other errors than its own on odd numbers, dates and nesting.
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, got {type(content).__name__}")
    # Before any merge, which resolves some of them.
    check_interpolations(content, path)
    return content


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"overrides are key=value, got {item!r}")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"can't read the overrides {list(overrides)}: {reason_line(error)}") from error


def _unknown_keys(config: Mapping[Any, Any], schema: type, prefix: str = "") -> Iterator[tuple[str, str, list[str]]]:
    """(prefix, key, known keys) of every key that the schema lacks."""
    hints = typing.get_type_hints(schema)
    known = [field.name for field in dataclasses.fields(cast(Any, schema))]
    for key in config:
        if key not in known:
            yield prefix, str(key), known
            continue
        nested = _dataclass_in(hints[key])
        value = None if OmegaConf.is_missing(config, key) else config[key]
        if nested is not None and isinstance(value, Mapping | DictConfig):
            yield from _unknown_keys(value, nested, f"{prefix}{key}.")


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that a hint holds, looking through `X | None`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)), None)


def _make_tuples(config: Any) -> None:
    """Turn lists under fields that are tuples into such: OmegaConf does so from 2.4 on only."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            _make_tuples(value)
        elif isinstance(value, list) and _holds_tuple(hints[field.name]):
            setattr(config, field.name, tuple(value))


def _holds_tuple(hint: Any) -> bool:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return any(typing.get_origin(option) is tuple for option in options)


def _unknown_key_message(prefix: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"Did you mean: '{near[0]}'?" if near else f"Known: {', '.join(known)}"
    where = f" in '{prefix.rstrip('.')}'" if prefix else ""
    return f"Key '{key}' not{where or ' in the config'}. {hint}"
