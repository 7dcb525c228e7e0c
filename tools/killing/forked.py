"""Commands in forked processes that may be killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from fuzzing.judge import exit_code

__all__ = ["finish", "run_until_killed"]


def finish(args: list[str], log: Path) -> float:
    """Run a command to its end.

    Returns:
        Seconds that it took.

    Raises:
        RuntimeError: it failed; the message has its last lines.
    """
    start = time.monotonic()
    _, status = os.waitpid(_start(args, log), 0)
    if status != 0:
        last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{' '.join(args)} ended with {os.waitstatus_to_exitcode(status)}:\n{last}")
    return time.monotonic() - start


def run_until_killed(args: list[str], log: Path, seconds: float) -> bool:
    """Run a command and send it SIGKILL; False if it had ended before.

    Args:
        args: of the command.
        log: file for what it prints.
        seconds: from its start to the signal.
    """
    pid = _start(args, log)
    time.sleep(seconds)
    os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def _start(args: list[str], log: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        # The child does so too; whoever comes first.
        with suppress(PermissionError):
            os.setpgid(pid, pid)
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        _print_into(log)
        code = _run(args)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _print_into(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(file, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)


def _run(args: list[str]) -> int:
    from perf_vit.cli.main import run

    return exit_code(lambda: run(args))
