"""tools/model_table.py: the page of models says what is registered."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import timm

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model_table(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("model_table")


def test_the_page_is_up_to_date(model_table: ModuleType) -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert model_table.updated(page) == page, "run: python tools/model_table.py"


def test_every_registered_model_is_in_the_table(model_table: ModuleType) -> None:
    modules = ("linear_vit", "rope_vit", "hct")
    expected = {name for module in modules for name in timm.list_models(module=module)}
    names = model_table.registered_names()
    assert set(names) == expected
    assert len(names) == len(expected)


def test_a_row_says_what_the_model_is(model_table: ModuleType) -> None:
    # The table of the page, which equals that of today.
    table = model_table.PAGE.read_text(encoding="utf-8").partition(model_table.BEGIN)[2].partition(model_table.END)[0]
    rows = {row.split("`")[1]: row for row in table.splitlines() if "`" in row}
    assert rows["performer_vit_base_patch16_224"].split(" | ")[1:] == ["86.6", "768", "12", "12", "16", "224 x 224 |"]
    row = rows["performer_vit_rope_small_patch16_224"].split(" | ")[1:]
    assert row == ["22.0", "384", "12", "6", "16", "224 x 224 |"]
    assert rows["hct_base"].split(" | ")[2:] == ["256", "10", "8", "-", "3328 x 2560 |"]
