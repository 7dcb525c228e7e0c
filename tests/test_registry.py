"""Registries: lookup by name, one-line errors, extensions from installed packages."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from perf_vit import registry
from perf_vit.errors import ConfigError
from perf_vit.registry import Registry


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that hasn't looked for extensions yet."""
    monkeypatch.setattr(registry, "_loaded", set())
    yield
    sys.modules.pop("sharpened", None)


def test_what_is_registered_is_found_in_order() -> None:
    tools: Registry[type] = Registry("tool")

    @tools.register("saw")
    class Saw:
        pass

    tools.add("axe", int)
    assert tools["saw"] is Saw
    assert list(tools) == ["saw", "axe"]
    assert "axe" in tools
    assert "file" not in tools


def test_an_unknown_name_is_one_line_with_the_nearest_one() -> None:
    tools: Registry[int] = Registry("model.tool", ConfigError)
    tools.add("hammer", 1)
    tools.add("saw", 2)
    with pytest.raises(
        ConfigError, match=r"^model.tool must be one of hammer, saw, got 'hamer'; did you mean 'hammer'\?$"
    ):
        tools["hamer"]
    with pytest.raises(ConfigError, match=r"^model.tool must be one of hammer, saw, got 'xyz'$"):
        tools["xyz"]


def test_a_name_is_registered_once() -> None:
    tools: Registry[int] = Registry("tool")
    tools.add("saw", 1)
    with pytest.raises(ValueError, match="tool 'saw' is registered already; use another name"):
        tools.add("saw", 2)


def test_installed_extensions_are_imported_at_the_first_lookup(
    fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    tools: Registry[int] = Registry("tool")
    monkeypatch.setattr(registry, "TOOLS", tools, raising=False)
    info = tmp_path / "sharpened-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sharpened\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[perf_vit]\nsharpened = sharpened\n")
    # An extension that looks a name up itself, before it registers its own.
    (tmp_path / "sharpened.py").write_text(
        "from perf_vit.registry import TOOLS\nassert 'knife' not in TOOLS\nTOOLS.add('knife', 3)\n"
    )
    assert tools["knife"] == 3
