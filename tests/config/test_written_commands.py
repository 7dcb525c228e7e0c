"""Commands of training as READMEs, pages and configs write them: each gives all that its config requires."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from perf_vit.config import load_config
from perf_vit.workflows.run_config import DistillationRun
from perf_vit.workflows.train import read_run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("datasets/*/README.md"))]


def commands_of(page: Path) -> list[list[str]]:
    """The commands that train on a shipped config; those that leave something out, as "...", are no whole ones."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^ *(perf-vit (?:train|distill) configs/.*)$", text, flags=re.MULTILINE)
    return [words for line in lines if "..." not in (words := shlex.split(line, comments=True))]


def command_of(config: Path) -> list[str]:
    """The command of training in the comment at the head of a config; none for that of the demo."""
    head = config.read_text(encoding="utf-8")
    found = re.search(r"perf-vit (?:train|distill) configs/.*(?:\n# {13}\S.*)*", head)
    return [] if found is None else shlex.split(found[0].replace("\n#", " "))


def open_keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The keys that a config has as ???."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from open_keys(value, f"{prefix}{name}.")
        elif value == "???":
            yield prefix + name


def key_of(override: str) -> str:
    return override.partition("=")[0]


def check(words: list[str]) -> None:
    _, command, config, *overrides = words
    # Some of the keys that a config leaves open have a default, which isn't meant.
    left = set(open_keys(yaml.safe_load((ROOT / config).read_text(encoding="utf-8")))) - set(map(key_of, overrides))
    assert not left
    if command == "distill":
        load_config(config, DistillationRun, overrides)
    else:
        read_run(config, overrides)


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=lambda page: str(page.name))
def test_a_command_of_a_page_gives_all_that_its_config_requires(page: Path) -> None:
    for words in commands_of(page):
        check(words)


@pytest.mark.parametrize("config", [path for path in sorted(ROOT.glob("configs/*/*.yaml")) if command_of(path)])
def test_the_command_of_a_config_gives_all_that_it_requires(config: Path) -> None:
    check(command_of(config))


def test_commands_are_found() -> None:
    assert len([words for page in PAGES for words in commands_of(page)]) >= 20
    assert len([path for path in ROOT.glob("configs/*/*.yaml") if command_of(path)]) >= 12
