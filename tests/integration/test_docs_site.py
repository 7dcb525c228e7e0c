"""The documentation site: its generated parts are complete, its links are those of the repository, and it builds."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from perf_vit.workflows.registry import config_schemas, task_keys

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(params=["generated", "repository_links"])
def extension(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(DOCS / "_ext")
    return importlib.import_module(request.param)


@pytest.mark.parametrize("extension", ["repository_links"], indirect=True)
@pytest.mark.parametrize(
    ("folder", "link", "of_site"),
    [
        ("docs", "[tasks](../CONTRIBUTING.md#add-a-task)", "[tasks](/contributing.md#add-a-task)"),
        ("docs", "[training.md](training.md#memory)", "[](/training.md#memory)"),
        ("docs/tutorials", "[heads](../detection.md)", "[heads](/detection.md)"),
        (".", "([docs/slides.md](docs/slides.md)).", "([](/slides.md))."),
        ("datasets", "[bccd](bccd/README.md)", "[bccd](/public_data/bccd.md)"),
        ("docs", "[page](https://example.org/a.md)", "[page](https://example.org/a.md)"),
        ("docs", "[here](#heading), ![picture](images/demo.png)", "[here](#heading), ![picture](images/demo.png)"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(extension, folder: str, link: str, of_site: str) -> None:
    assert extension.rewrite(link, ROOT / folder, ROOT) == of_site


@pytest.mark.parametrize("extension", ["generated"], indirect=True)
def test_every_mark_of_a_page_is_filled(extension) -> None:
    pages = [path for path in DOCS.rglob("*.md") if "_build" not in path.parts]
    marks = {name for page in pages for name in re.findall(r"<!-- generated: (\w+) -->", page.read_text())}
    assert marks == set(extension.GENERATED)


@pytest.mark.parametrize("extension", ["generated"], indirect=True)
def test_every_key_has_a_type_a_default_its_tasks_and_a_meaning(extension) -> None:
    entries = dict(
        re.findall(r"^### `([\w.]+)`\n\n(.*?)(?=^\(config-|^## |\Z)", extension.configuration(), re.M | re.S)
    )
    for task in config_schemas():
        for key in task_keys(task):
            shown = [part for part in entries[key.name].split("\n\n: ")[:-1] if key.type in part]
            assert any(task in part or "all tasks" in part for part in shown), (task, key.name)
            assert key.meaning, (task, key.name)
            assert "required" in entries[key.name] if key.default is None else "default" in entries[key.name]
    assert "`224` (classification, regression, slide_classification)" in entries["data.tile_px"]
    assert len(entries) > 100


@pytest.mark.parametrize("extension", ["generated"], indirect=True)
def test_every_registered_name_and_option_is_described(extension) -> None:
    registries, commands = extension.registries(), extension.commands()
    for name in ("clustered", "relu", "upernet", "mask_rcnn", "regression", "dota", "hann"):
        assert re.search(rf"^\| `{name}` \| .*\w.* \|$", registries, re.MULTILINE), name
    for command, option in (("predict", "--overlap"), ("convert", "--budget"), ("train", "CONFIG")):
        section = commands.split(f"## perf-vit {command}\n")[1].split("\n## ")[0]
        assert re.search(rf"^\| `{option}`[^|]*\|[^|]*\| .*\w.* \|$", section, re.MULTILINE), option


def test_every_page_is_in_a_table_of_contents() -> None:
    """Sphinx warns of others, which would not be found from the site's navigation."""
    pages = {path.relative_to(DOCS).with_suffix("") for path in DOCS.rglob("*.md") if "_build" not in path.parts}
    listed = {Path("index")}
    for page in pages:
        text = (DOCS / page).with_suffix(".md").read_text(encoding="utf-8")
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
            names = [re.sub(r".*<(.*)>", r"\1", line) for line in block.splitlines() if line and line[0] != ":"]
            listed |= {page.parent / name for name in names}
    assert pages - listed == set()
    assert listed - pages == set()


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_broken_links(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_nb", "pydata_sphinx_theme", "sphinx_design", "sphinx_copybutton"):
        pytest.importorskip(package, reason="the site needs the extra docs")
    build = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--builder", "html"]
    done = subprocess.run(
        [*build, "--doctree-dir", str(tmp_path / "doctrees"), str(DOCS), str(tmp_path / "html")],
        env={**os.environ, "DOCS_EXECUTE": "off"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    check = [sys.executable, str(ROOT / "tools" / "check_site.py"), str(tmp_path / "html")]
    checked = subprocess.run(check, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
