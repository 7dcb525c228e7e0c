"""Small seeded jobs of the commands that can be resumed, and what must be equal at their ends."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["JOBS", "Job"]

_BACKBONE = "{depth: 1, embed_dim: 24, num_heads: 2, attn_kwargs: {num_features: 8}}"
_VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A command.

    Attributes:
        prepare: makes its inputs in a folder.
        args: the command line for inputs and an output folder that may hold what an earlier run left.
        digest: of each output what must be equal.
        stage: how far a killed process had come, in a few words.
    """

    prepare: Callable[[Path], None]
    args: Callable[[Path, Path], list[str]]
    digest: Callable[[Path], dict[str, str]]
    stage: Callable[[Path], str]


def _prepare_scene(folder: Path, size_px: int) -> None:
    from perf_vit.data import make_ship_scene

    make_ship_scene(folder, seed=0, size_px=size_px, num_targets=8)


def _prepare_training(folder: Path) -> None:
    _prepare_scene(folder, 128)


def _training_args(inputs: Path, out: Path) -> list[str]:
    files = [f"data.{p}.image={inputs / 'scene.tif'}" for p in ("train", "val")]
    files += [f"data.{p}.labels={inputs / 'ships.geojson'}" for p in ("train", "val")]
    small = ["data.tile_px=32", "data.tiles_per_epoch=12", "data.batch_size=2", "model.out_indices=[0]"]
    small += [f"model.backbone_kwargs={_BACKBONE}", "model.backbone=performer_vit_tiny_patch16_224"]
    small += ["model.head_kwargs={channels: [4, 4, 8, 8]}", "trainer.num_pictures=1", "trainer.accelerator=cpu"]
    run = ["trainer.max_epochs=4", "trainer.checkpoint_every_steps=2", "trainer.ema_decay=0.9"]
    return ["train", "configs/segmentation/demo.yaml", *files, *small, *run, f"out={out}", *_resume(out)]


def _resume(out: Path) -> list[str]:
    return ["resume=true"] if (out / "checkpoints" / "last.ckpt").exists() else []


def _run_digest(out: Path) -> dict[str, str]:
    """Weights, optimizer states, metrics and pictures; TensorBoard's files hold times.

    Without hidden files and folders, which a killed process leaves beside an output that it was writing.
    """
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        if name.startswith("tensorboard") or any(part.startswith(".") for part in path.relative_to(out).parts):
            continue
        if path.suffix == ".ckpt":
            content = torch.load(path, weights_only=True)
            parts = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "global_step")
            found[name] = _hash_values({part: content.get(part) for part in parts})
        elif name == "config.yaml":
            found[name] = _hash(re.sub(r"(?m)^resume: .*$|^out: .*$", "", path.read_text()).encode())
        else:
            found[name] = _hash(path.read_bytes())
    return found


def _run_stage(out: Path) -> str:
    last = out / "checkpoints" / "last.ckpt"
    writing = sorted(path.name for path in out.rglob(".*.tmp"))
    if writing:
        return f"writing {writing[0].removeprefix('.').removesuffix('.tmp')}"
    if not out.exists():
        return "before the run folder"
    if not last.exists():
        return "before the first checkpoint"
    if list(out.glob(".student*")):
        return "saving the student"
    content = torch.load(last, weights_only=True)
    progress = content["loops"]["fit_loop"]["epoch_progress"]["current"]
    inside = progress["processed"] < progress["started"]
    return f"in epoch {progress['processed'] + 1}, {'after a checkpoint in it' if inside else 'from its start'}"


def _prepare_prediction(folder: Path) -> None:
    from perf_vit.models import (
        CHECKPOINT_KEY,
        SegmentationModelConfig,
        SegmentationSpec,
        build_segmenter,
        checkpoint_metadata,
    )
    from perf_vit.transforms import Normalizer

    _prepare_scene(folder, 500)
    torch.manual_seed(0)
    kwargs = {"depth": 1, "embed_dim": 24, "num_heads": 2, "attn_kwargs": {"num_features": 8}}
    config = SegmentationModelConfig(
        backbone="performer_vit_tiny_patch16_224", backbone_kwargs=kwargs, out_indices=[0], head="linear"
    )
    statistics = Normalizer((600.0,) * 4, (300.0,) * 4)
    model = build_segmenter(config, SegmentationSpec(classes=("sea", "ship"), normalizer=statistics, tile_px=64))
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, CHECKPOINT_KEY: checkpoint_metadata(config, model)}, folder / "model.ckpt")


def _prediction_args(inputs: Path, out: Path) -> list[str]:
    files = ["--checkpoint", inputs / "model.ckpt", "--input", inputs / "scene.tif", "--output", out / "map.tif"]
    windows = ["--window-size", 64, "--overlap", 32, "--device", "cpu", "--polygons", "geojson"]
    return ["predict", *map(str, [*files, *windows])]


def _prediction_digest(out: Path) -> dict[str, str]:
    """All files but those in hidden folders, which a killed process leaves beside an output that it was writing."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        if not name.startswith("."):
            found[name] = _hash(path.read_bytes())
    return found


def _prediction_stage(out: Path) -> str:
    missing = [name for name in ("map.tif", "map.png", "map.geojson") if not (out / name).exists()]
    partial = out / "map.tif.partial"
    if "map.tif" not in missing:
        return f"the map is there, without {', '.join(missing)}" if missing else "all files are there"
    if not partial.exists():
        return "before the folder for rows"
    rows = len(list(partial.glob("rows_*")))
    finishing = list(partial.glob("map.tif*"))
    return f"writing the map of {rows} strips" if finishing else f"{'some' if rows else 'no'} strips written"


def _prepare_conversion(folder: Path) -> None:
    import timm
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), folder / "vit.safetensors")


def _conversion_args(inputs: Path, out: Path) -> list[str]:
    model = ["vit_tiny_patch16_224", "--weights", inputs / "vit.safetensors", "--num-classes", 0]
    options = ["--img-size", 64, "--window-size", 2, "--num-sinks", 4, "--num-clusters", 8, "--layers", "0-2"]
    return ["convert", *map(str, [*model, "--out", out / "model", *options])]


def _conversion_digest(out: Path) -> dict[str, str]:
    """Of the report only its words: numbers are times, some of them, and it names its folder."""
    found = {}
    for path in sorted((out / "model").iterdir()):
        content = path.read_bytes()
        if path.name == "fidelity.html":
            content = re.sub(rb"<svg.*?</svg>", b"", content, flags=re.DOTALL)
            content = re.sub(rb"perf_vit\.load\(.*?\)", b"", content)
            content = re.sub(rb"[0-9.,]+", b"0", content)
        found[path.name] = _hash(content)
    return found


def _conversion_stage(out: Path) -> str:
    if (out / "model").exists():
        return "the model is there"
    staged = [path.name for path in out.glob(".model.*/new/*")] if out.exists() else []
    if "model.safetensors" in staged:
        return "measuring, or writing the report"
    return "writing weights" if out.exists() and list(out.glob(".model.*")) else "before anything is written"


def _prepare_distillation(folder: Path) -> None:
    import numpy as np
    import timm
    from PIL import Image
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, **_VIT)
    state = {name: value * 8 if name.endswith("qkv.weight") else value for name, value in model.state_dict().items()}
    save_file(state, folder / "vit.safetensors")
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (120, 120, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def _distillation_args(inputs: Path, out: Path) -> list[str]:
    kwargs = ", ".join(f"{key}: {value}" for key, value in {**_VIT, "img_size": 64}.items())
    model = [
        "model.backbone=vit_tiny_patch16_224",
        f"model.weights={inputs / 'vit.safetensors'}",
        f"model.backbone_kwargs={{{kwargs}}}",
    ]
    model += ["model.options={window_size: 2, num_sinks: 2, num_clusters: 4}"]
    data = [f"data.train.image=[{inputs / '0.png'}]", f"data.val.image=[{inputs / '1.png'}]", "data.tile_px=64"]
    data += ["data.batch_size=1", "data.num_val_tiles=2"]
    stages = ["optim.block_steps=20", "optim.token_steps=14", "optim.max_minutes=null", "trainer.val_every_steps=5"]
    config = "configs/distillation/vit_small_dinov2.yaml"
    return ["distill", config, *model, *data, *stages, "trainer.accelerator=cpu", f"out={out}", *_resume(out)]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _hash_values(value: Any) -> str:
    return _hash("\n".join(_lines(value, "")).encode())


def _lines(value: Any, place: str) -> list[str]:
    if isinstance(value, torch.Tensor):
        return [f"{place} {value.dtype} {_hash(value.contiguous().numpy().tobytes())}"]
    if isinstance(value, Mapping):
        return [line for key in value for line in _lines(value[key], f"{place}.{key}")]
    if isinstance(value, list | tuple):
        return [line for number, item in enumerate(value) for line in _lines(item, f"{place}.{number}")]
    return [f"{place} {value!r}"]


JOBS = {
    "train": Job(prepare=_prepare_training, args=_training_args, digest=_run_digest, stage=_run_stage),
    "predict": Job(
        prepare=_prepare_prediction, args=_prediction_args, digest=_prediction_digest, stage=_prediction_stage
    ),
    "convert": Job(
        prepare=_prepare_conversion, args=_conversion_args, digest=_conversion_digest, stage=_conversion_stage
    ),
    "distill": Job(prepare=_prepare_distillation, args=_distillation_args, digest=_run_digest, stage=_run_stage),
}
"""Jobs by command."""
