"""How the threads of OpenMP, with which torch computes on the CPU, wait for work."""

from __future__ import annotations

import ctypes
import os
import sys
import threading

__all__ = ["wait_passively"]

# How users choose it themselves: the variables of the standard, of GNU's OpenMP, and of LLVM's and Intel's.
_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_passively() -> None:
    """Let the idle threads of torch sleep instead of spin on cores that others need.

    Call it before or after `import torch`. It sets `OMP_WAIT_POLICY=passive` for this process and those started later.
    OpenMP reads the variable only once, when torch is imported. After that, this function starts sleeping threads in
    GNU's OpenMP, which torch uses on Linux: with more threads than cores, it spins for microseconds only. Other OpenMP
    libraries, as on macOS and Windows, can't be changed after the import.

    Does nothing if the environment contains OMP_WAIT_POLICY, GOMP_SPINCOUNT or KMP_BLOCKTIME.
    """
    if any(name in os.environ for name in _CHOICES):
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"
    openmp = _loaded_openmp()
    if openmp is not None:
        _exceed_cores(openmp)


def _loaded_openmp() -> ctypes.CDLL | None:
    """Return GNU's OpenMP if this process has loaded it."""
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
    except OSError:
        return None


def _exceed_cores(openmp: ctypes.CDLL) -> None:
    """Start more threads than cores and keep them asleep."""
    started = threading.Event()

    def own_team() -> None:
        # A parallel region without work: each of its threads calls a function that returns a number.
        openmp.GOMP_parallel(openmp.omp_get_level, None, openmp.omp_get_num_procs() + 1, 0)
        started.set()
        # The threads of the region end with this one.
        threading.Event().wait()

    threading.Thread(target=own_team, name="perf_vit-openmp", daemon=True).start()
    started.wait()
