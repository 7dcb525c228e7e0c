"""A Ray cluster makes the maps that one process makes."""

import os
import sys
import warnings
from functools import partial
from pathlib import Path

import mapping_many
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perf_vit.errors import DataWarning, InputError, MissingPackageError, PerfVitError
from perf_vit.inference import MapInput, RayPool, predict_many
from perf_vit.inference.jobs import JobResult
from perf_vit.inference.ray import row_ranges

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def pool():
    # The workers import the stub model from here.
    path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support"), path]
    )
    with RayPool(num_actors=2) as pool:
        yield pool
    os.environ["PYTHONPATH"] = path


@given(
    num_rows=st.integers(1, 200), stride=st.integers(1, 500), num_actors=st.integers(1, 40), rest=st.integers(1, 500)
)
def test_ranges_cover_all_rows_once_and_begin_with_windows(num_rows, stride, num_actors, rest) -> None:
    window_rows = [stride * i for i in range(num_rows)]
    height = window_rows[-1] + rest
    ranges = row_ranges(window_rows, height, num_actors)
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(height))
    assert {start for start, _ in ranges} <= set(window_rows)
    assert len(ranges) <= 4 * num_actors


@pytest.mark.slow
def test_rows_made_by_a_pool_are_the_same_bytes(pool, make_scene, tmp_path) -> None:
    item = MapInput(str(make_scene(height=900, width=130)), tmp_path / "map.tif")
    maker = mapping_many.maker()
    maker(MapInput(item.path, tmp_path / "local.tif"))
    seen = []
    job = maker.job(item.path, item.output)
    # What a killed run left: some rows in the middle, and a file that was being written.
    with pytest.raises(InputError), job.work() as journal:
        maker.run_rows(item.path, job.store(journal.folder), (300, 500))
        (journal.folder / "half.tmp").write_text("half")
        raise InputError("killed")
    assert len(list((tmp_path / "map.tif.partial").glob("rows_*"))) < 8
    maker.run(item.path, item.output, pool=pool, on_progress=lambda *rows: seen.append(rows))
    assert (tmp_path / "map.tif").read_bytes() == (tmp_path / "local.tif").read_bytes()
    assert len(seen) > 2
    assert seen[-1] == (900, 900)
    assert not (tmp_path / "map.tif.partial").exists()


@pytest.mark.slow
def test_many_inputs_in_a_pool_give_the_same_maps_and_report(pool, make_scene, tmp_path) -> None:
    inputs = [MapInput(str(make_scene(seed=i)), tmp_path / "maps" / f"{i}.tif") for i in range(3)]
    inputs.insert(1, MapInput(str(tmp_path / "nowhere.tif"), tmp_path / "maps" / "nowhere.tif"))
    maker = mapping_many.maker()
    report = predict_many(maker, inputs, each=pool.each, on_error="skip")
    assert {Path(item.input).name: item.status for item in report.inputs} == {
        "scene_0.tif": "done", "scene_1.tif": "done", "scene_2.tif": "done", "nowhere.tif": "failed"
    }  # fmt: skip
    for i, item in enumerate([inputs[0], *inputs[2:]]):
        mapping_many.maker()(MapInput(item.path, tmp_path / f"local_{i}.tif"))
        assert item.output.read_bytes() == (tmp_path / f"local_{i}.tif").read_bytes()
    with pytest.raises(InputError, match=r"nowhere.tif"):
        predict_many(maker, inputs, each=pool.each)


@pytest.mark.slow
def test_a_warning_about_data_reaches_the_user_once_a_kind(pool, tmp_path) -> None:
    inputs = [MapInput(f"{i}.tif", tmp_path / f"{i}.tif") for i in range(6)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reports = list(pool.each(_warn, inputs))
    assert [report.status for report in reports] == ["done"] * 6
    told = [str(each.message) for each in caught if each.category is DataWarning]
    assert len(told) == 2
    assert sum(text.endswith(".tif is unlike the others") for text in told) == 1
    assert told.count("some have no CRS") == 1


@pytest.mark.slow
def test_an_error_in_a_pool_is_the_error_itself(pool) -> None:
    with pytest.raises(InputError, match=r"^no 3$"):
        list(pool.map(_refuse_three, range(5)))


@pytest.mark.slow
def test_a_worker_computes_in_one_thread(pool) -> None:
    assert list(pool.map(_num_threads, [0])) == [(0, 1)]


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_one_that_dies_always_is_an_error(pool, tmp_path) -> None:
    assert sorted(pool.map(partial(_die_once, tmp_path), range(3))) == [(0, 0), (1, 2), (2, 4)]
    with pytest.raises(PerfVitError, match="a Ray worker died"):
        list(pool.map(_die, [1]))


def test_without_ray_the_error_says_how_to_install_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackageError, match=r'pip install "perf-vit\[ray\]"'):
        RayPool()


def _warn(item: MapInput) -> JobResult:
    warnings.warn(f"{item.path} is unlike the others", DataWarning, stacklevel=1)
    warnings.warn("some have no CRS", DataWarning, stacklevel=1)
    return JobResult(made=True, num_windows=1, num_pixels=1)


def _refuse_three(number: int) -> int:
    if number == 3:
        raise InputError("no 3")
    return number


def _num_threads(number: int) -> int:
    return torch.get_num_threads()


def _die_once(folder: Path, number: int) -> int:
    mark = folder / "died"
    if number == 1 and not mark.exists():
        mark.touch()
        os._exit(1)
    return 2 * number


def _die(number: int) -> int:
    os._exit(1)
