"""One command in a forked process: how it ended, and whether a user could live with that."""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FINDINGS", "VERDICTS", "Limits", "Outcome", "run_in_fork", "verdict"]

FINDINGS = ("traceback", "hang", "memory", "crash", "unclear")
"""Verdicts that a maintainer must look at."""

VERDICTS = ("accepted", "warned", "refused", "busy", *FINDINGS)

_MIB = 2**20
# What asks for much more than the limit is stopped before it takes the machine's memory.
_ADDRESS_FACTOR = 4
_TRACEBACK = "Traceback (most recent call last)"
# More takes longer than the time limit honestly: a few bytes of a header may claim any number.
_MANY_PIXELS = 2_000_000
# Allocations that failed, however the library says it.
_NO_MEMORY = ("MemoryError", "Unable to allocate", "can't allocate memory", "not enough memory", "Out of memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one command may take.

    Attributes:
        seconds: wall-clock time.
        memory_mib: resident memory above that of the process before the command.
    """

    seconds: float = 30
    memory_mib: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The end of one command.

    Attributes:
        code: exit code, None where a signal ended it.
        signal: its number, None for an exit.
        hung: whether it was stopped at the time limit.
        seconds: wall-clock time.
        grown_mib: peak of the resident memory above the baseline.
        errors: standard error.
    """

    code: int | None
    signal: int | None
    hung: bool
    seconds: float
    grown_mib: float
    errors: str


def run_in_fork(action: Callable[[], None], folder: Path, limits: Limits) -> Outcome:
    """Run an action in a forked process, with its standard output and error in files.

    Args:
        action: what to run; it ends by returning, raising or exiting.
        folder: for `stdout`, `stderr` and the memory at the start, made if need be.
        limits: time and memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    (folder / "baseline").write_text("0", encoding="ascii")
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _become(action, folder, limits)
    status, usage, hung = _wait(pid, started + limits.seconds)
    baseline_kib = int((folder / "baseline").read_text(encoding="ascii"))
    return Outcome(
        code=os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
        hung=hung,
        seconds=time.monotonic() - started,
        grown_mib=max(0, usage.ru_maxrss - baseline_kib) / 1024,
        errors=(folder / "stderr").read_text(encoding="utf-8", errors="replace"),
    )


def verdict(outcome: Outcome, limits: Limits, num_pixels: int = 0) -> str:
    """What to think of an outcome, one of `VERDICTS`.

    Accepted is exit 0; warned, the same with lines "Warning: ..."; refused, exit 2 with exactly one line "Error: ...";
    busy, at work on a raster that is as large as it says when time ran out. Everything else is a finding, "unclear"
    where the exit code and the lines don't go together.

    Args:
        outcome: of a command.
        limits: that it had.
        num_pixels: that the file says it has, as far as is known.
    """
    if outcome.grown_mib > limits.memory_mib:
        return "memory"
    if outcome.hung:
        return "busy" if num_pixels > _MANY_PIXELS else "hang"
    if outcome.signal is not None:
        return "crash"
    if _TRACEBACK in outcome.errors:
        return "traceback"
    lines = outcome.errors.splitlines()
    errors = [line for line in lines if line.startswith("Error: ")]
    if any(words in line for line in errors for words in _NO_MEMORY):
        return "memory"
    num_errors = len(errors)
    if outcome.code == 2 and num_errors == 1:
        return "refused"
    if outcome.code == 0 and num_errors == 0:
        return "warned" if any(line.startswith("Warning: ") for line in lines) else "accepted"
    return "unclear"


def _become(action: Callable[[], None], folder: Path, limits: Limits) -> None:
    """The child's whole life; it never returns, so that nothing of the parent runs twice."""
    code = 1
    try:
        # A group of its own, to be ended with its children.
        os.setpgid(0, 0)
        # Not all memory of a parent comes along.
        (folder / "baseline").write_text(str(_anonymous_kib()), encoding="ascii")
        for name, number in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        # The parent's streams may be a test's own, and its handler writes there.
        faulthandler.disable()
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        address = _virtual_kib() * 1024 + _ADDRESS_FACTOR * limits.memory_mib * _MIB
        resource.setrlimit(resource.RLIMIT_AS, (address, address))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = exit_code(action)
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def exit_code(action: Callable[[], None]) -> int:
    """The exit code that a process which does this alone would have; a traceback is printed."""
    try:
        action()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _wait(pid: int, deadline: float) -> tuple[int, resource.struct_rusage, bool]:
    """Status and usage of a child, and whether it had to be stopped."""
    hung = False
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return status, usage, hung
        if not hung and time.monotonic() > deadline:
            hung = True
            _kill_group(pid)
        time.sleep(0.005)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)


def _anonymous_kib() -> int:
    """Resident memory without pages of files, which come back after a fork when they are used."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0])


def _virtual_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() // 1024
