"""What leaves for a terminal, a pipe or a log, whatever the names in it."""

import ast
import io
import json
import sys
import warnings
from pathlib import Path

import pytest
import shapely
from affine import Affine
from nasty_names import NASTY_NAMES, UNSEEN_NAMES
from rasterio.features import rasterize

from perf_vit.cli.main import _warnings_as_lines
from perf_vit.errors import DataWarning
from perf_vit.inference import InputReport, RunReport
from perf_vit.metrics import ClassScores
from perf_vit.workflows import progress as module
from perf_vit.workflows.progress import (
    inputs_progress,
    new_table,
    run_table,
    say,
    say_json,
    say_line,
    score_table,
    show,
    show_any_text,
    windows_progress,
    working,
)

PACKAGE = Path(module.__file__).parents[1]
SHOWN = {**{name: name for name in NASTY_NAMES}, **UNSEEN_NAMES, "caf\udce9": r"caf\udce9"}


@pytest.fixture(autouse=True)
def _no_given_width(monkeypatch) -> None:
    # Test runners of several processes set it.
    monkeypatch.delenv("COLUMNS", raising=False)


def test_warnings_are_those_about_the_data_once_each(capsys) -> None:
    with warnings.catch_warnings(record=True) as others, _warnings_as_lines():
        for _ in range(2):
            warnings.warn("of 3 images, 1 is [b]odd[/b]", DataWarning, stacklevel=1)
        # As where outlines of tissue are burnt.
        rasterize([shapely.box(1, 1, 3, 3)], out_shape=(4, 4), transform=Affine.identity())
    assert capsys.readouterr().err == "Warning: of 3 images, 1 is [b]odd[/b]\n"
    assert not others


def failed(name: str) -> InputReport:
    return InputReport(input=f"in/{name}.tif", output="out", status="failed", error=f"can't read {name}")


@pytest.mark.parametrize(("name", "shown"), SHOWN.items())
def test_names_are_shown_literally_in_lines_tables_titles_and_progress(name, shown, capsys) -> None:
    say(f"map: {name}", name)
    table = new_table(f"title {name}", [f"column {name}", "n"])
    table.add_row(name, name)
    show(table, score_table([ClassScores(name, 1.0, 1.0, 1.0, 1.0, 5)], title=name))
    show(run_table(RunReport(inputs=[failed(name)])))
    out, err = capsys.readouterr()
    assert f"map: {shown}\n{shown}\n" in out
    assert f"title {shown}" in out
    assert f"column {shown}" in out
    assert out.count(f" {shown.strip()} ") >= 3
    assert f"{shown.rpartition('/')[2]}.tif" in out
    assert err == ""


@pytest.mark.parametrize(("name", "shown"), SHOWN.items())
def test_names_are_shown_literally_while_work_goes_on(name, shown, capsys) -> None:
    with windows_progress(f"searching {name}") as on_window:
        on_window(1, 2)
    with inputs_progress(1, windows=True) as (on_input, _):
        on_input(failed(name))
    with working(f"loading {name}") as on_step:
        on_step(name)
    say_line("Error", f"no {name} here")
    err = capsys.readouterr().err
    assert f"searching {shown.rstrip()}" in err
    kept = SHOWN[name] if name.split() == [name] else None
    if kept is not None:
        assert f"failed: in/{kept}.tif: can't read {kept}\n" in err
        assert f"Error: no {kept} here\n" in err


def test_an_error_is_one_line_whatever_it_says(capsys) -> None:
    say_line("Error", "can't read\n  a.tif:\r\n[/] no\u2028such\x85file")
    assert capsys.readouterr().err == "Error: can't read a.tif: [/] no such file\n"


def test_tables_in_a_file_are_as_wide_as_their_names(capsys, monkeypatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    table = new_table("t", ["class", "n"])
    table.add_row("n" * 200, "1")
    show(table)
    assert "n" * 200 in capsys.readouterr().out


def test_a_narrow_terminal_breaks_names_and_cuts_none(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "24")
    name = "".join(chr(ord("a") + i % 26) for i in range(60))
    table = new_table("title", ["class", "IoU"])
    table.add_row(name, "0.123")
    narrow = module.PlainConsole(file=io.StringIO(), width=24, force_terminal=False)
    narrow.print(table)
    text = narrow.file.getvalue()
    # Letters of the name's lines, without the borders.
    assert name in "".join(char for line in text.splitlines()[4:] for char in line if char.isalpha())
    assert "0.123" in text
    assert max(map(len, text.splitlines())) <= 24


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_any_name_can_be_printed_in_any_encoding(encoding, monkeypatch) -> None:
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    show_any_text()
    for name in SHOWN:
        say(name)
        show(score_table([ClassScores(name, 1.0, 1.0, 1.0, 1.0, 5)], title=name))
        say_line("Warning", name)
        with windows_progress(name) as on_window:
            on_window(1, 1)
    for stream in streams:
        stream.flush()
    out = streams[0].buffer.getvalue().decode(encoding)
    for name, shown in SHOWN.items():
        assert shown.encode(encoding, errors="backslashreplace").decode(encoding).rstrip() in out, name


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_json_on_stdout_is_json_in_any_encoding(encoding, monkeypatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    content = {name: name for name in [*SHOWN, "\x7f"]}
    say_json({**content, "none": float("nan")})
    stream.flush()
    assert json.loads(stream.buffer.getvalue().decode(encoding), parse_constant=pytest.fail) == {
        **content,
        "none": None,
    }


def _leaks(source: str) -> list[str]:
    """Calls that print past `perf_vit.workflows.progress`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in {"echo", "secho", "from_markup", "print_json"}:
            found.append(node.attr)
        elif isinstance(node, ast.Attribute) and node.attr == "print":
            found.append("print")
        elif isinstance(node, ast.Attribute) and node.attr == "status" and getattr(node.value, "id", "") == "errors":
            found.append("status")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"print", "Console"}:
            found.append(node.func.id)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_text_leaves_through_one_module(path) -> None:
    if path != Path(module.__file__):
        assert _leaks(path.read_text(encoding="utf-8")) == []


def _without_encoding(source: str) -> list[int]:
    """Lines that open a text file in the encoding of the machine."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        keywords = {keyword.arg for keyword in node.keywords}
        is_text = name in {"read_text", "write_text"} and isinstance(node.func, ast.Attribute)
        if name == "open":
            modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            is_method = isinstance(node.func, ast.Attribute) and not node.args
            is_text = bool({"newline"} & keywords) or any(mode in {"r", "w", "a", "x"} for mode in modes)
            is_text = is_text or (isinstance(node.func, ast.Name) and not any("b" in mode for mode in modes))
            is_rasterio = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "rasterio"
            is_text = is_text and not (is_method and not keywords) and not is_rasterio
        if is_text and "encoding" not in keywords and "mode" not in keywords:
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_text_files_have_an_encoding(path) -> None:
    assert _without_encoding(path.read_text(encoding="utf-8")) == []
