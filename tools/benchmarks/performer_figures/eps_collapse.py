"""Figure 4: what a constant added to each feature does to attention as the number of tokens grows."""

import importlib
import warnings
from pathlib import Path
from types import ModuleType

import torch
from figure_style import BLUE, GREEN, GREY, RED, YELLOW, Row, digits, label_logarithms, new_figure, print_markdown, save
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from rich.progress import track
from torch import Generator, Tensor
from torch.nn import functional as F

from perf_vit.ops import draw_projection, favor_attention
from perf_vit.workflows.progress import console

NUM_FEATURES, NUM_DRAWS = 256, 8
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
# D, standard deviation of the entries of q and k, and how many times as long the first key is made.
SETTINGS = {
    "D = 64, std 1": (64, 1.0, 1.0),
    "D = 16, std 0.5": (16, 0.5, 1.0),
    "D = 16, std 0.5, one key x 6": (16, 0.5, 6.0),
}
# The defaults of performer-pytorch and of the authors' JAX code.
EPSILONS = {"eps 1e-4": 1e-4, "eps 1e-6": 1e-6}
COLORS = {"eps 1e-4": RED, "eps 1e-6": GREEN, "ours": BLUE, "ours, SMREG": YELLOW, "exact": GREY}
# Ours without eps may cover the one with a small eps, so it is dashed.
LINES = {"ours": "o--"}
SHARE = "share of eps in the key features"
PANELS = (SHARE, "|out - mean| / |mean|", "|out - exact| / |exact|")

# (quantity, contender) -> one number a draw.
Found = dict[tuple[str, str], list[Tensor]]


def make(out: Path, seed: int) -> list[Row]:
    peer = popular_performer()
    if peer is None:
        console.print("performer-pytorch is not installed, so eps_collapse is left out: pip install performer-pytorch")
        return []
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for setting in SETTINGS:
        for length in LENGTHS:
            for (quantity, name), values in measure(peer, length, setting, NUM_DRAWS, generator).items():
                numbers = torch.stack(values)
                place = f"{setting}, L = {length}, {name}"
                rows.append(Row("eps_collapse", place, quantity, float(numbers.mean()), float(numbers.std())))
    _draw(rows, out / "eps_collapse.png")
    _print(rows)
    return rows


def popular_performer() -> ModuleType | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("performer_pytorch")
            return importlib.import_module("performer_pytorch.performer_pytorch")
    except ImportError:
        return None


@torch.no_grad()
def measure(peer: ModuleType, length: int, setting: str, num_draws: int, generator: Generator) -> Found:
    """Shares and distances; all contenders see the same q, k and v and, but for SMREG, the same rows, of the peer."""
    found: Found = {}
    head_dim, scale, first_key = SETTINGS[setting]
    for _ in track(range(num_draws), f"eps, {setting}, L = {length}", console=console):
        q, k, v = torch.randn(3, 1, 1, length, head_dim, generator=generator)
        q, k = q * scale, k * scale
        k[:, :, 0] *= first_key
        projection = _popular_projection(peer, head_dim, generator)
        outputs = {"exact": F.scaled_dot_product_attention(q, k, v), "ours": favor_attention(q, k, v, projection)}
        for name, eps in EPSILONS.items():
            outputs[name], share = _with_eps(peer, q, k, v, projection, eps)
            found.setdefault((SHARE, name), []).append(share)
        regularised = draw_projection(NUM_FEATURES, head_dim, True, "sqrt", generator, "softmax-hyp+")
        outputs["ours, SMREG"] = favor_attention(q, k, v, regularised, "softmax-hyp+")
        mean = v.mean(dim=-2, keepdim=True).expand_as(v)
        references = {"mean": mean, "exact": outputs["exact"], "ours": outputs["ours"]}
        for name, output in outputs.items():
            for words, reference in references.items():
                if name != words:
                    found.setdefault((f"|out - {words}| / |{words}|", name), []).append(distance(output, reference))
    return found


def distance(output: Tensor, reference: Tensor) -> Tensor:
    return torch.linalg.vector_norm(output - reference) / torch.linalg.vector_norm(reference)


def _popular_projection(peer: ModuleType, head_dim: int, generator: Generator) -> Tensor:
    # It draws from torch's global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        projection: Tensor = peer.gaussian_orthogonal_random_matrix(NUM_FEATURES, head_dim)
        return projection


def _with_eps(
    peer: ModuleType, q: Tensor, k: Tensor, v: Tensor, projection: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The peer's attention, and the part of the sum of its key features that eps makes up."""
    keys = peer.softmax_kernel(k, projection_matrix=projection, is_query=False, eps=eps)
    queries = peer.softmax_kernel(q, projection_matrix=projection, is_query=True, eps=eps)
    share = eps * NUM_FEATURES**-0.5 / keys.double().mean()
    return peer.linear_attention(queries, keys, v), share


def _draw(rows: list[Row], path: Path) -> None:
    figure = new_figure(12, 9)
    for setting, line in zip(SETTINGS, figure.subplots(len(SETTINGS), len(PANELS), sharex=True), strict=True):
        for axes, quantity in zip(line, PANELS, strict=True):
            chosen = [r for r in rows if r.quantity == quantity and r.setting.startswith(f"{setting}, L")]
            _draw_panel(axes, chosen)
            axes.set_title(f"{quantity}\n{setting}", fontsize=9)
            if quantity == SHARE:
                axes.set_ylim(0, 1.05)
            else:
                axes.set_yscale("log")
                axes.set_ylim(min(row.value for row in chosen) / 2, max(row.value for row in chosen) * 2)
                label_logarithms(axes.yaxis)
            if axes.get_subplotspec().is_last_row():
                axes.set_xlabel("tokens, L")
    lines = [Line2D([], [], color=color, marker="o", markersize=4, label=name) for name, color in COLORS.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)
    save(figure, path)


def _draw_panel(axes: Axes, rows: list[Row]) -> None:
    for name, color in COLORS.items():
        chosen = [row for row in rows if row.setting.partition(", L = ")[2].partition(", ")[2] == name]
        if chosen:
            values, spreads = [row.value for row in chosen], [row.spread for row in chosen]
            line = LINES.get(name, "o-")
            axes.errorbar(LENGTHS, values, spreads, fmt=line, color=color, markersize=4, capsize=2)
    axes.set_xscale("log")
    axes.set_xticks(LENGTHS, [f"{n / 1024:g}k" if n >= 1024 else str(n) for n in LENGTHS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _print(rows: list[Row]) -> None:
    values = {(row.setting, row.quantity): f"{digits(row.value)} ({digits(row.spread)})" for row in rows}
    for setting in SETTINGS:
        for quantity in dict.fromkeys(row.quantity for row in rows):
            names = [name for name in COLORS if (f"{setting}, L = {LENGTHS[0]}, {name}", quantity) in values]
            lines = [
                (f"{length:,}", *(values[f"{setting}, L = {length}, {name}", quantity] for name in names))
                for length in LENGTHS
            ]
            print_markdown(f"Figure 4, {setting}: {quantity}, mean (std) of {NUM_DRAWS}", ("L", *names), lines)
