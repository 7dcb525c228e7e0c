"""What a user gets from the wheel, beside what a checkout has."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from perf_vit import __version__
from perf_vit.config import shipped_configs

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.slow
def test_an_installed_package_finds_the_configs_of_the_checkout(unpacked_wheel: Path, tmp_path: Path) -> None:
    script = (
        "import perf_vit; from perf_vit.config import find_config, shipped_configs\n"
        "print(perf_vit.__file__); print(*shipped_configs())\n"
        "print(find_config('configs/segmentation/buildings.yaml').read_text())"
    )
    environment = {**os.environ, "PYTHONPATH": str(unpacked_wheel)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    location, names, content = done.stdout.split("\n", 2)
    assert Path(location).is_relative_to(unpacked_wheel)
    assert names.split() == shipped_configs()
    assert content.rstrip("\n") == (ROOT / "configs/segmentation/buildings.yaml").read_text().rstrip("\n")


def test_the_wheel_holds_package_configs_and_licence_only(unpacked_wheel: Path) -> None:
    assert {path.name.split("-")[0] for path in unpacked_wheel.iterdir()} == {"perf_vit"}
    assert (unpacked_wheel / "perf_vit" / "py.typed").is_file()
    assert (unpacked_wheel / "perf_vit" / "cli" / "help_keys.json").is_file()
    (metadata,) = unpacked_wheel.glob("*.dist-info")
    assert list(metadata.rglob("LICENSE"))
    assert "perf-vit = perf_vit.cli.main:run" in (metadata / "entry_points.txt").read_text()


def test_the_citation_names_this_version_and_its_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (citation["version"], citation["license"]) == (__version__, project["license"])
    assert citation["repository-code"] == project["urls"]["Repository"]


def test_the_readme_names_the_wheel_that_is_built() -> None:
    assert f"dist/perf_vit-{__version__}-py3-none-any.whl" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_issue_forms_have_what_github_asks_for() -> None:
    forms = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*_*.yml"))
    assert len(forms) == 2
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert form.keys() >= {"name", "description", "body"}
        assert all(part["type"] == "textarea" and part["attributes"]["label"] for part in form["body"])
        assert len({part["id"] for part in form["body"]}) == len(form["body"])
