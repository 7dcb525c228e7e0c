"""Kill commands at random moments, let them go on, and compare what they leave with an uninterrupted run.

    python tools/kill_resume.py --kills 30 --commands train,predict,convert,distill --out killed

writes `killed/table.md` and `killed/results.jsonl`. Each trial starts a command in a forked process, sends it SIGKILL
(`kill -9`) at a random moment, and runs the command again to its end, with `resume=true` where there is a checkpoint.
The uninterrupted run's duration is divided into as many equal parts as there are kills, and each moment is drawn from
one of them. Files, weights, optimizer states and metrics must then equal the uninterrupted run's, times apart; what
lies under a final name right after the kill must be complete. The exit code is 1 where anything differs.
"""

from __future__ import annotations

import os

# Before torch: threads of the parent don't survive its forks.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
os.environ["MPLBACKEND"] = "Agg"

import argparse
import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fuzzing.judge import Limits
from fuzzing.preload import import_package, import_what_runs_need
from killing.forked import finish, run_until_killed
from killing.jobs import JOBS, Job

_SETUP = Limits(seconds=600, memory_mib=8192)
_NUM_WHOLE = 3
# A moment that comes after the end is drawn again, a little earlier.
_TRIES, _EARLIER = 8, 0.9
# Written under their final name when they are complete; run folders grow.
_WHOLE = ("predict", "convert")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One kill.

    Attributes:
        command: of perf-vit.
        seconds: from its start.
        stage: how far it had come.
        resumed: whether the command ended well when it was run again.
        unequal: outputs that differ from the uninterrupted run's, or why it failed.
    """

    command: str
    seconds: float
    stage: str
    resumed: bool
    unequal: tuple[str, ...]


def main(args: Sequence[str] | None = None) -> int:
    """Run, print the table, and return the exit code."""
    options = _parser().parse_args(args)
    trials = []
    import_package()
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "results.jsonl").open("w", encoding="utf-8") as file:
        for command in options.commands.split(","):
            for trial in kill_and_resume(command, options.out / command, options.kills, options.seed):
                trials.append(trial)
                file.write(json.dumps(asdict(trial)) + "\n")
                file.flush()
    table = markdown_table(trials)
    (options.out / "table.md").write_text(table, encoding="utf-8")
    print(table)
    return int(any(trial.unequal for trial in trials))


def kill_and_resume(command: str, folder: Path, num_kills: int, seed: int) -> Iterator[Trial]:
    """Trials of one command.

    Args:
        command: of `JOBS`.
        folder: for inputs and outputs; replaced.
        num_kills: how many.
        seed: decides the moments.

    Raises:
        RuntimeError: the command fails without being killed.
    """
    job, rng = JOBS[command], random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    inputs, log = folder / "inputs", folder / "log.txt"
    inputs.mkdir(parents=True)
    import_what_runs_need({"prepare": lambda: job.prepare(inputs)}, folder / "preload", _SETUP)
    # The first run imports what the others find in the parent.
    import_what_runs_need({"run": lambda: _in_process(job.args(inputs, folder / "first"))}, folder / "preload", _SETUP)
    outs = [folder / f"whole{number}" for number in range(_NUM_WHOLE)]
    # On a busy machine the shortest is the nearest to those that follow.
    seconds = min(finish(job.args(inputs, out), log) for out in outs)
    expected = job.digest(outs[0])
    for number in range(num_kills):
        out = folder / "killed" / f"{number}"
        shutil.rmtree(out, ignore_errors=True)
        yield _trial(command, job, inputs, out, log, expected, (number, num_kills, seconds), rng)
        shutil.rmtree(out, ignore_errors=True)


def _trial(
    command: str,
    job: Job,
    inputs: Path,
    out: Path,
    log: Path,
    expected: dict[str, str],
    part: tuple[int, int, float],
    rng: random.Random,
) -> Trial:
    number, num_kills, seconds = part
    for attempt in range(_TRIES):
        moment = (number + rng.random()) / num_kills * seconds * _EARLIER**attempt
        shutil.rmtree(out, ignore_errors=True)
        if run_until_killed(job.args(inputs, out), log, moment):
            break
    else:
        return Trial(command=command, seconds=moment, stage="not hit", resumed=True, unequal=())
    stage = job.stage(out)
    unequal = list(_half_written(job, out, expected)) if command in _WHOLE else []
    try:
        finish(job.args(inputs, out), log)
    except RuntimeError as error:
        return Trial(command=command, seconds=moment, stage=stage, resumed=False, unequal=(*unequal, str(error)))
    found = job.digest(out)
    unequal += [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]
    return Trial(command=command, seconds=moment, stage=stage, resumed=True, unequal=tuple(unequal))


def _half_written(job: Job, out: Path, expected: dict[str, str]) -> Iterator[str]:
    """Outputs under their final name that differ right after the kill."""
    try:
        found = job.digest(out)
    except FileNotFoundError:
        return
    for name, digest in expected.items():
        if found.get(name, digest) != digest:
            yield f"{name} right after the kill"


def _in_process(args: list[str]) -> None:
    from perf_vit.cli.main import run

    run(args)


def markdown_table(trials: Sequence[Trial]) -> str:
    """A row a command."""
    rows = ["| command | kills | hit while | ran on to the end | equal |", "|---|---|---|---|---|"]
    for command in dict.fromkeys(trial.command for trial in trials):
        mine = [trial for trial in trials if trial.command == command]
        stages = ", ".join(f"{stage}: {number}" for stage, number in sorted(Counter(t.stage for t in mine).items()))
        resumed, equal = sum(trial.resumed for trial in mine), sum(not trial.unequal for trial in mine)
        rows.append(f"| {command} | {len(mine)} | {stages} | {resumed} | {equal} |")
    return "\n".join(rows) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Kill commands at random moments and let them go on.")
    parser.add_argument("--kills", type=int, default=30, help="kills of each command")
    parser.add_argument("--commands", default=",".join(JOBS), help="comma-separated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser


if __name__ == "__main__":
    sys.exit(main())
