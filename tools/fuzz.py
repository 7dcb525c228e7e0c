"""Give damaged files to the commands, and count what ends in anything but a result or one line of error.

    python tools/fuzz.py --files 2000 --seed 0 --out fuzz

writes `fuzz/table.md` and `fuzz/results.jsonl`, and keeps each file that a command ended badly on under
`fuzz/findings`, with the command line and its output. `--case 123` runs one case again. The exit code is 1 where there
are findings. A finding is a traceback, an exit that is neither success nor one line "Error: ...", a crash by a signal,
a command over the time limit, or one that took more memory than the limit above the worker's own.
"""

from __future__ import annotations

import os

# Before torch: threads of the parent don't survive its forks.
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
os.environ["MPLBACKEND"] = "Agg"

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from fuzzing.cases import Result, run_cases
from fuzzing.judge import FINDINGS, Limits
from fuzzing.kinds import KINDS
from fuzzing.preload import import_package, import_what_runs_need
from fuzzing.table import markdown_table
from fuzzing.workshop import TASKS, Workshop, build_workshop, save_checkpoint_seeds, train_checkpoint

# Making everything undamaged, on a busy machine.
_SETUP = Limits(seconds=600, memory_mib=4096)


def main(args: Sequence[str] | None = None) -> int:
    """Run, print the table, and return the exit code."""
    options = _parser().parse_args(args)
    results = fuzz(
        options.out,
        numbers=range(options.files) if options.case is None else [options.case],
        seed=options.seed,
        kinds=options.kinds,
        limits=Limits(seconds=options.seconds, memory_mib=options.memory_mib),
        workers=options.workers,
    )
    print(markdown_table(results))
    findings = [result for result in results if result.verdict in FINDINGS]
    print(
        f"{len(findings)} findings in {len(results)} files" + (f", in {options.out / 'findings'}" if findings else "")
    )
    return int(bool(findings))


def fuzz(
    out: Path, *, numbers: Sequence[int], seed: int, kinds: Sequence[str], limits: Limits, workers: int
) -> list[Result]:
    """Make what is undamaged, run the cases, and write the table into the folder `out`, which is replaced."""
    torch.set_num_threads(1)
    import_package()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shop = _prepare(out.absolute(), seed)
    chosen = [kind for kind in KINDS if not kinds or kind.name in kinds]
    results = run_cases(
        chosen, shop, out.absolute(), numbers=numbers, seed=seed, limits=limits, workers=min(workers, len(numbers))
    )
    (out / "results.jsonl").write_text("".join(json.dumps(asdict(result)) + "\n" for result in results))
    (out / "table.md").write_text(markdown_table(results))
    return results


def _prepare(out: Path, seed: int) -> Workshop:
    """Images, labels and trained models, all made in forked processes."""
    shop, logs = Workshop(out / "workshop"), out / "setup"
    logs.mkdir()
    import_what_runs_need({"files": partial(build_workshop, shop, seed)}, logs, _SETUP)
    import_what_runs_need({task: partial(train_checkpoint, shop, task) for task in TASKS}, logs, _SETUP)
    save_checkpoint_seeds(shop)
    return shop


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000, help="number of damaged files")
    parser.add_argument("--seed", type=int, default=0, help="decides files and damage")
    parser.add_argument("--out", type=Path, required=True, help="folder for table and findings; replaced")
    parser.add_argument("--kinds", nargs="*", default=[], choices=[kind.name for kind in KINDS], help="all by default")
    parser.add_argument("--case", type=int, help="run this case alone, with the same seed and kinds")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=30, help="time limit of a command")
    parser.add_argument("--memory-mib", type=int, default=1024, help="memory limit above the worker's own")
    return parser


if __name__ == "__main__":
    sys.exit(main())
