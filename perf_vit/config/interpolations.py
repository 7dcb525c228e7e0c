"""What `${...}` in a config file may do: name other keys of the config, and not without end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf.errors import GrammarParseError
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser
from omegaconf.grammar_parser import parse

from perf_vit.config.yaml_text import MOST_CHARACTERS, NODE_CHARACTERS
from perf_vit.errors import ConfigError

__all__ = ["check_interpolations"]

# n interpolations, each of values that hold others, write one value out at most 3^(n / 3) times.
_GROWTH = 3 ** (1 / 3)
_LONGEST = 1000


def check_interpolations(content: Mapping[Any, Any], path: Path) -> None:
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


def _interpolations(key: str, text: str, path: Path) -> Iterator[Any]:
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
