"""Threads that compute independent parts of a tensor, each with one thread of torch."""

from __future__ import annotations

import contextvars
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from perf_vit.threads import compute_alone

__all__ = ["each_in_threads", "num_workers"]

_Part = TypeVar("_Part")
_Result = TypeVar("_Result")

# None where the threads of OpenMP can't be limited.
_POOLS: dict[int, ThreadPoolExecutor | None] = {}


def num_workers(x: torch.Tensor) -> int:
    """Return how many threads may compute parts of a tensor at the same time: those of torch, or 1.

    Operations on parts that fit in a cache take microseconds, and to wake all threads for each of them costs as much.
    Where parts are independent, a thread for each needs no waiting. It is 1 where gradients are recorded, under a
    compiler or tracer, where a mode of PyTorch watches the operations of this thread, off the CPU, and where the
    threads of OpenMP can't be limited (macOS and Windows).
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return 1
    if torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():  # type: ignore[attr-defined, no-untyped-call]
        return 1
    number = torch.get_num_threads()
    return number if number > 1 and _pool(number) is not None else 1


def each_in_threads(function: Callable[[_Part], _Result], parts: Sequence[_Part], number: int) -> list[_Result]:
    """Call a function for each part, in `number` threads, and return the results in the order of the parts.

    The threads inherit inference mode, autocast and context variables.

    Args:
        function: Computes one part; it may write to its own place of a shared tensor.
        parts: Arguments.
        number: Of threads, from `num_workers`; with 1, this thread does everything as torch usually does.
    """
    number = min(number, len(parts))
    pool = _pool(torch.get_num_threads()) if number > 1 else None
    if pool is None:
        return [function(part) for part in parts]
    inference, autocast = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu")

    def some(first: int) -> list[_Result]:
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", dtype, autocast):
            return [function(part) for part in parts[first::number]]

    tasks = [pool.submit(contextvars.copy_context().run, some, first) for first in range(number)]
    results: list[list[_Result]] = [task.result() for task in tasks]
    return [results[index % number][index // number] for index in range(len(parts))]


def _pool(number: int) -> ThreadPoolExecutor | None:
    """Return threads that compute alone; None where that isn't possible."""
    if number not in _POOLS:
        pool = ThreadPoolExecutor(number, "perf_vit-parts", initializer=_start)
        is_alone = pool.submit(torch.get_num_threads).result() == 1
        _POOLS[number] = pool if is_alone else None
    return _POOLS[number]


def _start() -> None:
    # The first question of a thread sets its number to that of the process.
    torch.get_num_threads()
    compute_alone()


# A forked process has none of these threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_POOLS.clear)
