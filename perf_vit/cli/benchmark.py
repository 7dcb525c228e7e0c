"""The `perf-vit benchmark` commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["benchmark_app"]

benchmark_app = typer.Typer(help="Measure speed and memory, after checking the outputs.", no_args_is_help=True)

_LENGTHS = [256, 1024, 4096, 16384, 65536]


# Keeps `attention` a command of its own while it is the only one.
@benchmark_app.callback()
def _group() -> None:
    pass


@benchmark_app.command()
def attention(
    out: Annotated[Path, typer.Option(help="Folder for attention.csv and attention.png.")] = Path("benchmark"),
    length: Annotated[list[int] | None, typer.Option(help="Tokens; repeat it. 256 to 65,536 by default.")] = None,
    batch_size: Annotated[int, typer.Option(help="B.")] = 1,
    num_heads: Annotated[int, typer.Option(help="H.")] = 6,
    head_dim: Annotated[int, typer.Option(help="Channels of a head, D.")] = 64,
    num_features: Annotated[int, typer.Option(help="Random features, M.")] = 256,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16 or fp64.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    runs: Annotated[int, typer.Option(help="Timed calls, of which the median counts.")] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's choice by default.")] = None,
    max_seconds: Annotated[float, typer.Option(help="Leave a contender out once a call would take longer.")] = 10.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files of an earlier benchmark.")] = False,
) -> None:
    """Time and peak memory of linear attention against softmax, the popular Performer and the bare matrix products."""
    import torch

    from perf_vit.cli.benchmarks.attention import run_attention_benchmark
    from perf_vit.cli.benchmarks.settings import AttentionBenchmark

    settings = AttentionBenchmark(
        lengths=tuple(sorted(length or _LENGTHS)),
        batch_size=batch_size,
        num_heads=num_heads,
        head_dim=head_dim,
        num_features=num_features,
        dtype=dtype,
        device=device,
        num_runs=runs,
        num_threads=threads if threads is not None else torch.get_num_threads(),
        max_seconds=max_seconds,
    )
    run_attention_benchmark(settings, out, overwrite=overwrite)
