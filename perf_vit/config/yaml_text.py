"""Safe loading of untrusted YAML: plain values, with limits on size, depth, aliases and interpolations."""

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
"""Largest size in characters of a file with its aliases or interpolations expanded."""

NODE_CHARACTERS = 100
"""Smallest size counted for a key, value, list or mapping: time and memory depend on the number of objects."""

_LONGEST_TEXT = 1_000_000

_DEEPEST = 50


def load_yaml(text: str) -> Any:
    """Parse YAML into plain values.

    Raises:
        yaml.YAMLError: The text isn't YAML.
        ValueError: The text is too long or too deeply nested, or its aliases are recursive or expand too much.
    """
    if len(text) > _LONGEST_TEXT:
        raise ValueError(f"at most {_LONGEST_TEXT:,} characters are read, got {len(text):,}")
    _check_growth(text)
    return yaml.safe_load(text)


def _check_growth(text: str) -> None:
    # Sizes and anchors of the open lists and mappings; the first entry is the document.
    sizes, anchors = [0], [""]
    of_anchors: dict[str, int] = {}
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in anchors:
                raise ValueError(f"the alias *{event.anchor} is recursive; remove it")
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
            raise ValueError(f"at most {_DEEPEST} levels are read; nest less deeply")
        if sizes[-1] > MOST_CHARACTERS:
            raise ValueError(f"its aliases expand to more than {MOST_CHARACTERS:,} characters; write values out")


# n nested interpolations expand a value at most 3^(n / 3) times.
_GROWTH = 3 ** (1 / 3)

_LONGEST = 1000


def check_interpolations(content: Mapping[Any, Any], path: str | Path) -> None:
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
