"""`perf-vit fit-tile`."""

import pytest
from command_line import SMALL, call

from perf_vit.errors import ConfigError
from perf_vit.workflows.train import parse_bytes


def _args(trained, *extra) -> list:
    scene = trained.scene
    files = [f"data.{part}.{key}={getattr(scene, key)}" for part in ("train", "val") for key in ("image", "labels")]
    return ["fit-tile", "configs/segmentation/demo.yaml", *files, *SMALL, *extra]


def test_the_largest_tile_is_printed_with_what_it_takes(trained, capsys, monkeypatch) -> None:
    # Processes that train are those of tests/tasks/test_memory.py.
    monkeypatch.setattr("perf_vit.tasks.memory._peak_in_process", lambda steps: 10**6 * steps.tile_px)
    assert call(_args(trained, "--memory", "900GB", "--max-tile", "64", "--batch-size", "1")) == 0
    printed = capsys.readouterr().out
    assert "64 px: 0.06 GB" in printed
    assert "largest tile: data.tile_px=64, " in printed
    assert "of 900.00 GB" in printed


def test_memory_without_a_unit_is_one_line(trained, capsys) -> None:
    assert call(_args(trained, "--memory", "16")) == 2
    assert "--memory must be a size such as 16GB" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "number"), [("16GB", 16 * 10**9), ("1.5 GiB", 3 * 2**29), ("500mb", 5 * 10**8)])
def test_sizes_have_units(text: str, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["16", "GB", "-1GB", "0GB", "16 GBit"])
def test_sizes_without_units_are_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match="memory must be a size such as 16GB"):
        parse_bytes(text)


@pytest.mark.parametrize("number", ["true", "2"])
def test_processes_that_share_a_tile_are_refused_in_one_line(number: str, capsys) -> None:
    files = [f"data.{part}.{key}=x" for part in ("train", "val") for key in ("image", "labels")]
    assert call(["fit-tile", "configs/segmentation/demo.yaml", *files, f"trainer.sequence_parallel={number}"]) == 2
    assert f"fitted for one process, got trainer.sequence_parallel={number}, with which" in capsys.readouterr().err


@pytest.mark.parametrize("config", ["classification/scenes", "regression/biomass", "slide_classification/tumour"])
def test_a_config_of_another_task_is_one_line(config, capsys) -> None:
    assert call(["fit-tile", f"configs/{config}.yaml"]) == 2
    assert "tiles are fitted for configs of segmentation and detection, got one of " in capsys.readouterr().err
