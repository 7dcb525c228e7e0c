"""Wall times of calls that run tensor operations."""

from __future__ import annotations

import copy
import html
import io
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

from perf_vit._version import __version__
from perf_vit.conversion import attention_errors, linearize, load_converted, token_cosines
from perf_vit.conversion.linearize import converted_layers, max_exact_side
from perf_vit.files import write_text
from perf_vit.layers import MixerOptions
from perf_vit.workflows.progress import as_text, new_table

__all__ = [
    "Call",
    "ConversionReport",
    "MeasuredConversion",
    "Speed",
    "alternating_medians",
    "machine_name",
    "measure_conversion",
    "write_conversion",
]

Call = Callable[[], tuple[Tensor, ...]]


def alternating_medians(calls: Mapping[str, Call], num_runs: int, device: str) -> dict[str, float]:
    """Measure the median seconds of each call after one warm-up.

    The calls take turns, one run each, so that other load on the machine affects all of them alike.

    Args:
        calls: Functions to time, by name.
        num_runs: Timed runs of each.
        device: Device they run on.
    """
    for call in calls.values():
        _seconds(call, device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(num_runs):
        for name, call in calls.items():
            seconds[name].append(_seconds(call, device))
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine_name(device: str) -> str:
    """Return the processor's name: the GPU's, or the CPU's as the kernel reports it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def _seconds(call: Call, device: str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    # Kept until the clock has stopped: releasing the results is the caller's time.
    outputs = call()
    _synchronize(device)
    seconds = time.perf_counter() - start
    del outputs
    return seconds


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


REPORT = "fidelity.html"

# Softmax on a CPU takes minutes beyond.
_SOFTMAX_TOKENS = 8192

_RUNS = 3

# Softmax takes most of the time at the larger size.
_LARGER_IMAGES = 2

_LARGEST_FACTOR = 32

# Columns of the table of layers, as mixers name their sizes.
_SIZES = ("window", "sinks", "clusters", "features")

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td, th { padding: .3rem .9rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } svg { max-width: 100%; height: auto } pre { background: #f4f4f4;
padding: .8rem; overflow-x: auto }
"""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds of one image at one size.

    Attributes:
        size_px: side of the image.
        num_tokens: of the model at that size.
        softmax: of the model before, None where it was left out.
        plain: of the model with plain FAVOR+ in the same layers.
        converted: of the model after.
    """

    size_px: int
    num_tokens: int
    softmax: float | None
    plain: float
    converted: float


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Fidelity to the softmax model at one image size.

    Attributes:
        size_px: Side of the images.
        grid: Rows and columns of their patches.
        errors: Relative error of each converted layer's outputs on its inputs in the softmax model, by index.
        patch_cosines: Cosine of the final patch tokens with those of the softmax model, by image.
        class_cosines: Cosine of the class token by image, or empty.
    """

    size_px: int
    grid: tuple[int, int]
    errors: dict[int, float]
    patch_cosines: list[float]
    class_cosines: list[float]


@dataclass(frozen=True, kw_only=True)
class MeasuredConversion:
    """What a report shows.

    Attributes:
        options: Options of the converted layers by index.
        max_exact_px: Size of the largest square image with softmax attention in all layers, 0 for none.
        fidelity: Fidelity at the models' size and, if attention is exact there, at a larger size.
        speeds: Times at the models' size and at the larger size.
    """

    options: dict[int, MixerOptions]
    max_exact_px: int
    fidelity: list[Fidelity]
    speeds: list[Speed]


def measure_conversion(
    softmax: Any,
    converted: Any,
    crops: Callable[[int], Sequence[Tensor]],
    *,
    time_softmax: bool = False,
    on_step: Callable[[str], None] = lambda _: None,
) -> MeasuredConversion:
    """Compare a converted model with the softmax model that it came from.

    Times are measured at the models' size and at a larger one: twice the size, or the first multiple at which attention
    is not exact. Fidelity is measured at the models' size, and at the larger one where the first says nothing.

    Args:
        softmax: Model before the conversion.
        converted: Model after it.
        crops: Function that returns standardised images, [C, S, S], of a size S; none if the images are smaller.
        time_softmax: Whether to run softmax at the larger size whatever the number of tokens.
        on_step: Callback with the measurement that starts.
    """
    models, options = (softmax, converted), {i: layer.options for i, layer in converted_layers(converted).items()}
    (size, _), patch_px = softmax.patch_embed.img_size, softmax.patch_embed.patch_size[0]
    images = crops(size)
    fidelity = [_fidelity(*models, images, on_step)]
    speeds = [_speed(*models, images[0], time_softmax, on_step)]
    larger = _larger_size(options.values(), softmax.patch_embed.grid_size, size)
    models = (_resized(softmax, larger), _resized(converted, larger))
    speeds.append(_speed(*models, images[0].repeat(1, larger // size, larger // size), time_softmax, on_step))
    if _is_exact(options.values(), softmax.patch_embed.grid_size) and speeds[1].softmax is not None:
        larger_images = crops(larger)[:_LARGER_IMAGES]
        fidelity += [_fidelity(*models, larger_images, on_step)] if larger_images else []
    return MeasuredConversion(
        options=options,
        max_exact_px=patch_px * (max_exact_side(converted) or 0),
        fidelity=fidelity,
        speeds=speeds,
    )


def _is_exact(options: Collection[MixerOptions], grid: tuple[int, int]) -> bool:
    return all(each.is_exact(grid) for each in options)


def _larger_size(options: Collection[MixerOptions], grid: tuple[int, int], size: int) -> int:
    """Return the first multiple of the size, from twice on, at which attention is not exact; else twice the size."""
    rows, columns = grid
    factors = (f for f in range(2, _LARGEST_FACTOR) if not _is_exact(options, (f * rows, f * columns)))
    return size * next(factors, 2)


def _resized(model: nn.Module, size: int) -> Any:
    resized: Any = copy.deepcopy(model)
    resized.set_input_size(img_size=(size, size))
    return resized


def _fidelity(softmax: Any, converted: Any, images: Sequence[Tensor], on_step: Callable[[str], None]) -> Fidelity:
    size = images[0].shape[-1]
    on_step(f"errors of the layers at {size} px")
    layers = {index: [layer] for index, layer in converted_layers(converted).items()}
    errors = attention_errors(softmax, layers, images)
    on_step(f"final tokens at {size} px")
    patches, class_tokens = token_cosines(softmax, converted, images)
    return Fidelity(
        size_px=size,
        grid=softmax.patch_embed.grid_size,
        errors={index: error for index, (error,) in errors.items()},
        patch_cosines=patches,
        class_cosines=class_tokens,
    )


@torch.no_grad()
def _speed(softmax: Any, converted: Any, image: Tensor, time_softmax: bool, on_step: Callable[[str], None]) -> Speed:
    on_step(f"time at {image.shape[-1]} px")
    plain = linearize(softmax, "performer", sorted(converted_layers(converted)))
    models = {"softmax": softmax, "converted": converted, "plain": plain}
    rows, columns = softmax.patch_embed.grid_size
    num_tokens = rows * columns + softmax.num_prefix_tokens
    if num_tokens > _SOFTMAX_TOKENS and not time_softmax:
        del models["softmax"]
    batch = image.unsqueeze(0)
    calls = {name: lambda model=model: (model.eval()(batch),) for name, model in models.items()}
    seconds = alternating_medians(calls, _RUNS, str(batch.device))
    return Speed(
        size_px=image.shape[-1],
        num_tokens=num_tokens,
        softmax=seconds.get("softmax"),
        plain=seconds["plain"],
        converted=seconds["converted"],
    )


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """A converted model and what was measured of it.

    Attributes:
        folder: Folder of the model.
        path: Path of the report, an HTML page.
        measured: Fidelity of the layers and of the final tokens, and times.
    """

    folder: Path
    path: Path
    measured: MeasuredConversion

    @property
    def table(self) -> list[dict[str, Any]]:
        """Relative error of the outputs of each converted layer, at the largest size of `measured.fidelity`."""
        return [{"layer": index, "error": error} for index, error in self.measured.fidelity[-1].errors.items()]

    @property
    def notes(self) -> list[str]:
        """What was not measured."""
        return _notes(self.measured)

    def tables(self) -> list[Table]:
        """All figures for people."""
        return [_filled(*each) for each in _tables(self.measured)]

    def load(self) -> nn.Module:
        """Load the converted model, in evaluation mode, on the CPU."""
        return load_converted(self.folder)

    def __str__(self) -> str:
        return "\n".join([as_text(*self.tables()), *self.notes])

    __repr__ = __str__


def _filled(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = new_table(title, head)
    for row in rows:
        table.add_row(*row)
    return table


def write_conversion(measured: MeasuredConversion, folder: Path, *, home: Path, title: str, images: str) -> Path:
    """Write `fidelity.html`, which needs no other file, into a model's folder.

    Args:
        measured: what to show.
        folder: of the saved model, where the report goes.
        home: where the model will be loaded from.
        title: the model that was converted.
        images: what was measured on.

    Raises:
        OutputError: the folder can't be written to.
    """
    tables = [(heading, _html_table(head, rows)) for heading, head, rows in _tables(measured)]
    sections = "".join(f"<h2>{html.escape(heading)}</h2>\n{table}\n" for heading, table in tables)
    notes = "".join(f"<p>{html.escape(note)}</p>\n" for note in _notes(measured))
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}, linear</title><style>{_STYLE}</style></head>
<body>
<h1>{html.escape(title)}, linear</h1>
<p>Measured on {html.escape(images)}. {html.escape(_machine())}</p>
{_chart(measured)}
{sections}{notes}
<h2>Load it</h2>
<pre>model = perf_vit.load("{html.escape(str(home))}")</pre>
</body></html>
"""
    path = folder / REPORT
    write_text(path, page)
    return path


def _tables(measured: MeasuredConversion) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of each table."""
    largest = measured.fidelity[-1]
    cosines = [
        [f"{each.size_px:,}", name, str(len(x)), f"{sum(x) / len(x):.4f}", f"{min(x):.4f}"]
        for each in measured.fidelity
        for name, x in (("patch tokens", each.patch_cosines), ("class token", each.class_cosines))
        if x
    ]
    layers = [
        [str(index), f"{error:.4f}", *_sizes(measured.options[index], largest.grid)]
        for index, error in largest.errors.items()
    ]
    speeds = [
        [
            f"{speed.size_px:,}",
            f"{speed.num_tokens:,}",
            "not run" if speed.softmax is None else f"{speed.softmax:.3f}",
            f"{speed.plain:.3f}",
            f"{speed.converted:.3f}",
            "-" if speed.softmax is None else f"{speed.converted / speed.softmax:.2f}",
            f"{speed.converted / speed.plain:.2f}",
        ]
        for speed in measured.speeds
    ]
    head = ["px", "tokens", "softmax", "plain FAVOR+", "converted", "/ softmax", "/ plain"]
    return [
        (
            "Cosine of final tokens with those of the softmax model",
            ["px", "", "images", "mean", "worst image"],
            cosines,
        ),
        ("Seconds of one image, and the converted model's over the others'", head, speeds),
        (
            f"Relative error of attention outputs at {largest.size_px:,} px, on the softmax model's inputs",
            ["layer", "error", *_SIZES],
            layers,
        ),
    ]


def _sizes(options: MixerOptions, grid: tuple[int, int]) -> list[str]:
    summary = options.summary(grid)
    return [str(summary.get(name, "-")) for name in _SIZES]


def _notes(measured: MeasuredConversion) -> list[str]:
    exact, (given, larger) = measured.max_exact_px, measured.speeds
    notes = []
    if exact:
        notes.append(f"Converted layers are exact (softmax) up to {exact} x {exact} px, and linear in larger images.")
    if given.size_px <= exact:
        notes.append(f"At {given.size_px} px the converted model equals the softmax model.")
    if given.size_px <= exact < larger.size_px and larger.softmax is not None and len(measured.fidelity) == 1:
        notes.append(f"Fidelity at {larger.size_px} px was not measured, because an image is smaller.")
    left_out = [speed for speed in measured.speeds if speed.softmax is None]
    return notes + [
        f"Softmax was not run at {speed.size_px} px: {speed.num_tokens:,} tokens are more than {_SOFTMAX_TOKENS:,}; "
        "`time_softmax` runs it."
        for speed in left_out
    ]


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    header = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table><tr>{header}</tr>\n{body}</table>"


def _chart(measured: MeasuredConversion) -> str:
    """Bars of the layers' errors, as SVG."""
    errors = measured.fidelity[-1].errors
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.bar(range(len(errors)), list(errors.values()), color="#0072b2")
    axes.set_xticks(range(len(errors)), [str(index) for index in errors])
    axes.set(xlabel="layer", ylabel="relative error", ylim=(0, None))
    axes.grid(axis="y", alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def _machine() -> str:
    return (
        f"Times are medians of {_RUNS} forward passes in fp32 on {machine_name('cpu')}, threads: "
        f"{torch.get_num_threads()}, torch {torch.__version__}, perf_vit {__version__}."
    )
