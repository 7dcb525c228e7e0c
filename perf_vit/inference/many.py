"""Many inputs, one after the other or on many machines; one bad file doesn't cost the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from perf_vit.errors import BusyError, PerfVitError
from perf_vit.inference.inputs import MapInput
from perf_vit.inference.job import JobResult
from perf_vit.inference.options import OnError
from perf_vit.inference.run_report import InputReport, InputStatus, RunReport

__all__ = ["Each", "PredictOne", "attempt", "in_turn", "predict_many"]

PredictOne = Callable[[MapInput], JobResult]
"""Makes the outputs of one input."""

Each = Callable[[PredictOne, Sequence[MapInput]], Generator[InputReport, None, None]]
"""Calls `attempt` for each input, here or elsewhere, and gives the reports in any order."""

# The report is written now and then, so that a crash leaves most of it; each time takes time.
_REPORT_EVERY_S = 10.0


def attempt(predict_one: PredictOne, item: MapInput) -> InputReport:
    """Make the outputs of one input and say what became of it; whatever goes wrong is part of the report."""
    start = time.monotonic()
    report = InputReport(input=item.path, output=str(item.output), status="failed")
    try:
        result = predict_one(item)
    except Exception as error:
        text = str(error) if isinstance(error, PerfVitError) else f"{type(error).__name__}: {error}"
        status: InputStatus = "busy" if isinstance(error, BusyError) else "failed"
        report = replace(report, status=status, error=" ".join(text.split()), cause=error)
    else:
        report = replace(
            report,
            status="done" if result.made else "skipped-existing",
            output=str(result.out or item.output),
            num_windows=result.num_windows,
            num_pixels=result.num_pixels,
            num_objects=result.num_objects,
            damaged=result.damaged,
        )
    return replace(report, seconds=time.monotonic() - start)


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
        for last in [False] * num_rounds + [True]:
            # A pool stops what goes on elsewhere when its generator is closed.
            with closing(each(predict_one, inputs)) as reports:
                inputs = _round(reports, run, on_error, last)
            if not inputs:
                break
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
