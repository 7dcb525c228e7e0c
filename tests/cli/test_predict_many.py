"""`perf-vit predict` with folders, globs and lists: one map an input, a report, an exit code."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import rasterio
from command_line import call

from perf_vit.cli.main import run


@pytest.fixture
def scenes(trained, tmp_path) -> Path:
    """Two scenes that fit the model, one of them in a sub-folder."""
    for name in ("a.tif", "sub/b.tif"):
        path = tmp_path / "scenes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(trained.scene.image, path)
    return tmp_path / "scenes"


def _predict(trained, inputs: list, output: Path, *extra: str) -> list:
    return ["predict", "--checkpoint", trained.checkpoint, "--input", *inputs, "--output", output, *extra]


def _ok(args: list) -> None:
    """Run a command that must go well."""
    with pytest.raises(SystemExit) as exit_:
        run([str(arg) for arg in args])
    assert not exit_.value.code


def _report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_a_folder_becomes_a_folder_of_maps_and_a_second_run_has_nothing_to_do(trained, scenes, tmp_path) -> None:
    out = tmp_path / "maps"
    _ok(_predict(trained, [scenes], out))
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == [
        "a.png", "a.qml", "a.tif", "a.tif.aux.xml", "report.html", "report.json",
        "sub/b.png", "sub/b.qml", "sub/b.tif", "sub/b.tif.aux.xml",
    ]  # fmt: skip
    with rasterio.open(out / "a.tif") as dataset:
        model = dataset.tags()["PERF_VIT_MODEL"]
    first = _report(out)
    assert first["model"] == model
    assert first["totals"]["done"] == 2
    assert first["totals"]["num_pixels"] == 2 * 192 * 192
    assert first["settings"]["blend"] == "hann"
    _ok(_predict(trained, [scenes], out))
    assert _report(out)["totals"]["skipped-existing"] == 2
    _ok(_predict(trained, [scenes], out, "--overwrite"))
    assert _report(out)["totals"]["done"] == 2


def test_a_bad_file_is_skipped_and_the_exit_code_tells(trained, scenes, tmp_path, capsys) -> None:
    (scenes / "a_bad.tif").write_text("no raster")
    out = tmp_path / "maps"
    assert call(_predict(trained, [scenes], out, "--on-error", "skip")) == 2
    captured = capsys.readouterr()
    [line] = [line for line in captured.err.splitlines() if line.startswith("Error: ")]
    assert "1 of 3 inputs failed" in line
    assert "Traceback" not in captured.err
    statuses = {Path(item["input"]).name: item["status"] for item in _report(out)["inputs"]}
    assert statuses == {"a.tif": "done", "a_bad.tif": "failed", "b.tif": "done"}


def test_a_bad_file_stops_the_run_and_what_is_finished_stays(trained, scenes, tmp_path, capsys) -> None:
    (scenes / "a_bad.tif").write_text("no raster")
    out = tmp_path / "maps"
    assert call(_predict(trained, [scenes], out)) == 2
    assert "a_bad.tif" in capsys.readouterr().err
    assert (out / "a.tif").exists()
    assert not (out / "sub").exists()
    assert _report(out)["totals"] | {"seconds": 0} == {
        "inputs": 2, "done": 1, "skipped-existing": 0, "failed": 1, "busy": 0,
        "seconds": 0, "num_windows": 16, "num_pixels": 192 * 192, "num_damaged": 0,
    }  # fmt: skip


def test_what_a_shell_makes_of_a_glob_works_too(trained, scenes, tmp_path) -> None:
    files = sorted(scenes.rglob("*.tif"))
    _ok(_predict(trained, files, tmp_path / "shell"))
    _ok(_predict(trained, [scenes / "**" / "*.tif"], tmp_path / "quoted"))
    listed = tmp_path / "list.csv"
    rows = [f"{os.path.relpath(file, tmp_path)},{i}" for i, file in enumerate(files)]
    listed.write_text("\n".join(["href,output", *rows]))
    _ok(_predict(trained, [listed], tmp_path / "listed", "--path-column", "href"))
    maps = ("shell/a.tif", "shell/b.tif", "quoted/sub/b.tif", "listed/0.tif", "listed/1.tif")
    assert len({(tmp_path / name).read_bytes() for name in maps}) == 1


def test_several_maps_want_a_folder(trained, scenes, tmp_path, capsys) -> None:
    assert call(_predict(trained, [scenes], tmp_path / "maps.tif")) == 2
    assert f"several inputs need a folder as --output, got {tmp_path / 'maps.tif'}" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert call(_predict(trained, [scenes], tmp_path / "file")) == 2
    assert "a parent is not a folder" in capsys.readouterr().err


def test_damaged_pieces_of_a_single_file_are_shown(trained, tmp_path, capsys) -> None:
    image = tmp_path / "cut.tif"
    with rasterio.open(trained.scene.image) as dataset:
        profile = {"driver": "GTiff", "tiled": True, "blockxsize": 64, "blockysize": 64, "compress": None}
        with rasterio.open(image, "w", **{**dataset.profile, **profile}) as copy:
            copy.write(dataset.read())
    content = image.read_bytes()
    image.write_bytes(content[: int(len(content) * 0.9)])
    _ok(_predict(trained, [image], tmp_path / "map.tif", "--on-error", "skip"))
    assert "damaged pieces of the input were left out" in capsys.readouterr().err
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert (dataset.read(1)[128:, 128:] == 255).all()


def test_ray_options_without_ray_are_refused(trained, scenes, tmp_path, capsys) -> None:
    assert call(_predict(trained, [scenes], tmp_path / "maps", "--num-actors", "2")) == 2
    assert "is for --engine ray" in capsys.readouterr().err


@pytest.mark.slow
def test_ray_makes_the_maps_of_the_local_engine(trained, scenes, tmp_path) -> None:
    _ok(_predict(trained, [scenes / "a.tif"], tmp_path / "local.tif"))
    for inputs, out in (([scenes], tmp_path / "maps"), ([scenes / "a.tif"], tmp_path / "one.tif")):
        args = _predict(trained, inputs, out, "--engine", "ray", "--num-actors", "2")
        done = subprocess.run([sys.executable, "-m", "perf_vit", *map(str, args)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    expected = (tmp_path / "local.tif").read_bytes()
    for made in ("maps/a.tif", "maps/sub/b.tif", "one.tif"):
        assert (tmp_path / made).read_bytes() == expected
    assert _report(tmp_path / "maps")["totals"]["done"] == 2
