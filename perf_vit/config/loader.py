"""Loading of configs: YAML and dotted overrides, validated against a dataclass schema."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser
from omegaconf.grammar_parser import parse

from perf_vit.config.values import (
    MISSING,
    build_config,
    dataclass_in,
    dataclass_of_items,
    hints_of,
    options_of_hint,
    shown,
)
from perf_vit.config.yaml_text import MOST_CHARACTERS, NODE_CHARACTERS, load_yaml, takes_text
from perf_vit.errors import ConfigError, reason_line

__all__ = [
    "Config",
    "Overrides",
    "as_overrides",
    "config_value",
    "dump_config",
    "find_config",
    "given_keys",
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


T = TypeVar("T")

_DUMPED = "# Resolved config of a run of perf-vit.\n"

Config: TypeAlias = str | Path | Mapping[str, Any]
"""YAML file, name of a shipped config, or mapping with the content of a config."""

Overrides: TypeAlias = str | Iterable[str] | Mapping[str, Any]
"""Mapping of dotted keys to values, or "dotted.key=value" strings or one of them, whose values are parsed as YAML."""


def as_overrides(overrides: Overrides | None) -> Mapping[str, Any] | tuple[str, ...]:
    """Return overrides that may be read more than once.

    Raises:
        ConfigError: They are neither a mapping nor strings.
    """
    if overrides is None or isinstance(overrides, Mapping):
        return {} if overrides is None else overrides
    several: Any = (overrides,) if isinstance(overrides, str) else overrides
    several = tuple(several) if isinstance(several, Iterable) else (several,)
    for item in several:
        if not isinstance(item, str):
            raise ConfigError(
                f"overrides must be a mapping of keys to values, or texts such as optim.lr=1e-4, got {item!r}"
            )
    return several


def load_config(config: Config, schema: type[T], overrides: Overrides = ()) -> T:
    """Load a config into a dataclass.

    A top-level `extends: other.yaml` (relative to the file, or a shipped name) is loaded first. Groups of keys are
    merged key by key; other values are replaced, also mappings such as `head_kwargs`. Values are converted to the
    types of their keys as in `perf_vit.config.build_config`. Unknown keys, values that don't fit and missing required
    values are errors. `${key}` refers to the value of another key; resolvers such as `${oc.env:NAME}` are allowed in
    overrides only.

    Args:
        config: YAML file, name of a shipped config, or mapping with the content of a config.
        schema: Dataclass, possibly nested.
        overrides: Values by dotted key, or "dotted.key=value" strings, whose values are parsed as YAML; applied last. A
            mapping replaces the value of its key; top-level sections are merged.

    Returns:
        Instance of the schema.

    Raises:
        ConfigError: The config is invalid; the one-line message names the key or file.
    """
    path, merged = _name_of(config), _merged(config, overrides, schema)
    for prefix, key, known in _unknown_keys(merged, schema):
        raise ConfigError(_unknown_key_message(prefix, key, known, schema))
    with _one_line(path):
        # Interpolations may refer to defaults.
        complete = OmegaConf.create(_merge(_defaults(schema), merged, schema))
        values = cast(dict[str, Any], OmegaConf.to_container(complete, resolve=True))
    return build_config(schema, values, str(path))


def config_value(config: Config, key: str, overrides: Overrides = (), default: Any = None) -> Any:
    """Return a top-level value of a config after bases and overrides, without a schema.

    Raises:
        ConfigError: The config is invalid; the one-line message names the key or file.
    """
    with _one_line(_name_of(config)):
        return OmegaConf.create(_merged(config, overrides)).get(key, default)


def given_keys(config: Config) -> set[str]:
    """Return the dotted keys that a config and its bases give, groups included.

    Raises:
        ConfigError: The config is invalid.
    """

    def walk(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
        for key, value in values.items():
            yield f"{prefix}{key}"
            if isinstance(value, Mapping):
                yield from walk(value, f"{prefix}{key}.")

    return set(walk(_merged(config, ()), ""))


def dump_config(config: Any, path: Path) -> None:
    """Write a dataclass as YAML that `load_config` can read and `is_dumped` recognises."""
    path.write_text(_DUMPED + OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config))), encoding="utf-8")


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


def _defaults(schema: Any) -> dict[str, Any]:
    """Return the default of each key as plain values, "???" for required ones."""
    values: dict[str, Any] = {}
    hints = hints_of(schema)
    for field in dataclasses.fields(schema):
        if field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = _defaults(hints[field.name]) if dataclasses.is_dataclass(hints[field.name]) else MISSING
        is_group = dataclasses.is_dataclass(value) and not isinstance(value, type)
        values[field.name] = dataclasses.asdict(cast(Any, value)) if is_group else value
    return values


def _merged(config: Config, overrides: Overrides, schema: Any = None) -> dict[str, Any]:
    name = _name_of(config)
    with _one_line(name):
        if isinstance(config, Mapping):
            content = _plain(config)
            _check_interpolations(content, name)
            merged = _with_base(content, Path(), (), schema)
        else:
            merged = _read_with_bases(find_config(config), (), schema)
    for key, value in _parsed(as_overrides(overrides), schema):
        merged = _assigned(merged, key, value, schema, name)
    return merged


def _plain(value: Any) -> Any:
    """Convert values to those of YAML: no paths, tuples or other mappings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _read_with_bases(path: Path, seen: tuple[Path, ...], schema: Any) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path} extends itself; remove the cycle")
    return _with_base(_read_yaml(path, schema), path, (*seen, path.resolve()), schema)


def _with_base(content: dict[str, Any], path: Path, seen: tuple[Path, ...], schema: Any) -> dict[str, Any]:
    """Merge a config onto that of its key `extends`, whose path is relative to `path`."""
    base = content.pop("extends", None)
    if base is None:
        return content
    beside = path.parent / str(base)
    parent = _read_with_bases(beside if beside.is_file() else find_config(str(base)), seen, schema)
    merged = _merge(parent, content, schema)
    _check_interpolations(merged, path)
    return merged


def _merge(base: dict[str, Any], changes: Mapping[str, Any], schema: Any) -> dict[str, Any]:
    """Replace values of a config, groups of keys key by key; without a schema, all mappings are groups."""
    hints = {} if schema is None else hints_of(schema)
    merged = dict(base)
    for key, value in changes.items():
        group, before = dataclass_in(hints.get(key)), merged.get(key)
        is_group = (schema is None or group is not None) and isinstance(before, dict) and isinstance(value, Mapping)
        merged[key] = _merge(cast(dict[str, Any], before), value, group) if is_group else value
    return merged


def _read_yaml(path: Path, schema: Any) -> dict[str, Any]:
    try:
        content = load_yaml(path.read_text(encoding="utf-8"), Any if schema is None else schema)
    # On malformed numbers, dates and deep nesting the parser raises builtin exceptions.
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, got {type(content).__name__}")
    # Checked before merging, which resolves some interpolations.
    _check_interpolations(content, path)
    return content


def _parsed(overrides: Mapping[str, Any] | tuple[str, ...], schema: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            yield key, _plain(value)
        return
    for item in overrides:
        key, sign, text = item.partition("=")
        if item.startswith("-"):
            raise ConfigError(f"overrides have no dashes, got {item!r}; write {key.lstrip('-')}={text or 'VALUE'}")
        if not sign or not key:
            raise ConfigError(f"overrides must be key=value, got {item!r}; {_as_override(item)}")
        yield key.strip(), _parsed_value(key.strip(), text, schema)


def _as_override(item: str) -> str:
    key, colon, value = item.partition(":")
    return f"write {key}={value.strip()}" if colon and value else "add the value"


def _parsed_value(key: str, text: str, schema: Any) -> Any:
    hint = _hint_of(key, schema)
    text = text.strip()
    if takes_text(hint) and text and text[0] not in "[{\"'" and text not in ("null", "~"):
        # Not YAML, which ends at " #" and reads "a: b" as a mapping.
        return text
    if _is_list(hint) and "," in text and text[0] not in "[{\"'":
        text = f"[{text}]"
    try:
        return load_yaml(text, hint)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        if schema is None:
            # Another key is asked for; the schema tells whether this one is text.
            return text
        problem = getattr(error, "problem", None) or reason_line(error)
        raise ConfigError(
            f"can't read {key}={text:.100}: {problem}; close brackets and quote text with special characters"
        ) from error


def _is_list(hint: Any) -> bool:
    """Return whether a key takes nothing but lists, so that commas separate their items."""
    options = [each for each in options_of_hint(hint) if each is not type(None)]
    return bool(options) and all(typing.get_origin(each) in (list, tuple) for each in options)


def _path_of(key: str) -> list[str]:
    """Split a dotted key; items of lists are numbers, as in extra_train[0].image."""
    return [part for part in key.replace("[", ".").replace("]", "").split(".") if part]


def _hint_of(key: str, schema: Any) -> Any:
    hint = schema
    for part in _path_of(key):
        group = dataclass_in(hint)
        if group is None:
            return Any
        hint = hints_of(group).get(part, Any)
    return Any if hint is None else hint


def _assigned(tree: Any, key: str, value: Any, schema: Any, name: str | Path) -> Any:
    """Return a config with another value of a dotted key."""
    path = _path_of(key)
    if len(path) == 1 and isinstance(value, dict) and isinstance(tree.get(path[0]), dict):
        return _merge(tree, {path[0]: value}, schema)
    return _with_value(tree, path, value, "", name)


def _with_value(tree: Any, path: Sequence[str], value: Any, above: str, name: str | Path) -> Any:
    if not path:
        return value
    first, rest = path[0], path[1:]
    here = f"{above}.{first}" if above else first
    if isinstance(tree, list) and first.isdigit() and int(first) < len(tree):
        place = int(first)
        return [*tree[:place], _with_value(tree[place], rest, value, here, name), *tree[place + 1 :]]
    if tree is not None and tree != MISSING and not isinstance(tree, dict):
        raise ConfigError(f"{name}: {above} must be a mapping to set {here}, got {shown(tree)}; give all of {above}")
    before = tree if isinstance(tree, dict) else {}
    return {**before, first: _with_value(before.get(first), rest, value, here, name)}


def _unknown_keys(config: Mapping[Any, Any], schema: type, prefix: str = "") -> Iterator[tuple[str, str, list[str]]]:
    """Yield (prefix, key, known keys) of every key that the schema lacks."""
    hints = hints_of(schema)
    known = [field.name for field in dataclasses.fields(cast(Any, schema))]
    for key, value in config.items():
        if key not in known:
            yield prefix, str(key), known
            continue
        nested = dataclass_in(hints[key])
        if nested is not None and isinstance(value, Mapping):
            yield from _unknown_keys(value, nested, f"{prefix}{key}.")
        of_items = dataclass_of_items(hints[key])
        # A single item may stand for a list.
        for place, item in enumerate(value if isinstance(value, list) else [value]):
            if of_items is not None and isinstance(item, Mapping):
                yield from _unknown_keys(item, of_items, f"{prefix}{key}[{place}].")


def _unknown_key_message(prefix: str, key: str, known: list[str], schema: type) -> str:
    elsewhere = [name for name in _all_keys(schema) if name.rpartition(".")[2] == key]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    near = near if not elsewhere or (near and difflib.SequenceMatcher(None, key, near[0]).ratio() > 0.8) else elsewhere
    hint = f"Did you mean: '{near[0]}'?" if near else f"Known: {', '.join(known)}"
    where = f" in '{prefix.rstrip('.')}'" if prefix else ""
    return f"Key '{key}' not{where or ' in the config'}. {hint}"


def _all_keys(schema: type, prefix: str = "") -> Iterator[str]:
    for name, hint in hints_of(schema).items():
        yield f"{prefix}{name}"
        if (nested := dataclass_in(hint)) is not None:
            yield from _all_keys(nested, f"{prefix}{name}.")


# n nested interpolations expand a value at most 3^(n / 3) times.
_GROWTH = 3 ** (1 / 3)

_LONGEST = 1000


def _check_interpolations(content: Mapping[Any, Any], path: str | Path) -> None:
    """Refuse resolvers, such as `${oc.env:NAME}`, and interpolations that could expand a config too much.

    Resolvers read the environment, which a file from elsewhere must not do; overrides may use them.

    Raises:
        ConfigError: A value has one; the message names the key.
    """
    size, count = 0, 0
    for key, value in _leaves(content):
        size += NODE_CHARACTERS + len(value)
        for node in _interpolations(key, value, path):
            if isinstance(node, OmegaConfGrammarParser.InterpolationResolverContext):
                raise ConfigError(
                    f"{path}: {key} uses the resolver {node.getText()}, which a file must not; give the value on the "
                    f"command line, {key}='{node.getText()}'"
                )
            count += 1
    if count and size * _GROWTH**count > MOST_CHARACTERS:
        raise ConfigError(f"{path} has {count} interpolations, too many for its size; write some of their values out")


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, text) of all values except mappings and lists."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _leaves(each, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for place, each in enumerate(value):
            yield from _leaves(each, f"{key}.{place}")
    else:
        yield key, str(value)


def _interpolations(key: str, text: str, path: str | Path) -> Iterator[Any]:
    if "${" not in text:
        return
    if len(text) > _LONGEST:
        raise ConfigError(f"{path}: {key} is an interpolation of {len(text)} characters; at most {_LONGEST} are read")
    try:
        nodes: list[Any] = [parse(text)]
    except (GrammarParseError, RecursionError) as error:
        raise ConfigError(f"{path}: {key} is not a valid interpolation: {text:.80}") from error
    while nodes:
        node = nodes.pop()
        nodes.extend(getattr(node, "children", None) or ())
        kinds = (
            OmegaConfGrammarParser.InterpolationNodeContext,
            OmegaConfGrammarParser.InterpolationResolverContext,
        )
        if isinstance(node, kinds):
            yield node
