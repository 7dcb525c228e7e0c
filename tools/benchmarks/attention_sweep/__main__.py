"""Time and peak memory of linear attention against softmax, performer-pytorch and the bare matrix products.

    python tools/benchmarks/attention_sweep --out bench

checks the outputs against the N x N reference first, then measures all contenders, prints a table a direction and
writes `attention.csv` and `attention.png`. performer-pytorch (the `peers` extra) is measured where it is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from contenders import INSTALL_HINT, POPULAR, attention_contenders
from report import attention_files, attention_summary, attention_table, write_attention
from settings import PASSES, AttentionBenchmark
from sweep import sweep_lengths
from verify import verify_linear_attention

from perf_vit.errors import PerfVitError
from perf_vit.ops import draw_projection
from perf_vit.workflows.progress import say, say_line, show, working
from perf_vit.writers import check_outputs

_LENGTHS = [256, 1024, 4096, 16384, 65536]


def main(
    out: Annotated[Path, typer.Option(help="Folder of attention.csv and attention.png.")] = Path("benchmark"),
    length: Annotated[list[int] | None, typer.Option(help="Tokens; repeatable. 256 to 65,536 by default.")] = None,
    batch_size: Annotated[int, typer.Option(help="Batch size, B.")] = 1,
    num_heads: Annotated[int, typer.Option(help="Heads, H.")] = 6,
    head_dim: Annotated[int, typer.Option(help="Channels of a head, D.")] = 64,
    num_features: Annotated[int, typer.Option(help="Random features, M.")] = 256,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16 or fp64.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    runs: Annotated[int, typer.Option(help="Timed calls; the median counts.")] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's choice by default.")] = None,
    max_seconds: Annotated[float, typer.Option(help="Leave a contender out once a call would take longer.")] = 10.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of an earlier run.")] = False,
) -> None:
    """Measure linear attention against softmax, performer-pytorch and the bare matrix products."""
    try:
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
        check_outputs(attention_files(out), [], overwrite=overwrite)
        with _threads(settings.num_threads):
            _run(settings, out)
    except PerfVitError as error:
        say_line("Error", str(error))
        sys.exit(2)


def _run(settings: AttentionBenchmark, folder: Path) -> None:
    """Verify, measure, print and write; nothing is measured or written where an output disagrees with its reference."""
    generator = torch.Generator().manual_seed(0)
    projection = draw_projection(settings.num_features, settings.head_dim, generator=generator)
    projection = projection.to(settings.device, settings.torch_dtype)
    verify_linear_attention(settings, projection)
    contenders = attention_contenders(settings, projection)
    if POPULAR not in {contender.name for contender in contenders}:
        say_line("Note", INSTALL_HINT)
    with working("measuring") as on_step:
        rows = sweep_lengths(settings, contenders, lambda direction, length: on_step(f"{direction}, L = {length:,}"))
    table, picture = write_attention(rows, settings, folder)
    say(settings.describe())
    for direction in PASSES:
        show(attention_table(rows, direction))
    say(*attention_summary(rows), f"table: {table}", f"picture: {picture}")


@contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    typer.run(main)
