"""Check and time attention on a GPU: forward passes, training steps, memory, and maps of a GeoTIFF.

    python tools/benchmarks/gpu.py --out DIR

takes less than 8 minutes. Attention is compared with its N x N references first; nothing is timed if they differ. A
backend of attention (`perf_vit.ops.set_attention_backend`) that differs from them, or that doesn't run, gets no times.
Then each cell times one ViT with one mixer at one number of tokens, the most telling cells first. A cell that would
exceed `--budget-s` is left out, and running out of memory is a result. `DIR` gets `gpu.md`, `gpu.json` and `gpu.png`.

    python tools/benchmarks/gpu.py --out DIR --device cpu --quick

tries the tool with tiny models.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from engine import scene
from gpu_report import report_files, write_cells, write_report
from gpu_verify import verify, verify_backend
from torch import Tensor, nn

import perf_vit
from perf_vit.errors import PerfVitError
from perf_vit.inference import SegmentationPredictOptions, SegmentationPredictor
from perf_vit.layers import MIXERS
from perf_vit.models import SegmentationSpec
from perf_vit.ops import attention_backend
from perf_vit.sources import open_source
from perf_vit.transforms import Normalizer
from perf_vit.workflows.conversion_report import machine_name
from perf_vit.workflows.progress import say, say_line, working
from perf_vit.writers import check_outputs

FORWARD, TRAINING, ENGINE = "forward", "training", "map"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PATCH = 16

# Clusters run at every size, so that the table shows from where they are faster.
OPTIONS: dict[str, dict[str, Any]] = {"clustered": {"max_exact_tokens": 0}}
# What else than PyTorch operations computes the attention of a mixer, by kind of cell.
BACKENDS = {
    (FORWARD, "clustered"): ("triton",),
    (FORWARD, "performer"): ("triton",),
    (TRAINING, "clustered"): ("flex",),
    (ENGINE, "clustered"): ("triton",),
    (ENGINE, "performer"): ("triton",),
}
# For predictions, which should rather be too long: time grows with this power of the tokens, by default with the first,
# and by these factors from a forward pass to a training step, with checkpoints, and from one model to the next.
GROWTH = {"softmax": 2.0}
TRAINING_FACTOR, CHECKPOINT_FACTOR, MODEL_FACTOR = 4.0, 1.4, 12.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of a run.

    Attributes:
        device: "cuda", "cuda:1" or "cpu".
        dtype: Dtype of autocast; "fp32" for none.
        budget_s: Seconds for the whole run.
        models: timm names of ViTs, the smallest first.
        lengths: Numbers of patches of an image, squares, ascending.
        batch_tokens: Patches of a batch; an image with more is a batch of its own.
        runs: Most timed calls of a cell, after one that isn't counted.
        cell_s: Seconds after which a cell gets no further call.
        scene_px: Side of the image that is mapped.
        window_px: Side of its windows.
        kwargs: Further arguments of the models.
        backends: Backends of attention to measure beside PyTorch operations, each with the reason why it isn't timed;
            "" if its results agree with the references.
    """

    device: str = "cuda"
    dtype: str = "bf16"
    budget_s: float = 450.0
    models: tuple[str, ...] = ("vit_small_patch16_224", "vit_large_patch16_224")
    lengths: tuple[int, ...] = (1024, 4096, 16384, 65536, 262144)
    batch_tokens: int = 16384
    runs: int = 5
    cell_s: float = 2.0
    scene_px: int = 8192
    window_px: int = 1024
    kwargs: dict[str, Any] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)

    @property
    def is_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return torch.device(self.device).type == "cuda"


QUICK: dict[str, Any] = {
    "models": ("vit_tiny_patch16_224", "vit_small_patch16_224"),
    "lengths": (64, 100, 256),
    "batch_tokens": 128,
    "runs": 1,
    "scene_px": 512,
    "window_px": 256,
    "kwargs": {"depth": 2},
}


@dataclass(kw_only=True)
class Cell:
    """One measurement.

    Attributes:
        kind: "forward", "training" (forward, backward and an AdamW step) or "map".
        model: timm name.
        mixer: Name of the mixer.
        length: Patches of an image.
        batch: Images in a call.
        status: "measured", "out of memory", "skipped" or "failed".
        reason: Why it was skipped or how it failed.
        seconds: Median time of a call.
        images_per_s: Images per second; of a map, windows per second.
        peak_gib: Most memory that torch held, with weights, gradients and states of the optimiser.
        checkpointed: Whether each block was computed again in the backward pass.
        backend: What computes attention: "torch", "triton" or "flex".
    """

    kind: str
    model: str
    mixer: str
    length: int
    batch: int = 1
    status: str = "skipped"
    reason: str = ""
    seconds: float | None = None
    images_per_s: float | None = None
    peak_gib: float | None = None
    checkpointed: bool = False
    backend: str = "torch"

    @property
    def title(self) -> str:
        """Name of the mixer, with the backend of its attention."""
        return self.mixer if self.backend == "torch" else f"{self.mixer}, {self.backend}"


def main(
    out: Annotated[Path, typer.Option(help="Folder of gpu.md, gpu.json and gpu.png.")],
    device: Annotated[str, typer.Option(help="cuda, cuda:1 or cpu.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    budget_s: Annotated[float, typer.Option(help="Seconds for the whole run.")] = 450.0,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models and images, to try the tool.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of an earlier run.")] = False,
) -> None:
    """Check and time attention on a GPU."""
    started = time.perf_counter()
    try:
        settings = Settings(device=device, dtype=dtype, budget_s=budget_s, **(QUICK if quick else {}))
        _check(settings)
        check_outputs(report_files(out), [], overwrite=overwrite)
        figures = verify(settings.device, DTYPES[dtype])
        if settings.is_gpu:
            settings.backends.update(check_backends(settings, figures))
        about = _describe(settings, figures)
        cells = measure(settings, started, lambda cells: write_cells(out, about, cells))
        write_report(out, about, cells)
        say((out / "gpu.md").read_text(encoding="utf-8"))
    except PerfVitError as error:
        say_line("Error", str(error))
        sys.exit(2)
    if failed := [cell for cell in cells if cell.status == "failed"]:
        say_line("Error", f"{len(failed)} cells failed, first {failed[0].title}, {failed[0].kind}: {failed[0].reason}")
        sys.exit(1)


def check_backends(settings: Settings, figures: dict[str, Any]) -> dict[str, str]:
    """Return the backends with "" or the reason why they aren't timed; adds their errors to the figures."""
    reasons = {}
    for name in sorted({name for names in BACKENDS.values() for name in names}):
        try:
            figures[name] = verify_backend(name, settings.device, DTYPES[settings.dtype])
            reasons[name] = ""
        except Exception as error:
            # Whatever a compiler of kernels raises, the other cells go on.
            reasons[name] = f"not verified: {(str(error).strip() or type(error).__name__).splitlines()[0][:200]}"
    return reasons


def cells_of(settings: Settings) -> list[Cell]:
    """Return the cells, the most telling first: the lengths between the smallest and largest, and the smaller model."""
    mixers = sorted(MIXERS, key=lambda name: name != "softmax")
    small, *larger = settings.models
    first, *middle, last = settings.lengths
    window = (settings.window_px // PATCH) ** 2
    steps = [(FORWARD, small, middle), (TRAINING, small, middle), (ENGINE, small, [window])]
    steps += [(kind, model, middle) for model in larger for kind in (FORWARD, TRAINING)]
    ends = [(each, model) for each in (last, first) for model in settings.models]
    steps += [(kind, model, [each]) for each, model in ends for kind in (FORWARD, TRAINING)]
    return [
        Cell(
            kind=kind,
            model=model,
            mixer=mixer,
            length=length,
            batch=max(1, settings.batch_tokens // length),
            backend=backend,
        )
        for kind, model, lengths in steps
        for length in lengths
        for mixer in mixers
        for backend in ("torch", *(each for each in BACKENDS.get((kind, mixer), ()) if each in settings.backends))
    ]


def measure(settings: Settings, started: float, on_cell: Callable[[list[Cell]], None]) -> list[Cell]:
    """Measure all cells that fit into the budget.

    Args:
        settings: Sizes of the run.
        started: Time at which the budget began, of `time.perf_counter`.
        on_cell: Called after each cell with all of them.
    """
    cells = cells_of(settings)
    with working("measuring") as on_step, tempfile.TemporaryDirectory() as folder:
        for number, cell in enumerate(cells):
            left = settings.budget_s - (time.perf_counter() - started)
            cell.reason = _reason_to_skip(settings, cell, cells[:number], left)
            if not cell.reason:
                on_step(f"{cell.kind}, {cell.model}, {cell.title}, {cell.length:,} patches")
                _run(settings, cell, Path(folder))
            on_cell(cells[: number + 1])
    return cells


def _reason_to_skip(settings: Settings, cell: Cell, past: list[Cell], left: float) -> str:
    cell.checkpointed = cell.kind == TRAINING and _needs_checkpoints(settings, cell, past)
    if reason := settings.backends.get(cell.backend):
        return reason
    if lacking := _lacked_memory(cell, past):
        return f"out of memory at {lacking:,} patches"
    call = predicted_seconds(settings, cell, past)
    cost = call * (1 + max(1.0, min(settings.runs, settings.cell_s / max(call, 1e-9))))
    return "" if 0 < left >= cost else f"predicted {cost:.0f} s, {max(0.0, left):.0f} s left"


def predicted_seconds(settings: Settings, cell: Cell, past: list[Cell]) -> float:
    """Return the seconds of a call by the nearest measured cell of the same mixer; 0 where there is none."""

    def distance(each: Cell) -> tuple[bool, bool, float]:
        return each.model != cell.model, each.kind != cell.kind, abs(each.length - cell.length)

    is_map = cell.kind == ENGINE
    measured = [each for each in past if each.seconds and each.title == cell.title and (each.kind == ENGINE) == is_map]
    if not measured:
        return 0.0
    near = min(measured, key=distance)
    larger = cell.length > near.length
    growth = (cell.length / near.length) ** (GROWTH.get(cell.mixer, 1.0) if larger else 1.0) * cell.batch / near.batch
    order = settings.models.index(cell.model) - settings.models.index(near.model)
    factor = MODEL_FACTOR ** max(0, order)
    if cell.kind == TRAINING and near.kind != TRAINING:
        factor *= TRAINING_FACTOR
    if cell.checkpointed and not near.checkpointed:
        factor *= CHECKPOINT_FACTOR
    return (near.seconds or 0.0) * growth * factor


def _run(settings: Settings, cell: Cell, folder: Path) -> None:
    """Measure one cell; what goes wrong is its result."""
    try:
        with attention_backend(cell.backend):
            _measure_cell(settings, cell, folder)
        cell.status = "measured"
    except torch.OutOfMemoryError:
        cell.status = "out of memory"
    except RuntimeError as error:
        # A kernel that can't be launched is a finding, too, and others go on.
        cell.status, cell.reason = "failed", str(error).strip().splitlines()[0][:200]
    finally:
        _free(settings)
    if cell.status == "out of memory" and cell.kind == TRAINING and not cell.checkpointed:
        cell.checkpointed = True
        _run(settings, cell, folder)


def _measure_cell(settings: Settings, cell: Cell, folder: Path) -> None:
    call = _make_map(settings, cell, folder) if cell.kind == ENGINE else _make_call(settings, cell)
    if settings.is_gpu:
        torch.cuda.reset_peak_memory_stats(settings.device)
    if cell.kind == ENGINE:
        cell.seconds = _seconds(call, settings)
        cell.images_per_s = (settings.scene_px / settings.window_px) ** 2 / cell.seconds
    else:
        cell.seconds = _median(call, settings)
        cell.images_per_s = cell.batch / cell.seconds
    if settings.is_gpu:
        cell.peak_gib = torch.cuda.max_memory_allocated(settings.device) / 2**30


def _make_call(settings: Settings, cell: Cell) -> Callable[[], object]:
    side = round(cell.length**0.5) * PATCH
    model = make_model(settings, cell).train(cell.kind == TRAINING)
    generator = torch.Generator(settings.device).manual_seed(0)
    x = torch.randn(cell.batch, 3, side, side, generator=generator, device=settings.device)
    autocast = torch.autocast(x.device.type, DTYPES[settings.dtype], enabled=settings.dtype != "fp32")

    def forward() -> Tensor:
        with autocast:
            out: Tensor = model(x)
        return out

    if cell.kind == FORWARD:
        return torch.no_grad()(forward)
    model.set_grad_checkpointing(cell.checkpointed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def step() -> None:
        optimizer.zero_grad()
        forward().float().square().mean().backward()
        optimizer.step()

    return step


def make_model(settings: Settings, cell: Cell) -> Any:
    """Make the ViT of a cell with random weights, without position embeddings, which would belong to one size."""
    options = {"num_classes": 0, "dynamic_img_size": True, "pos_embed": "none", **settings.kwargs}
    with torch.device(settings.device):
        model = timm.create_model(cell.model, **options)
    return perf_vit.linearize(model, cell.mixer, **OPTIONS.get(cell.mixer, {}))


def _median(call: Callable[[], object], settings: Settings) -> float:
    """Return the median seconds of a call after one that isn't counted, which may choose kernels."""
    warm, seconds = _seconds(call, settings), [_seconds(call, settings)]
    while len(seconds) < settings.runs and sum(seconds) + warm < settings.cell_s:
        seconds.append(_seconds(call, settings))
    return statistics.median(seconds)


def _seconds(call: Callable[[], object], settings: Settings) -> float:
    _wait(settings)
    started = time.perf_counter()
    result = call()
    _wait(settings)
    seconds = time.perf_counter() - started
    del result
    return seconds


class _Scores(nn.Module):
    """Three scores a pixel, from the tokens of a ViT."""

    size_multiple = PATCH
    task = "segmentation"

    def __init__(self, vit: Any, window_px: int) -> None:
        super().__init__()
        self.vit = vit
        same = Normalizer((128.0,) * 3, (64.0,) * 3)
        self.spec = SegmentationSpec(classes=("a", "b", "c"), normalizer=same, tile_px=window_px)

    def forward(self, tiles: Tensor) -> Tensor:
        """Scores, [B, 3, H, W]."""
        tokens = self.vit.forward_features(tiles)[:, self.vit.num_prefix_tokens :, :3].mT
        maps = tokens.unflatten(2, (tiles.shape[2] // PATCH, tiles.shape[3] // PATCH))
        return nn.functional.interpolate(maps, scale_factor=float(PATCH))

    def to_labels(self, logits: Tensor) -> Tensor:
        """Class indices, [B, H, W]."""
        return logits.argmax(1)


def _make_map(settings: Settings, cell: Cell, folder: Path) -> Callable[[], object]:
    """Return a call that maps a Cloud-Optimised GeoTIFF as `perf-vit predict` does, after a small one."""
    size = settings.window_px
    precision: Any = {"fp32": "32", "fp16": "16"}.get(settings.dtype, settings.dtype)
    options = SegmentationPredictOptions(
        window_size=size, overlap=0, batch_size=cell.batch, device=settings.device, precision=precision, overwrite=True
    )
    sizes = {"scene.tif": settings.scene_px, "small.tif": 2 * size}
    for name, side in sizes.items():
        if not (folder / name).exists():
            scene(folder / name, side, side)
    predictor: Any = SegmentationPredictor(_Scores(make_model(settings, cell).eval(), size), options)  # type: ignore[arg-type]
    predictor.run(open_source(folder / "small.tif"), folder / "map.tif")
    return lambda: predictor.run(open_source(folder / "scene.tif"), folder / "map.tif")


def _needs_checkpoints(settings: Settings, cell: Cell, past: list[Cell]) -> bool:
    """Return whether a smaller training step says that this one needs more than the GPU's memory without."""
    smaller = [each for each in _series(cell, past) if each.length < cell.length]
    if any(each.checkpointed for each in smaller):
        return True
    if not smaller or smaller[-1].peak_gib is None:
        return False
    tokens = cell.length * cell.batch / (smaller[-1].length * smaller[-1].batch)
    total = torch.cuda.get_device_properties(settings.device).total_memory / 2**30
    return smaller[-1].peak_gib * tokens > 0.9 * total


def _lacked_memory(cell: Cell, past: list[Cell]) -> int | None:
    """Return the number of patches of a smaller cell of the same series that ran out of memory."""
    lengths = [each.length for each in _series(cell, past) if each.status == "out of memory"]
    return next((length for length in lengths if length < cell.length), None)


def _series(cell: Cell, past: list[Cell]) -> list[Cell]:
    series = (cell.kind, cell.model, cell.title)
    return sorted((each for each in past if (each.kind, each.model, each.title) == series), key=lambda x: x.length)


def _check(settings: Settings) -> None:
    if settings.dtype not in DTYPES:
        raise PerfVitError(f"--dtype must be one of {', '.join(DTYPES)}, got {settings.dtype}")
    if not settings.budget_s > 0:
        raise PerfVitError(f"--budget-s must be above 0, got {settings.budget_s}; 450 suits one GPU")
    try:
        torch.zeros(1, device=settings.device)
    except (RuntimeError, AssertionError) as error:
        raise PerfVitError(
            f"--device {settings.device} needs a GPU that torch finds, got: {str(error).splitlines()[0]}; "
            "use --device cpu --quick to try the tool"
        ) from error


def _describe(settings: Settings, figures: dict[str, Any]) -> dict[str, Any]:
    shown = {name: getattr(settings, name) for name in ("device", "dtype", "budget_s", "batch_tokens", "runs")}
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "timm": timm.__version__}
    command = " ".join(["python", "tools/benchmarks/gpu.py", *sys.argv[1:]])
    return {"machine": machine_name(settings.device), "command": command, **versions, **shown, "checks": figures}


def _wait(settings: Settings) -> None:
    if settings.is_gpu:
        torch.cuda.synchronize(settings.device)


def _free(settings: Settings) -> None:
    if settings.is_gpu:
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    # Deterministic products, which the check of repeated gradients asks for.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    typer.run(main)
