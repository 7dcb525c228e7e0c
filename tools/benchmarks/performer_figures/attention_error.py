"""Figure 2: how far attention through M random features is from exact attention (ibid., figure 4)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from figure_style import BLUE, GREEN, GREY, PURPLE, RED, YELLOW, Row, digits, new_figure, print_markdown, save
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from rich.progress import track
from torch import Generator, Tensor

from perf_vit.cli.console import console
from perf_vit.ops import draw_projection, favor_attention
from perf_vit.ops.naive import softmax_attention
from perf_vit.ops.projection import ProjectionNorms


@dataclass(frozen=True)
class Case:
    """Queries and keys of N(0, scale^2) entries, values of N(0, 1)."""

    length: int
    head_dim: int
    scale: float

    def __str__(self) -> str:
        return f"L = {self.length:,}, D = {self.head_dim}, entries of std {self.scale:g}"


@dataclass(frozen=True)
class Estimator:
    kernel: str
    norms: ProjectionNorms
    color: str


# The first has the sizes of the paper's figure.
CASES = (Case(4096, 16, 1.0), Case(4096, 16, 0.5), Case(4096, 16, 1.5), Case(1024, 64, 1.0))
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
NUM_DRAWS = 15

# (estimator, directions, M) -> relative squared error of each draw; the mean of the values is there with M = 0.
Errors = dict[tuple[str, str, int], Tensor]


def make(out: Path, seed: int) -> list[Row]:
    rows, figure = [], new_figure(10, 8)
    for case, axes in zip(CASES, figure.subplots(2, 2, sharex=True).flat, strict=True):
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
    """Errors |out - exact|^2 / |exact|^2; each draw has inputs and rows of its own, and all estimators see its inputs."""
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
    return [
        Row("attention_error", str(case), f"{name}, {words}, M = {m}" if m else name, float(e.mean()), float(e.std()))
        for (name, words, m), e in errors.items()
    ]


def _print(errors: Errors, case: Case) -> None:
    chosen = (16, 64, 256, 1024)
    lines = [
        (
            f"{name}, {words}",
            *(f"{digits(float((e := errors[name, words, m]).mean()))} ({digits(float(e.std()))})" for m in chosen),
        )
        for name in ESTIMATORS
        for words in DIRECTIONS
    ]
    mean = errors[MEAN, "", 0]
    lines.append((MEAN, f"{digits(float(mean.mean()))} ({digits(float(mean.std()))})", "", "", ""))
    print_markdown(f"Figure 2, {case}: mean (std)", ("features", *(f"M = {m}" for m in chosen)), lines)


def _draw(axes: Axes, errors: Errors, case: Case) -> None:
    for name, estimator in ESTIMATORS.items():
        for words, line in {"orthogonal": "o-", "iid": "--"}.items():
            found = [errors[name, words, m] for m in NUM_FEATURES]
            axes.plot(NUM_FEATURES, [e.mean() for e in found], line, color=estimator.color, markersize=3, linewidth=1.2)
            if words == "orthogonal":
                low, high = zip(*((e.quantile(0.1), e.quantile(0.9)) for e in found), strict=True)
                axes.fill_between(NUM_FEATURES, low, high, color=estimator.color, alpha=0.12, linewidth=0)
    axes.axhline(float(errors[MEAN, "", 0].mean()), color=GREY, linestyle=":")
    axes.set(xscale="log", yscale="log", title=str(case))
    axes.set_xticks(NUM_FEATURES, [str(m) for m in NUM_FEATURES])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    if axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
        axes.set_ylabel("|out - exact|² / |exact|²")
    if axes.get_subplotspec().is_last_row():  # type: ignore[union-attr]
        axes.set_xlabel("features, M")
