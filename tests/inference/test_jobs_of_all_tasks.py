"""What holds for the predictions of all tasks: killed, gone on with, made once, never mixed, reported."""

import contextlib
import copy
import csv
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from small_models import save_classifier, save_segmenter, save_slide_classifier, save_small_detector
from synthetic_slide import make_slide

import perf_vit
from perf_vit.errors import InputError, OptionError, OutputError
from perf_vit.inference import RayPool, find_inputs, predict_many
from perf_vit.inference.jobs import JobResult
from perf_vit.sources import open_source
from perf_vit.sources._gdal import open_dataset
from perf_vit.sources.slides import SlideSource
from perf_vit.workflows.registry import TASKS


def make_predictor(task: str, checkpoint: Path, **options: Any) -> Any:
    return TASKS[task].predictor(checkpoint, TASKS[task].predict_options(**options))


class KilledError(BaseException):
    """Ends a process at any line, as a signal does."""


@dataclass(frozen=True)
class Case:
    """A prediction.

    Attributes:
        task: Its task.
        save: Writes the checkpoint of an untrained model.
        write: Writes the inputs into a folder and gives what is predicted.
        out: Name of the main output.
        options: Options of the prediction.
        counted: Attribute of the model whose forward passes are counted; the model itself by default.
    """

    task: str
    save: Callable[[Path], Path]
    write: Callable[[Path], Any]
    out: str
    options: dict[str, Any] = field(default_factory=dict)
    counted: str | None = None


def write_image(path: Path, height: int, seed: int) -> Path:
    """A raster of three bands, 64 px wide, of squares: noise has a polygon for each pixel."""
    squares = np.random.default_rng(seed).integers(1, 255, (3, -(-height // 4), 16)).astype(np.uint8)
    pixels = squares.repeat(4, 1).repeat(4, 2)[:, :height]
    profile = {"driver": "GTiff", "height": height, "width": 64, "count": 3, "dtype": "uint8", "crs": "EPSG:32636"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", transform=Affine(1, 0, 5e5, 0, -1, 4e6), **profile) as file:
        file.write(pixels)
    return path


def write_scene(folder: Path) -> str:
    return str(write_image(folder / "scene.tif", 500, 0))


def write_images(folder: Path) -> list[str]:
    return [str(write_image(folder / f"{number}.tif", 40, number)) for number in range(6)]


def write_slides(folder: Path) -> list[str]:
    folder.mkdir()
    return [
        str(make_slide(folder / f"{number}.svs", 320, 320, mpp=0.5, tile_px=64, tissue_share=0.6, seed=number))
        for number in range(3)
    ]


CASES = {
    "segmentation": Case(
        "segmentation", save_segmenter, write_scene, "map.tif", {"quicklook": True, "polygons": "geojson"}
    ),
    "detection": Case("detection", save_small_detector, write_scene, "found.gpkg", {"score_threshold": 0.0}),
    "detection in batches": Case(
        "detection", save_small_detector, write_scene, "found.json", {"score_threshold": 0.0, "batch_size": 2}
    ),
    "classification": Case(
        "classification", lambda path: save_classifier(path, "single_label"), write_images, "found.csv"
    ),
    "regression": Case("regression", lambda path: save_classifier(path, "regression"), write_images, "found.csv"),
    "slide classification": Case(
        "slide_classification", save_slide_classifier, write_slides, "found.csv", {"batch_size": 4}, "encoder"
    ),
}


class Bench:
    """A case with its files."""

    def __init__(self, case: Case, root: Path) -> None:
        self.case = case
        self.root = root
        self.checkpoint = case.save(root / "model.ckpt")
        self.source = case.write(root / "in")

    def elsewhere(self, root: Path) -> "Bench":
        """The same model and inputs with outputs in another folder, where those of the folder "whole" are copied."""
        other = copy.copy(self)
        other.root = root
        shutil.copytree(self.root / "whole", root / "whole")
        return other

    def finish(self, folder: str) -> None:
        """Leave what an uninterrupted prediction leaves."""
        shutil.copytree(self.root / "whole", self.root / folder)

    @property
    def first_input(self) -> Path:
        return Path(self.source if isinstance(self.source, str) else self.source[0])

    def run(self, folder: str, *, kill_after: int | None = None, **options: Any) -> tuple[JobResult, int]:
        """What became of the prediction and how many forward passes it took."""
        given = {"device": "cpu", **self.case.options, **options}
        predictor = make_predictor(self.case.task, self.checkpoint, **given)
        count = 0

        def on_forward(*_: Any) -> None:
            nonlocal count
            if count == kill_after:
                raise KilledError
            count += 1

        model = predictor.model
        counted = getattr(model, self.case.counted) if self.case.counted else model
        counted.register_forward_pre_hook(on_forward)
        return predictor.run(self.source, self.root / folder / self.case.out), count

    def kill(self, folder: str, after: int, **options: Any) -> None:
        with pytest.raises(KilledError):
            self.run(folder, kill_after=after, **options)

    def files(self, folder: str) -> dict[str, bytes]:
        """All files in a folder of outputs, hidden ones too."""
        root = self.root / folder
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def predicted(request, tmp_path_factory) -> tuple[Bench, int]:
    """A prediction that was run to its end, and how many forward passes it took."""
    bench = Bench(request.param, tmp_path_factory.mktemp("bench"))
    return bench, bench.run("whole")[1]


@pytest.fixture
def bench(predicted, tmp_path) -> Bench:
    """One with inputs that no test may change."""
    return predicted[0].elsewhere(tmp_path)


@pytest.fixture
def number(predicted) -> int:
    """Forward passes of a whole prediction."""
    return predicted[1]


def test_a_killed_prediction_goes_on_and_its_outputs_are_those_of_an_uninterrupted_one(bench, number) -> None:
    assert number >= 3
    bench.kill("killed", number // 2)
    found = bench.root / "killed" / bench.case.out
    if found.suffix == ".csv":
        # The rows so far, to be looked at.
        rows, whole = found.read_text().splitlines(), (bench.root / "whole" / found.name).read_text().splitlines()
        assert 1 < len(rows) < len(whole)
        assert rows == whole[: len(rows)]
    else:
        assert not found.exists()
    result, again = bench.run("killed")
    assert result.made
    assert 0 < again < number
    assert bench.files("killed") == bench.files("whole")


def test_a_prediction_that_is_done_is_not_made_again(bench) -> None:
    bench.finish("out")
    before = {path: path.stat().st_mtime_ns for path in (bench.root / "out").rglob("*")}
    result, number = bench.run("out")
    assert (result.made, number) == (False, 0)
    assert {path: path.stat().st_mtime_ns for path in (bench.root / "out").rglob("*")} == before


def test_outputs_of_other_settings_are_refused_and_replaced_on_demand(bench) -> None:
    bench.finish("out")
    before = bench.files("out")
    with pytest.raises(OutputError, match="exists already, but not as this model's"):
        bench.run("out", precision="bf16")
    assert bench.files("out") == before
    assert bench.run("out", precision="bf16", overwrite=True)[0].made
    assert not bench.run("out", precision="bf16")[0].made


def test_outputs_of_another_input_are_refused(bench, tmp_path_factory) -> None:
    bench = Bench(bench.case, tmp_path_factory.mktemp("own"))
    bench.run("out")
    before = bench.files("out")
    others = Path(bench.case.write(bench.root / "other") if isinstance(bench.source, str) else bench.source[1])
    content = bytearray(others.read_bytes())
    content[-100:] = content[-200:-100]
    bench.first_input.write_bytes(content)
    # So that times of change alone tell nothing.
    later = (time.time() + 60,) * 2
    for path in (bench.root / "out").rglob("*"):
        os.utime(path, later)
    with pytest.raises(OutputError, match="exists already, but not as this model's"):
        bench.run("out")
    assert bench.files("out") == before


def test_outputs_that_were_edited_are_refused(bench) -> None:
    if bench.case.task == "segmentation":
        pytest.skip("tags of a map say what it is, whoever edits its pixels")
    bench.finish("out")
    out = bench.root / "out" / bench.case.out
    out.write_bytes(out.read_bytes() + b"\n")
    before = bench.files("out")
    with pytest.raises(OutputError, match="exists already, but was changed since it was made"):
        bench.run("out")
    assert bench.files("out") == before


def test_a_broken_link_in_the_place_of_an_output_is_refused(bench) -> None:
    bench.finish("out")
    out = bench.root / "out" / bench.case.out
    out.unlink()
    out.symlink_to("nowhere")
    with pytest.raises(OutputError, match="exists already"):
        bench.run("out")
    assert os.readlink(out) == "nowhere"


def test_what_was_begun_with_other_settings_is_not_gone_on_with(bench, number) -> None:
    bench.kill("out", number // 2)
    with pytest.raises(OutputError, match=r"holds the unfinished .*, made with precision = float32, now bfloat16"):
        bench.run("out", precision="bf16")
    _, number = bench.run("whole in bf16", precision="bf16")
    assert bench.run("out", precision="bf16", resume=False)[1] == number
    assert bench.files("out") == bench.files("whole in bf16")


def test_a_process_killed_while_it_moves_its_outputs_leaves_the_rest_to_the_next(bench, monkeypatch) -> None:
    with monkeypatch.context() as patch:

        def kill(*_: Any) -> None:
            raise KilledError

        patch.setattr("perf_vit.inference.jobs.journal.Journal.move", kill)
        with pytest.raises(KilledError):
            bench.run("out")
    result, number = bench.run("out")
    assert (result.made, number) == (True, 0)
    assert bench.files("out") == bench.files("whole")


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_the_report_of_many_inputs_has_all_of_them(task, tmp_path) -> None:
    for number in range(3):
        write_image(tmp_path / "in" / f"{number}.tif", 64, number)
    (tmp_path / "in" / "bad.tif").write_bytes(b"no raster")
    checkpoint = CASES[task].save(tmp_path / "model.ckpt")
    predictor = make_predictor(task, checkpoint, device="cpu", on_error="skip")
    inputs = find_inputs([tmp_path / "in"], tmp_path / "out")
    for status in ("done", "skipped-existing"):
        report = predict_many(predictor, inputs, on_error="skip", report_path=tmp_path / "out" / "report.json")
        assert {Path(each.input).name: each.status for each in report.inputs} == {
            "bad.tif": "failed", "0.tif": status, "1.tif": status, "2.tif": status
        }  # fmt: skip
        written = json.loads((tmp_path / "out" / "report.json").read_text())
        assert {Path(each["output"]).suffix for each in written["inputs"] if each["status"] == status} == {
            ".tif" if task == "segmentation" else ".gpkg"
        }


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_inputs_whose_outputs_are_there_are_opened_once(task, tmp_path, monkeypatch) -> None:
    images = [write_image(tmp_path / "in" / f"{number}.tif", 64, number) for number in range(3)]
    checkpoint = CASES[task].save(tmp_path / "model.ckpt")

    def run() -> list[Any]:
        report = perf_vit.predict(checkpoint, tmp_path / "in", tmp_path / "out", progress=False, device="cpu")
        return sorted(({**each.to_dict(), "seconds": 0} for each in report.inputs), key=lambda each: each["input"])

    def count(path: str, **options: Any) -> Any:
        opened.append(path)
        return open_dataset(path, **options)

    def made() -> dict[str, tuple[int, bytes]]:
        found = (path for path in (tmp_path / "out").iterdir() if path.name != "report.json")
        return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}

    first, files, opened = run(), made(), []
    monkeypatch.setattr("perf_vit.sources.raster.open_dataset", count)
    again = run()
    assert [opened.count(str(path)) for path in images] == [1, 1, 1]
    differing = {"status": "skipped-existing", **({} if task == "segmentation" else {"num_objects": None})}
    assert [{**each, **differing} for each in again] == [{**each, **differing} for each in first]
    assert {each["status"] for each in again} == {"skipped-existing"}
    assert made() == files
    # What is missing is made, and what a killed process left is removed.
    left = Path(f"{again[1]['output']}.partial")
    left.mkdir()
    for path in (tmp_path / "out").glob("*2.*"):
        path.unlink()
    assert [each["status"] for each in run()] == ["skipped-existing", "skipped-existing", "done"]
    assert made().keys() == files.keys()
    assert not left.exists()


@pytest.mark.parametrize("task", ["classification", "regression", "slide classification"])
def test_a_table_has_a_row_for_every_input(task, tmp_path) -> None:
    bench = Bench(CASES[task], tmp_path)
    bad = tmp_path / "in" / "bad.tif"
    bad.write_bytes(b"no raster")
    bench.source.insert(1, str(bad))
    result, _ = bench.run("out", on_error="skip")
    assert list(result.failed) == [str(bad)]
    with (tmp_path / "out" / "found.csv").open() as file:
        header, *rows = csv.reader(file)
    assert [row[0] for row in rows] == bench.source
    assert header[-1] == "error"
    assert ["bad.tif" in row[-1] for row in rows] == [path == str(bad) for path in bench.source]
    with pytest.raises(OutputError, match="without parts of the input that couldn't be read"):
        bench.run("out")


@pytest.mark.parametrize("task", ["classification", "slide classification"])
def test_an_input_that_changed_since_its_row_was_written_is_looked_at_again(task, tmp_path) -> None:
    bench = Bench(CASES[task], tmp_path)
    _, number = bench.run("before")
    bench.kill("out", number - 1)
    shutil.copy(bench.source[-1], bench.source[0])
    _, again = bench.run("out")
    _, whole = bench.run("whole")
    assert again < whole
    assert bench.files("out") == bench.files("whole")


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_a_damaged_input_is_finished_by_skip_and_never_taken_for_a_whole_one_by_stop(task, tmp_path) -> None:
    bench = Bench(CASES[task], tmp_path)
    content = bench.first_input.read_bytes()
    bench.first_input.write_bytes(content[: int(len(content) * 0.7)])
    # The files next to a map need the whole scene.
    alone = {"quicklook": False, "polygons": None} if task == "segmentation" else {}
    skip = {**alone, "on_error": "skip"}
    stop = skip | {"on_error": "stop"}
    with pytest.raises(InputError, match="can't read"):
        bench.run("out", **stop)
    # What stop finished is whole, and skip goes on with it.
    result, number = bench.run("out", **skip)
    assert result.damaged
    _, whole = bench.run("whole", **skip)
    assert number < whole
    assert bench.files("out") == bench.files("whole")
    assert bench.run("out", **skip)[1] == 0
    with pytest.raises(OutputError, match=r"couldn't be read|damaged pixels"):
        bench.run("out", **stop)
    bench.kill("killed", whole - 1, **skip)
    with pytest.raises((OutputError, InputError)):
        bench.run("killed", **stop)
    assert not (tmp_path / "killed" / bench.case.out).exists()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "slide classification"])
def test_a_table_made_by_ray_is_the_same_bytes(task, tmp_path) -> None:
    pytest.importorskip("ray")
    bench = Bench(CASES[task], tmp_path)
    bench.run("local")
    predictor = make_predictor(bench.case.task, bench.checkpoint, device="cpu", **bench.case.options)
    with RayPool(num_actors=2) as pool:
        predictor.run(bench.source, tmp_path / "ray" / bench.case.out, pool=pool)
    assert bench.files("ray") == bench.files("local")


class OtherFolder:
    """In place of a pool: pickled work is done in another folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()

    def map(self, work: Callable[[Any], Any], items: Any) -> Any:
        pickled = pickle.dumps(work)
        for item in items:
            with contextlib.chdir(self._folder):
                result = pickle.loads(pickled)(item)
            yield item, result


@pytest.mark.parametrize("task", ["classification", "slide classification"])
def test_a_table_made_elsewhere_of_relative_paths_is_the_same_bytes(task, tmp_path, monkeypatch) -> None:
    bench = Bench(CASES[task], tmp_path)
    bench.source = [os.path.relpath(path, tmp_path) for path in bench.source]
    monkeypatch.chdir(tmp_path)
    options = dict(bench.case.options)
    if bench.case.task == "slide_classification":
        ring = [[0, 0], [300, 0], [300, 300], [0, 300], [0, 0]]
        Path("tissue.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
        options["tissue"] = "tissue.geojson"
    bench.run("local", **options)
    predictor = make_predictor(bench.case.task, Path("model.ckpt"), device="cpu", **options)
    predictor.run(bench.source, Path("elsewhere", bench.case.out), pool=OtherFolder(tmp_path / "worker"))
    assert bench.files("elsewhere") == bench.files("local")


@pytest.mark.slow
def test_objects_of_many_inputs_found_by_ray_are_the_same_bytes(tmp_path) -> None:
    pytest.importorskip("ray")
    write_images(tmp_path / "in")
    checkpoint = save_small_detector(tmp_path / "model.ckpt")
    predictor = make_predictor("detection", checkpoint, device="cpu", score_threshold=0.0)
    local = predict_many(predictor, find_inputs([tmp_path / "in"], tmp_path / "local"))
    with RayPool(num_actors=2) as pool:
        spread = predict_many(predictor, find_inputs([tmp_path / "in"], tmp_path / "ray"), each=pool.each)
    assert spread.count("done") == local.count("done") == 6
    for path in (tmp_path / "local").iterdir():
        assert (tmp_path / "ray" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_a_source_that_was_given_stays_open_and_the_model_is_evaluated(task, tmp_path) -> None:
    bench = Bench(CASES[task], tmp_path)
    predictor = make_predictor(task, bench.checkpoint, device="cpu", **bench.case.options)
    predictor.model.train()
    closed = []
    with open_source(bench.source) as source:
        source.close = lambda: closed.append(True)
        predictor.run(source, tmp_path / "out" / bench.case.out)
        assert not closed
        del source.close
    bench.run("by_path")
    assert bench.files("out") == bench.files("by_path")


@pytest.mark.parametrize("task", ["classification", "slide classification"])
def test_a_model_in_training_mode_is_evaluated(task, tmp_path) -> None:
    bench = Bench(CASES[task], tmp_path)
    predictor = make_predictor(bench.case.task, bench.checkpoint, device="cpu", **bench.case.options)
    modes = []
    counted = getattr(predictor.model, bench.case.counted) if bench.case.counted else predictor.model
    counted.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    predictor.model.train()
    predictor.run(bench.source, tmp_path / "out" / bench.case.out)
    assert modes
    assert not any(modes)


def test_embedding_leaves_the_mode_of_a_model_in_training(tmp_path) -> None:
    bench = Bench(CASES["slide classification"], tmp_path)
    predictor = make_predictor("slide_classification", bench.checkpoint, device="cpu")
    predictor.model.train()
    predictor.embed(bench.source[0])
    assert predictor.model.project.training


def test_a_slide_is_closed_that_has_no_tissue(tmp_path, monkeypatch) -> None:
    bench = Bench(CASES["slide classification"], tmp_path)
    closed = []
    monkeypatch.setattr(SlideSource, "close", lambda source: closed.append(source.path))
    tissue = tmp_path / "tissue.geojson"
    ring = [[-9, -9], [-5, -9], [-5, -5], [-9, -9]]
    tissue.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    with pytest.raises(InputError, match="tissue"):
        bench.run("out", tissue=str(tissue))
    # Further slides are read ahead.
    assert len(closed) >= 1
    assert closed == bench.source[: len(closed)]


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_a_device_of_an_unknown_name_is_an_option_error_and_leaves_nothing(task, tmp_path) -> None:
    bench = Bench(CASES[task], tmp_path)
    with pytest.raises(OptionError, match=r"^device banana"):
        bench.run("out", device="banana")
    assert not (tmp_path / "out").exists()
