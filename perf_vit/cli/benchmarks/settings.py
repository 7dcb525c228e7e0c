"""What one run of the attention benchmark is asked for, and the words of the command line turned into it."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from perf_vit.errors import ConfigError, reason_line

__all__ = ["DTYPES", "FORWARD", "FORWARD_BACKWARD", "PASSES", "AttentionBenchmark", "machine_name"]

FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"
PASSES = (FORWARD, FORWARD_BACKWARD)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class AttentionBenchmark:
    """One run of `perf-vit benchmark attention`.

    Attributes:
        lengths: numbers of tokens, L, ascending.
        batch_size: B.
        num_heads: H.
        head_dim: channels of a head, D.
        num_features: random features, M.
        dtype: a key of `DTYPES`.
        device: "cpu", "cuda" or "cuda:1".
        num_runs: timed calls, of which the median counts.
        max_seconds: a contender whose next call would take longer is left out from there on.
        num_threads: threads of torch on the CPU.

    Raises:
        ConfigError: no length, a number below 1, an unknown dtype or a device that isn't there.
    """

    lengths: tuple[int, ...]
    batch_size: int = 1
    num_heads: int = 6
    head_dim: int = 64
    num_features: int = 256
    dtype: str = "fp32"
    device: str = "cpu"
    num_runs: int = 5
    max_seconds: float = 10.0
    num_threads: int = 1

    def __post_init__(self) -> None:
        numbers = (self.batch_size, self.num_heads, self.head_dim, self.num_features, self.num_runs, self.num_threads)
        if not self.lengths or min(self.lengths + numbers) < 1 or self.max_seconds <= 0:
            raise ConfigError(f"lengths, sizes, runs, threads and seconds must be positive, got {self}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"--device {self.device}: {reason_line(error)}") from error

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of queries, keys and values."""
        return DTYPES[self.dtype]

    def describe(self) -> str:
        """One line with everything a reader needs to judge the numbers."""
        return (
            f"B={self.batch_size} H={self.num_heads} D={self.head_dim} M={self.num_features} {self.dtype}, "
            f"{machine_name(self.device)}, {self.num_threads} threads, torch {torch.__version__}, "
            f"median of {self.num_runs}"
        )


def machine_name(device: str) -> str:
    """The processor's name: the GPU's, or the CPU's as the kernel gives it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
