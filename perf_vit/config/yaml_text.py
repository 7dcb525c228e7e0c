"""YAML of unknown origin: plain values, and no more of them than the text could hold without its aliases."""

from __future__ import annotations

from typing import Any

import yaml

__all__ = ["MOST_CHARACTERS", "NODE_CHARACTERS", "load_yaml"]

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
