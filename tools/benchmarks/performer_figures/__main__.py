"""The figures of "Rethinking Attention with Performers" (Choromanski et al. 2020), measured with this package.

    python tools/benchmarks/performer_figures --out docs/images/performers

Draws one picture each, writes every number behind them to `figures.csv` and prints the tables of docs/performers.md.
Two of the figures want performer-pytorch (the `peers` extra). The speed curve is a picture of
`tools/benchmarks/attention_sweep`.
"""

import platform
from pathlib import Path
from typing import Annotated

import attention_error
import eps_collapse
import kernel_mse
import qr_bias
import torch
import typer
from figure_style import read_rows, write_rows

from perf_vit.workflows.conversion_report import machine_name
from perf_vit.workflows.progress import console

FIGURES = {
    "kernel_mse": kernel_mse.make,
    "attention_error": attention_error.make,
    "eps_collapse": eps_collapse.make,
    "qr_bias": qr_bias.make,
}


def main(
    out: Annotated[Path, typer.Option(help="Folder of the pictures and figures.csv.")] = Path("docs/images/performers"),
    seed: Annotated[int, typer.Option(help="Of every random draw.")] = 0,
    figure: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(FIGURES)}; repeatable; all.")] = None,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 1,
) -> None:
    """Draw the figures of docs/performers.md."""
    unknown = set(figure or ()) - set(FIGURES)
    if unknown:
        raise typer.BadParameter(
            f"expected {', '.join(FIGURES)}, got {', '.join(sorted(unknown))}", param_hint="--figure"
        )
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    rows = read_rows(out / "figures.csv")
    for name in figure or FIGURES:
        made = FIGURES[name](out, seed)
        # A figure that was left out keeps the numbers of its last picture.
        rows = [row for row in rows if row.figure != name or not made] + made
        write_rows(sorted(rows, key=lambda row: list(FIGURES).index(row.figure)), out / "figures.csv")
    console.print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {machine_name('cpu')}, {threads} threads"
    )


if __name__ == "__main__":
    typer.run(main)
