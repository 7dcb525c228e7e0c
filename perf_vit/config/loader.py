"""Loading of configs: YAML and dotted overrides, validated against a dataclass schema."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from perf_vit.config.yaml_text import check_interpolations, load_yaml
from perf_vit.errors import ConfigError, reason_line

__all__ = [
    "Config",
    "Overrides",
    "check_values",
    "config_value",
    "dump_config",
    "find_config",
    "is_dumped",
    "load_config",
    "shipped_configs",
]

_PACKAGE = Path(__file__).resolve().parent.parent


def _folder() -> Path:
    installed = _PACKAGE / "_configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def shipped_configs() -> list[str]:
    """Return the names of the shipped configs, such as "configs/segmentation/buildings.yaml"."""
    folder = _folder()
    return sorted(f"configs/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.yaml"))


def find_config(name: str | Path) -> Path:
    """Return the path of a config: an existing file, or else a shipped config with that name.

    Args:
        name: Path, or name of a shipped config with or without the leading "configs/" and the ending ".yaml".

    Raises:
        ConfigError: Neither exists; the message names the closest shipped config.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = path.as_posix().removeprefix("configs/").removesuffix(".yaml")
    if (file := _folder() / f"{shipped}.yaml").is_file():
        return file
    near = difflib.get_close_matches(str(name), shipped_configs(), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"shipped: {', '.join(shipped_configs())}"
    raise ConfigError(f"no config file {name}; {hint}")


def check_values(instance: Any, prefix: str = "") -> None:
    """Check the values of a dataclass against the types of its fields.

    Dataclasses don't check types, and OmegaConf accepts nested lists for lists of strings. Integers are accepted as
    floats, and tuples as lists; `Any` and types that configs don't use accept everything.

    Args:
        instance: Dataclass instance, possibly nested.
        prefix: Prefix of field names in the message, such as "data.".

    Raises:
        ConfigError: A value has another type; the message names the field, the type and the value.
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
    return not dataclasses.is_dataclass(hint) or isinstance(value, typing.cast(type, hint))


T = TypeVar("T")

_DUMPED = "# Resolved config of a run of perf-vit.\n"

Config: TypeAlias = str | Path | Mapping[str, Any]
"""YAML file, name of a shipped config, or mapping with the content of a config."""

Overrides: TypeAlias = Sequence[str] | Mapping[str, Any]
"""Mapping of dotted keys to values, or "dotted.key=value" strings, whose values are parsed as YAML."""


def load_config(config: Config, schema: type[T], overrides: Overrides = ()) -> T:
    """Load a config into a dataclass.

    A top-level `extends: other.yaml` (relative to the file, or a shipped name) is loaded first and overridden key by
    key. Unknown keys, values of another type and missing required values are errors. `${key}` refers to the value of
    another key; resolvers such as `${oc.env:NAME}` are allowed in overrides only.

    Args:
        config: YAML file, name of a shipped config, or mapping with the content of a config.
        schema: Dataclass, possibly nested.
        overrides: Values by dotted key, or "dotted.key=value" strings, whose values are parsed as YAML; applied last.

    Returns:
        Instance of the schema.

    Raises:
        ConfigError: The config is invalid; the one-line message names the key or file.
    """
    path, merged = _name_of(config), _merged(config, overrides)
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


def config_value(config: Config, key: str, overrides: Overrides = (), default: Any = None) -> Any:
    """Return a top-level value of a config after bases and overrides, without a schema.

    Raises:
        ConfigError: The config is invalid; the one-line message names the key or file.
    """
    with _one_line(_name_of(config)):
        return _merged(config, overrides).get(key, default)


def dump_config(config: Any, path: Path) -> None:
    """Write a dataclass as YAML that `load_config` can read and `is_dumped` recognises."""
    path.write_text(_DUMPED + OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def is_dumped(path: Path) -> bool:
    """Return whether a file was written by `dump_config`, according to its first line."""
    try:
        with path.open("rb") as file:
            return file.read(len(_DUMPED)) == _DUMPED.encode()
    except OSError:
        return False


@contextmanager
def _one_line(path: str | Path) -> Iterator[None]:
    """Convert OmegaConf's errors to a one-line `ConfigError` with the key."""
    try:
        yield
    except OmegaConfBaseException as error:
        text = str(error.msg or error).strip().splitlines()
        raise ConfigError(f"{error.full_key or path}: {text[0] if text else type(error).__name__}") from error
    # OmegaConf passes on errors of integers too large for a float and of text that can't be encoded.
    except (ArithmeticError, UnicodeError) as error:
        raise ConfigError(f"{path}: {reason_line(error)}") from error


def _name_of(config: Config) -> str | Path:
    return "the config" if isinstance(config, Mapping) else config


def _merged(config: Config, overrides: Overrides) -> DictConfig:
    name = _name_of(config)
    with _one_line(name):
        if isinstance(config, Mapping):
            content = _plain(config)
            check_interpolations(content, name)
            merged = OmegaConf.create(_with_base(content, Path(), ()))
        else:
            merged = OmegaConf.create(_read_with_bases(find_config(config), seen=()))
        if isinstance(overrides, Mapping):
            for key, value in overrides.items():
                OmegaConf.update(merged, key, _plain(value))
        else:
            merged.merge_with(_parse_overrides(overrides))
        return merged


def _plain(value: Any) -> Any:
    """Convert values to those of YAML: no paths, tuples or other mappings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path} extends itself; remove the cycle")
    return _with_base(_read_yaml(path), path, (*seen, path.resolve()))


def _with_base(content: dict[str, Any], path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Merge a config onto that of its key `extends`, whose path is relative to `path`."""
    base = content.pop("extends", None)
    if base is None:
        return content
    beside = path.parent / str(base)
    parent = _read_with_bases(beside if beside.is_file() else find_config(str(base)), seen)
    merged = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.merge(parent, content)))
    check_interpolations(merged, path)
    return merged


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    # On malformed numbers, dates and deep nesting the parser raises builtin exceptions.
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, got {type(content).__name__}")
    # Checked before merging, which resolves some interpolations.
    check_interpolations(content, path)
    return content


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"overrides must be key=value, got {item!r}; add the value")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"can't read the overrides {list(overrides)}: {reason_line(error)}") from error


def _unknown_keys(config: Mapping[Any, Any], schema: type, prefix: str = "") -> Iterator[tuple[str, str, list[str]]]:
    """Yield (prefix, key, known keys) of every key that the schema lacks."""
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
    """Return the dataclass of a type hint, also for `X | None`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)), None)


def _make_tuples(config: Any) -> None:
    """Convert lists of tuple fields to tuples, which OmegaConf does from version 2.4."""
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
