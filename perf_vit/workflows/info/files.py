"""Descriptions of models, vector files and configs."""

from __future__ import annotations

import csv
import glob
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from rich.table import Table

from perf_vit.config import config_value
from perf_vit.conversion.save import CONFIG, is_converted
from perf_vit.errors import CheckpointError, ConfigError, parsing
from perf_vit.files import read_json_or_none
from perf_vit.models import checkpoint_facts
from perf_vit.sources import split_layer
from perf_vit.sources.describe import describe_vector, is_vector
from perf_vit.sources.files import TILE_INDEX_SUFFIXES, is_vector_name
from perf_vit.workflows.progress import two_columns

__all__ = ["FileDescription", "describe_file"]

# Longer lists are cut.
_MAX_LISTED = 20


def _shown(value: Any) -> str:
    """Return a plain value in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(each)}" for key, each in list(value.items())[:_MAX_LISTED])
    if isinstance(value, list | tuple):
        more = f", ... ({len(value)})" if len(value) > _MAX_LISTED else ""
        return ", ".join(map(_shown, value[:_MAX_LISTED])) + more
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.8g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, kw_only=True)
class FileDescription:
    """Description of a model, a vector file or a config.

    Attributes:
        path: Path as given.
        kind: Kind of file: "checkpoint", "run folder", "converted model", "vector file", "COCO file", "config".
        facts: Facts by name, as plain values.
    """

    path: str
    kind: str
    facts: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values of JSON."""
        return {"path": self.path, "kind": self.kind, **self.facts}

    def table(self) -> Table:
        """All facts for people."""
        facts = {"kind": self.kind, **self.facts}
        return two_columns([(name.replace("_", " "), _shown(value)) for name, value in facts.items() if value])


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
    for place in (folder / "student", folder):
        if (place / CONFIG).is_file():
            with parsing(place / CONFIG, "JSON", CheckpointError):
                config = json.loads((place / CONFIG).read_bytes())
            if not isinstance(config, dict) or "architecture" not in config:
                continue
            known = {"backbone": config.get("architecture"), "classes": config.get("num_classes")}
            kind = "converted model" if is_converted(place) else "model of timm"
            facts = {**known, "conversion": config.get("perf_vit"), **_run_facts(folder)}
            return FileDescription(path=path, kind=kind, facts=facts)
    best = folder / "checkpoints" / "best.ckpt"
    if best.is_file():
        facts = {**_checkpoint_facts(best), **_run_facts(folder)}
        return FileDescription(path=path, kind="run folder", facts=facts)
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
