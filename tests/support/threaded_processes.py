"""Processes that share an image, as threads of one process, which start at once."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perf_vit.streaming.processes import Processes


class ThreadedProcesses(Processes):
    """One of several threads; `reduce` waits for all of them."""

    def __init__(self, rank: int, number: int, slots: list[Any], barrier: threading.Barrier) -> None:
        super().__init__()
        self.rank, self.number = rank, number
        self._slots, self._barrier = slots, barrier

    def _all_reduce(self, values: Tensor, operation: str) -> None:
        self._slots[self.rank] = values.clone()
        self._barrier.wait()
        shapes = {each.shape for each in self._slots}
        assert len(shapes) == 1, f"tensors of one shape must cross, got {shapes}"
        stacked = torch.stack(self._slots)
        self._barrier.wait()
        values.copy_(stacked.sum(0) if operation == "sum" else stacked.amax(0))


def in_threads(function: Callable[[Processes], Any], number: int) -> list[Any]:
    """Call a function in each of several threads, given its `Processes`; results by rank."""
    results: list[Any] = [None] * number
    failures: list[BaseException] = []
    slots, barrier = [None] * number, threading.Barrier(number, timeout=60)

    def call(rank: int) -> None:
        try:
            results[rank] = function(ThreadedProcesses(rank, number, slots, barrier))
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(number)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if failures:
        raise next((each for each in failures if not isinstance(each, threading.BrokenBarrierError)), failures[0])
    return results
