"""One bad input doesn't cost the others, and several processes share them."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import mapping_many
import numpy as np
import pytest
import rasterio

from perf_vit.errors import BusyError, InputError, OutputError, PerfVitError
from perf_vit.inference import MapInput, RunReport, predict_many, reserve_report
from perf_vit.inference.jobs import JobResult
from perf_vit.inference.jobs import journal as journals
from perf_vit.inference.jobs.journal import open_journal
from perf_vit.types import Window

RESULT = JobResult(made=True, num_windows=4, num_pixels=100)


def _inputs(*names: str) -> list[MapInput]:
    return [MapInput(name, Path(f"{name}.tif")) for name in names]


def _statuses(report: RunReport) -> dict[str, str]:
    return {item.input: item.status for item in report.inputs}


def _one_that_fails(error: Exception):
    def predict_one(item: MapInput) -> JobResult:
        if item.path == "bad":
            raise error
        return RESULT

    return predict_one


@pytest.mark.parametrize("error", [InputError("can't\nopen bad"), OSError("disk"), RuntimeError("CUDA out of memory")])
def test_a_bad_input_is_skipped_and_reported(error: Exception, tmp_path) -> None:
    report = predict_many(
        _one_that_fails(error), _inputs("a", "bad", "b"), on_error="skip", report_path=tmp_path / "report.json"
    )
    assert _statuses(report) == {"a": "done", "bad": "failed", "b": "done"}
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["totals"] == {
        "inputs": 3, "done": 2, "skipped-existing": 0, "failed": 1, "busy": 0,
        "seconds": content["totals"]["seconds"], "num_windows": 8, "num_pixels": 200, "num_damaged": 0,
    }  # fmt: skip
    assert "\n" not in content["inputs"][1]["error"]
    assert str(error).split()[-1] in content["inputs"][1]["error"]


def test_a_bad_input_stops_the_run_and_the_report_stays(tmp_path) -> None:
    with pytest.raises(InputError, match="no raster"):
        predict_many(
            _one_that_fails(InputError("no raster")), _inputs("a", "bad", "b"), report_path=tmp_path / "report.json"
        )
    content = json.loads((tmp_path / "report.json").read_text())
    assert [item["status"] for item in content["inputs"]] == ["done", "failed"]


def test_a_busy_input_is_left_for_the_end_and_tried_again() -> None:
    calls = []

    def predict_one(item: MapInput) -> JobResult:
        calls.append(item.path)
        if item.path == "busy" and calls.count("busy") < 3:
            raise BusyError("elsewhere")
        return RESULT

    report = predict_many(predict_one, _inputs("busy", "a"), wait_s=0)
    assert calls == ["busy", "a", "busy", "busy"]
    assert _statuses(report) == {"a": "done", "busy": "done"}


def test_an_input_that_stays_busy_is_reported_as_such() -> None:
    def predict_one(item: MapInput) -> JobResult:
        raise BusyError("elsewhere")

    report = predict_many(predict_one, _inputs("x"), wait_s=0, num_rounds=2)
    assert _statuses(report) == {"x": "busy"}


def test_a_report_that_another_run_holds_is_not_overwritten(tmp_path) -> None:
    with reserve_report(tmp_path / "maps") as first, reserve_report(tmp_path / "maps") as second:
        assert first == tmp_path / "maps" / "report.json"
        assert second.name.startswith("report-")
    assert list((tmp_path / "maps").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="a parent is not a folder"), reserve_report(tmp_path / "file"):
        pass


def test_maps_that_are_there_are_kept_and_others_replaced_on_demand(make_scene, tmp_path) -> None:
    inputs = [MapInput(str(make_scene(seed=i)), tmp_path / "maps" / f"{i}.tif") for i in range(2)]

    def run(**options) -> list[str]:
        report = predict_many(mapping_many.maker(**options), inputs, on_error="skip")
        assert all("overwrite=True" in item.error for item in report.inputs if item.status == "failed")
        return [item.status for item in report.inputs]

    assert run() == ["done", "done"]
    assert run() == ["skipped-existing"] * 2
    assert run(overwrite=True) == ["done", "done"]
    for other in ({"name": "another"}, {"window_size": 32}, {"window_size": 32, "kind": "classes"}):
        assert run(**other) == ["failed"] * 2
        assert run(**other, overwrite=True) == ["done"] * 2
        assert run(**other) == ["skipped-existing"] * 2
    last = {"window_size": 32, "kind": "classes"}
    later = time.time() + 5
    os.utime(inputs[0].path, (later, later))
    assert run(**last) == ["failed", "skipped-existing"]


def test_a_map_of_another_input_with_the_same_grid_is_no_map_of_this_one(make_scene, tmp_path) -> None:
    first, second = make_scene(seed=0), make_scene(seed=1)
    item = MapInput(str(second), tmp_path / "map.tif")
    mapping_many.maker()(MapInput(str(first), item.output))
    before = item.output.read_bytes()
    later = time.time() + 5
    os.utime(item.output, (later, later))
    with pytest.raises(OutputError, match="not as this model's map of this input"):
        mapping_many.maker()(item)
    assert item.output.read_bytes() == before
    shutil.copy(first, tmp_path / "copy.tif")
    assert not mapping_many.maker()(MapInput(str(tmp_path / "copy.tif"), item.output)).made


def test_a_map_with_damage_is_kept_by_skip_and_not_taken_for_a_whole_one_by_stop(make_scene, tmp_path) -> None:
    path = make_scene(height=300, width=300, tiled=True, blockxsize=64, blockysize=64)
    _damage(path)
    inputs = [MapInput(str(path), tmp_path / "map.tif")]
    report = predict_many(mapping_many.maker(on_error="skip"), inputs, on_error="skip")
    [made] = report.inputs
    assert made.status == "done"
    assert made.damaged
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert int(dataset.tags()["PERF_VIT_DAMAGED_PIECES"]) == len(made.damaged)
        missing = np.isnan(dataset.read(1))
    # The scene's own border.
    missing[:2] = missing[:, :3] = False
    assert missing.sum() > 1000
    for piece in made.damaged:
        missing[piece.window.slices_in(_extent(320))] = False
    assert not missing.any()
    [kept] = predict_many(mapping_many.maker(on_error="skip"), inputs).inputs
    assert kept.status == "skipped-existing"
    with pytest.raises(OutputError, match=r"has damaged pixels; .*overwrite=True"):
        predict_many(mapping_many.maker(), inputs)
    with pytest.raises(PerfVitError, match="can't read"):
        predict_many(mapping_many.maker(overwrite=True), inputs)


def test_damage_that_an_interrupted_run_met_is_in_the_report(make_scene, tmp_path) -> None:
    path = make_scene(height=700, width=100, tiled=True, blockxsize=64, blockysize=64, compress="deflate")
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 9000] = bytes(9000)
    path.write_bytes(content)
    maker = mapping_many.maker(on_error="skip")
    expected = maker(MapInput(str(path), tmp_path / "whole.tif")).damaged
    assert expected
    with pytest.raises(RuntimeError, match="interrupted"):
        mapping_many.maker(on_error="skip", fail_after=25)(MapInput(str(path), tmp_path / "map.tif"))
    assert list((tmp_path / "map.tif.partial").glob("rows_*"))
    assert maker(MapInput(str(path), tmp_path / "map.tif")).damaged == expected
    assert (tmp_path / "map.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()


@pytest.mark.slow
def test_two_processes_share_a_folder_and_do_each_input_once(make_scene, tmp_path) -> None:
    for i in range(6):
        make_scene(height=100, width=100, seed=i)
    command = [sys.executable, mapping_many.__file__, tmp_path / "scene_*.tif", tmp_path / "maps", "0.04"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    runs = [subprocess.Popen(list(map(str, command)), text=True, **pipes) for _ in range(2)]
    assert [run.stdout.readline() for run in runs] == ["ready\n"] * 2
    for run in runs:
        run.stdin.write("go\n")
        run.stdin.flush()
    for run in runs:
        _, errors = run.communicate()
        assert run.returncode == 0, errors
    reports = [json.loads(path.read_text()) for path in (tmp_path / "maps").glob("report*.json")]
    assert len(reports) == 2
    done = [item["output"] for report in reports for item in report["inputs"] if item["status"] == "done"]
    assert sorted(done) == sorted(str(tmp_path / "maps" / f"scene_{i}.tif") for i in range(6))
    assert all(report["totals"]["done"] for report in reports)
    assert all(report["totals"]["failed"] == 0 for report in reports)
    assert sorted(path.suffix for path in (tmp_path / "maps").iterdir()) == [".json"] * 2 + [".tif"] * 6


def test_a_lock_of_a_folder_that_was_removed_meanwhile_does_not_count(tmp_path, monkeypatch) -> None:
    acquire = journals._acquire

    def acquire_then_lose(lock) -> None:
        acquire(lock)
        Path(lock.lock_file).unlink()

    monkeypatch.setattr(journals, "_acquire", acquire_then_lose)
    with pytest.raises(BusyError), open_journal(tmp_path / "map.tif"):
        pass


def _damage(path: Path) -> None:
    """Cut off the last tiles of an uncompressed file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * 0.7)])


def _extent(size: int) -> Window:
    return Window(0, 0, size, size)
