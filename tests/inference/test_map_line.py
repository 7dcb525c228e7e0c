"""Maps of many inputs are made side by side, and nobody sees the difference but in time."""

import gc
import threading
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from stub_segmenter import StubSegmenter

from perf_vit.errors import BusyError, DataWarning, InputError, OutputError
from perf_vit.inference import MapInput, SegmentationPredictOptions, SegmentationPredictor, predict_many
from perf_vit.inference.dense import RowStitcher, Strip
from perf_vit.inference.dense_output import DenseOutput, StripWriter
from perf_vit.inference.jobs.journal import open_journal
from perf_vit.models.input_spec import InputBands, InputCheck
from perf_vit.types import Window
from perf_vit.writers import RasterLayout, StripStore
from perf_vit.writers.cog import write_cog
from perf_vit.writers.layout import HeldRows

SIZES = [(60, 50), (700, 130), (64, 64), (61, 64), (130, 40)]


class Recorder(StubSegmenter):
    """A segmenter that notes its batches, and fails or waits where it is told to."""

    def __init__(self, on_call=lambda tiles: None) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.on_call = on_call

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(tiles))
        self.on_call(tiles)
        return super().forward(tiles)


@pytest.fixture
def scenes(make_scene, tmp_path) -> list[Path]:
    paths = [tmp_path / "scenes" / f"{index}.tif" for index in range(len(SIZES))]
    paths[0].parent.mkdir()
    for index, (path, (height, width)) in enumerate(zip(paths, SIZES, strict=True)):
        # Squares of 8 px: noise has a polygon for each pixel.
        squares = np.random.default_rng(index).integers(1, 30_000, (3, -(-height // 8), -(-width // 8)), np.uint16)
        pixels = squares.repeat(8, 1).repeat(8, 2)[:, :height, :width].copy()
        pixels[:, :2], pixels[:, :, :3] = 0, 0
        make_scene(pixels=pixels).rename(path)
    return paths


def _inputs(scenes: list[Path], out: Path) -> list[MapInput]:
    return [MapInput(str(path), out / path.name) for path in scenes]


def _predictor(model: StubSegmenter | None = None, **options) -> SegmentationPredictor:
    return SegmentationPredictor(model or Recorder(), SegmentationPredictOptions(device="cpu", overlap=16, **options))


def _predict(predictor: SegmentationPredictor, inputs: list[MapInput], **options):
    return predict_many(predictor, inputs, each=predictor.each, **options)


def _statuses(report) -> list[str]:
    return [each.status for each in report.inputs]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("batch_size", [3, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 100))])
def test_maps_of_many_inputs_are_the_same_bytes_as_one_at_a_time(scenes, tmp_path, batch_size: int) -> None:
    predictor = _predictor(batch_size=batch_size, quicklook=True, polygons="geojson")
    for item in _inputs(scenes, tmp_path / "single"):
        _predictor(quicklook=True, polygons="geojson").run(item.path, item.output)
    before = threading.active_count()
    report = _predict(predictor, _inputs(scenes, tmp_path / "many"))
    assert threading.active_count() == before
    assert [each.input for each in report.inputs] == list(map(str, scenes))
    assert _statuses(report) == ["done"] * len(scenes)
    assert _files(tmp_path / "many") == _files(tmp_path / "single")
    # Maps, quicklooks, polygons and what these were tidied with.
    assert len(_files(tmp_path / "many")) == 4 * len(scenes)


def test_batches_run_across_inputs(scenes, tmp_path) -> None:
    model = Recorder()
    small = [scenes[0], scenes[2], scenes[3]] * 3
    inputs = [MapInput(str(path), tmp_path / f"{index}.tif") for index, path in enumerate(small)]
    _predict(_predictor(model, batch_size=4), inputs)
    assert model.sizes == [4, 4, 1]


def test_maps_that_are_there_are_left_alone(scenes, tmp_path) -> None:
    inputs = _inputs(scenes, tmp_path / "maps")
    _predict(_predictor(), inputs[1:3])
    model, before = Recorder(), (tmp_path / "maps" / "1.tif").stat().st_mtime_ns
    report = _predict(_predictor(model), inputs)
    assert _statuses(report) == ["done", "skipped-existing", "skipped-existing", "done", "done"]
    assert (tmp_path / "maps" / "1.tif").stat().st_mtime_ns == before
    assert sum(model.sizes) == sum(each.num_windows for each in report.inputs if each.status == "done")


def test_an_error_of_the_model_costs_its_own_input_only(scenes, tmp_path) -> None:
    def fail_at_low(tiles: torch.Tensor) -> None:
        if (tiles[:, 0].flatten(1).amax(1) > 1e6).any():
            raise RuntimeError("out of memory")

    with rasterio.open(scenes[2], "r+") as dataset:
        marked = dataset.read()
        marked[:] = 10
        dataset.write(marked)
    bad = scenes[2].with_name("bad.tif")
    profile = rasterio.open(scenes[2]).profile | {"dtype": "float32"}
    with rasterio.open(bad, "w", **profile) as dataset:
        dataset.write(np.full((3, *dataset.shape), 1e12, np.float32))
    inputs = _inputs([scenes[0], bad, scenes[2], scenes[3]], tmp_path / "maps")
    report = _predict(_predictor(Recorder(fail_at_low), batch_size=4, on_error="skip"), inputs, on_error="skip")
    assert _statuses(report) == ["done", "failed", "done", "done"]
    assert report.inputs[1].error == "RuntimeError: out of memory"
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["0.tif", "2.tif", "3.tif"]


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_an_input_that_cannot_be_read_stops_the_run_or_is_skipped(scenes, tmp_path, on_error: str) -> None:
    content = scenes[2].read_bytes()
    scenes[2].write_bytes(content[: len(content) // 2])
    inputs = _inputs(scenes, tmp_path / "maps")
    predictor = _predictor(on_error=on_error)
    before = threading.active_count()
    if on_error == "stop":
        with pytest.raises(InputError, match=r"2\.tif"):
            _predict(predictor, inputs, on_error="stop")
        made = {"0.tif", "1.tif"}
    else:
        report = _predict(predictor, inputs, on_error="skip")
        assert len(report.inputs) == 5
        assert _statuses(report)[3:] == ["done", "done"]
        made = {"0.tif", "1.tif", "3.tif", "4.tif"}
    assert threading.active_count() == before
    assert {path.name for path in (tmp_path / "maps").glob("*.tif")} >= made
    assert not (on_error == "stop" and (tmp_path / "maps" / "4.tif").exists())


def test_polygons_that_another_process_writes_are_left_to_it(scenes, tmp_path) -> None:
    out = tmp_path / "maps" / "0.tif"
    predictor = _predictor(polygons="geojson")
    with open_journal(out.with_suffix(".geojson")), pytest.raises(BusyError):
        predictor.run(scenes[0], out)
    assert out.exists()
    assert not out.with_suffix(".geojson").exists()
    assert not predictor.run(scenes[0], out).made
    assert out.with_suffix(".geojson").exists()
    assert not list(out.parent.glob("*.partial"))


def test_an_input_of_another_process_comes_back_busy(scenes, tmp_path) -> None:
    inputs = _inputs(scenes, tmp_path / "maps")
    with open_journal(tmp_path / "maps" / "2.tif"):
        report = _predict(_predictor(), inputs, num_rounds=1, wait_s=0)
    assert sorted(_statuses(report)) == ["busy", "done", "done", "done", "done"]
    assert [each.input for each in report.inputs if each.status == "busy"] == [str(scenes[2])]
    assert _statuses(_predict(_predictor(), inputs)).count("skipped-existing") == 4


def test_inputs_after_a_large_one_are_left_to_other_processes_meanwhile(scenes, tmp_path) -> None:
    def look(_: torch.Tensor) -> None:
        if len(model.sizes) in (2, 20):
            locked.append(sorted(path.name for path in (tmp_path / "maps").glob("*.partial")))

    locked: list[list[str]] = []
    model = Recorder(look)
    # 45 windows, and one each.
    inputs = _inputs([scenes[1], scenes[0], scenes[2], scenes[3]], tmp_path / "maps")
    assert _statuses(_predict(_predictor(model), inputs)) == ["done"] * 4
    assert locked == [["1.tif.partial"]] * 2


def test_inputs_behind_a_large_one_are_left_to_other_processes_where_a_small_one_comes_first(scenes, tmp_path) -> None:
    def look(_: torch.Tensor) -> None:
        # The large one is the second: all its windows but the last ones.
        if 1 < len(model.sizes) < 40:
            locked.update(path.name for path in (tmp_path / "maps").glob("*.partial"))

    locked: set[str] = set()
    model = Recorder(look)
    inputs = _inputs([scenes[0], scenes[1], scenes[2], scenes[3]], tmp_path / "maps")
    assert _statuses(_predict(_predictor(model), inputs)) == ["done"] * 4
    assert "1.tif.partial" in locked
    assert locked <= {"0.tif.partial", "1.tif.partial"}


@pytest.mark.parametrize("part", ["model", "encoding", "writing"])
def test_a_failed_input_leaves_no_rows_in_memory_without_the_garbage_collector(
    scenes, tmp_path, monkeypatch, part: str
) -> None:
    def fail(*arguments, **options) -> None:
        if part != "model" or len(model.sizes) == 30:
            raise RuntimeError("out of memory")

    def make(self: RowStitcher, *arguments) -> None:
        init(self, *arguments)
        made.append(weakref.ref(self._mean))

    init, made = RowStitcher.__init__, []
    monkeypatch.setattr(RowStitcher, "__init__", make)
    if part == "writing":
        monkeypatch.setattr(StripStore, "write", fail)
    if part == "encoding":
        monkeypatch.setattr("perf_vit.inference.dense_output.class_map", fail)
    gc.disable()
    try:
        model = Recorder(fail if part == "model" else lambda _: None)
        report = _predict(_predictor(model, on_error="skip"), _inputs(scenes[:3], tmp_path / "maps"), on_error="skip")
        held = [each() for each in made]
    finally:
        gc.enable()
    assert _statuses(report) == ["failed" if part == "encoding" else "done", "failed", report.inputs[0].status]
    assert [each is None for each in held] == [True] * 3


def test_a_warning_as_an_error_costs_its_own_input_only(scenes, tmp_path) -> None:
    colours = ("red", "green", "blue")
    for index, path in enumerate(scenes[:4]):
        with rasterio.open(path, "r+") as dataset:
            dataset.descriptions = colours[::-1] if index in (0, 2) else colours
    predictor = _predictor(on_error="skip")
    predictor.check_input = InputCheck(InputBands(names=colours, dtype="uint8", low=(), high=()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        report = _predict(predictor, _inputs(scenes[:4], tmp_path / "maps"), on_error="skip")
    assert _statuses(report) == ["failed", "done", "failed", "done"]
    assert "in another order" in report.inputs[0].error


def test_strips_that_cannot_be_written_fail_their_input(scenes, tmp_path, monkeypatch) -> None:
    def fail(self, row: int, block: np.ndarray) -> None:
        if row >= 600:
            raise OutputError("no space")
        write(self, row, block)

    write = StripStore.write
    monkeypatch.setattr(StripStore, "write", fail)
    before = threading.active_count()
    report = _predict(_predictor(on_error="skip"), _inputs(scenes[:3], tmp_path / "maps"), on_error="skip")
    assert _statuses(report) == ["done", "failed", "done"]
    assert "no space" in report.inputs[1].error
    with pytest.raises(OutputError, match="no space"):
        _predictor().run(scenes[1], tmp_path / "single.tif")
    assert threading.active_count() == before
    assert list(tmp_path.glob("single.tif.partial/rows_*"))
    monkeypatch.undo()
    assert _predictor().run(scenes[1], tmp_path / "single.tif").made
    assert _predictor().run(scenes[1], tmp_path / "whole.tif").made
    assert (tmp_path / "single.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()


def test_scores_that_are_written_as_they_are_do_not_change_behind_the_writer(tmp_path) -> None:
    scores = np.zeros((1, 4, 5), np.float32)
    strips = [Strip(Window(row, 0, 4, 5), scores, np.ones((4, 5), bool)) for row in (0, 4)]
    output = DenseOutput(encode=lambda strip: strip.scores, band_names=["x"], dtype="float32", nodata=None)
    written, go_on = {}, threading.Event()

    class Slow:
        def write(self, row: int, block: np.ndarray) -> None:
            assert go_on.wait(20)
            written[row] = block.copy()

    with ThreadPoolExecutor(1) as pool:
        writer = StripWriter(output, Slow(), pool)
        for value, strip in enumerate(strips):
            scores[:] = value
            writer(strip)
        go_on.set()
        writer.flush()
    assert {row: block.max() for row, block in written.items()} == {0: 0, 4: 1}


def test_closing_early_leaves_no_thread_and_no_lock_and_a_later_call_goes_on(scenes, tmp_path) -> None:
    inputs = _inputs([scenes[0], scenes[1], scenes[2], scenes[4]], tmp_path / "maps")
    before, model = threading.active_count(), Recorder()
    reports = _predictor(model).each(None, inputs)
    assert next(reports).status == "done"
    reports.close()
    assert threading.active_count() == before
    assert not (tmp_path / "maps" / "2.tif.partial").exists()
    report = _predict(_predictor(), inputs)
    assert _statuses(report)[0] == "skipped-existing"
    assert set(_statuses(report)) == {"skipped-existing", "done"}
    _predict(_predictor(), _inputs(scenes, tmp_path / "whole"))
    expected = _files(tmp_path / "whole")
    assert all(expected[name] == content for name, content in _files(tmp_path / "maps").items())


def test_an_interrupt_leaves_no_thread_and_only_rows_that_a_later_call_goes_on_with(scenes, tmp_path) -> None:
    def interrupt(_: torch.Tensor) -> None:
        if len(model.sizes) == 25:
            raise KeyboardInterrupt

    inputs, model, before = _inputs(scenes, tmp_path / "maps"), Recorder(interrupt), threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        _predict(_predictor(model), inputs)
    assert threading.active_count() == before
    assert (tmp_path / "maps" / "0.tif").exists()
    assert [path.name for path in (tmp_path / "maps").glob("*.partial")] == ["1.tif.partial"]
    assert list((tmp_path / "maps").glob("1.tif.partial/rows_*"))
    rest = Recorder()
    assert _statuses(_predict(_predictor(rest), inputs)) == ["skipped-existing", *["done"] * 4]
    _predict(_predictor(), _inputs(scenes, tmp_path / "whole"))
    assert _files(tmp_path / "maps") == _files(tmp_path / "whole")


def test_a_map_is_finished_while_the_model_computes_the_next(scenes, tmp_path, monkeypatch) -> None:
    finish, computed = threading.Event(), []

    def let_finish(tiles: torch.Tensor) -> None:
        computed.append(len(tiles))
        if len(computed) == 3:
            finish.set()

    def write_late(*arguments) -> None:
        # Without the third input in the model, the first map would never be finished.
        assert finish.wait(20)
        write_cog(*arguments)

    monkeypatch.setattr("perf_vit.inference.jobs.job.write_cog", write_late)
    inputs = _inputs([scenes[0], scenes[2], scenes[3]], tmp_path / "maps")
    assert _statuses(_predict(_predictor(Recorder(let_finish)), inputs)) == ["done"] * 3


def test_an_error_of_finishing_stops_while_a_long_map_is_computed(scenes, tmp_path, monkeypatch) -> None:
    failing = threading.Event()

    def wait(_: torch.Tensor) -> None:
        if len(model.sizes) > 1:
            assert failing.wait(20)
            time.sleep(0.05)

    def fail(*_) -> None:
        failing.set()
        raise OSError("no space")

    monkeypatch.setattr("perf_vit.inference.jobs.job.write_cog", fail)
    model = Recorder(wait)
    with pytest.raises(OSError, match="no space"):
        _predict(_predictor(model, on_error="stop"), _inputs(scenes[:2], tmp_path / "maps"), on_error="stop")
    # The second map has 45 windows.
    assert len(model.sizes) < 40


def test_an_error_of_finishing_is_part_of_the_report(scenes, tmp_path, monkeypatch) -> None:
    def fail(store, layout, made, path) -> None:
        if path.name == "2.tif":
            raise OSError("no space")
        write_cog(store, layout, made, path)

    monkeypatch.setattr("perf_vit.inference.jobs.job.write_cog", fail)
    # One that stops goes on when it is asked to.
    report = _predict(_predictor(on_error="stop"), _inputs(scenes, tmp_path / "maps"), on_error="skip")
    assert _statuses(report) == ["done", "done", "failed", "done", "done"]
    assert report.inputs[2].error == "OSError: no space"


def test_a_folder_that_other_processes_remove_meanwhile_is_made_again(tmp_path, monkeypatch) -> None:
    def make(self: Path, *arguments, **options) -> None:
        if self.name == "map.tif.partial" and errors:
            # What `Path.mkdir` raises if a parent, or the folder itself, goes while it looks.
            raise errors.pop()(2, "gone", str(self))
        mkdir(self, *arguments, **options)

    mkdir, errors = Path.mkdir, [FileNotFoundError, FileExistsError, FileNotFoundError]
    monkeypatch.setattr(Path, "mkdir", make)
    with open_journal(tmp_path / "maps" / "map.tif") as journal:
        assert journal.folder.is_dir()
    assert errors == []
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="a parent is not a folder"), open_journal(tmp_path / "file" / "map.tif"):
        pass


@pytest.mark.parametrize("name", [".map.tmp.a1b2c3d4", "map.tmp.aux.xml", ".pyramid.tmp.a1b2c3d4", "map.tmp.ovr"])
def test_what_writers_leave_next_to_a_map_is_ours(scenes, tmp_path, name: str) -> None:
    folder = tmp_path / "map.tif.partial"
    folder.mkdir()
    (folder / "lock").touch()
    if name.startswith("."):
        (folder / name).mkdir()
        (folder / name / "map.tmp").write_bytes(b"half")
    else:
        (folder / name).write_bytes(b"half")
    assert _predictor().run(scenes[0], tmp_path / "map.tif").made
    assert not folder.exists()


@pytest.mark.parametrize("name", [".map.tmp", "amap.tmp.b", "notes.txt", ".other.tmp.a1b2c3d4"])
def test_a_folder_with_other_files_is_not_ours(scenes, tmp_path, name: str) -> None:
    (tmp_path / "map.tif.partial").mkdir()
    (tmp_path / "map.tif.partial" / name).touch()
    with pytest.raises(OutputError, match="was not made by perf_vit"):
        _predictor().run(scenes[0], tmp_path / "map.tif")


@pytest.mark.parametrize("leftover", ["map.tmp", "damage_0123456789abcdef0123456789abcdef.jsonl"])
def test_what_a_killed_process_left_of_a_small_map_is_ours(scenes, tmp_path, leftover: str) -> None:
    folder = tmp_path / "map.tif.partial"
    folder.mkdir()
    (folder / "lock").touch()
    (folder / leftover).write_text('{"window": [0, 0, 9, 9], "reason": "damaged"}\n')
    result = _predictor(on_error="skip").run(scenes[0], tmp_path / "map.tif")
    assert result.made
    assert result.damaged == ()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("dtype", "num_bands", "has_colors"),
    [("uint8", 1, True), *((dtype, count, False) for dtype in ("uint8", "uint16", "float32") for count in (1, 3, 4))],
)
def test_small_maps_have_the_bytes_of_maps_of_strips(tmp_path, dtype: str, num_bands: int, has_colors: bool) -> None:
    rng = np.random.default_rng(0)
    pixels = (rng.random((num_bands, 200, 512)) * 250).astype(dtype)
    layout = RasterLayout(
        height=200,
        width=512,
        num_bands=num_bands,
        dtype=dtype,
        crs=rasterio.crs.CRS.from_epsg(32637),
        transform=rasterio.Affine(2, 0, 400_000, 0, -3, 4_500_000),
        nodata=float("nan") if dtype == "float32" else 255,
        colormap={0: (1, 2, 3, 255), 9: (4, 5, 6, 255)} if has_colors else None,
        band_names=[f"name {band}" for band in range(num_bands)],
        tags={"MODEL": "x", "OTHER": "y z"},
        scale=0.5 if num_bands == 3 else 1.0,
    )
    made = {}
    for store_of in (HeldRows, StripStore):
        folder = tmp_path / store_of.__name__
        folder.mkdir()
        store = store_of(folder, layout, Path("map.tif"))
        for row in (128, 0):
            store.write(row, pixels[:, row : row + 128])
        assert store.gaps(0, 200) == []
        write_cog(store, layout, folder / "map.tmp", Path("map.tif"))
        made[store_of] = (folder / "map.tmp").read_bytes()
    assert made[HeldRows] == made[StripStore]
