"""The same work on a Ray cluster: a pool of processes, here or on many machines."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

from perf_vit.errors import ConfigError, DataWarning, PerfVitError, extra, reason_line
from perf_vit.inference.batch import InputReport, PredictOne, attempt
from perf_vit.inference.inputs import MapInput

__all__ = ["RayPool", "row_ranges"]

Item = TypeVar("Item")

Result = TypeVar("Result")

# Of what an actor dies of: it is restarted, and goes on with the rows that are there.
_RETRIES = 3

# Only paths and reports travel; Ray would take a third of the memory.
_OBJECT_STORE_BYTES = 100 * 2**20


class RayPool:
    """Actors that do one thing at a time each; a context manager.

    What they work with is unpickled once an actor: let it load its model at the first call.

    Args:
        num_actors: one a GPU, or one a CPU where there is none, by default.
        address: of a running cluster, as "auto" or "ray://host:10001"; by default that of RAY_ADDRESS, else a Ray of
            its own on this machine for as long as the pool is open.
        use_gpus: a GPU for each actor; where the cluster has some by default.

    Raises:
        ConfigError: Ray isn't installed, or there is no cluster.
    """

    def __init__(
        self, *, num_actors: int | None = None, address: str | None = None, use_gpus: bool | None = None
    ) -> None:
        self._ray = _import_ray()
        self._ours = not self._ray.is_initialized()
        if self._ours:
            _connect(self._ray, address or os.environ.get("RAY_ADDRESS") or "local", num_actors)
        resources = self._ray.cluster_resources()
        self.use_gpus = bool(resources.get("GPU")) if use_gpus is None else use_gpus
        self._actors: list[Any] = []
        self._told: set[tuple[str, int]] = set()
        self.num_actors = num_actors or max(1, int(resources.get("GPU" if self.use_gpus else "CPU", 1)))

    def __enter__(self) -> RayPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ours:
            self._ray.shutdown()
            return
        for actor in self._actors:
            self._ray.kill(actor)

    def each(self, predict_one: PredictOne, inputs: Sequence[MapInput]) -> Generator[InputReport, None, None]:
        """`attempt` each input in the pool, for `predict_many`; reports in the order they are finished.

        Warnings about data are given here, of each kind the first that an actor had.
        """
        with closing(self._outcomes(_Attempt(predict_one), inputs)) as outcomes:
            for item, outcome in outcomes:
                if isinstance(outcome, Exception):
                    yield InputReport(input=item.path, output=str(item.output), status="failed", error=str(outcome))
                else:
                    report, warned = outcome
                    self._tell(warned)
                    yield report

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Generator[tuple[Item, Result], None, None]:
        """Items and what became of them, in the order they are finished.

        Raises:
            PerfVitError: an actor died too often; and what `work` raises.
        """
        with closing(self._outcomes(work, items)) as outcomes:
            for item, outcome in outcomes:
                if isinstance(outcome, Exception):
                    raise outcome
                yield item, outcome

    def _tell(self, warned: Iterable[tuple[tuple[str, int], str]]) -> None:
        for place, text in warned:
            if place not in self._told:
                self._told.add(place)
                warnings.warn(text, DataWarning, stacklevel=3)

    def _outcomes(
        self, work: Callable[[Item], Result], items: Iterable[Item]
    ) -> Generator[tuple[Item, Result | Exception], None, None]:
        # One list in another: Ray hands on references that are arguments, but not those inside of one.
        given = [self._ray.put(work)]
        waiting = list(items)[::-1]
        running: dict[Any, tuple[Any, Item]] = {}

        def start(actor: Any) -> None:
            item = waiting.pop()
            running[actor.do.remote(given, item)] = actor, item

        for actor in self._some_actors(len(waiting)):
            start(actor)
        try:
            while running:
                [done], _ = self._ray.wait(list(running), num_returns=1)
                actor, item = running.pop(done)
                outcome = self._outcome_of(done)
                if waiting:
                    start(actor)
                yield item, outcome
        finally:
            # What goes on after an error would be in the way of the next call.
            for actor, _ in running.values():
                self._ray.kill(actor)
                self._actors.remove(actor)

    def _some_actors(self, num_items: int) -> list[Any]:
        """As many as there is work for; those of earlier calls, which hold what they worked with."""
        make = self._ray.remote(num_cpus=1, num_gpus=int(self.use_gpus))(_Worker)
        options = {"max_restarts": -1, "max_task_retries": _RETRIES}
        while len(self._actors) < min(self.num_actors, num_items):
            self._actors.append(make.options(**options).remote())
        return self._actors[:num_items]

    def _outcome_of(self, reference: Any) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            return error.cause if isinstance(error.cause, Exception) else error
        except errors.RayError as error:
            # What happened comes first, what it came from last.
            lines = str(error).strip().splitlines()
            return PerfVitError(f"a Ray worker died: {' ... '.join(dict.fromkeys((lines[0], lines[-1])))}")


class _Worker:
    """What an actor runs: one piece of work after the other, each unpickled once."""

    def __init__(self) -> None:
        self._given: Any = None
        self._work: Callable[[Any], Any] | None = None

    def do(self, given: list[Any], item: Any) -> Any:
        if self._work is None or given != self._given:
            self._given, self._work = given, _import_ray().get(given[0])
        return self._work(item)


class _Attempt:
    """`attempt`, with a report that can travel, and each `DataWarning`: the place in the code and the text."""

    def __init__(self, predict_one: PredictOne) -> None:
        self._predict_one = predict_one

    def __call__(self, item: MapInput) -> tuple[InputReport, list[tuple[tuple[str, int], str]]]:
        # Nobody sees what an actor prints.
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DataWarning)
            report = attempt(self._predict_one, item)
        of_data = [each for each in caught if issubclass(each.category, DataWarning)]
        warned = [((each.filename, each.lineno), str(each.message)) for each in of_data]
        return report if isinstance(report.cause, PerfVitError) else replace(report, cause=None), warned


def _import_ray() -> Any:
    # Before the import, which reads it: nothing is to be sent anywhere.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with extra("ray", "`engine=ray`"):
        import ray
        import ray.exceptions
    return ray


def _connect(ray: Any, address: str, num_actors: int | None) -> None:
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        num_cpus = max(num_actors or 0, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0) or None
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES, "num_cpus": num_cpus}
    try:
        ray.init(**options)
    except Exception as error:
        # Ray has no error of its own for this.
        raise ConfigError(f"no Ray at {address}: {reason_line(error)}; start one, or leave it out") from error


# A task computes the row of windows above its first one again: a quarter more work at worst.
_MIN_WINDOW_ROWS = 4

# Tasks are not equally long: nodata is skipped.
_TASKS_PER_ACTOR = 4


def row_ranges(window_rows: list[int], height: int, num_actors: int) -> list[tuple[int, int]]:
    """Cut a scene's rows where rows of windows begin, into some ranges for each actor.

    Args:
        window_rows: first rows of the rows of windows.
        height: rows of the scene.
        num_actors: that share them.

    Returns:
        (first row, first row below) of each range, which cover all rows once.
    """
    step = max(_MIN_WINDOW_ROWS, -(-len(window_rows) // (_TASKS_PER_ACTOR * num_actors)))
    starts = [0, *window_rows[step::step]]
    return list(zip(starts, [*starts[1:], height], strict=True))
