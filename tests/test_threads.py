"""The threads of torch sleep while they wait, unless the user chose otherwise."""

import os
import re
import subprocess
import sys

import pytest

from perf_vit import threads
from perf_vit.threads import wait_passively

CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# A thread that fails on purpose is seen in this test or in the next.
pytestmark = pytest.mark.filterwarnings("ignore:Exception in thread perf_vit-openmp")
only_gnu = pytest.mark.skipif(sys.platform != "linux", reason="torch brings GNU's OpenMP on Linux only")


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    return kept | variables


def spins_of_command(**choice: str) -> int:
    """How often waiting threads of a command look for work, as its environment and the command decide."""
    command = [sys.executable, "-m", "perf_vit", "info", "no_such_file.tif"]
    # OpenMP prints what it read from the environment once it is loaded.
    shown = environment(OMP_DISPLAY_ENV="verbose", **choice)
    done = subprocess.run(command, env=shown, stderr=subprocess.PIPE, text=True, check=False)
    found = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    assert len(set(found)) == 1, found
    return int(found[0])


@only_gnu
def test_the_command_sets_it_before_torch_is_loaded() -> None:
    assert spins_of_command() == 0


@pytest.mark.slow
@only_gnu
def test_a_users_choice_wins() -> None:
    assert spins_of_command(GOMP_SPINCOUNT="77") == 77
    assert spins_of_command(OMP_WAIT_POLICY="active") > spins_of_command(KMP_BLOCKTIME="5") > 0


# Prints the CPU seconds of small parallel operations with pauses in between, before and after the call.
_PAUSES = """
import os, time
import torch
torch.set_num_threads(2)
numbers = torch.ones(1 << 17)

def cpu_seconds():
    numbers.add_(1)
    start = time.process_time()
    for _ in range(40):
        time.sleep(0.005)
        numbers.add_(1)
    return time.process_time() - start

before = cpu_seconds()
import perf_vit
perf_vit.wait_passively()
print(before, cpu_seconds(), os.environ.get("OMP_WAIT_POLICY"))
"""


@only_gnu
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_torch_that_is_loaded_already_stops_spinning() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PAUSES], env=environment(), capture_output=True, text=True, check=True
    )
    before, after, policy = done.stdout.split()
    assert float(after) < float(before) / 4
    assert policy == "passive"


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_in_the_environment_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in CHOICES:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "1")
    before = dict(os.environ)
    monkeypatch.setattr("perf_vit.threads._loaded_openmp", lambda: pytest.fail("looked for OpenMP"))
    wait_passively()
    assert dict(os.environ) == before


class Openmp:
    """Stands for the library: keeps the numbers of threads it was asked for, and fails for more than `most`."""

    def __init__(self, num_cores: int, most: int = 10_000) -> None:
        self.num_cores, self.most, self.asked = num_cores, most, []

    def omp_get_num_procs(self) -> int:
        return self.num_cores

    def omp_get_level(self) -> int:
        return 0

    def GOMP_parallel(self, call: object, data: object, num_threads: int, flags: int) -> None:
        self.asked.append(num_threads)
        if num_threads > self.most:
            raise OSError("no more threads")


@only_gnu
def test_a_failure_of_openmp_blocks_nothing() -> None:
    failing = Openmp(2, most=0)
    threads._exceed_cores(failing)
    assert failing.asked == [3]


@only_gnu
def test_no_thread_is_asked_for_beyond_the_limit_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    few, many = Openmp(2), Openmp(5000)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (4096, 4096))
    for each in (few, many):
        threads._exceed_cores(each)
    assert (few.asked, many.asked) == ([3], [])


@only_gnu
@pytest.mark.parametrize("listed", ["0::/user/job\n", "9:name=systemd:/x\n8:pids:/user/job\n0::/\n"])
@pytest.mark.parametrize("limited", ["user/job", "user", "."])
def test_no_thread_is_asked_for_beyond_the_limit_of_a_control_group(monkeypatch, tmp_path, listed, limited) -> None:
    root = tmp_path / "pids" if "pids" in listed else tmp_path
    for name in ("user/job", "user", "."):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "pids.current").write_text("95\n")
        (root / name / "pids.max").write_text("100\n" if name == limited else "max\n")
    (tmp_path / "listed").write_text(listed)
    monkeypatch.setattr(threads, "_CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(threads, "_LISTED_GROUPS", tmp_path / "listed")
    few, many = Openmp(4), Openmp(5)
    for each in (few, many):
        threads._exceed_cores(each)
    assert (few.asked, many.asked) == ([5], [])


@pytest.mark.parametrize(
    ("listed", "folder", "files", "expected"),
    [
        ("0::/job\n", "job", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/job\n", ".", {"cpu.max": "10000 100000\n"}, 1),
        ("0::/job\n", "job", {"cpu.max": "max 100000\n"}, 16),
        ("3:cpu,cpuacct:/job\n", "cpu/job", {"cpu.cfs_quota_us": "300000\n", "cpu.cfs_period_us": "100000\n"}, 3),
        ("3:cpu,cpuacct:/job\n", "cpu/job", {"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, 16),
        ("", ".", {}, 16),
    ],
)
def test_threads_follow_the_share_of_processors_of_a_container(
    monkeypatch, tmp_path, listed: str, folder: str, files: dict[str, str], expected: int
) -> None:
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (tmp_path / folder / name).write_text(text)
    (tmp_path / "listed").write_text(listed)
    monkeypatch.setattr(threads, "_CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(threads, "_LISTED_GROUPS", tmp_path / "listed")
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: range(64), raising=False)
    threads._granted_processors.cache_clear()
    try:
        assert threads.num_processors() == expected
    finally:
        threads._granted_processors.cache_clear()


@only_gnu
def test_a_system_without_control_groups_sets_no_limit(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(threads, "_LISTED_GROUPS", tmp_path / "missing")
    found = Openmp(4)
    threads._exceed_cores(found)
    assert found.asked == [5]


@only_gnu
def test_torchs_own_openmp_is_found_among_those_of_other_wheels() -> None:
    others = ["", "[heap]", "/usr/lib/libgomp.so.1/a.so", "/usr/lib/libgompx.txt"]
    expected = ["/p/torch/lib/libgomp-a34b3233.so.1", "/usr/lib/libgomp.so.1", "/p/a.libs/libgomp-e985bcbb.so.1.0.0"]
    assert threads._as_torch_prefers([*others, *reversed(expected)]) == expected
    assert threads._loaded_openmp() is not None
