"""Configs from elsewhere: no reading of the environment, no few lines that fill the memory."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perf_vit.config import config_value, load_config
from perf_vit.errors import ConfigError, InputError
from perf_vit.labels.objects import read_object_labels


@dataclass(kw_only=True)
class Part:
    folder: str = ""
    names: list[Any] = field(default_factory=list)


@dataclass(kw_only=True)
class Schema:
    out: str = ""
    secret: str = ""
    name: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    part: Part = field(default_factory=Part)


def written(tmp_path: Path, text: str, name: str = "config.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


RESOLVERS = {
    "environment": "out: ${oc.env:PERF_VIT_SECRET}",
    "within text": "out: runs/${oc.env:PERF_VIT_SECRET}/x",
    "with a default": "out: ${oc.env:PERF_VIT_SECRET,none}",
    "in a list": "part: {names: [a, '${oc.env:PERF_VIT_SECRET}']}",
    "in a mapping": "values: {a: {b: '${oc.env:PERF_VIT_SECRET}'}}",
    "put together": "name: oc.env\nout: ${${name}:PERF_VIT_SECRET}",
    "within an interpolation": "values: {x: 1}\nout: ${values.${oc.env:PERF_VIT_SECRET}}",
    "decoded": "out: '${oc.decode:\"${oc.env:PERF_VIT_SECRET}\"}'",
    "another resolver": "out: ${oc.create:{}}",
    "under an unknown key": "unknown: ${oc.env:PERF_VIT_SECRET}",
}


@pytest.mark.parametrize("kind", RESOLVERS)
def test_a_file_reads_nothing_of_the_environment(kind: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PERF_VIT_SECRET", "hunter2")
    path = written(tmp_path, RESOLVERS[kind])
    base = written(tmp_path, "extends: config.yaml\n", "child.yaml")
    for given in (path, base):
        for load in (lambda given: load_config(given, Schema), lambda given: config_value(given, "out")):
            with pytest.raises(
                ConfigError, match=r"uses the resolver .*, which a file must not; give the value"
            ) as found:
                load(given)
            assert "hunter2" not in str(found.value)


def test_overrides_may_read_the_environment(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PERF_VIT_SECRET", "hunter2")
    path = written(tmp_path, "out: a\n")
    assert load_config(path, Schema, ["out=runs/${oc.env:PERF_VIT_SECRET}"]).out == "runs/hunter2"


def test_keys_of_the_config_may_name_each_other(tmp_path: Path) -> None:
    path = written(tmp_path, "out: runs\nname: ${out}/a\npart: {folder: '${name}/b', names: ['${out}', '\\${x}']}\n")
    loaded = load_config(path, Schema)
    assert (loaded.name, loaded.part.folder, loaded.part.names) == ("runs/a", "runs/a/b", ["runs", "${x}"])
    # As many as the regions of a usual config.
    lines = "".join(f"  k{number}: ${{out}}/{number}\n" for number in range(16))
    assert load_config(written(tmp_path, f"out: runs\nvalues:\n{lines}"), Schema).values["k15"] == "runs/15"


def aliases(levels: int, how: str) -> str:
    """Each level holds the one before twice or more."""
    lines = {"list": "[lol, lol]", "mapping": "{a: lol, b: lol}", "merge": "{a: lol, b: lol}"}
    level = {
        "list": "[*l{0}, *l{0}, *l{0}]",
        "mapping": "{{a: *l{0}, b: *l{0}, c: *l{0}}}",
        "merge": "{{<<: [*l{0}, *l{0}, *l{0}]}}",
    }
    text = f"values:\n  l0: &l0 {lines[how]}\n"
    return text + "".join(f"  l{i + 1}: &l{i + 1} {level[how].format(i)}\n" for i in range(levels))


def interpolations(levels: int, how: str) -> str:
    value = {"text": '"${{.l{0}}}${{.l{0}}}"', "mapping": "{{a: '${{values.l{0}}}', b: '${{values.l{0}}}'}}"}
    text = "values:\n  l0: lol\n"
    return text + "".join(f"  l{i + 1}: {value[how].format(i)}\n" for i in range(levels))


BOMBS = {
    "aliases in lists": aliases(20, "list"),
    "aliases in mappings": aliases(20, "mapping"),
    "merge keys": aliases(20, "merge"),
    "an alias within itself": "values: &a {x: *a}",
    "interpolations in text": interpolations(30, "text"),
    "interpolations of mappings": interpolations(30, "mapping"),
    "nested lists": "values: {x: " + "[" * 5000 + "]" * 5000 + "}",
    "nested mappings": "values: " + "{a: " * 2000 + "1" + "}" * 2000,
    "nested blocks": "\n".join(" " * i + "a:" for i in range(400)),
    "nested interpolations": "out: " + "${" * 400 + "x" + "}" * 400,
    "a long interpolation": "out: '${x}" + "a" * 100_000 + "'",
    "a long file": "out: " + "a" * 2_000_000,
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_makes_no_large_config(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path, BOMBS[kind])
    for load in (lambda: load_config(path, Schema), lambda: config_value(path, "out")):
        start = time.process_time()
        with pytest.raises(ConfigError, match=r"config\.yaml"):
            load()
        assert time.process_time() - start < 5


def test_two_files_make_no_larger_config_than_one(tmp_path: Path) -> None:
    base = written(tmp_path, interpolations(8, "text"), "base.yaml")
    assert len(load_config(base, Schema).values["l8"]) == 3 * 2**8
    names = ", ".join(["'${values.l8}${values.l8}'"] * 8)
    path = written(tmp_path, f"extends: base.yaml\npart: {{names: [{names}]}}", "child.yaml")
    with pytest.raises(ConfigError, match=r"child\.yaml has 32 interpolations, too many for its size"):
        load_config(path, Schema)


def test_aliases_that_repeat_a_little_are_welcome(tmp_path: Path) -> None:
    text = "values:\n  base: &base {a: 1, b: [1, 2]}\n"
    text += "".join(f"  r{number}: {{<<: *base, c: {number}}}\n" for number in range(100))
    assert load_config(written(tmp_path, text), Schema).values["r99"] == {"a": 1, "b": [1, 2], "c": 99}


@pytest.mark.parametrize("kind", ["aliases in lists", "merge keys", "an alias within itself", "nested lists"])
def test_neither_does_the_list_of_classes_of_a_yolo_folder(kind: str, tmp_path: Path) -> None:
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.mkdir()
    labels.mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(images / "a.png")
    (labels / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    written(labels, BOMBS[kind] + "\nnames: [a]\n", "data.yaml")
    start = time.process_time()
    with pytest.raises(InputError, match=r"can't read .*data\.yaml as YAML"):
        read_object_labels(labels, images, label_format="yolo")
    assert time.process_time() - start < 5
