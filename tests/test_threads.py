"""The threads of torch sleep while they wait, unless the user chose otherwise."""

import os
import re
import subprocess
import sys

import pytest

from perf_vit.threads import wait_passively

CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
only_gnu = pytest.mark.skipif(sys.platform != "linux", reason="torch brings GNU's OpenMP on Linux only")


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    return kept | variables


@only_gnu
def test_the_command_sets_it_before_torch_is_loaded_and_a_users_choice_wins() -> None:
    spins = {}
    for choice in ({}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "77"}, {"KMP_BLOCKTIME": "5"}):
        command = [sys.executable, "-m", "perf_vit", "info", "no_such_file.tif"]
        # OpenMP prints what it read from the environment once it is loaded.
        shown = environment(OMP_DISPLAY_ENV="verbose", **choice)
        spins["".join(choice)] = subprocess.Popen(command, env=shown, stderr=subprocess.PIPE, text=True)
    for name, process in spins.items():
        found = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", process.communicate()[1])
        assert len(set(found)) == 1, found
        spins[name] = int(found[0])
    never = 0
    assert spins[""] == never
    assert spins["GOMP_SPINCOUNT"] == 77
    assert spins["OMP_WAIT_POLICY"] > spins["KMP_BLOCKTIME"] > never


# Prints the CPU seconds of small parallel operations with pauses in between, before and after the call.
_PAUSES = """
import os, time
import torch
torch.set_num_threads(2)
numbers = torch.ones(1 << 17)

def cpu_seconds():
    numbers.add_(1)
    start = time.process_time()
    for _ in range(100):
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
