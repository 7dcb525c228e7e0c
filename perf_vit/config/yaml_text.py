"""Safe loading of untrusted YAML: plain values, with limits on size, depth and aliases."""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Any, Literal

import yaml

from perf_vit.config.values import hints_of, options_of_hint

__all__ = ["MOST_CHARACTERS", "NODE_CHARACTERS", "load_yaml", "takes_text"]

MOST_CHARACTERS = 20_000_000
"""Largest size in characters of a file with its aliases or interpolations expanded."""

NODE_CHARACTERS = 100
"""Smallest size counted for a key, value, list or mapping: time and memory depend on the number of objects."""

_LONGEST_TEXT = 1_000_000

_DEEPEST = 50


class _Loader(yaml.SafeLoader):
    """Safe loader for which 1e-6 is a number, as in YAML 1.2, and 2024-01-31 is text, as configs have no dates.

    It raises ValueError for what is nested too deeply, and for aliases that are recursive or expand too much.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._growth = _Growth()

    def get_event(self) -> yaml.Event:
        """Return the next event of the parser, counted."""
        event: yaml.Event = super().get_event()  # type: ignore[no-untyped-call]
        self._growth.add(event)
        return event


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_EXPONENTIAL = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?|[0-9]*\.[0-9]+)[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENTIAL, list("-+.0123456789"))

_NOT_TEXT = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float"))


def load_yaml(text: str, hint: Any = Any) -> Any:
    """Parse YAML into plain values.

    Args:
        text: YAML.
        hint: Type of the content; where it says text, unquoted words such as no, 1.10 and 2024-01-01 are text.

    Raises:
        yaml.YAMLError: The text isn't YAML.
        ValueError: The text is too long or too deeply nested, or its aliases are recursive or expand too much.
    """
    if len(text) > _LONGEST_TEXT:
        raise ValueError(f"at most {_LONGEST_TEXT:,} characters are read, got {len(text):,}")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _keep_text(node, hint)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _keep_text(node: yaml.Node, hint: Any) -> None:
    """Tag unquoted scalars as text where a type says so."""
    if hint is Any:
        return
    for option in options_of_hint(hint):
        items = typing.get_args(option)[:1] if typing.get_origin(option) in (list, tuple) else ()
        if isinstance(node, yaml.MappingNode) and isinstance(option, type) and dataclasses.is_dataclass(option):
            hints = {"<<": option, **hints_of(option)}
            for key, value in node.value:
                _keep_text(value, hints.get(str(key.value), Any))
        elif isinstance(node, yaml.SequenceNode):
            for each in node.value:
                _keep_text(each, items[0] if items else option)
        elif isinstance(node, yaml.ScalarNode) and items:
            _keep_text(node, items[0])
    if isinstance(node, yaml.ScalarNode) and node.style is None and node.tag in _NOT_TEXT and takes_text(hint):
        node.tag = "tag:yaml.org,2002:str"


def takes_text(hint: Any) -> bool:
    """Return whether scalars of a type are text; null and lists of text are left to other rules."""
    scalars = [each for each in options_of_hint(hint) if typing.get_origin(each) not in (list, tuple, dict)]
    kinds = [_text_kind(each) for each in scalars if each is not type(None) and not dataclasses.is_dataclass(each)]
    return bool(kinds) and all(kinds)


def _text_kind(hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return all(isinstance(each, str) for each in typing.get_args(hint))
    return hint is str


class _Growth:
    """Depth, and size with aliases expanded, of the YAML read so far."""

    def __init__(self) -> None:
        # Sizes and anchors of the open lists and mappings; the first entry is the document.
        self._sizes, self._anchors = [0], [""]
        self._of_anchors: dict[str, int] = {}

    def add(self, event: yaml.Event) -> None:
        """Count an event of the parser."""
        sizes, anchors = self._sizes, self._anchors
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in anchors:
                raise ValueError(f"the alias *{event.anchor} is recursive; remove it")
            sizes[-1] += self._of_anchors.get(event.anchor or "", 0)
        elif isinstance(event, yaml.ScalarEvent):
            size = NODE_CHARACTERS + len(event.value)
            self._of_anchors[event.anchor or ""] = size
            sizes[-1] += size
        elif isinstance(event, yaml.CollectionStartEvent):
            sizes.append(NODE_CHARACTERS)
            anchors.append(event.anchor or "")
        elif isinstance(event, yaml.CollectionEndEvent):
            size, anchor = sizes.pop(), anchors.pop()
            self._of_anchors[anchor] = size
            sizes[-1] += size
        if len(sizes) > _DEEPEST:
            raise ValueError(f"at most {_DEEPEST} levels are read; nest less deeply")
        if sizes[-1] > MOST_CHARACTERS:
            raise ValueError(f"its aliases expand to more than {MOST_CHARACTERS:,} characters; write values out")
