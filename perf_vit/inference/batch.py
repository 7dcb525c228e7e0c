"""What became of each of many inputs, for people and for programs."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from filelock import FileLock, Timeout

from perf_vit._version import __version__
from perf_vit.errors import BusyError, OutputError, PerfVitError
from perf_vit.files import read_json_or_none, write_json
from perf_vit.inference.inputs import MapInput
from perf_vit.inference.jobs import DamagedPiece, JobResult
from perf_vit.inference.options import OnError
from perf_vit.writers import check_outputs

__all__ = [
    "REPORT",
    "Each",
    "InputReport",
    "InputStatus",
    "PredictOne",
    "RunReport",
    "attempt",
    "check_report",
    "in_turn",
    "predict_many",
    "report_of",
    "reserve_report",
]

REPORT = "report.json"
"""Name of a run's report in its output folder."""

InputStatus = Literal["done", "skipped-existing", "failed", "busy"]


_OF_SOME = ("num_objects", "seam_disagreement")
"""What is reported of some tasks only."""


@dataclass(frozen=True, kw_only=True)
class InputReport:
    """What became of one input.

    Attributes:
        input: its path.
        output: path of its main output.
        status: "skipped-existing" where its outputs were there already, "busy" where another process makes it.
        seconds: spent on it.
        num_windows: of the source.
        num_pixels: of the source.
        num_objects: that were found in this run, None where none are looked for.
        seam_disagreement: share of a map's pixels on which overlapping windows disagree, None where none overlap.
        damaged: what couldn't be read and is left out.
        error: one line, None where there is none.
        cause: the error itself, where it isn't lost between processes.
    """

    input: str
    output: str
    status: InputStatus
    seconds: float = 0.0
    num_windows: int = 0
    num_pixels: int = 0
    num_objects: int | None = None
    seam_disagreement: float | None = None
    damaged: tuple[DamagedPiece, ...] = ()
    error: str | None = None
    cause: Exception | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As plain values of JSON; windows are [row, col, height, width]."""
        return {
            "input": self.input,
            "output": self.output,
            "status": self.status,
            "seconds": round(self.seconds, 3),
            "num_windows": self.num_windows,
            "num_pixels": self.num_pixels,
            **{name: value for name in _OF_SOME if (value := getattr(self, name)) is not None},
            "damaged": [{"window": list(astuple(piece.window)), "reason": piece.reason} for piece in self.damaged],
            "error": self.error,
        }


@dataclass
class RunReport:
    """What became of all inputs of a run.

    Attributes:
        inputs: in the order they were finished.
        header: what else is to be known of the run: the model, its settings.
        path: where it is kept, None for nowhere.
    """

    inputs: list[InputReport] = field(default_factory=list)
    header: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def count(self, status: InputStatus) -> int:
        """Inputs of a status."""
        return sum(report.status == status for report in self.inputs)

    @property
    def num_damaged(self) -> int:
        """Damaged pieces of all inputs."""
        return sum(len(report.damaged) for report in self.inputs)

    def to_dict(self) -> dict[str, Any]:
        """As plain values of JSON."""
        made = [report for report in self.inputs if report.status == "done"]
        totals = {
            "inputs": len(self.inputs),
            **{status: self.count(status) for status in get_args(InputStatus)},
            "seconds": round(sum(report.seconds for report in self.inputs), 3),
            "num_windows": sum(report.num_windows for report in made),
            "num_pixels": sum(report.num_pixels for report in made),
            "num_damaged": self.num_damaged,
        }
        inputs = [report.to_dict() for report in self.inputs]
        return {"perf_vit_version": __version__, **self.header, "totals": totals, "inputs": inputs}

    def write(self, path: Path) -> None:
        """Write it as JSON, all or nothing.

        Raises:
            OutputError: nothing can be written there.
        """
        write_json(path, self.to_dict())


def check_report(folder: Path, *, overwrite: bool = False) -> None:
    """Refuse a folder where the report would replace a file that is no report of an earlier run.

    Args:
        folder: of the outputs.
        overwrite: allow it.

    Raises:
        OutputError: it would.
    """
    if not (overwrite or _is_report(folder / REPORT)):
        check_outputs([folder / REPORT], [])


@contextmanager
def reserve_report(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """The path of a run's report in its output folder, which is made if need be.

    `report.json`; while another run into the same folder has that, `report-HOST-PROCESS.json`. The report of an
    earlier run is replaced.

    Args:
        folder: of the outputs.
        overwrite: replace any other file of the report's name too.

    Raises:
        OutputError: nothing can be written there, or another file has the report's name.
    """
    path = folder / REPORT
    check_report(folder, overwrite=overwrite)
    lock = FileLock(folder / ".perf_vit-report.lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        yield folder / f"report-{socket.gethostname()}-{os.getpid()}.json"
        return
    except OSError as error:
        not_folder = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "it is no folder" if not_folder else str(error.strerror or error).lower()
        raise OutputError(f"can't write into {folder}: {reason}; several outputs need a folder") from error
    try:
        yield path
    finally:
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


def _is_report(path: Path) -> bool:
    """Whether a file is the report of a run."""
    content = read_json_or_none(path)
    return isinstance(content, dict) and content.keys() >= {"perf_vit_version", "totals", "inputs"}


PredictOne = Callable[[MapInput], JobResult]
"""Makes the outputs of one input."""

Each = Callable[[PredictOne, Sequence[MapInput]], Generator[InputReport, None, None]]
"""Calls `attempt` for each input, here or elsewhere, and gives the reports in any order."""

# The report is written now and then, so that a crash leaves most of it; each time takes time.
_REPORT_EVERY_S = 10.0


def attempt(predict_one: PredictOne, item: MapInput) -> InputReport:
    """Make the outputs of one input and say what became of it; whatever goes wrong is part of the report."""
    start = time.monotonic()
    outcome: JobResult | Exception
    try:
        outcome = predict_one(item)
    except Exception as error:
        outcome = error
    return report_of(item, outcome, time.monotonic() - start)


def report_of(item: MapInput, outcome: JobResult | Exception, seconds: float) -> InputReport:
    """Report of an input whose outputs were made, were there, or failed."""
    report = InputReport(input=item.path, output=str(item.output), status="failed", seconds=seconds)
    if isinstance(outcome, Exception):
        text = str(outcome) if isinstance(outcome, PerfVitError) else f"{type(outcome).__name__}: {outcome}"
        status: InputStatus = "busy" if isinstance(outcome, BusyError) else "failed"
        return replace(report, status=status, error=" ".join(text.split()), cause=outcome)
    return replace(
        report,
        status="done" if outcome.made else "skipped-existing",
        output=str(outcome.out or item.output),
        num_windows=outcome.num_windows,
        num_pixels=outcome.num_pixels,
        num_objects=outcome.num_objects,
        seam_disagreement=outcome.seam_disagreement,
        damaged=outcome.damaged,
    )


def in_turn(predict_one: PredictOne, inputs: Sequence[MapInput]) -> Generator[InputReport, None, None]:
    """One input after the other, in this process."""
    for item in inputs:
        yield attempt(predict_one, item)


def predict_many(
    predict_one: PredictOne,
    inputs: Sequence[MapInput],
    *,
    each: Each = in_turn,
    on_error: OnError = "stop",
    report: RunReport | None = None,
    report_path: Path | None = None,
    settled: Mapping[MapInput, InputReport] = MappingProxyType({}),
    num_rounds: int = 3,
    wait_s: float = 1.0,
    on_input: Callable[[InputReport], None] = lambda report: None,
) -> RunReport:
    """Make the outputs of each input.

    Several processes may be given the same inputs: what another is working on is left for the end.

    Args:
        predict_one: makes those of one; raises BusyError where another process makes it.
        inputs: from `find_inputs`.
        each: `in_turn`, or the method of a pool.
        on_error: "stop" at the first input that fails, or "skip" it.
        report: one to go on with, for its header.
        report_path: where to keep the report, also of a run that stops.
        settled: reports of inputs that need nothing, and come first in the report.
        num_rounds: how often to come back to inputs that were busy.
        wait_s: seconds before each of these rounds.
        on_input: called with each input that is settled.

    Returns:
        What became of each input.

    Raises:
        PerfVitError: with "stop", the first input's failure; or whatever else `predict_one` raised.
    """
    run = _Run(report or RunReport(), report_path, on_input)
    try:
        for known in settled.values():
            run.settle(known)
        inputs = [item for item in inputs if item not in settled]
        for last in [False] * num_rounds + [True]:
            if not inputs:
                break
            # A pool stops what goes on elsewhere when its generator is closed.
            with closing(each(predict_one, inputs)) as reports:
                inputs = _round(reports, run, on_error, last)
            if inputs:
                time.sleep(wait_s)
    finally:
        run.write()
    return run.report


def _round(reports: Generator[InputReport, None, None], run: _Run, on_error: OnError, last: bool) -> list[MapInput]:
    """Settle what can be settled; the inputs that are busy, unless this is the last round."""
    busy = []
    for report in reports:
        if report.status == "busy" and not last:
            busy.append(MapInput(report.input, Path(report.output)))
            continue
        run.settle(report)
        if report.status == "failed" and on_error == "stop":
            raise report.cause or PerfVitError(report.error)
    return busy


class _Run:
    """A report that grows, in memory and on disk."""

    def __init__(self, report: RunReport, path: Path | None, on_input: Callable[[InputReport], None]) -> None:
        self.report = report
        self._path = path
        self._on_input = on_input
        self._written = time.monotonic()

    def settle(self, report: InputReport) -> None:
        # The error's traceback holds the whole source.
        self.report.inputs.append(replace(report, cause=None))
        self._on_input(report)
        if time.monotonic() - self._written > _REPORT_EVERY_S:
            self.write()

    def write(self) -> None:
        if self._path is not None:
            self.report.write(self._path)
            self._written = time.monotonic()
