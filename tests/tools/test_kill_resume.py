"""tools/kill_resume.py: differences are found and counted, and killed commands end as uninterrupted ones do."""

import importlib
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("kill_resume")


def test_an_output_that_differs_is_named_and_counted(tool, tmp_path, monkeypatch) -> None:
    job = tool.Job(
        prepare=lambda folder: None,
        args=lambda inputs, out: ["no such command"],
        digest=lambda out: {"map.tif": "as expected", "map.png": "other", "more.txt": ""},
        stage=lambda out: "somewhere",
    )
    monkeypatch.setattr(tool, "run_until_killed", lambda *_: True)
    monkeypatch.setattr(tool, "finish", lambda *_: 1.0)
    expected = {"map.tif": "as expected", "map.png": "whole", "map.json": "whole"}
    part = (0, 1, 1.0)
    trial = tool._trial(
        "train", job, tmp_path, tmp_path / "out", tmp_path / "log", expected, part, tool.random.Random(0)
    )
    assert trial.unequal == ("map.json", "map.png", "more.txt")
    assert trial.resumed
    trial = tool._trial(
        "predict", job, tmp_path, tmp_path / "out", tmp_path / "log", expected, part, tool.random.Random(0)
    )
    assert trial.unequal[0] == "map.png right after the kill"
    assert "| predict | 1 | somewhere: 1 | 1 | 0 |" in tool.markdown_table([trial])


def test_a_command_that_fails_when_it_is_run_again_is_counted(tool, tmp_path, monkeypatch) -> None:
    def fail(*_) -> float:
        raise RuntimeError("no")

    monkeypatch.setattr(tool, "run_until_killed", lambda *_: True)
    monkeypatch.setattr(tool, "finish", fail)
    job = tool.Job(prepare=None, args=lambda *_: [], digest=lambda out: {}, stage=lambda out: "at the start")
    rest = (tmp_path, tmp_path / "out", tmp_path / "log", {}, (0, 1, 1.0), tool.random.Random(0))
    trial = tool._trial("train", job, *rest)
    assert (trial.resumed, trial.unequal) == (False, ("no",))
    assert "| train | 1 | at the start: 1 | 0 | 0 |" in tool.markdown_table([trial])


@pytest.mark.slow
def test_commands_killed_at_random_moments_end_as_uninterrupted_ones(tool, tmp_path, capsys) -> None:
    assert tool.main(["--kills", "3", "--out", str(tmp_path / "killed")]) == 0
    table = capsys.readouterr().out
    assert all(f"| {command} | 3 |" in table for command in ("train", "predict", "convert", "distill"))
