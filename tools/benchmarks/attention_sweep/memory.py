"""Peak memory of calls that run tensor operations."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from perf_vit.workflows.conversion_report import Call

__all__ = ["peak_extra_bytes"]


def peak_extra_bytes(call: Call, device: str) -> int:
    """Measure the most bytes that a call allocates at once, less those of the tensors that it returns.

    Tensors that exist before the call don't count: the result is the memory needed above inputs and outputs.
    On CUDA, the caching allocator keeps the peak. On the CPU, every allocation and release of torch's allocator is
    recorded by its profiler and summed: exact and repeatable, where the resident set of a process hides whatever a
    call takes from memory that an earlier call has freed. Work space inside BLAS is in neither.

    Args:
        call: Function to measure; its results are the outputs.
        device: Device it runs on.
    """
    return _cuda_peak(call, device) if device.startswith("cuda") else _cpu_peak(call)


def _cuda_peak(call: Call, device: str) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    outputs = call()
    torch.cuda.synchronize(device)
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
