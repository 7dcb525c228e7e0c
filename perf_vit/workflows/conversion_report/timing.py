"""Wall times of calls that run tensor operations."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Call", "alternating_medians", "machine_name"]


Call = Callable[[], tuple[Tensor, ...]]


def alternating_medians(calls: Mapping[str, Call], num_runs: int, device: str) -> dict[str, float]:
    """Measure the median seconds of each call after one warm-up.

    The calls take turns, one run each, so that other load on the machine affects all of them alike.

    Args:
        calls: Functions to time, by name.
        num_runs: Timed runs of each.
        device: Device they run on.
    """
    for call in calls.values():
        _seconds(call, device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(num_runs):
        for name, call in calls.items():
            seconds[name].append(_seconds(call, device))
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine_name(device: str) -> str:
    """Return the processor's name: the GPU's, or the CPU's as the kernel reports it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


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
