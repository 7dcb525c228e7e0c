"""An interrupted map goes on where it was, and nobody sees the difference."""

import errno
import json
import os
import random
import resource
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import mapping_process
import pytest
from stub_segmenter import StubSegmenter

import perf_vit.inference.jobs.journal as journals
from perf_vit.errors import BusyError, DataWarning, InputError, OptionError, OutputError
from perf_vit.inference import SegmentationPredictOptions, SegmentationPredictor
from perf_vit.inference.jobs.journal import open_journal
from perf_vit.writers import StripStore

SCRIPT = Path(mapping_process.__file__)


@pytest.fixture
def scene(make_scene) -> Path:
    return make_scene(height=700, width=130, num_bands=3)


def _start(*args: object) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _wait_for(process: subprocess.Popen, done: int) -> None:
    for line in process.stdout:
        if int(line.split("/")[0]) >= done:
            return


@pytest.mark.slow
def test_a_killed_run_goes_on_and_gives_the_same_bytes(scene, tmp_path) -> None:
    mapping_process.main(scene, tmp_path / "whole.tif")
    rng = random.Random(0)
    kills = 0
    out = tmp_path / "map.tif"
    for attempt in range(4):
        process = _start(scene, out, 0.01)
        # Later attempts have less left to do.
        _wait_for(process, rng.randint(1, 6) + 6 * attempt)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.communicate()
        kills += process.returncode == -9
        if out.exists():
            break
    assert kills >= 2
    assert list(tmp_path.glob("map.tif.partial/rows_*")) or out.exists()
    mapping_process.main(scene, out)
    assert out.read_bytes() == (tmp_path / "whole.tif").read_bytes()
    assert not (tmp_path / "map.tif.partial").exists()


@pytest.mark.slow
def test_runs_killed_at_random_moments_of_their_life_give_the_same_bytes(make_scene, tmp_path) -> None:
    scene = make_scene(height=3000, width=1500, num_bands=3)
    start = time.monotonic()
    process = _start(scene, tmp_path / "whole.tif", 0, 256)
    assert process.wait() == 0, process.communicate()
    duration = time.monotonic() - start
    expected = (tmp_path / "whole.tif").read_bytes()
    rng = random.Random(1)
    kills = 0
    for _ in range(10):
        process = _start(scene, tmp_path / "map.tif", 0, 256)
        # From before the first window to the middle of writing the final file.
        time.sleep(rng.uniform(0.3, 0.9) * duration)
        process.kill()
        process.communicate()
        kills += process.returncode == -9
        process = _start(scene, tmp_path / "map.tif", 0, 256)
        assert process.wait() == 0, process.communicate()
        assert (tmp_path / "map.tif").read_bytes() == expected
        (tmp_path / "map.tif").unlink()
    assert kills >= 6


@pytest.mark.slow
def test_other_settings_are_not_mixed_in(scene, tmp_path) -> None:
    process = _start(scene, tmp_path / "map.tif", 0.02)
    _wait_for(process, 25)
    process.kill()
    process.communicate()
    kept = sorted(path.name for path in (tmp_path / "map.tif.partial").iterdir())
    refused = _start(scene, tmp_path / "map.tif", 0, 32)
    _, errors = refused.communicate()
    assert refused.returncode == 1
    assert "made with window_size = 64, now 32" in errors
    assert sorted(path.name for path in (tmp_path / "map.tif.partial").iterdir()) == kept


def test_a_strip_that_failed_once_leaves_no_wrong_rows(scene, tmp_path, monkeypatch) -> None:
    queued, calls = threading.Event(), []

    class Model(StubSegmenter):
        def forward(self, tiles):
            calls.append(len(tiles))
            if len(calls) == 5:
                queued.set()
            return super().forward(tiles)

    def predict(out: Path) -> None:
        # A batch is a row of windows.
        options = SegmentationPredictOptions(kind="probabilities", device="cpu", overlap=16, batch_size=3)
        SegmentationPredictor(Model(), options).run(scene, out)

    write, failures = StripStore.write, []

    def fail_once(store: StripStore, row: int, block) -> None:
        if row > 0 and not failures:
            # A further batch waits in the queue by then.
            assert queued.wait(20)
            failures.append(row)
            raise OSError("the disk is away")
        write(store, row, block)

    monkeypatch.setattr(StripStore, "write", fail_once)
    with pytest.raises(OSError, match="the disk is away"):
        predict(tmp_path / "map.tif")
    kept = {int(path.name.split("_")[1]) for path in (tmp_path / "map.tif.partial").glob("rows_*")}
    # The strip behind it may have been on its way.
    assert failures == [48]
    assert {0} <= kept <= {0, 96}
    predict(tmp_path / "map.tif")
    predict(tmp_path / "whole.tif")
    assert (tmp_path / "map.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()


@pytest.mark.slow
def test_a_changed_input_is_not_mixed_in(scene, tmp_path) -> None:
    process = _start(scene, tmp_path / "map.tif", 0.02)
    _wait_for(process, 25)
    process.kill()
    process.communicate()
    shutil.copy(scene, tmp_path / "other.tif")
    shutil.copyfile(tmp_path / "other.tif", scene)
    with pytest.raises(OutputError, match="made with input_modified_ns"):
        mapping_process.main(scene, tmp_path / "map.tif")


def _limited(*args: object, file_bytes: int) -> subprocess.CompletedProcess:
    """Run with a limit to the size of files, at which writing fails as it does on a full disk."""
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    limit = (file_bytes, file_bytes)
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )


@pytest.mark.parametrize("step", [pytest.param("a strip", marks=pytest.mark.slow), "the final file"])
def test_a_full_disk_is_a_clear_error_and_the_run_can_go_on(scene, tmp_path, step: str) -> None:
    mapping_process.main(scene, tmp_path / "whole.tif")
    expected = (tmp_path / "whole.tif").read_bytes()
    out = tmp_path / "map.tif"
    # Strips are smaller than the map of all of them.
    failed = _limited(scene, out, file_bytes=len(expected) // (100 if step == "a strip" else 2))
    assert failed.returncode == 1
    # libtiff may say something before.
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("can't write ")
    assert "is the disk full?" in last
    assert not out.exists()
    assert (tmp_path / "map.tif.partial").exists() == (step == "the final file")
    mapping_process.main(scene, out)
    assert out.read_bytes() == expected
    assert not (tmp_path / "map.tif.partial").exists()


def test_a_finished_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch) -> None:
    out, synced = tmp_path / "map.tif", []

    def sync(file: int) -> None:
        if stat.S_ISREG(os.fstat(file).st_mode):
            synced.append((os.fstat(file).st_ino, out.exists()))

    with open_journal(out) as journal:
        made = journal.folder / "map.tmp"
        made.write_bytes(b"map")
        monkeypatch.setattr("perf_vit.inference.jobs.journal.os.fsync", sync)
        journal.move(made)
        assert synced == [(out.stat().st_ino, False)]


def test_an_error_of_the_disk_at_the_last_moment_keeps_the_rows_and_the_earlier_map(tmp_path, monkeypatch) -> None:
    out = tmp_path / "map.tif"
    out.write_bytes(b"before")

    def sync(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OutputError, match=r"can't write .*map.tif: input/output error"), open_journal(out) as journal:
        (journal.folder / "rows_1").write_bytes(b"")
        made = journal.folder / "map.tmp"
        made.write_bytes(b"map")
        monkeypatch.setattr("perf_vit.inference.jobs.journal.os.fsync", sync)
        journal.move(made)
    assert out.read_bytes() == b"before"
    assert (tmp_path / "map.tif.partial" / "rows_1").exists()


def test_a_second_process_is_told_of_the_first(scene, tmp_path) -> None:
    first = _start(scene, tmp_path / "map.tif", 0.05)
    _wait_for(first, 2)
    with pytest.raises(OutputError, match="being written by another process"):
        mapping_process.main(scene, tmp_path / "map.tif")
    first.kill()
    first.communicate()
    mapping_process.main(scene, tmp_path / "map.tif")
    assert (tmp_path / "map.tif").exists()


def test_an_error_before_the_first_rows_leaves_nothing_and_after_them_only_the_rows(tmp_path) -> None:
    path = tmp_path / "a" / "b" / "map.tif"
    with pytest.raises(InputError), open_journal(path) as journal:
        journal.begin({"x": 1}, resume=True)
        raise InputError("damaged")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError), open_journal(path) as journal:
        journal.begin({"x": 1}, resume=True)
        (journal.folder / "rows_1").write_text("")
        raise InputError("damaged")
    assert json.loads((path.parent / "map.tif.partial" / "journal.json").read_text()) == {"x": 1}
    with open_journal(path) as journal:
        journal.begin({"x": 2}, resume=False)
        assert not (journal.folder / "rows_1").exists()
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("content", ["notes.txt", "rows_1.tif", "journal.json/x", "no folder"])
def test_a_folder_of_somebody_else_is_never_touched(tmp_path, content: str) -> None:
    folder = tmp_path / "map.tif.partial"
    mine = folder if content == "no folder" else folder / content
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    refusal = pytest.raises(OutputError, match=r"map\.tif\.partial, where .* was not made by perf_vit")
    with refusal, open_journal(tmp_path / "map.tif") as journal:
        journal.begin({}, resume=False)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("names", [(), ("lock",), ("lock", "journal.json.tmp")])
def test_a_folder_of_a_run_that_was_killed_before_its_journal_is_ours(tmp_path, names: tuple[str, ...]) -> None:
    (tmp_path / "map.tif.partial").mkdir()
    for name in names:
        (tmp_path / "map.tif.partial" / name).touch()
    with open_journal(tmp_path / "map.tif") as journal:
        journal.begin({"x": 1}, resume=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["_clear", "rmdir"])
def test_a_folder_whose_removal_was_cut_short_is_ours_and_counts_as_nothing(tmp_path, monkeypatch, step: str) -> None:
    path = tmp_path / "map.tif"
    with monkeypatch.context() as patched, open_journal(path) as journal:
        journal.begin({"x": 1}, resume=True)
        (journal.folder / "rows_1").touch()
        if step == "_clear":
            patched.setattr(journals, "_clear", lambda folder: None)
            patched.setattr(Path, "unlink", lambda *_, **__: None)
        else:
            patched.setattr(Path, "rmdir", lambda _: None)
    folder = tmp_path / "map.tif.partial"
    assert folder.exists()
    with open_journal(path) as journal:
        # Other settings would be refused if something had been begun.
        journal.begin({"x": 2}, resume=True)
        assert not (folder / "rows_1").exists()
    assert not folder.exists()


def test_a_run_with_a_damaged_window_stops_and_keeps_its_rows(make_scene, tmp_path) -> None:
    path = make_scene(height=700, width=64, num_bands=3, blockysize=16)
    content = bytearray(path.read_bytes())
    path.write_bytes(content[: int(len(content) * 0.7)])
    out = tmp_path / "map.tif"
    with pytest.raises(InputError, match="can't read rows"):
        mapping_process.main(path, out)
    assert not out.exists()
    assert list((tmp_path / "map.tif.partial").glob("rows_*"))


def test_an_unknown_value_of_an_option_names_the_option_and_the_choices() -> None:
    with pytest.raises(OptionError, match=r"^on_error must be one of stop, skip, got ignore"):
        SegmentationPredictOptions(on_error="ignore")


def test_a_folder_that_another_process_removes_while_it_is_looked_at_is_nobodys(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "map.tif.partial"
    folder.mkdir()

    def listdir_too_late(path) -> list[str]:
        shutil.rmtree(path)
        raise FileNotFoundError(path)

    monkeypatch.setattr(journals.os, "listdir", listdir_too_late)
    journals.check_partial_folder(tmp_path / "map.tif")
    assert not folder.exists()


def test_unfinished_work_of_other_settings_outlives_the_map_that_is_there(make_scene, tmp_path) -> None:
    out = tmp_path / "map.tif"
    predictor = SegmentationPredictor(StubSegmenter(), SegmentationPredictOptions(device="cpu"))
    scene = make_scene(height=40, width=48, num_bands=3)
    predictor.run(scene, out)

    class KilledError(BaseException):
        pass

    def begin(settings) -> Path:
        with pytest.raises(KilledError), open_journal(out) as journal:
            journal.begin(settings, resume=True)
            (journal.folder / "rows_0.tif").touch()
            raise KilledError
        return journal.folder

    with predictor.opened(scene) as source:
        same = predictor.job(source, out).begun_with
    folder = begin(same)
    assert not predictor.run(scene, out).made
    assert not folder.exists()
    folder = begin({**same, "precision": "bfloat16"})
    with pytest.warns(DataWarning, match=r"holds an unfinished map\.tif made with precision = bfloat16, now float32"):
        assert not predictor.run(scene, out).made
    assert (folder / "rows_0.tif").exists()


@pytest.mark.parametrize("name", ["tmpab12_cde", ".nfs00000000a1b2c3d400000001"])
def test_temporary_files_of_a_process_at_work_are_no_strangers(tmp_path, name) -> None:
    with open_journal(tmp_path / "map.tif") as journal:
        (journal.folder / name).touch()
        with pytest.raises(BusyError), open_journal(tmp_path / "map.tif"):
            pass
        (journal.folder / "lock").unlink()
        with pytest.raises(OutputError, match="was not made by perf_vit"):
            journals.check_partial_folder(tmp_path / "map.tif")
