"""Figure 4: what a constant added to each feature does to attention as the number of tokens grows."""

import importlib
import warnings
from pathlib import Path
from types import ModuleType

import torch
from figure_style import BLUE, GREEN, GREY, RED, Row, digits, new_figure, print_markdown, save
from rich.progress import track
from torch import Generator, Tensor
from torch.nn import functional as F

from perf_vit.cli.console import console
from perf_vit.ops import favor_attention

HEAD_DIM, NUM_FEATURES, NUM_DRAWS = 64, 256, 5
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
# The defaults of performer-pytorch and of the authors' JAX code.
EPSILONS = {"eps 1e-4": 1e-4, "eps 1e-6": 1e-6}
COLORS = {"eps 1e-4": RED, "eps 1e-6": GREEN, "ours": BLUE, "exact": GREY}

# (quantity, contender) -> one number a draw.
Found = dict[tuple[str, str], list[Tensor]]


def make(out: Path, seed: int) -> list[Row]:
    peer = popular_performer()
    if peer is None:
        console.print("performer-pytorch is not installed, so eps_collapse is left out: pip install performer-pytorch")
        return []
    generator = torch.Generator().manual_seed(seed)
    measured = {length: measure(peer, length, NUM_DRAWS, generator) for length in LENGTHS}
    rows = [
        Row(
            "eps_collapse", f"L = {length}, {name}", quantity, float(torch.stack(v).mean()), float(torch.stack(v).std())
        )
        for length, found in measured.items()
        for (quantity, name), v in found.items()
    ]
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
def measure(peer: ModuleType, length: int, num_draws: int, generator: Generator) -> Found:
    """Shares and distances; all contenders see the same q, k, v and the same rows, drawn by the peer."""
    found: Found = {}
    for _ in track(range(num_draws), f"eps, L = {length}", console=console):
        q, k, v = torch.randn(3, 1, 1, length, HEAD_DIM, generator=generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            projection = peer.gaussian_orthogonal_random_matrix(NUM_FEATURES, HEAD_DIM)
        exact, mean = F.scaled_dot_product_attention(q, k, v), v.mean(dim=-2, keepdim=True).expand_as(v)
        ours = favor_attention(q, k, v, projection)
        outputs = {"ours": ours, "exact": exact}
        for name, eps in EPSILONS.items():
            keys = peer.softmax_kernel(k, projection_matrix=projection, is_query=False, eps=eps)
            queries = peer.softmax_kernel(q, projection_matrix=projection, is_query=True, eps=eps)
            outputs[name] = peer.linear_attention(queries, keys, v)
            share = eps * NUM_FEATURES**-0.5 / keys.double().mean()
            found.setdefault(("eps share", name), []).append(share)
        for name, output in outputs.items():
            for words, other in {"the mean": mean, "exact": exact, "ours": ours}.items():
                if name != words:
                    difference = torch.linalg.vector_norm(output - other) / torch.linalg.vector_norm(other)
                    found.setdefault((f"|out - {words}| / |{words}|", name), []).append(difference)
    return found


def _draw(rows: list[Row], path: Path) -> None:
    figure = new_figure(12, 3.8)
    panels = {
        "eps share": "share of eps in the keys' features",
        "|out - the mean| / |the mean|": "distance from the mean of the values",
        "|out - exact| / |exact|": "distance from exact attention",
    }
    for axes, (quantity, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name, color in COLORS.items():
            chosen = [r for r in rows if r.quantity == quantity and r.setting.endswith(f", {name}")]
            if chosen:
                lengths = [int(r.setting.partition(",")[0].removeprefix("L = ")) for r in chosen]
                values, spreads = [r.value for r in chosen], [r.spread for r in chosen]
                axes.errorbar(lengths, values, spreads, fmt="o-", color=color, label=name, markersize=4, capsize=2)
        axes.set(title=title, xscale="log", xlabel="tokens, L", yscale="linear" if quantity == "eps share" else "log")
        axes.set_xticks(LENGTHS, [f"{n / 1024:g}k" if n >= 1024 else str(n) for n in LENGTHS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        if quantity == "eps share":
            axes.set_ylim(0, 1.05)
    save(figure, path)


def _print(rows: list[Row]) -> None:
    values = {(row.setting, row.quantity): row for row in rows}

    def cell(length: int, name: str, quantity: str) -> str:
        row = values.get((f"L = {length}, {name}", quantity))
        return "-" if row is None else digits(row.value)

    for quantity in dict.fromkeys(row.quantity for row in rows):
        names = [name for name in COLORS if (f"L = {LENGTHS[0]}, {name}", quantity) in values]
        lines = [(f"{length:,}", *(cell(length, name, quantity) for name in names)) for length in LENGTHS]
        print_markdown(f"Figure 4: {quantity}", ("L", *names), lines)
