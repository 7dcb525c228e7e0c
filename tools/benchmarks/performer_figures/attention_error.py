"""Figure 2: how far attention through M random features is from exact attention (ibid., figure 4)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from figure_style import (
    BLUE,
    GREEN,
    GREY,
    PURPLE,
    RED,
    YELLOW,
    Row,
    digits,
    label_logarithms,
    new_figure,
    print_markdown,
    save,
)
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from rich.progress import track
from torch import Generator, Tensor

from perf_vit.ops import draw_projection, favor_attention
from perf_vit.ops.naive import softmax_attention
from perf_vit.ops.projection import ProjectionNorms
from perf_vit.workflows.progress import console


@dataclass(frozen=True)
class Case:
    """Queries and keys of N(0, scale^2) entries, values of N(0, 1)."""

    length: int
    head_dim: int
    scale: float

    def __str__(self) -> str:
        return f"L = {self.length}, D = {self.head_dim}, std {self.scale:g}"


@dataclass(frozen=True)
class Estimator:
    kernel: str
    norms: ProjectionNorms
    color: str


# The first row has the sizes of the paper's figure.
SCALES = (0.5, 1.0, 1.5)
CASES = (*(Case(4096, 16, scale) for scale in SCALES), *(Case(1024, 64, scale) for scale in SCALES))
ESTIMATORS = {
    "softmax-trig": Estimator("softmax-trig", "chi", RED),
    "softmax+": Estimator("softmax+", "chi", BLUE),
    "softmax-hyp+": Estimator("softmax-hyp+", "chi", GREEN),
    "oprf": Estimator("oprf", "chi", PURPLE),
    "SMREG": Estimator("softmax-hyp+", "sqrt", YELLOW),
}
DIRECTIONS = {"orthogonal": True, "iid": False}
MEAN = "mean of the values"
NUM_FEATURES = (16, 32, 64, 128, 256, 512, 1024)
NUM_DRAWS = 40
PRINTED = (16, 64, 256, 1024)

# (estimator, directions, M) -> relative squared error of each draw; the mean of the values is there with M = 0.
Errors = dict[tuple[str, str, int], Tensor]


def make(out: Path, seed: int) -> list[Row]:
    rows, figure = [], new_figure(12, 7.5)
    for case, axes in zip(CASES, figure.subplots(2, 3, sharex=True).flat, strict=True):
        errors = measure(case, NUM_FEATURES, NUM_DRAWS, torch.Generator().manual_seed(seed))
        _draw(axes, errors, case)
        rows += _rows(errors, case)
        _print(errors, case)
    lines = [Line2D([], [], color=e.color, label=name) for name, e in ESTIMATORS.items()]
    lines += [Line2D([], [], color=GREY, linestyle=":", label=MEAN)]
    lines += [Line2D([], [], color="black", linestyle=s, label=d) for d, s in {"orthogonal": "-", "iid": "--"}.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False)
    save(figure, out / "attention_error.png")
    return rows


@torch.no_grad()
def measure(case: Case, num_features: tuple[int, ...], num_draws: int, generator: Generator) -> Errors:
    """Errors |out - exact|^2 / |exact|^2; each draw has inputs, which all estimators see, and rows of its own."""
    found: dict[tuple[str, str, int], list[Tensor]] = {}
    for _ in track(range(num_draws), f"error of the output, {case}", console=console):
        q, k, v = torch.randn(3, 1, 1, case.length, case.head_dim, generator=generator)
        q, k = q * case.scale, k * case.scale
        exact = softmax_attention(q, k, v)
        mean = v.mean(dim=-2, keepdim=True)
        found.setdefault((MEAN, "", 0), []).append(relative_squared_error(mean, exact))
        for name, estimator in ESTIMATORS.items():
            for words, orthogonal in DIRECTIONS.items():
                for m in num_features:
                    projection = draw_projection(
                        m, case.head_dim, orthogonal, estimator.norms, generator, kernel=estimator.kernel
                    )
                    out = favor_attention(q, k, v, projection, estimator.kernel)
                    found.setdefault((name, words, m), []).append(relative_squared_error(out, exact))
    return {key: torch.stack(values) for key, values in found.items()}


def relative_squared_error(estimate: Tensor, exact: Tensor) -> Tensor:
    return (estimate - exact).double().square().sum() / exact.double().square().sum()


def _rows(errors: Errors, case: Case) -> list[Row]:
    rows = []
    for (name, words, m), values in errors.items():
        setting = f"{case}, {name}, {words}, M = {m}" if m else f"{case}, {name}"
        rows.append(Row("attention_error", setting, "mean", float(values.mean()), float(values.std())))
        low, median, high = (float(values.quantile(level)) for level in (0.1, 0.5, 0.9))
        rows.append(Row("attention_error", setting, "median", median, low=low, high=high))
    return rows


def _print(errors: Errors, case: Case) -> None:
    lines = [
        (f"{name}, {words}", *(_cell(errors[name, words, m], m == 256) for m in PRINTED))
        for name in ESTIMATORS
        for words in DIRECTIONS
    ]
    lines.append((MEAN, _cell(errors[MEAN, "", 0], True), *[""] * (len(PRINTED) - 1)))
    header = ("features", *(f"M = {m}" for m in PRINTED))
    print_markdown(f"Figure 2, {case}: median (10 to 90 %) of {NUM_DRAWS} draws", header, lines)


def _cell(values: Tensor, with_range: bool) -> str:
    low, middle, high = (digits(float(values.quantile(level))) for level in (0.1, 0.5, 0.9))
    return f"{middle} ({low} to {high})" if with_range else middle


def _draw(axes: Axes, errors: Errors, case: Case) -> None:
    drawn = [float(errors[MEAN, "", 0].median())]
    for name, estimator in ESTIMATORS.items():
        for words, line in {"orthogonal": "o-", "iid": "--"}.items():
            found = [errors[name, words, m] for m in NUM_FEATURES]
            medians = [float(e.median()) for e in found]
            axes.plot(NUM_FEATURES, medians, line, color=estimator.color, markersize=3, linewidth=1.2)
            drawn += [] if name == "softmax-trig" else medians
            if words == "orthogonal":
                low, high = zip(*((e.quantile(0.1), e.quantile(0.9)) for e in found), strict=True)
                axes.fill_between(NUM_FEATURES, low, high, color=estimator.color, alpha=0.12, linewidth=0)
    axes.axhline(float(errors[MEAN, "", 0].median()), color=GREY, linestyle=":")
    axes.set(xscale="log", yscale="log", title=str(case))
    axes.set_ylim(min(drawn) / 2, max(drawn) * 3)
    label_logarithms(axes.yaxis)
    _name_what_is_above(axes, errors)
    axes.set_xticks(NUM_FEATURES, [str(m) for m in NUM_FEATURES])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    if axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
        axes.set_ylabel("|out - exact|² / |exact|²")
    if axes.get_subplotspec().is_last_row():  # type: ignore[union-attr]
        axes.set_xlabel("features, M")


def _name_what_is_above(axes: Axes, errors: Errors) -> None:
    """Say where softmax-trig is, if all of it is above the axes: with it, the rest would be squeezed to a line."""
    lowest = min(float(errors["softmax-trig", "orthogonal", m].median()) for m in NUM_FEATURES)
    if lowest > axes.get_ylim()[1]:
        words = f"softmax-trig: above {digits(lowest)}"
        axes.text(0.5, 0.97, words, transform=axes.transAxes, color=RED, ha="center", va="top")
