"""Tables survive what ends a process: rows are kept, each is made once, and a bad input costs its own row only."""

import csv
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_models import save_classifier, save_slide_classifier
from synthetic_slide import make_slide
from table_process import classify

from perf_vit.errors import InputError, OutputError
from perf_vit.inference import (
    ClassificationPredictOptions,
    ClassificationPredictor,
    SlideClassificationPredictOptions,
    SlideClassificationPredictor,
)

NUM_SLIDES = 12


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(table: Path) -> list[list[str]]:
    with table.open(newline="") as file:
        return list(csv.reader(file))


class Runs:
    """Runs of one command in processes of their own."""

    def __init__(self, root: Path) -> None:
        self.checkpoint = str(save_slide_classifier(root / "model.ckpt"))
        (root / "in").mkdir()
        sizes = [256 + 32 * (seed % 3) for seed in range(NUM_SLIDES)]
        self.slides = [
            str(make_slide(root / "in" / f"{seed}.svs", size, size, mpp=0.5, tile_px=64, tissue_share=0.6, seed=seed))
            for seed, size in enumerate(sizes)
        ]
        # Modules are imported once, so that a run takes no longer than its work.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["perf_vit.inference"])
        self.root = root
        self.finish("warm-up")
        self.seconds = min(self.finish("again"), self.finish("whole"))

    def start(self, folder: str) -> multiprocessing.process.BaseProcess:
        out = str(self.root / folder / "found.csv")
        process = self._context.Process(target=classify, args=(self.checkpoint, self.slides, out))
        process.start()
        return process

    def finish(self, folder: str) -> float:
        begin = time.monotonic()
        process = self.start(folder)
        process.join(120)
        assert process.exitcode == 0
        return time.monotonic() - begin

    def kill(self, folder: str, after_s: float) -> None:
        process = self.start(folder)
        time.sleep(after_s)
        # It may have ended before, on a machine that got faster.
        process.kill()
        process.join(60)

    def kill_with_rows(self, folder: str, num_rows: int) -> None:
        """Kill a run as soon as it has kept some rows."""
        process = self.start(folder)
        kept = self.root / folder / "found.csv.partial"
        until = time.monotonic() + 60
        while sum(file.read_bytes().count(b"\n") for file in kept.glob("items_*.jsonl")) < num_rows:
            assert time.monotonic() < until
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)

    def check_finished(self, folder: str) -> None:
        """Finish a run that was killed and compare it with a whole one."""
        whole, table = rows_of(self.root / "whole" / "found.csv"), self.root / folder / "found.csv"
        if table.exists():
            known = rows_of(table)
            assert known == whole[: len(known)]
        self.finish(folder)
        assert files_of(self.root / folder) == files_of(self.root / "whole")
        assert [row[0] for row in rows_of(table)[1:]] == self.slides


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def test_a_run_over_slides_that_is_killed_twice_has_each_row_once(runs: Runs) -> None:
    assert len(rows_of(runs.root / "whole" / "found.csv")) == 1 + NUM_SLIDES
    for num_rows in (3, 8):
        runs.kill_with_rows("twice", num_rows)
        # The table is written with the first row, and every ten seconds.
        assert len(rows_of(runs.root / "twice" / "found.csv")) > 1
    runs.check_finished("twice")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_run_over_slides_that_is_killed_at_any_moment_has_each_row_once(runs: Runs, seed: int) -> None:
    moment = float(np.random.default_rng(seed).random())
    runs.kill(f"random_{seed}", moment * runs.seconds)
    runs.check_finished(f"random_{seed}")


def predictor_of(root: Path, **options) -> SlideClassificationPredictor:
    checkpoint = root / "model.ckpt"
    if not checkpoint.exists():
        save_slide_classifier(checkpoint)
    return SlideClassificationPredictor(
        checkpoint, SlideClassificationPredictOptions(batch_size=4, device="cpu", **options)
    )


@pytest.fixture
def slides(tmp_path: Path) -> list[str]:
    (tmp_path / "in").mkdir()
    return [
        str(make_slide(tmp_path / "in" / f"{seed}.svs", 256, 256, mpp=0.5, tile_px=64, tissue_share=0.6, seed=seed))
        for seed in range(4)
    ]


def failing(predictor: SlideClassificationPredictor, number: int, error: BaseException) -> SlideClassificationPredictor:
    """A predictor whose encoder fails with the slide of a number."""
    embed, count = predictor.embed, 0

    def fail(path: str, *args, **kwargs):
        nonlocal count
        count += 1
        if Path(path).stem == str(number):
            raise error
        return embed(path, *args, **kwargs)

    predictor.embed = fail
    return predictor


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: misaligned address"), MemoryError(), OSError("bad tile"), InputError("no tissue")],
    ids=lambda error: type(error).__name__,
)
def test_whatever_fails_with_one_slide_costs_its_row_only(slides, tmp_path, error: Exception) -> None:
    found = failing(predictor_of(tmp_path, on_error="skip"), 1, error).run(slides, tmp_path / "found.csv")
    assert list(found.failed) == [slides[1]]
    rows = rows_of(tmp_path / "found.csv")
    assert [row[0] for row in rows[1:]] == slides
    assert [bool(row[-1]) for row in rows[1:]] == [False, True, False, False]
    assert (str(error) or type(error).__name__) in rows[2][-1]


@pytest.mark.parametrize("error", [OutputError("can't write: no space left on device"), KeyboardInterrupt()])
def test_what_is_no_fault_of_a_slide_ends_the_run_and_keeps_its_rows(slides, tmp_path, error) -> None:
    with pytest.raises(type(error)):
        failing(predictor_of(tmp_path, on_error="skip"), 2, error).run(slides, tmp_path / "found.csv")
    assert [row[0] for row in rows_of(tmp_path / "found.csv")[1:]] == slides[:2]
    assert predictor_of(tmp_path).run(slides, tmp_path / "found.csv").num_rows == 4


def test_slides_that_are_read_with_tissue_have_a_picture_of_it(slides, tmp_path) -> None:
    predictor = predictor_of(tmp_path)
    predictor.model.spec = replace(predictor.model.spec, tissue=None)
    predictor.run(slides, tmp_path / "without" / "found.csv")
    assert not (tmp_path / "without" / "found_attention" / "tissue").exists()
    predictor.options = replace(predictor.options, tissue="auto")
    made = predictor.run(slides, tmp_path / "with" / "found.csv")
    pictures = [tmp_path / "with" / "found_attention" / "tissue" / f"{seed}.png" for seed in range(4)]
    assert set(pictures) < set(made.beside)
    assert all(path.is_file() for path in pictures)
    # One that was deleted is missed, and one that was drawn over is never replaced.
    pictures[0].unlink()
    assert predictor.run(slides, tmp_path / "with" / "found.csv").made
    pictures[1].write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"tissue/1\.png exists already"):
        predictor.run(slides, tmp_path / "with" / "found.csv")
    assert pictures[1].read_bytes() == b"mine"


def stopped(slides: list[str], root: Path, **options) -> Path:
    """A table of two rows, whose run stopped at the third slide."""
    out = root / "found.csv"
    with pytest.raises(InputError, match=r"no tissue; found.csv.partial keeps what is finished"):
        failing(predictor_of(root, **options), 2, InputError("no tissue")).run(slides, out)
    assert [row[0] for row in rows_of(out)[1:]] == slides[:2]
    return out


def test_a_table_of_some_rows_that_was_edited_is_never_replaced(slides, tmp_path) -> None:
    out = stopped(slides, tmp_path)
    edited = out.read_text() + "mine\n"
    out.write_text(edited)
    with pytest.raises(OutputError, match="exists already"):
        predictor_of(tmp_path).run(slides, out)
    assert out.read_text() == edited
    out.rename(tmp_path / "mine.csv")
    assert predictor_of(tmp_path).run(slides, out).num_rows == 4


def test_a_run_that_begins_again_replaces_the_rows_of_the_stopped_one(slides, tmp_path) -> None:
    out = stopped(slides, tmp_path)
    with pytest.raises(InputError):
        failing(predictor_of(tmp_path, resume=False), 0, InputError("x")).run(slides, out)
    assert not out.exists()
    assert predictor_of(tmp_path, resume=False).run(slides, out).num_rows == 4


def test_an_earlier_table_stays_until_the_new_one_is_complete(slides, tmp_path) -> None:
    out = tmp_path / "found.csv"
    predictor_of(tmp_path).run(slides[:1], out)
    before = out.read_bytes()
    with pytest.raises(InputError):
        failing(predictor_of(tmp_path, overwrite=True), 2, InputError("x")).run(slides, out)
    assert out.read_bytes() == before
    assert predictor_of(tmp_path, overwrite=True).run(slides, out).num_rows == 4


def test_one_image_of_a_batch_that_fails_does_not_cost_the_others(tmp_path, monkeypatch) -> None:
    from test_jobs_of_all_tasks import write_images

    images = write_images(tmp_path / "in")
    options = ClassificationPredictOptions(batch_size=6, device="cpu", on_error="skip")
    predictor = ClassificationPredictor(save_classifier(tmp_path / "c.ckpt", "single_label"), options)
    rows: Callable = predictor.rows

    def fail(folder: Path, inputs: dict) -> dict:
        if images[3] in inputs:
            raise RuntimeError("kernel failed")
        return rows(folder, inputs)

    monkeypatch.setattr(predictor, "rows", fail)
    found = predictor.run(images, tmp_path / "found.csv")
    assert list(found.failed) == [images[3]]
    assert found.num_rows == 5
