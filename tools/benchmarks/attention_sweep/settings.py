"""Settings of the attention benchmark."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from perf_vit.errors import ConfigError, reason_line
from perf_vit.workflows.conversion_report import machine_name

__all__ = ["DTYPES", "FORWARD", "FORWARD_BACKWARD", "PASSES", "AttentionBenchmark"]

FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"
PASSES = (FORWARD, FORWARD_BACKWARD)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class AttentionBenchmark:
    """Settings of one run.

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
