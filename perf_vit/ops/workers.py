"""Threads that compute independent parts of a tensor, each with one thread of torch."""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
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
    compiler or tracer, where a mode or transform of PyTorch holds for this thread, off the CPU, and where the threads
    of OpenMP can't be limited (macOS and Windows).
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling() or _is_watched():
        return 1
    number = torch.get_num_threads()
    return number if number > 1 and _pool(number) is not None else 1


def each_in_threads(function: Callable[[_Part], _Result], parts: Sequence[_Part], number: int) -> list[_Result]:
    """Call a function for each part, in `number` threads, and return the results in the order of the parts.

    The threads inherit inference mode, autocast and context variables. After an error none of them is at work.

    Args:
        function: Computes one part; it may write to its own place of a shared tensor.
        parts: Arguments; a multiple of `number` of them, of equal cost, keeps all threads busy.
        number: Of threads, from `num_workers`; with 1, this thread does everything as torch usually does.
    """
    number = min(number, len(parts))
    pool = _pool(torch.get_num_threads()) if number > 1 else None
    if pool is None:
        return [function(part) for part in parts]
    inference, autocast = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    dtype, is_over = torch.get_autocast_dtype("cpu"), threading.Event()

    def some(first: int) -> list[_Result]:
        found = []
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", dtype, autocast):
            for part in parts[first::number]:
                if is_over.is_set():
                    break
                found.append(function(part))
        return found

    tasks = [pool.submit(contextvars.copy_context().run, some, first) for first in range(number)]
    try:
        results: list[list[_Result]] = [task.result() for task in tasks]
    finally:
        is_over.set()
        wait(tasks)
    return [results[index % number][index // number] for index in range(len(parts))]


def _is_watched() -> bool:
    """Whether a tracer, a mode or a transform holds for the calling thread, which other threads would not see."""
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    is_transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return bool(modes or is_transformed or torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def _pool(number: int) -> ThreadPoolExecutor | None:
    """Return threads that compute alone; None where that isn't possible."""
    if number not in _POOLS:
        pool = ThreadPoolExecutor(number, "perf_vit-parts", initializer=_start)
        is_alone = pool.submit(torch.get_num_threads).result() == 1
        _POOLS[number] = pool if is_alone else None
    return _POOLS[number]


def _start() -> None:
    # The first question of a thread sets its numbers, of OpenMP and of MKL, to those of the process.
    torch.get_num_threads()
    compute_alone()


# A forked process has none of these threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_POOLS.clear)
