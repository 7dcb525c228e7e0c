"""Damage done to the values inside JSON, YAML, XML, CSV, checkpoints and model folders."""

from __future__ import annotations

import copy
import io
import json
import re
import struct
import zipfile
from typing import Any

import torch
import yaml
from fuzzing.mutations import Rng, flip_bits, huge_number, overwrite

__all__ = [
    "mutate_checkpoint",
    "mutate_checkpoint_member",
    "mutate_json",
    "mutate_safetensors",
    "mutate_text",
    "mutate_tree",
    "mutate_yaml",
]

_STRANGE: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    0.5,
    10**6,
    10**12,
    2**63,
    10**400,
    float("nan"),
    float("inf"),
    -float("inf"),
    1e308,
    "",
    "x",
    "0",
    "../..",
    "[bold]",
    "${oc.env:HOME}",
    "\ud7ff\u0000é",
    "a" * 5000,
    [],
    {},
    [None],
    [[]],
    {"": None},
    [1e400] * 3,
)
_WORDS = ("", "0", "-1", "1e400", "nan", "inf", "99999999999999999999", "1e6", "100000", "x", "é", '"', "\x00", "null")
_DEPTH = 2000


def mutate_tree(tree: Any, rng: Rng) -> Any:
    """A copy of nested dicts and lists with one to three of its values replaced, deleted, repeated or nested."""
    holder = [copy.deepcopy(tree)]
    for _ in range(int(rng.integers(1, 4))):
        places = _places(holder)
        if not places:
            break
        parent, key = places[int(rng.integers(len(places)))]
        _change(parent, key, rng)
    return holder[0] if holder else None


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value, those of long lists thinned out."""
    found: list[tuple[Any, Any]] = []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:20])
    for key, value in list(items):
        found.append((tree, key))
        if isinstance(value, dict) or (isinstance(value, list) and type(value) is list):
            found += _places(value)
    return found


def _change(parent: Any, key: Any, rng: Rng) -> None:
    value = parent[key]
    action = rng.choice(["replace", "replace", "scale", "delete", "wrap", "repeat"])
    if action == "delete":
        del parent[key]
    elif action == "wrap":
        parent[key] = [value] if rng.random() < 0.5 else {"value": value}
    elif action == "repeat" and isinstance(value, list):
        parent[key] = value * int(rng.choice([0, 2, 3]))
    elif action == "scale" and isinstance(value, (int, float)):
        parent[key] = value * float(rng.choice([-1, 0, 1e-6, 0.5, 1000, 1e12]))
    elif action == "scale" and isinstance(value, torch.Tensor):
        parent[key] = value[..., :1] if value.ndim else value.reshape(1)
    else:
        parent[key] = copy.deepcopy(_STRANGE[int(rng.integers(len(_STRANGE)))])


def mutate_json(data: bytes, other: bytes, rng: Rng) -> bytes:
    """Change values of a JSON file; now and then repeat a key, or nest deeply."""
    try:
        tree = json.loads(data)
    except ValueError:
        return mutate_text(data, other, rng)
    choice = rng.random()
    if choice < 0.05:
        return b"[" * _DEPTH * 50 + data + b"]" * _DEPTH * 50
    text = json.dumps(mutate_tree(tree, rng))
    if choice < 0.15:
        keys = re.findall(r'"\w+": ', text)
        text = text.replace("{", "{" + keys[int(rng.integers(len(keys)))] + "0, ", 1) if keys else text
    return text.encode("utf-8", "surrogatepass")


def mutate_yaml(data: bytes, other: bytes, rng: Rng) -> bytes:
    """Change values of a YAML file; now and then nest deeply."""
    if rng.random() < 0.05:
        return data + b"\nseed: " + b"[" * _DEPTH + b"]" * _DEPTH + b"\n"
    return yaml.safe_dump(mutate_tree(yaml.safe_load(data), rng)).encode()


def mutate_text(data: bytes, other: bytes, rng: Rng) -> bytes:
    """Replace a word, delete or repeat a line, or put odd bytes into a text file."""
    choice = rng.random()
    if choice < 0.6:
        words = list(re.finditer(rb"[\w.+-]+", data))
        if words:
            word = words[int(rng.integers(len(words)))]
            return data[: word.start()] + _WORDS[int(rng.integers(len(_WORDS)))].encode() + data[word.end() :]
    if choice < 0.85:
        lines = data.splitlines(keepends=True) or [b""]
        index = int(rng.integers(len(lines)))
        lines[index] *= int(rng.choice([0, 2, 3]))
        return b"".join(lines)
    place = int(rng.integers(len(data) + 1))
    odd = (b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"<", b"&a;", b"{", b"'", b"\r", b"," * 100, b"[" * 10_000)
    return data[:place] + odd[int(rng.integers(len(odd)))] + data[place:]


def mutate_checkpoint(data: bytes, other: bytes, rng: Rng) -> bytes:
    """Change values of what `torch.save` wrote: metadata mostly, or tensors."""
    content = torch.load(io.BytesIO(data), weights_only=True)
    if "perf_vit" in content and rng.random() < 0.7:
        content["perf_vit"] = mutate_tree(content["perf_vit"], rng)
    else:
        content = mutate_tree(content, rng)
    made = io.BytesIO()
    torch.save(content, made)
    return made.getvalue()


def mutate_checkpoint_member(data: bytes, other: bytes, rng: Rng) -> bytes:
    """Change the bytes of one file inside a checkpoint's archive, whose checksums fit again."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(made, "w") as after:
        names = before.namelist()
        candidates = [name for name in names if name.endswith("data.pkl") or rng.random() < 0.1]
        chosen = candidates[int(rng.integers(len(candidates)))]
        for name in names:
            content = before.read(name)
            if name == chosen and content:
                content = (huge_number, flip_bits, overwrite)[int(rng.integers(3))](content, content, rng)
            after.writestr(name, content)
    return made.getvalue()


def mutate_safetensors(data: bytes, other: bytes, rng: Rng) -> bytes:
    """Change values of a safetensors file's header, whose length fits again."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.dumps(mutate_tree(json.loads(data[8 : 8 + length]), rng)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(header)) + header + data[8 + length :]
