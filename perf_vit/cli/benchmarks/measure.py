"""Clocks and memory meters for calls that run tensor operations."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

__all__ = ["Call", "alternating_medians", "peak_extra_bytes"]

Call = Callable[[], tuple[Tensor, ...]]


def alternating_medians(calls: Mapping[str, Call], num_runs: int, device: str) -> dict[str, float]:
    """Median seconds of each call after one warm-up.

    The calls take turns, one run each, so that whatever else the machine does hits all of them alike.

    Args:
        calls: what to time, by name.
        num_runs: timed runs of each.
        device: the device they run on.
    """
    for call in calls.values():
        _seconds(call, device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(num_runs):
        for name, call in calls.items():
            seconds[name].append(_seconds(call, device))
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_extra_bytes(call: Call, device: str) -> int:
    """Most bytes that a call had allocated at once, less those of the tensors it returned.

    Tensors that existed before the call don't count: what remains is what the call needs above inputs and outputs.
    On CUDA, the caching allocator keeps the peak. On the CPU, every allocation and release of torch's allocator is
    recorded by its profiler and summed: exact and repeatable, where the resident set of a process hides whatever a
    call takes from memory that an earlier call has freed. Work space inside BLAS is in neither.

    Args:
        call: what to measure; its results are the outputs.
        device: the device it runs on.
    """
    return _cuda_peak(call, device) if device.startswith("cuda") else _cpu_peak(call)


def _seconds(call: Call, device: str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    # Kept until the clock has stopped: releasing the results is the caller's time.
    outputs = call()
    _synchronize(device)
    seconds = time.perf_counter() - start
    del outputs
    return seconds


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _cuda_peak(call: Call, device: str) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    outputs = call()
    _synchronize(device)
    return max(0, torch.cuda.max_memory_allocated(device) - before - _num_bytes(outputs))


def _cpu_peak(call: Call) -> int:
    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        outputs = call()
    allocated = peak = 0
    for change in _allocations(profiler):
        allocated += change
        peak = max(peak, allocated)
    return max(0, peak - _num_bytes(outputs))


def _allocations(profiler: profile) -> list[int]:
    """Bytes of each allocation (positive) and release (negative) in order of time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        # Kernel names in a trace are not always valid UTF-8.
        trace = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    events = [event for event in trace["traceEvents"] if event.get("name") == "[memory]"]
    return [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]


def _num_bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    # The profiler's C++ side writes its start and stop there, below Python and whatever the log level.
    saved = os.dup(2)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
