"""Threads: how many, and how those of OpenMP, with which torch computes on the CPU, wait for work."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["compute_alone", "num_processors", "process_groups", "wait_passively"]

# More threads than that don't read or write faster.
_MAX_THREADS = 16

# How users choose it themselves: the variables of the standard, of GNU's OpenMP, and of LLVM's and Intel's.
_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_LISTED_GROUPS = Path("/proc/self/cgroup")
_LIBRARY = re.compile(r"/.*/libgomp[^/]*\.so[^/]*")


def num_processors() -> int:
    """Return the number of processors that this process may use, at most 16: for threads that read or compress.

    A container's share of the processors (cpu.max of a control group) counts, rounded up.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, _MAX_THREADS, _granted_processors())


@functools.cache
def _granted_processors() -> int:
    """Return the processors that the control groups of this process grant."""
    shares = [share for group in process_groups("cpu") if (share := _share_of(group)) is not None]
    return max(1, math.ceil(min(shares, default=_MAX_THREADS)))


def _share_of(group: Path) -> float | None:
    """Return the processors that a control group grants; None without a limit."""
    with suppress(OSError, ValueError):
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        else:
            # Version 1.
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ((group / name).read_text(encoding="utf-8") for name in names)
        # "max" is no number, and version 1 has -1 without a limit.
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    return None


def wait_passively() -> None:
    """Let the idle threads of torch sleep instead of spin on cores that others need.

    Call it before or after `import torch`. It sets `OMP_WAIT_POLICY=passive` for this process and those started later.
    OpenMP reads the variable only once, when torch is imported. After that, this function starts sleeping threads in
    GNU's OpenMP, which torch uses on Linux: with more threads than cores, it spins for microseconds only. Other OpenMP
    libraries, as on macOS and Windows, can't be changed after the import. Neither can GNU's where OMP_DYNAMIC or
    OMP_THREAD_LIMIT keeps it from starting more threads than cores, or where a limit of processes (RLIMIT_NPROC, or
    pids.max of a control group) leaves no room for them.

    Does nothing if the environment contains OMP_WAIT_POLICY, GOMP_SPINCOUNT or KMP_BLOCKTIME.
    """
    if any(name in os.environ for name in _CHOICES):
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"
    openmp = _loaded_openmp()
    if openmp is not None:
        _exceed_cores(openmp)


def compute_alone() -> None:
    """Let operations of torch in the calling thread use this thread only, and change nothing for others.

    `torch.set_num_threads` would also set the number of all threads that are started later. Does nothing where torch
    doesn't compute with GNU's OpenMP, as on macOS and Windows.
    """
    openmp = _loaded_openmp()
    if openmp is None:
        return
    openmp.omp_set_num_threads(1)
    # Where the user has set a number of threads, MKL, which is part of torch, keeps one of its own in each thread.
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libtorch_cpu.so", mode=os.RTLD_NOLOAD).MKL_Set_Num_Threads_Local(1)


def _loaded_openmp() -> ctypes.CDLL | None:
    """Return GNU's OpenMP if this process has loaded it."""
    if sys.platform != "linux":
        return None
    paths = {
        line.split(maxsplit=5)[-1]
        for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    }
    for path in _as_torch_prefers(paths):
        # A file that was replaced since is another library, or none.
        with suppress(OSError):
            return ctypes.CDLL(path, mode=os.RTLD_NOLOAD)
    return None


def _as_torch_prefers(paths: Iterable[str]) -> list[str]:
    """Return the paths of GNU's OpenMP; wheels bring their own under names such as libgomp-a34b3233.so.1."""
    # Torch uses the one of its wheel, else that of the system.
    return sorted(filter(_LIBRARY.fullmatch, paths), key=lambda path: ("/torch" not in path, "/libgomp-" in path, path))


def _exceed_cores(openmp: ctypes.CDLL) -> None:
    """Start more threads than cores and keep them asleep."""
    num_threads = openmp.omp_get_num_procs() + 1
    if not _may_start(num_threads):
        return
    started = threading.Event()

    def own_team() -> None:
        try:
            # A parallel region without work: each of its threads calls a function that returns a number.
            openmp.GOMP_parallel(openmp.omp_get_level, None, num_threads, 0)
        finally:
            started.set()
        # The threads of the region end with this one.
        threading.Event().wait()

    threading.Thread(target=own_team, name="perf_vit-openmp", daemon=True).start()
    started.wait()


def _may_start(num_threads: int) -> bool:
    """Return whether this process may start so many threads; OpenMP ends a process that may not."""
    import resource  # Not on Windows.

    limit, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if limit != resource.RLIM_INFINITY and len(os.listdir("/proc/self/task")) + num_threads > limit:
        return False
    return all(_has_room(group, num_threads) for group in process_groups("pids"))


def process_groups(controller: str) -> Iterator[Path]:
    """Yield the folders of the control groups that may limit this process by a controller, up to the root."""
    with suppress(OSError):
        for line in _LISTED_GROUPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            # Version 2 has one tree with no name; version 1 has one for each controller.
            _, controllers, name = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root = _CONTROL_GROUPS / controller if controllers else _CONTROL_GROUPS
            group = root / name.lstrip("/")
            # In a container, the name may be that outside of it, where the root is the container's group.
            yield from (each for each in (group, *group.parents) if each.is_relative_to(root))


def _has_room(group: Path, num_threads: int) -> bool:
    """Return whether a control group may have so many threads more."""
    try:
        most = (group / "pids.max").read_text(encoding="utf-8").strip()
        return most == "max" or int((group / "pids.current").read_text(encoding="utf-8")) + num_threads <= int(most)
    except (OSError, ValueError):
        # The root has no such files.
        return True
