"""The damaged files: made, given to their commands in forked processes, and judged."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from fuzzing.judge import FINDINGS, VERDICTS, Limits, run_in_fork, verdict
from fuzzing.kinds import Kind
from fuzzing.mutations import BYTE_MUTATIONS, UNDAMAGED, Rng
from fuzzing.workshop import Workshop

from perf_vit.cli.main import run

__all__ = ["Result", "run_case", "run_cases"]

# Commands that refuse their undamaged file would test nothing.
_CONTROL_SHARE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one damaged file.

    Attributes:
        number: of the case; with the seed it decides everything.
        kind: of file.
        mutation: what was done to it.
        seed_file: what it was made of.
        verdict: the worst of its commands.
        command: the command line with that verdict.
        detail: the last line that it wrote to standard error, or how it ended.
        seconds: of the slowest command.
        grown_mib: memory of the largest command.
    """

    number: int
    kind: str
    mutation: str
    seed_file: str
    verdict: str
    command: list[str]
    detail: str
    seconds: float
    grown_mib: float


def run_cases(
    kinds: Sequence[Kind], shop: Workshop, out: Path, *, numbers: Sequence[int], seed: int, limits: Limits, workers: int
) -> list[Result]:
    """Run cases in several forked processes.

    Args:
        kinds: to choose from, by weight.
        shop: everything undamaged.
        out: folder for `findings` and for what is being made.
        numbers: of the cases.
        seed: decides all damage, with a case's number.
        limits: of each command.
        workers: processes at a time.

    Returns:
        One result a case, in order.
    """

    def share(worker: int) -> None:
        with (out / f"results_{worker}.jsonl").open("w") as file:
            for number in numbers[worker::workers]:
                result = run_case(kinds, shop, out, number=number, seed=seed, limits=limits)
                file.write(json.dumps(asdict(result)) + "\n")
                file.flush()

    _fork_all(share, workers)
    files = [out / f"results_{worker}.jsonl" for worker in range(workers)]
    found = [Result(**json.loads(line)) for file in files for line in file.read_text().splitlines()]
    return sorted(found, key=lambda result: result.number)


def run_case(kinds: Sequence[Kind], shop: Workshop, out: Path, *, number: int, seed: int, limits: Limits) -> Result:
    """Make one damaged file, run its commands, and keep the file where one of them ends badly."""
    rng = np.random.default_rng([seed, number])
    case = out / f"case_{number:05d}"
    shutil.rmtree(case, ignore_errors=True)
    kind, mutation, origin, victim = _damage(kinds, shop, case, rng)
    worst: Result | None = None
    num_pixels = 0
    (case / "out").mkdir()
    for index, command in enumerate(kind.commands(victim, shop, case / "out", rng)):
        outcome = run_in_fork(lambda command=command: run(command), case / f"command_{index}", limits)
        num_pixels = max(
            num_pixels, _claimed_pixels((case / f"command_{index}" / "stdout").read_text(errors="replace"))
        )
        lines = [line for line in outcome.errors.splitlines() if line.strip()] or [f"exit code {outcome.code}"]
        result = Result(
            number=number,
            kind=kind.name,
            mutation=mutation,
            seed_file=origin.name,
            verdict=verdict(outcome, limits, num_pixels),
            command=command,
            detail=f"signal {outcome.signal}" if outcome.signal is not None else lines[-1][:300],
            seconds=round(outcome.seconds, 2),
            grown_mib=round(outcome.grown_mib, 1),
        )
        worst = _worse(worst, result)
    assert worst is not None
    _keep_or_delete(case, out, worst)
    return worst


def _damage(kinds: Sequence[Kind], shop: Workshop, case: Path, rng: Rng) -> tuple[Kind, str, Path, Path]:
    """A kind, the name of its mutation, the valid file and the damaged one."""
    weights = np.array([kind.weight for kind in kinds])
    kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
    seeds = kind.find_seeds(shop.seeds)
    origin = seeds[int(rng.integers(len(seeds)))]
    others = sorted(path for path in shop.seeds.glob("*/*") if path.is_file())
    other = others[int(rng.integers(len(others)))] if rng.random() < 0.3 else seeds[int(rng.integers(len(seeds)))]
    mutations = kind.all_mutations()
    # Half of what a kind has of its own: such damage gets past the first check of a header.
    names = list(kind.mutations) if kind.mutations and rng.random() < 0.5 else list(BYTE_MUTATIONS)
    name = UNDAMAGED if rng.random() < _CONTROL_SHARE else names[int(rng.integers(len(names)))]
    data = mutations[name](origin.read_bytes(), other.read_bytes(), rng)
    return kind, name, origin, kind.place(origin, data, case)


def _claimed_pixels(printed: str) -> int:
    """Rows times columns by what `info` printed, 0 by any other text."""
    found = re.search(r"([\d,]+) rows x ([\d,]+) columns", printed) or re.search(
        r'"height": (\d+),\s+"width": (\d+)', printed
    )
    return 0 if found is None else int(found[1].replace(",", "")) * int(found[2].replace(",", ""))


def _worse(first: Result | None, second: Result) -> Result:
    if first is None:
        return second
    worst = max(first, second, key=lambda result: VERDICTS.index(result.verdict))
    return replace(worst, seconds=max(first.seconds, second.seconds), grown_mib=max(first.grown_mib, second.grown_mib))


def _keep_or_delete(case: Path, out: Path, result: Result) -> None:
    if result.verdict not in FINDINGS:
        shutil.rmtree(case)
        return
    shutil.rmtree(case / "out")
    (case / "result.json").write_text(json.dumps(asdict(result), indent=2) + "\n")
    place = out / "findings" / case.name
    place.parent.mkdir(exist_ok=True)
    shutil.rmtree(place, ignore_errors=True)
    case.rename(place)
    sys.stdout.write(f"{place}: {result.verdict}: {result.detail}\n")
    sys.stdout.flush()


def _fork_all(share: Callable[[int], None], workers: int) -> None:
    """Run a share in each of several processes; a failure of one is the tool's own."""
    sys.stdout.flush()
    pids = []
    for worker in range(workers):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                share(worker)
                code = 0
            finally:
                if code:
                    sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
                sys.stdout.flush()
                os._exit(code)
        pids.append(pid)
    failed = [pid for pid in pids if os.waitpid(pid, 0)[1]]
    if failed:
        raise RuntimeError(f"{len(failed)} of {workers} workers failed; see the traceback above")
