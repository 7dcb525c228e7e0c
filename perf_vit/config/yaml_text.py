"""YAML of unknown origin: plain values, and no more of them than the text could hold without its aliases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf.errors import GrammarParseError
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser
from omegaconf.grammar_parser import parse

from perf_vit.errors import ConfigError

__all__ = ["MOST_CHARACTERS", "NODE_CHARACTERS", "check_interpolations", "load_yaml"]

MOST_CHARACTERS = 20_000_000
"""What a file may come to once its aliases, or a config's interpolations, are written out."""

NODE_CHARACTERS = 100
"""What a key, a value, a list or a mapping counts at least: what takes time and memory are objects."""

_LONGEST_TEXT = 1_000_000

_DEEPEST = 50


def load_yaml(text: str) -> Any:
    """Plain values from YAML.

    Raises:
        yaml.YAMLError: text that isn't YAML.
        ValueError: text that is too long or nested too deeply, or whose aliases make too much of it or hold themselves.
    """
    if len(text) > _LONGEST_TEXT:
        raise ValueError(f"at most {_LONGEST_TEXT:,} characters are read, got {len(text):,}")
    _check_growth(text)
    return yaml.safe_load(text)


def _check_growth(text: str) -> None:
    # Sizes of the lists and mappings that are open, with their anchors; the first one is the document's.
    sizes, anchors = [0], [""]
    of_anchors: dict[str, int] = {}
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in anchors:
                raise ValueError(f"the alias *{event.anchor} stands within what it names")
            sizes[-1] += of_anchors.get(event.anchor or "", 0)
        elif isinstance(event, yaml.ScalarEvent):
            size = NODE_CHARACTERS + len(event.value)
            of_anchors[event.anchor or ""] = size
            sizes[-1] += size
        elif isinstance(event, yaml.CollectionStartEvent):
            sizes.append(NODE_CHARACTERS)
            anchors.append(event.anchor or "")
        elif isinstance(event, yaml.CollectionEndEvent):
            size, anchor = sizes.pop(), anchors.pop()
            of_anchors[anchor] = size
            sizes[-1] += size
        if len(sizes) > _DEEPEST:
            raise ValueError(f"at most {_DEEPEST} levels are read")
        if sizes[-1] > MOST_CHARACTERS:
            raise ValueError(f"its aliases make more than {MOST_CHARACTERS:,} characters of it; write values out")


# n interpolations, each of values that hold others, write one value out at most 3^(n / 3) times.
_GROWTH = 3 ** (1 / 3)

_LONGEST = 1000


def check_interpolations(content: Mapping[Any, Any], path: str | Path) -> None:
    """Refuse resolvers, such as `${oc.env:NAME}`, and interpolations that could make too much of a config file.

    Resolvers read the environment, which is no business of a file from elsewhere; overrides may use them.

    Raises:
        ConfigError: names the key.
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
    """(dotted key, text) of all values that aren't mappings or lists."""
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
        raise ConfigError(f"{path}: {key} is no interpolation that OmegaConf reads: {text:.80}") from error
    while nodes:
        node = nodes.pop()
        nodes.extend(getattr(node, "children", None) or ())
        kinds = (
            OmegaConfGrammarParser.InterpolationNodeContext,
            OmegaConfGrammarParser.InterpolationResolverContext,
        )
        if isinstance(node, kinds):
            yield node
