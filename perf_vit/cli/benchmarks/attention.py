"""`perf-vit benchmark attention`, start to end: check, measure, show, save."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from perf_vit.cli.benchmarks.contenders import INSTALL_HINT, POPULAR, attention_contenders
from perf_vit.cli.benchmarks.report import attention_files, attention_summary, attention_table, write_attention
from perf_vit.cli.benchmarks.settings import PASSES, AttentionBenchmark
from perf_vit.cli.benchmarks.sweep import Measurement, sweep_lengths
from perf_vit.cli.benchmarks.verify import verify_linear_attention
from perf_vit.cli.console import say, say_line, show, working
from perf_vit.io import check_outputs
from perf_vit.ops import draw_projection

__all__ = ["run_attention_benchmark"]


def run_attention_benchmark(
    settings: AttentionBenchmark, folder: Path, *, overwrite: bool = False
) -> list[Measurement]:
    """Verify linear attention, measure all contenders, print the table and write CSV and picture.

    Args:
        settings: what to measure.
        folder: where `attention.csv` and `attention.png` go.
        overwrite: replace such files that exist.

    Raises:
        PerfVitError: the files exist or can't be written, or an output disagrees with its reference; nothing is
            measured or written then.
    """
    check_outputs(attention_files(folder), [], overwrite=overwrite)
    generator = torch.Generator().manual_seed(0)
    projection = draw_projection(settings.num_features, settings.head_dim, generator=generator)
    projection = projection.to(settings.device, settings.torch_dtype)
    with _threads(settings.num_threads):
        verify_linear_attention(settings, projection)
        contenders = attention_contenders(settings, projection)
        if POPULAR not in {contender.name for contender in contenders}:
            say_line("Note", INSTALL_HINT)
        with working("measuring") as on_step:
            rows = sweep_lengths(
                settings, contenders, lambda direction, length: on_step(f"{direction}, L = {length:,}")
            )
    table, picture = write_attention(rows, settings, folder)
    say(settings.describe())
    for direction in PASSES:
        show(attention_table(rows, direction))
    say(*attention_summary(rows), f"table: {table}", f"picture: {picture}")
    return rows


@contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
