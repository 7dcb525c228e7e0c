"""What a converted model keeps against what it costs, over a grid of windows, sinks and clusters.

    python tools/benchmarks/conversion_tradeoff.py --weights vit.safetensors --size 1022 a.tif b.tif slide.svs

Cosine of final tokens with those of the softmax model, as `conversion_fidelity.py` measures it, against the time of a
forward pass of one image and against its arithmetic (matrix products and convolutions, as torch counts them), both over
those of plain FAVOR+. Each setting is timed in turns with plain FAVOR+. Prints a table in which the settings are marked
that no other one beats in time and cosine; writes tradeoff_SIZE.csv and tradeoff_SIZE.png.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from conversion_fidelity import fidelity, read_crops, tokens_of
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from performer_figures.figure_style import BLUE, GREEN, GREY, PURPLE, RED, YELLOW, label_logarithms, new_figure, save
from pretrained_vit import load_vit
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import perf_vit
from perf_vit.workflows.conversion_report import Call, alternating_medians, machine_name
from perf_vit.workflows.progress import console, errors

COLORS, MARKERS = (GREY, BLUE, GREEN, YELLOW, RED, PURPLE), "osD^vP"
FOLDER = Path(__file__).parents[2] / "docs" / "images" / "conversion"


@dataclass(frozen=True)
class Row:
    """One setting: cosines (means, worst image) and costs, also of plain FAVOR+ in the same run."""

    window_size: int
    num_sinks: int
    num_clusters: int
    patch: float
    worst_patch: float
    class_: float
    worst_class: float
    seconds: float
    plain_seconds: float
    gflop: float
    plain_gflop: float

    @property
    def relative_time(self) -> float:
        return self.seconds / self.plain_seconds

    @property
    def relative_gflop(self) -> float:
        return self.gflop / self.plain_gflop


def main(
    images: Annotated[list[Path], typer.Argument(help="Rasters or slides; two crops are taken of each.")],
    weights: Annotated[Path, typer.Option(help="State dict, .safetensors.")],
    model_name: Annotated[str, typer.Option(help="timm's name of the model.")] = "vit_small_patch14_dinov2",
    size: Annotated[int, typer.Option(help="Side of a crop in pixels.")] = 1022,
    windows: Annotated[str, typer.Option(help="Sides of a window in patches, up to 6.")] = "0,12,16,24",
    sinks: Annotated[str, typer.Option(help="Numbers of sinks, up to 6.")] = "0,64,512",
    clusters: Annotated[str, typer.Option(help="Numbers of clusters.")] = "48,96,256",
    runs: Annotated[int, typer.Option(help="Timed runs of each setting, of which the median counts.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for the CSV file and the figure.")] = FOLDER,
) -> None:
    """Print, write and draw the trade-off."""
    given = {"windows": windows, "sinks": sinks, "clusters": clusters}
    numbers = {name: numbers_of(text, name) for name, text in given.items()}
    model = load_vit(model_name, weights, size)
    crops = [crop for path in images for crop in read_crops(path, size)]
    exact, _ = tokens_of(model, crops)
    plain = Cost(perf_vit.linearize(model, "performer"), crops[0])
    rows = []
    for setting in itertools.product(*numbers.values()):
        with errors.status(f"window {setting[0]}, {setting[1]} sinks, {setting[2]} clusters"):
            rows.append(measure(model, setting, crops, exact, plain, runs))
    title = f"{model_name}, {size} px, {len(crops)} images, {machine_name('cpu')}"
    show(rows, f"{title}, {torch.get_num_threads()} threads")
    out.mkdir(parents=True, exist_ok=True)
    write_rows(rows, out / f"tradeoff_{size}.csv")
    draw(rows, title, out / f"tradeoff_{size}.png")


def numbers_of(text: str, name: str) -> list[int]:
    try:
        numbers = sorted({int(part) for part in text.split(",") if text})
    except ValueError:
        raise typer.BadParameter(f"--{name} must be whole numbers with commas between, got {text!r}") from None
    if name in ("windows", "sinks") and len(numbers) > len(COLORS):
        raise typer.BadParameter(f"--{name} must be {len(COLORS)} numbers at most, got {len(numbers)}")
    return numbers


def _fused_attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


# torch counts its fused attention on GPUs alone.
_FUSED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention_flops}


class Cost:
    """Time and arithmetic of one forward pass of a model."""

    def __init__(self, model: nn.Module, crop: Tensor) -> None:
        self.call: Call = torch.no_grad()(lambda: (model.forward_features(crop.unsqueeze(0)),))
        with FlopCounterMode(display=False, custom_mapping=_FUSED) as counter:
            self.call()
        self.gflop = counter.get_total_flops() / 1e9


def measure(
    model: nn.Module, setting: tuple[int, ...], crops: list[Tensor], exact: list[Tensor], plain: Cost, runs: int
) -> Row:
    options = dict(zip(("window_size", "num_sinks", "num_clusters"), setting, strict=True), max_exact_tokens=0)
    # Clusters aren't drawn.
    *cosines, _ = fidelity(lambda _: perf_vit.linearize(model, **options), crops, exact, 1)
    own = Cost(perf_vit.linearize(model, **options), crops[0])
    seconds = alternating_medians({"own": own.call, "plain": plain.call}, runs, "cpu")
    return Row(*setting, *cosines, seconds["own"], seconds["plain"], own.gflop, plain.gflop)


def front(rows: Sequence[Row], cost: str) -> list[Row]:
    """Settings that none beats in both the cost and the cosine of patch tokens, cheapest first."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (getattr(row, cost), -row.patch)):
        if not best or row.patch > best[-1].patch:
            best.append(row)
    return best


def show(rows: Sequence[Row], title: str) -> None:
    table = Table(title=title)
    for header in (
        "window",
        "sinks",
        "clusters",
        "patch tokens",
        "worst",
        "class token",
        "worst",
        "time",
        "arithmetic",
        "",
    ):
        table.add_column(header, justify="right")
    unbeaten = set(front(rows, "relative_time"))
    for row in rows:
        table.add_row(
            str(row.window_size),
            str(row.num_sinks),
            str(row.num_clusters),
            *(f"{cosine:.4f}" for cosine in (row.patch, row.worst_patch, row.class_, row.worst_class)),
            *(f"{ratio:.2f}" for ratio in (row.relative_time, row.relative_gflop)),
            "*" if row in unbeaten else "",
        )
    console.print(table)
    console.print("time and arithmetic over those of plain FAVOR+; * no other setting is both faster and closer")


def write_rows(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), "relative_time", "relative_gflop"])
        writer.writeheader()
        for row in rows:
            ratios = {"relative_time": row.relative_time, "relative_gflop": row.relative_gflop}
            numbers = {**asdict(row), **ratios}
            writer.writerow({name: f"{x:.5g}" if isinstance(x, float) else x for name, x in numbers.items()})


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """What is lost against time and against arithmetic, with the line of the settings that none beats."""
    figure = new_figure(10, 4.6)
    axes = figure.subplots(1, 2, sharey=True)
    for panel, cost, words in zip(axes, ("relative_time", "relative_gflop"), ("time", "arithmetic"), strict=True):
        draw_panel(panel, rows, cost)
        panel.set_xlabel(f"{words} of a forward pass over that of plain FAVOR+")
    axes[0].set_ylabel("1 - cosine of patch tokens")
    axes[1].legend(handles=legend_of(rows), frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title, fontsize=9)
    save(figure, path)


def draw_panel(axes: Axes, rows: Sequence[Row], cost: str) -> None:
    styles = styles_of(rows)
    # An exact setting has no place on a logarithmic axis; rounding is where it ends up.
    lost = {row: max(1 - row.patch, 1e-7) for row in rows}
    unbeaten = front(rows, cost)
    axes.plot([getattr(row, cost) for row in unbeaten], [lost[row] for row in unbeaten], color="black", lw=0.8)
    for row in rows:
        color, marker, area = styles["sinks", row.num_sinks], styles["window", row.window_size], _area(row, rows)
        place = getattr(row, cost), lost[row]
        axes.scatter(*place, s=area, facecolors=color, edgecolors=color, marker=marker, lw=1, alpha=0.85, zorder=3)
    axes.set_yscale("log")
    label_logarithms(axes.yaxis)
    axes.grid(alpha=0.3)


def styles_of(rows: Sequence[Row]) -> dict[tuple[str, int], str]:
    """Color of each number of sinks and marker of each window."""
    sinks, windows = (sorted({getattr(row, key) for row in rows}) for key in ("num_sinks", "window_size"))
    colors = {("sinks", number): color for number, color in zip(sinks, COLORS, strict=False)}
    return colors | {("window", number): marker for number, marker in zip(windows, MARKERS, strict=False)}


def legend_of(rows: Sequence[Row]) -> list[Line2D]:
    handles = []
    for (kind, number), style in styles_of(rows).items():
        look = {"color": style, "marker": "o"} if kind == "sinks" else {"color": GREY, "marker": style}
        label = f"{number} sinks" if kind == "sinks" else f"windows {number}" if number else "no windows"
        handles.append(Line2D([], [], ls="", label=label, **look))
    for row in {row.num_clusters: row for row in sorted(rows, key=lambda row: row.num_clusters)}.values():
        size, label = _area(row, rows) ** 0.5, f"{row.num_clusters} clusters"
        handles.append(Line2D([], [], ls="", color=GREY, marker="o", ms=size, label=label))
    return [*handles, Line2D([], [], color="black", lw=0.8, label="none beats these")]


def _area(row: Row, rows: Sequence[Row]) -> float:
    """Square points of a marker: the more clusters, the larger."""
    numbers = sorted({other.num_clusters for other in rows})
    return 22.0 + 26 * numbers.index(row.num_clusters)


if __name__ == "__main__":
    typer.run(main)
