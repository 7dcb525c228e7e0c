"""Figure 1: where positive features estimate the softmax kernel better than trigonometric ones (ibid., figure 2)."""

import math
from pathlib import Path

import numpy as np
import torch
from figure_style import BLUE, GREEN, RED, Row, digits, new_figure, print_markdown, save
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from rich.progress import track
from torch import Generator, Tensor

from perf_vit.ops import draw_projection
from perf_vit.ops.naive import kernel_matrix
from perf_vit.workflows.progress import console

TRIG, PLUS, HYP = "softmax-trig", "softmax+", "softmax-hyp+"
COLORS = {TRIG: RED, PLUS: BLUE, HYP: GREEN}
FEATURES_PER_ROW = {TRIG: 2, PLUS: 1, HYP: 2}
DIM, NUM_ROWS, NUM_DRAWS = 16, 64, 10_000
# Beyond this the closed form itself says that so many draws can't measure the positive features' error.
LARGEST_RELATIVE_ERROR = 0.2


def make(out: Path, seed: int, num_draws: int = NUM_DRAWS, num_steps: int = 16) -> list[Row]:
    lengths = torch.arange(1, num_steps + 1, dtype=torch.float64) * 2 / num_steps
    angles = (torch.arange(num_steps, dtype=torch.float64) + 0.5) * math.pi / num_steps
    x, y = pairs(lengths[:, None], angles)
    closed = closed_form_mse(x, y, NUM_ROWS)
    measured = measured_mse(x, y, NUM_ROWS, num_draws, torch.Generator().manual_seed(seed))
    trusted = relative_error((x + y).square().sum(-1), NUM_ROWS, num_draws) < LARGEST_RELATIVE_ERROR
    _draw(lengths, angles, closed, measured, trusted, out / "kernel_mse.png")
    rows = [
        *_agreement(closed, measured, trusted, num_draws),
        *_crossings(),
        *_at_length_one(lengths, angles, closed, measured, trusted),
    ]
    lines = [(row.setting, row.quantity, digits(row.value)) for row in rows]
    print_markdown("Figure 1", ("setting", "quantity", "value"), lines)
    return rows


def pairs(lengths: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors x and y, [..., D], of equal length with an angle between them."""
    lengths, angles = torch.broadcast_tensors(lengths, angles)
    x, y = torch.zeros(2, *lengths.shape, DIM, dtype=lengths.dtype)
    x[..., 0], y[..., 0], y[..., 1] = lengths, lengths * angles.cos(), lengths * angles.sin()
    return x, y


def closed_form_mse(x: Tensor, y: Tensor, num_rows: int) -> dict[str, Tensor]:
    """Mean squared errors of the estimates of exp(x . y) from iid rows (ibid., lemma 2), of which M counts the rows."""
    kernel, z2, d2 = (x * y).sum(-1).exp(), (x + y).square().sum(-1), (x - y).square().sum(-1)
    plus = z2.exp() * kernel**2 * -torch.expm1(-z2) / num_rows
    trig = z2.exp() * kernel**-2 * torch.expm1(-d2) ** 2 / (2 * num_rows)
    return {TRIG: trig, PLUS: plus, HYP: plus * -torch.expm1(-z2) / 2}


def measured_mse(x: Tensor, y: Tensor, num_rows: int, num_draws: int, generator: Generator) -> dict[str, Tensor]:
    """The same from draws of the library's features; all kernels see the same rows."""
    q, k = ((vectors * DIM**0.25).unsqueeze(-2) for vectors in (x, y))
    exact = (x * y).sum(-1).exp()
    squares = {kernel: torch.zeros_like(exact) for kernel in COLORS}
    for _ in track(range(num_draws), "error of the kernel", console=console):
        projection = draw_projection(num_rows, DIM, orthogonal=False, generator=generator)
        for kernel, total in squares.items():
            total += (kernel_matrix(q, k, projection, kernel)[..., 0, 0] - exact).square()
    return {kernel: total / num_draws for kernel, total in squares.items()}


def relative_error(z2: Tensor, num_rows: int, num_draws: int) -> Tensor:
    """Relative standard error of a measured MSE(SM+), from the excess kurtosis of the log-normal exp(w . z)."""
    kurtosis = (4 * z2).exp() + 2 * (3 * z2).exp() + 3 * (2 * z2).exp() - 6
    return ((kurtosis / num_rows + 2) / num_draws).sqrt()


def crossing_angle(length: float, trig_rows: float) -> float:
    """The angle at which both errors are equal, for `trig_rows` trigonometric rows to each positive one."""
    angles = torch.linspace(0.001, math.pi - 0.001, 20_000, dtype=torch.float64)
    mse = closed_form_mse(*pairs(torch.full_like(angles, length), angles), 1)
    return float(angles[(mse[TRIG] / trig_rows > mse[PLUS]).to(torch.int8).argmax()])


def _agreement(closed: dict[str, Tensor], measured: dict[str, Tensor], trusted: Tensor, num_draws: int) -> list[Row]:
    rows = []
    for kernel in COLORS:
        off = (measured[kernel] / closed[kernel] - 1).abs()[trusted]
        rows.append(
            Row("kernel_mse", f"{kernel}, {num_draws} draws", "measured off closed form, median", float(off.median()))
        )
        rows.append(
            Row("kernel_mse", f"{kernel}, {num_draws} draws", "measured off closed form, largest", float(off.max()))
        )
    rows.append(Row("kernel_mse", "all pairs", "share that can be measured", float(trusted.double().mean())))
    # The pair of the longest, most parallel vectors: what a measurement makes of a tail that it never sees.
    seen = measured[PLUS][-1, 0] / closed[PLUS][-1, 0]
    rows.append(Row("kernel_mse", "longest pair, smallest angle", "MSE(SM+), measured / closed", float(seen)))
    for name, mse in {"closed form": closed, "measured": measured}.items():
        wins = (mse[TRIG] > mse[PLUS]).double()
        rows.append(Row("kernel_mse", "all pairs, equal rows", f"share won by positive, {name}", float(wins.mean())))
    wins = (2 * closed[TRIG] > closed[PLUS]).double().mean()
    rows.append(Row("kernel_mse", "all pairs, equal features", "share won by positive, closed form", float(wins)))
    return rows


def _crossings() -> list[Row]:
    rows = []
    for length in (0.25, 0.5, 1.0, 1.5, 2.0):
        for words, trig_rows in {"equal rows": 1.0, "equal features": 0.5}.items():
            angle = math.degrees(crossing_angle(length, trig_rows))
            rows.append(Row("kernel_mse", f"length {length:g}, {words}", "positive wins beyond, degrees", angle))
    return rows


def _at_length_one(
    lengths: Tensor, angles: Tensor, closed: dict[str, Tensor], measured: dict[str, Tensor], trusted: Tensor
) -> list[Row]:
    place = int((lengths - 1).abs().argmin())
    rows = []
    for column in (0, len(angles) // 2, len(angles) - 1):
        if not trusted[place, column]:
            continue
        setting = f"length {lengths[place]:g}, {math.degrees(angles[column]):.1f} degrees"
        for name, mse in {"closed form": closed, "measured": measured}.items():
            ratio = mse[TRIG][place, column] / mse[PLUS][place, column]
            rows.append(Row("kernel_mse", setting, f"MSE(trig) / MSE(SM+), {name}", float(ratio)))
    return rows


def _draw(
    lengths: Tensor, angles: Tensor, closed: dict[str, Tensor], measured: dict[str, Tensor], trusted: Tensor, path: Path
) -> None:
    figure = new_figure(12, 3.9)
    figure.get_layout_engine().set(w_pad=0.12)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    for axes, mse, title in ((left, closed, "closed form"), (middle, measured, "measured")):
        ratio = (mse[TRIG] / mse[PLUS]).log10()
        norm = TwoSlopeNorm(0, -8, 8)
        image = axes.pcolormesh(angles, lengths, ratio, norm=norm, cmap="RdBu", shading="nearest", rasterized=True)
        axes.contour(angles, lengths, ratio, levels=[0], colors="black", linewidths=1.5)
        axes.set(title=title, xlabel="angle between x and y")
        axes.set_xticks(np.linspace(0, math.pi, 5), ["0", "45°", "90°", "135°", "180°"])
    left.set_ylabel("length of x and of y")
    left.text(2.3, 1.2, "positive\nwins", ha="center", va="center")
    left.text(0.75, 1.2, "trigonometric\nwins", ha="center", va="center")
    middle.contourf(angles, lengths, (~trusted).double(), levels=[0.5, 1.5], colors="none", hatches=["///"])
    figure.colorbar(image, ax=[left, middle], label="log10 MSE(trig) / MSE(SM+), equal rows", extend="both")
    _draw_slice(right, lengths, angles, closed, measured, trusted)
    save(figure, path)


def _draw_slice(
    axes: Axes, lengths: Tensor, angles: Tensor, closed: dict[str, Tensor], measured: dict[str, Tensor], trusted: Tensor
) -> None:
    """Relative errors at length 1, for 256 features of each kernel."""
    place = int((lengths - 1).abs().argmin())
    exact = (lengths[place] ** 2 * angles.cos()).exp()
    for kernel, color in COLORS.items():
        scale = NUM_ROWS / (256 / FEATURES_PER_ROW[kernel]) / exact**2
        axes.plot(angles, closed[kernel][place] * scale, color=color, label=kernel)
        seen = trusted[place] if kernel != TRIG else torch.ones_like(trusted[place])
        axes.plot(angles[seen], (measured[kernel][place] * scale)[seen], "o", color=color, markersize=4)
    axes.set(title=f"length {lengths[place]:g}, 256 features (dots: measured)", yscale="log", ylabel="MSE / exp(x.y)²")
    axes.set_xlabel("angle between x and y")
    axes.set_xticks(np.linspace(0, math.pi, 5), ["0", "45°", "90°", "135°", "180°"])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
