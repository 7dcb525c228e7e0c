"""Scripts on small inputs with the traits of public bug reports; each prints PASS or FAIL and a figure."""

import contextlib
import io
import runpy
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SLOW = {"08_xview_as_published", "slides/09_pen_hides_pale_tissue"}


def cases() -> list[object]:
    names = sorted(str(path.relative_to(HERE)).removesuffix(".py") for path in HERE.rglob("[0-9]*.py"))
    return [pytest.param(name, id=name, marks=marks_of(name)) for name in names]


def marks_of(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if name in SLOW else []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", cases())
def test_case_passes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = HERE / f"{name}.py"
    monkeypatch.chdir(HERE.parent.parent)
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(script)])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 0, printed.getvalue()
    assert "PASS" in printed.getvalue()
