"""`perf-vit config`, the keys and groups in the help of commands, and overrides written as flags."""

import json
import re

import jsonschema
import pytest
from command_line import call

from perf_vit.config import shipped_configs
from perf_vit.workflows.progress import console
from perf_vit.workflows.registry import task_keys


@pytest.fixture(autouse=True)
def _wide(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    # Where it was set before, as by test runners of several processes, the console has taken it.
    monkeypatch.setattr(console, "_width", 1000)


def printed(capsys, *args: str) -> str:
    assert call(list(args)) == 0
    return capsys.readouterr().out


def test_usual_keys_are_listed_and_all_on_request(capsys) -> None:
    usual, every = printed(capsys, "config", "detection"), printed(capsys, "config", "detection", "--all")
    for text in (usual, every):
        assert re.search(r"data\.tile_px +│ whole number +│ 512 +│ Tile size in pixels", text)
        assert re.search(r"data\.train\.image +│ text or a list of names.*│ required", text)
    assert "data.nodata" in every
    assert "data.nodata" not in usual
    assert "perf-vit config detection --all" in usual
    names = {key.name for key in task_keys("detection")}
    assert names == {name for name in re.findall(r"[a-z_.]+", every) if name in names}


def test_without_a_task_tasks_and_shipped_configs_are_listed(capsys) -> None:
    text = printed(capsys, "config")
    assert "segmentation, detection, classification, regression, slide_classification, distillation" in text
    assert all(name in text for name in shipped_configs())


def test_programs_get_json(capsys) -> None:
    keys = json.loads(printed(capsys, "config", "segmentation", "--json", "--all"))
    assert {"name", "group", "type", "default", "meaning"} == set(keys[0])
    jsonschema.Draft202012Validator.check_schema(json.loads(printed(capsys, "config", "--schema")))


def test_an_unknown_task_is_one_line(capsys) -> None:
    assert call(["config", "segmentatoin"]) == 2
    assert "did you mean 'segmentation'?" in capsys.readouterr().err


def test_the_help_of_train_lists_keys_by_section(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    text = printed(capsys, "train", "--help")
    for section, key in (("data", "data.tile_px"), ("model", "model.backbone"), ("optim", "optim.lr")):
        assert re.search(rf"│ {section} +│ .*{re.escape(key)}\b", text)
    assert "optim.block_lr" in printed(capsys, "distill", "--help")


def test_the_help_of_predict_has_groups(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = printed(capsys, "predict", "--help")
    groups = re.split(r"╭─ (\w+) ─+╮", text)
    of_group = dict(zip(groups[1::2], groups[2::2], strict=True))
    for group, option in {
        "Input": "--crs", "Output": "--polygons", "Tiling": "--overlap", "Speed": "--device", "Slides": "--tissue"
    }.items():  # fmt: skip
        assert option in of_group[group]


@pytest.mark.parametrize("flag", ["--data.tile_px=64", "--data.tile_px"])
def test_an_override_written_as_a_flag_is_answered(flag: str, capsys) -> None:
    assert call(["train", "segmentation/buildings", flag, "64", "out=x"]) == 2
    value = "64" if "=" in flag else "VALUE"
    message = f"overrides have no dashes, got '{flag}'; write data.tile_px={value}"
    assert message in " ".join(capsys.readouterr().err.split())


def test_completion_is_offered(capsys) -> None:
    assert "--install-completion" in printed(capsys, "--help")
