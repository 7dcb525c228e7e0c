"""tools/fuzz.py: bad endings are reported, the seed decides the damage, and no damaged file ends badly."""

import importlib
import io
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def part(monkeypatch):
    """A module of the tool by name."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return lambda name: importlib.import_module(f"fuzzing.{name}")


def _end(code: int, *lines: str) -> None:
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    sys.exit(code)


def _leave_a_thread() -> None:
    threading.Thread(target=time.sleep, args=(60,)).start()


def _take_memory() -> None:
    # Mapped, as a process that has run long has freed memory at hand; written to, as untouched memory isn't resident.
    taken = mmap.mmap(-1, 200 * 2**20)
    for start in range(0, len(taken), mmap.PAGESIZE):
        taken[start] = 1


ENDINGS = {
    "accepted": lambda: None,
    "accepted, exit 0": lambda: _end(0, "epoch 1 of 1"),
    "warned": lambda: _end(0, "Warning: 3 objects are left out"),
    "refused": lambda: _end(2, "Warning: no CRS", "Error: a.tif can't be read"),
    "traceback": lambda: 1 / 0,
    "traceback, printed": lambda: _end(2, "Traceback (most recent call last):", "Error: a.tif"),
    "hang": lambda: time.sleep(60),
    "hang, a thread": _leave_a_thread,
    "memory": _take_memory,
    "memory, refused": lambda: np.ones(2**40),
    "memory, one line": lambda: _end(2, "Error: MemoryError: Unable to allocate 1. TiB for an array"),
    "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "crash, abort": os.abort,
    "unclear, no line": lambda: _end(2),
    "unclear, two lines": lambda: _end(2, "Error: one", "Error: two"),
    "unclear, exit 1": lambda: _end(1, "Error: one"),
    "unclear, error and exit 0": lambda: _end(0, "Error: one"),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_each_ending_gets_its_verdict(part, tmp_path, name) -> None:
    judge = part("judge")
    # Interpreters under a debugger or coverage are slow to fork; a hang lasts longer than any of them.
    limits = judge.Limits(seconds=1.5 if name.startswith("hang") else 30, memory_mib=100)
    outcome = judge.run_in_fork(ENDINGS[name], tmp_path / "logs", limits)
    expected = name.split(",")[0]
    found = judge.verdict(outcome, limits)
    # numpy's failed allocation has a traceback as well: either is a finding.
    assert found == ("traceback" if name == "memory, refused" else expected), outcome


def test_work_on_a_raster_that_says_it_is_large_is_no_hang(part, tmp_path) -> None:
    judge = part("judge")
    limits = judge.Limits(seconds=1.5, memory_mib=100)
    outcome = judge.run_in_fork(lambda: time.sleep(60), tmp_path / "logs", limits)
    assert judge.verdict(outcome, limits, num_pixels=100_000**2) == "busy"
    assert judge.verdict(outcome, limits, num_pixels=48 * 64) == "hang"


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("size    100,000 rows x 64 columns", 6_400_000),
        ('{"path": "a", "height": 48, "width": 64, "bands": 3}', 3072),
        ('{\n  "height": 48,\n  "width": 64\n}', 3072),
        ("Error: can't open it", 0),
    ],
)
def test_a_file_says_how_large_it_is_by_what_info_printed(part, printed: str, expected: int) -> None:
    assert part("cases")._claimed_pixels(printed) == expected


def test_a_stopped_command_takes_its_children_with_it(part, tmp_path) -> None:
    judge = part("judge")

    def start_a_child() -> None:
        child = subprocess.Popen(["sleep", "60"])
        (tmp_path / "pid").write_text(str(child.pid))
        child.wait()

    assert judge.run_in_fork(start_a_child, tmp_path / "logs", judge.Limits(seconds=1.5)).hung
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def planted(part, tmp_path, monkeypatch):
    """Results of cases whose command ends as it is told, and the folder of the run."""

    def _planted(ending: str, *, num_cases: int = 4) -> tuple[list, Path]:
        cases, kinds, judge = part("cases"), part("kinds"), part("judge")
        (tmp_path / "seeds" / "planted").mkdir(parents=True)
        (tmp_path / "seeds" / "planted" / "file.bin").write_bytes(bytes(range(256)))
        monkeypatch.setattr(cases, "run", lambda command: ENDINGS[ending]())
        kind = kinds.Kind(name="planted", commands=lambda victim, shop, out, rng: [["info", str(victim)]])
        limits = judge.Limits(seconds=1.5, memory_mib=100)
        shop = SimpleNamespace(seeds=tmp_path / "seeds")
        found = cases.run_cases([kind], shop, tmp_path, numbers=range(num_cases), seed=0, limits=limits, workers=2)
        return found, tmp_path

    return _planted


@pytest.mark.parametrize("ending", ["traceback", "hang", "memory", "crash", "unclear, exit 1"])
def test_a_planted_fault_is_found_in_every_case_and_its_file_kept(planted, part, ending) -> None:
    results, out = planted(ending)
    assert [result.verdict for result in results] == [ending.split(",")[0]] * 4
    assert [result.number for result in results] == [0, 1, 2, 3]
    for result in results:
        folder = out / "findings" / f"case_{result.number:05d}"
        assert (folder / "file.bin").is_file()
        assert (folder / "command_0" / "stderr").is_file()
        assert json.loads((folder / "result.json").read_text())["command"][0] == "info"
    table = part("table").markdown_table(results).splitlines()
    column = [cell.strip() for cell in table[0].split("|")].index(ending.split(",")[0])
    assert [cell.strip() for cell in table[-1].split("|")][column] == "4"


def test_files_without_findings_are_deleted(planted) -> None:
    results, out = planted("refused")
    assert {result.verdict for result in results} == {"refused"}
    assert not (out / "findings").exists()
    assert not list(out.glob("case_*"))


def test_damage_is_decided_by_the_generator(part) -> None:
    mutations = part("mutations")
    data, other = bytes(range(256)) * 20, bytes(500)
    for name, mutate in mutations.BYTE_MUTATIONS.items():
        made = [mutate(data, other, np.random.default_rng(seed)) for seed in (0, 0, 1, 2, 3)]
        assert made[0] == made[1], name
        assert len(set(made)) > 2, name


def test_a_changed_archive_member_has_a_checksum_that_fits(part) -> None:
    values = part("values")
    made = io.BytesIO()
    torch.save({"perf_vit": {"task": "segmentation", "spec": {"tile_px": 32}}, "weights": torch.ones(3)}, made)
    data = made.getvalue()
    changed = [values.mutate_checkpoint_member(data, data, np.random.default_rng(seed)) for seed in range(8)]
    assert all(zipfile.ZipFile(io.BytesIO(each)).testzip() is None for each in changed)
    contents = {zipfile.ZipFile(io.BytesIO(each)).read("archive/data.pkl") for each in changed}
    assert len(contents) > 3


def test_changed_chunks_of_a_png_have_checksums_that_fit(part, tmp_path) -> None:
    from PIL import Image, PngImagePlugin

    mutations = part("mutations")
    Image.fromarray(np.zeros((8, 9), np.uint8)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    made = [mutations.mutate_png(data, data, np.random.default_rng(seed)) for seed in range(10)]
    assert len({*made} - {data}) > 3
    for changed in made:
        # Reading a checksum that doesn't fit raises.
        stream = PngImagePlugin.PngStream(io.BytesIO(changed[8:]))
        kind, _, length = stream.read()
        stream.crc(kind, stream.fp.read(length))


@pytest.mark.slow
def test_a_hundred_damaged_files_end_in_a_result_or_one_line(tmp_path) -> None:
    args = [sys.executable, TOOLS / "fuzz.py", "--files", "100", "--seed", "7", "--out", tmp_path / "fuzz"]
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in (tmp_path / "fuzz" / "results.jsonl").read_text().splitlines()]
    assert len(results) == 100
    assert len({result["kind"] for result in results}) > 15
    # A run that refuses everything tests nothing.
    accepted = [result for result in results if result["verdict"] in {"accepted", "warned"}]
    assert len(accepted) > 15
    assert (tmp_path / "fuzz" / "table.md").read_text() in done.stdout
