"""Time, memory and parameters of one attention layer with each mixer, from 256 to 65,536 tokens, in one run.

    python tools/benchmarks/mixers.py --out mixers.md

The layer is that of a ViT-tiny: 192 channels in 3 heads, projections included, one class token, batch of one, one
thread. A training step is forward and backward. Outputs are compared with N x N references by the tests of the mixers.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from timm.layers import Attention

sys.path.insert(0, str(Path(__file__).with_name("attention_sweep")))
from memory import peak_extra_bytes

from perf_vit.layers import MIXERS, LinearizedAttention
from perf_vit.layers.token_grid import TokenGrid
from perf_vit.workflows.progress import say
from perf_vit.writers import check_outputs

MIXERS_MEASURED = ["softmax", "performer", "clustered", "linformer", "reformer", "s4", "h3", "windowed", "registers"]
# Clusters at every size; windows of equal size in all mixers that have them.
OPTIONS = {"clustered": {"max_exact_tokens": 0}}
SIDES = [16, 32, 64, 128, 256]


def main(
    out: Annotated[Path, typer.Option(help="Markdown file of the tables.")] = Path("mixers.md"),
    side: Annotated[list[int] | None, typer.Option(help="Rows and columns of tokens; repeatable.")] = None,
    runs: Annotated[int, typer.Option(help="Timed calls; the median counts.")] = 3,
    max_seconds: Annotated[float, typer.Option(help="Leave a mixer out where a call would take longer.")] = 20.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of an earlier run.")] = False,
) -> None:
    """Measure all mixers and write one table for the forward pass, one for a training step."""
    check_outputs([out], [], overwrite=overwrite)
    torch.set_num_threads(1)
    sides = sorted(side or SIDES)
    tables = [
        [f"| mixer | parameters | {' | '.join(f'{n * n:,}' for n in sides)} |", "|---" * (len(sides) + 2) + "|"]
        for _ in (0, 1)
    ]
    for name in MIXERS_MEASURED:
        cells: list[list[str]] = [[], []]
        last = [0.0, 0.0]
        for index, n in enumerate(sides):
            layer, x = make_layer(name, n)
            for step, training in enumerate((False, True)):
                growth = (n / sides[index - 1]) ** (4 if name == "softmax" else 2) if index else 1
                if last[step] * growth > max_seconds:
                    cells[step].append("")
                    continue
                call = caller(layer, x, training=training)
                last[step] = seconds(call, runs)
                mebibytes = peak_extra_bytes(call, "cpu") / 2**20
                cells[step].append(f"{1e3 * last[step]:,.1f} / {mebibytes:,.0f}")
            say(f"{name} {n * n:,}: {cells[0][-1]}; {cells[1][-1]}")
        own = sum(parameter.numel() for parameter in layer.mixer.parameters())
        for table, row in zip(tables, cells, strict=True):
            table.append(f"| `{name}` | {own:,} | {' | '.join(row)} |")
    titles = ("Forward pass", "Training step")
    text = "\n\n".join(
        f"{title}, milliseconds / MiB\n\n" + "\n".join(table) for title, table in zip(titles, tables, strict=True)
    )
    out.write_text(text + "\n")


def make_layer(name: str, side: int) -> tuple[LinearizedAttention, torch.Tensor]:
    """Return a layer of ViT-tiny with a mixer, and tokens of a square grid and a class token."""
    torch.manual_seed(0)
    grid = TokenGrid()
    grid.size = (side, side)
    options = MIXERS[name].options_type(**OPTIONS.get(name, {}), num_prefix_tokens=1)
    layer = LinearizedAttention(Attention(192, num_heads=3, qkv_bias=True), options, grid)
    return layer, torch.randn(1, 1 + side * side, 192)


def caller(layer: LinearizedAttention, x: torch.Tensor, *, training: bool) -> Callable[[], torch.Tensor]:
    """Return a function that runs the layer forward, and back if `training`."""

    def forward() -> torch.Tensor:
        with torch.inference_mode():
            return layer(x)

    def train() -> torch.Tensor:
        layer.zero_grad()
        out = layer(x)
        out.sum().backward()
        return out.detach()

    return train if training else forward


def seconds(call: Callable[[], torch.Tensor], runs: int) -> float:
    """Return the median of the CPU seconds of calls, after one that warms up."""
    call()
    times = []
    for _ in range(runs):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


if __name__ == "__main__":
    typer.run(main)
