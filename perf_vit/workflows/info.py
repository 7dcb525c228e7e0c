"""What a file is, and what a model would have to do for it."""

from __future__ import annotations

import csv
import glob
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from rich.table import Table
from torch import nn

from perf_vit.errors import CheckpointError, ConfigError, OptionError, extra, parsing
from perf_vit.files import read_json_or_none
from perf_vit.types import Source

with extra("geo", "info"):
    from omegaconf import MISSING, OmegaConf

    from perf_vit.config import config_value
    from perf_vit.conversion.linearize import convertible_layers, max_exact_side
    from perf_vit.conversion.save import CONFIG, is_converted
    from perf_vit.conversion.weights import is_model
    from perf_vit.models import checkpoint_facts, load_segmenter
    from perf_vit.sources import SourceInfo, describe_source, open_source, split_layer
    from perf_vit.sources.describe import describe_vector, is_vector
    from perf_vit.sources.files import TILE_INDEX_SUFFIXES, is_vector_name
    from perf_vit.tiling import grid_windows
    from perf_vit.workflows.load import find_model

__all__ = ["Description", "FileDescription", "Workload", "describe", "describe_file", "estimate_workload"]

_DEFAULT_WINDOW_PX = 1024

# Longer lists are cut.
_MAX_LISTED = 20


def _two_columns(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def _shown(value: Any) -> str:
    """A plain value in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(each)}" for key, each in list(value.items())[:_MAX_LISTED])
    if isinstance(value, list | tuple):
        more = f", ... ({len(value)})" if len(value) > _MAX_LISTED else ""
        return ", ".join(map(_shown, value[:_MAX_LISTED])) + more
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.8g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a model would have to do for a source.

    Attributes:
        model: its name.
        patch_px: side of a patch, in pixels of the source.
        num_tokens: patches of the whole source.
        window_size: side of a window, in pixels.
        overlap: pixels that windows share.
        num_windows: windows to run.
        seconds_per_window: of one forward pass, measured here on noise.
        seconds: of all windows.
        device: where it was measured.
        max_exact_px: Size in pixels of the largest square window with exact attention, None unless attention is linear.
        num_softmax_layers: Number of attention layers that a conversion left as they were, 0 for other models.
    """

    model: str
    patch_px: int
    num_tokens: int
    window_size: int
    overlap: int
    num_windows: int
    seconds_per_window: float
    seconds: float
    device: str
    max_exact_px: int | None
    num_softmax_layers: int


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a raster or slide is, and what a model would have to do for it.

    Attributes:
        source: Size, bands, place and format.
        workload: Windows and time of a model, None without one.
    """

    source: SourceInfo
    workload: Workload | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values of JSON."""
        return {**asdict(self.source), "workload": None if self.workload is None else asdict(self.workload)}

    def table(self) -> Table:
        """All of it for people."""
        return _two_columns(_facts(self.source) + ([] if self.workload is None else _work(self.workload)))


@dataclass(frozen=True, kw_only=True)
class FileDescription:
    """What a model, a vector file or a config is.

    Attributes:
        path: Path as given.
        kind: Such as "checkpoint", "run folder", "converted model", "vector file", "COCO file" or "config".
        facts: What is known of it, as plain values.
    """

    path: str
    kind: str
    facts: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values of JSON."""
        return {"path": self.path, "kind": self.kind, **self.facts}

    def table(self) -> Table:
        """All of it for people."""
        facts = {"kind": self.kind, **self.facts}
        return _two_columns([(name.replace("_", " "), _shown(value)) for name, value in facts.items() if value])


def describe_file(path: str) -> FileDescription | None:
    """Describe a run folder, checkpoint, converted model, vector file, COCO file or config; None for other files.

    Raises:
        PerfVitError: The file is one of these, and can't be read.
    """
    file = Path(path)
    name = file.name.lower()
    if file.is_dir():
        return _describe_folder(path)
    if not Path(split_layer(path)[0]).is_file():
        return None
    if name.endswith(".ckpt"):
        return FileDescription(path=path, kind="checkpoint", facts=_checkpoint_facts(file))
    if name.endswith((".yaml", ".yml")):
        return FileDescription(path=path, kind="config", facts=_config_facts(file))
    if name.endswith(".json") and (found := _coco_facts(file)):
        return FileDescription(path=path, kind="COCO file", facts=found)
    is_index = name.endswith((".json", *TILE_INDEX_SUFFIXES))
    if is_vector_name(path) and not is_index and is_vector(path):
        return FileDescription(path=path, kind="vector file", facts=describe_vector(path))
    return None


def _describe_folder(path: str) -> FileDescription | None:
    folder = Path(path)
    best = folder / "checkpoints" / "best.ckpt"
    if best.is_file():
        facts = {**_checkpoint_facts(best), **_run_facts(folder)}
        return FileDescription(path=path, kind="run folder", facts=facts)
    for place in (folder / "student", folder):
        if (place / CONFIG).is_file():
            with parsing(place / CONFIG, "JSON", CheckpointError):
                config = json.loads((place / CONFIG).read_bytes())
            if not isinstance(config, dict) or "architecture" not in config:
                continue
            known = {"backbone": config.get("architecture"), "classes": config.get("num_classes")}
            kind = "converted model" if is_converted(place) else "model of timm"
            return FileDescription(path=path, kind=kind, facts={**known, "conversion": config.get("perf_vit")})
    return None


def _checkpoint_facts(path: Path) -> dict[str, Any]:
    found = checkpoint_facts(path)
    spec, model = found["spec"], found["model"]
    named = ("background", "tile_px", "resolution", "mpp", "score_threshold", "bands", "nodata")
    trained = spec.get("trained_on") or {}
    return {
        "task": found.get("task"),
        "model": found["label"],
        "backbone": model.get("backbone"),
        "head": model.get("head"),
        "parameters": found["num_parameters"],
        "classes": list(spec.get("classes") or ()),
        "trained_on": " ".join(filter(None, (trained.get("dtype"), ", ".join(trained.get("names") or ())))),
        **{name: spec.get(name) for name in named},
        "epoch": found["epoch"],
        "perf_vit": found.get("version"),
    }


def _run_facts(folder: Path) -> dict[str, Any]:
    """The length of a run and the last scores of its validation."""
    metrics = folder / "metrics.csv"
    if not metrics.is_file():
        return {}
    with parsing(metrics, "the metrics of a run"), metrics.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if int(float(row["epoch"])) > 0]
        scored = [{key: float(v) for key, v in row.items() if key.startswith("val/") and v} for row in rows]
    last: dict[str, float] = next((scores for scores in reversed(scored) if scores), {})
    return {"epochs_done": len(rows), "last_scores": dict(list(last.items())[:_MAX_LISTED])}


def _config_facts(path: Path) -> dict[str, Any]:
    task = config_value(path, "task", default="segmentation")
    data, model = (_section(path, name) for name in ("data", "model"))
    splits = {part: found for part in ("train", "val") if isinstance(found := data.get(part), Mapping)}
    files = {f"{part} {key}": value for part, split in splits.items() for key, value in split.items() if value}
    return {
        "task": task,
        "out": _plain(config_value(path, "out")),
        "backbone": model.get("backbone"),
        "head": model.get("head"),
        "classes": data.get("classes"),
        "tile_px": data.get("tile_px"),
        "batch_size": data.get("batch_size"),
        **files,
        "to_be_given": [f"data.{name.replace(' ', '.')}" for name, value in files.items() if value == MISSING],
        "missing_files": [v for v in files.values() if isinstance(v, str) and _is_missing(v)],
    }


def _section(path: Path, name: str) -> Mapping[str, Any]:
    """A section of a config, which may be empty."""
    found = _plain(config_value(path, name))
    if found is not None and not isinstance(found, Mapping):
        raise ConfigError(
            f"{path}: {name} must be a mapping of keys to values, got {found!s:.100}; it is no config of perf-vit"
        )
    return found or {}


def _plain(value: Any) -> Any:
    """Nested mappings and lists of a config; "???" for values to be given."""
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _is_missing(value: str) -> bool:
    return "/" in value and "://" not in value and not glob.glob(split_layer(value)[0])


def _coco_facts(path: Path) -> dict[str, Any]:
    """Images, objects and classes of a COCO file; nothing for other JSON."""
    content = read_json_or_none(path)
    if not (isinstance(content, dict) and content.keys() >= {"images", "annotations", "categories"}):
        return {}
    with parsing(path, "a COCO file"):
        names = {each.get("id"): str(each.get("name")) for each in content["categories"]}
        counts = Counter(names.get(each.get("category_id"), "unknown") for each in content["annotations"])
        return {"images": len(content["images"]), "objects": len(content["annotations"]), "classes": dict(counts)}


def describe(
    path: str,
    *,
    model: str | None = None,
    window_size: int | None = None,
    mpp: float | None = None,
    slide_mpp: float | None = None,
) -> Description | FileDescription:
    """Describe a raster or slide and, if a model is given, the time that it would take; or see `describe_file`.

    Args:
        path: Path or URL.
        model: Run folder or checkpoint of a segmentation model, or a timm name; see `estimate_workload`.
        window_size: Size of the model's windows in pixels.
        mpp: Micrometres per pixel to read a slide at.
        slide_mpp: Micrometres per pixel of a slide's level 0, where the file doesn't say.

    Raises:
        InputError: The file can't be opened.
        PerfVitError: The model can't be loaded or doesn't fit.
    """
    if (model, window_size, mpp, slide_mpp) == (None,) * 4 and (file := describe_file(path)) is not None:
        return file
    with open_source(path, mpp=mpp, slide_mpp=slide_mpp) as source:
        work = None if model is None else estimate_workload(source, model, window_size)
        return Description(source=describe_source(source), workload=work)


def estimate_workload(source: Source, model: str, window_size: int | None = None) -> Workload:
    """Time one window of a model and multiply.

    Args:
        source: what would be predicted.
        model: a run folder or .ckpt file of `perf-vit train`, or a name of timm's, whose backbone alone is timed.
        window_size: in pixels; by default the checkpoint's tile, or 1,024.

    Raises:
        ConfigError: no such model.
        CheckpointError: the file is not a checkpoint.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    load = _checkpoint if model.endswith(".ckpt") or Path(model).is_dir() else _backbone
    network, forward, patch_px, size = load(model, source.num_bands, window_size, device)
    side = max_exact_side(network)
    overlap = size // 4
    num_windows = len(grid_windows(source.extent, size, overlap))
    seconds = _time_forward(forward, torch.randn(1, source.num_bands, size, size, device=device))
    return Workload(
        model=model,
        patch_px=patch_px,
        num_tokens=-(-source.height // patch_px) * -(-source.width // patch_px),
        window_size=size,
        overlap=overlap,
        num_windows=num_windows,
        seconds_per_window=seconds,
        seconds=seconds * num_windows,
        device=device,
        max_exact_px=None if side is None else side * patch_px,
        num_softmax_layers=0 if side is None else len(convertible_layers(network)),
    )


def _checkpoint(
    path: str, num_bands: int, window_size: int | None, device: str
) -> tuple[nn.Module, Callable[[torch.Tensor], Any], int, int]:
    model = load_segmenter(find_model(path)).to(device)
    expected = len(model.spec.normalizer.mean)
    if expected != num_bands:
        raise ConfigError(
            f"{path} was trained on {expected} bands, the file has {num_bands}; give a file with as many bands"
        )
    patch_px = model.size_multiple
    return model, model, patch_px, _whole_patches(window_size or model.spec.tile_px, patch_px)


def _backbone(
    name: str, num_bands: int, window_size: int | None, device: str
) -> tuple[nn.Module, Callable[[torch.Tensor], Any], int, int]:
    if not is_model(name):
        raise OptionError(f"model must be a .ckpt file or a model of timm, got {name}; see timm.list_models()")
    wanted = window_size or _DEFAULT_WINDOW_PX
    try:
        patch_px = timm.create_model(name, num_classes=0).patch_embed.patch_size[0]
        size = _whole_patches(wanted, patch_px)
        model = timm.create_model(name, in_chans=num_bands, img_size=size, num_classes=0)
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"{name} has no patches of a fixed size to count; choose a ViT") from error
    return model, model.eval().to(device).forward_features, patch_px, size


def _whole_patches(window_size: int, patch_px: int) -> int:
    return max(1, window_size // patch_px) * patch_px


def _time_forward(forward: Callable[[torch.Tensor], Any], tile: torch.Tensor) -> float:
    """Seconds of the second of two passes: the first allocates."""
    seconds = 0.0
    with torch.inference_mode():
        for _ in range(2):
            started = time.perf_counter()
            forward(tile)
            if tile.is_cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
    return seconds


def _facts(info: SourceInfo) -> list[tuple[str, str]]:
    names = ", ".join(info.band_names[:12]) + (", ..." if len(info.band_names) > 12 else "")
    resolution = None if info.resolution_xy is None else "{:.8g} x {:.8g}".format(*info.resolution_xy)
    facts: list[tuple[str, str | None]] = [
        ("format", " ".join(filter(None, (info.kind, info.format and f"({info.format})")))),
        ("size", f"{info.height:,} rows x {info.width:,} columns"),
        ("EXIF", f"orientation {info.orientation}, applied" if info.orientation > 1 else None),
        ("bands", f"{len(info.band_names)} x {info.dtype}: {names}"),
        ("palette", f"{info.num_colors} colours" if info.num_colors else None),
        ("nodata", "none" if info.nodata is None else f"{info.nodata:g}"),
        ("mask", info.mask),
        ("CRS", info.crs or ("none" if info.kind == "raster" else None)),
        ("resolution", resolution and f"{resolution} {info.units or ''}"),
        ("bounds", info.bounds_crs and "x {0:.8g} to {2:.8g}, y {1:.8g} to {3:.8g}".format(*info.bounds_crs)),
        ("mpp", f"{info.mpp:.4g} um" if info.mpp else ("unknown: give slide_mpp" if info.kind == "slide" else None)),
        ("levels", ", ".join(f"{height:,} x {width:,}" for height, width in info.levels)),
        ("blocks", info.block_px and f"{info.block_px[0]} x {info.block_px[1]}, {info.compression or 'uncompressed'}"),
        ("file", None if info.file_bytes is None else f"{info.file_bytes / 2**20:,.1f} MiB"),
    ]
    return [(name, value) for name, value in facts if value]


def _work(work: Workload) -> list[tuple[str, str]]:
    return [
        ("model", work.model),
        ("tokens", f"{work.num_tokens:,} patches of {work.patch_px} px"),
        *([] if work.max_exact_px is None else [("attention", _attention(work))]),
        ("windows", f"{work.num_windows:,} of {work.window_size} px, overlapping by {work.overlap} px"),
        ("time", f"{_duration(work.seconds)}, {work.seconds_per_window:.3g} s a window, measured on {work.device}"),
    ]


def _attention(work: Workload) -> str:
    exact = work.max_exact_px
    left = f" except in {work.num_softmax_layers} layers of softmax attention" if work.num_softmax_layers else ""
    return (
        f"exact in windows of up to {exact:,} px, linear in larger ones{left}"
        if exact
        else f"linear at every size{left}"
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
