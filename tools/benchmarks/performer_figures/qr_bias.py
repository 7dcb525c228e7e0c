"""Figure 5: orthogonal rows from a QR decomposition alone are biased, and Haar-distributed ones are not."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from eps_collapse import popular_performer
from figure_style import BLUE, GREY, RED, Row, new_figure, print_markdown, save
from rich.progress import track
from torch import Generator, Tensor

from perf_vit.ops import draw_projection
from perf_vit.workflows.progress import console

HEAD_DIM, NUM_DRAWS = 64, 20_000
# z = t (1, .., 1) / sqrt(D).
STEPS = tuple(t / 2 for t in range(-4, 5))
OURS, POPULAR, IID = "ours, orthogonal", "performer-pytorch, orthogonal", "ours, iid"
COLORS = {POPULAR: RED, OURS: BLUE, IID: GREY}


def make(out: Path, seed: int) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    draws: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: draw_projection(HEAD_DIM, HEAD_DIM, generator=generator),
        IID: lambda: draw_projection(HEAD_DIM, HEAD_DIM, orthogonal=False, generator=generator),
    }
    peer = popular_performer()
    if peer is None:
        console.print("performer-pytorch is not installed, so it is left out: pip install performer-pytorch")
    else:
        draws[POPULAR] = lambda: peer.gaussian_orthogonal_random_matrix(HEAD_DIM, HEAD_DIM)
    rows = []
    for name, draw in draws.items():
        means, errors = measure(draw, NUM_DRAWS, generator)
        for t, mean, error in zip(STEPS, means.tolist(), errors.tolist(), strict=True):
            rows.append(Row("qr_bias", f"{name}, t = {t:g}", "E exp(w.z)", mean, error))
    rows += [Row("qr_bias", f"true, t = {t:g}", "E exp(w.z)", math.exp(t**2 / 2)) for t in STEPS]
    _draw(rows, out / "qr_bias.png")
    _print(rows)
    return rows


def measure(draw: Callable[[], Tensor], num_draws: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Means of exp(w . z) over the rows of many matrices, and standard errors, for each t; matrices are independent."""
    z = torch.tensor(STEPS, dtype=torch.float64) * torch.full((HEAD_DIM, 1), HEAD_DIM**-0.5, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        draws = track(range(num_draws), "bias of the rows", console=console)
        per_matrix = torch.stack([(draw().double() @ z).exp().mean(dim=0) for _ in draws])
    return per_matrix.mean(dim=0), per_matrix.std(dim=0) / math.sqrt(num_draws)


def _draw(rows: list[Row], path: Path) -> None:
    figure = new_figure(7, 3.8)
    axes = figure.subplots()
    for shift, (name, color) in enumerate(COLORS.items()):
        chosen = [row for row in rows if row.setting.startswith(f"{name}, t")]
        ratios = [row.value / math.exp(t**2 / 2) for row, t in zip(chosen, STEPS, strict=False)]
        errors = [2 * row.spread / math.exp(t**2 / 2) for row, t in zip(chosen, STEPS, strict=False)]
        if chosen:
            places = [t + 0.03 * (shift - 1) for t in STEPS]
            axes.errorbar(places, ratios, errors, fmt="o-", color=color, label=name, markersize=4, capsize=2)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xlabel="t, where z = t (1, .., 1) / sqrt(D)", ylabel="mean of exp(w.z) / exp(|z|²/2)")
    axes.set_title(f"D = {HEAD_DIM}, {NUM_DRAWS:,} matrices, bars: 2 standard errors", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save(figure, path)


def _print(rows: list[Row]) -> None:
    names = list(dict.fromkeys(row.setting.rpartition(", t = ")[0] for row in rows))
    cells = {row.setting: f"{row.value:.3f}" + (f" ({row.spread:.3f})" if row.spread > 0 else "") for row in rows}
    lines = [(f"{t:g}", *(cells[f"{name}, t = {t:g}"] for name in names)) for t in STEPS]
    print_markdown(f"Figure 5: mean of exp(w.z) (standard error), {NUM_DRAWS:,} matrices", ("t", *names), lines)
