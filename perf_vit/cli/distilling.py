"""`perf-vit distill`: from a config to a run folder with a trained student."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from perf_vit.cli.schemas import DistillationRun, PairConfig
from perf_vit.cli.training import check_run_folder, make_run_folder, set_up_logging
from perf_vit.config import dump_config
from perf_vit.data import build_crops
from perf_vit.errors import CheckpointError, ConfigError
from perf_vit.models import performerize
from perf_vit.tasks import DistillationTask, build_distillation_trainer

__all__ = ["distill_model"]

_STUDENT_PREFIX = "student."
_logger = logging.getLogger("perf_vit")


def distill_model(config: DistillationRun, *, progress: bool = True) -> Path:
    """Train a student and leave it with checkpoints, metrics, curves and the resolved config in the run folder.

    Everything is opened and built before the folder is touched, so a wrong argument leaves nothing behind.

    Returns:
        The saved student: the best checkpoint's by the patch tokens' cosine.

    Raises:
        PerfVitError: a config, input or output that doesn't fit.
    """
    folder = Path(config.out)
    last = folder / "checkpoints" / "last.ckpt"
    check_run_folder(folder, last, resume=config.resume)
    set_up_logging()
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    teacher = _teacher(config.model)
    _check_size(teacher, config.data.size_px)
    task = _task(config, teacher)
    pretrained: Any = teacher.pretrained_cfg
    data = build_crops(
        config.data,
        pretrained["mean"],
        pretrained["std"],
        steps_per_epoch=config.trainer.val_every_steps,
        seed=config.seed,
    )
    trainer = build_distillation_trainer(config.trainer, config.optim, folder, progress=progress)
    make_run_folder(folder)
    dump_config(config, folder / "config.yaml")
    trainer.fit(task, data, ckpt_path=last if config.resume else None, weights_only=True)
    return _save_student(task, folder)


def _teacher(config: PairConfig) -> nn.Module:
    if not timm.is_model(config.name):
        raise ConfigError(f"model.name: timm has no model {config.name}; see timm.list_models()")
    source: dict[str, Any] = {}
    if config.weights is not None:
        if not Path(config.weights).is_file():
            raise CheckpointError(f"no weights file {config.weights}; check model.weights")
        source["pretrained_cfg_overlay"] = {"file": config.weights}
    try:
        # The grid of position embeddings stays as it was trained, whatever the size of the crops.
        return timm.create_model(config.name, pretrained=True, **{"dynamic_img_size": True, **source, **config.kwargs})
    except (RuntimeError, TypeError, ValueError, AssertionError, KeyError) as error:
        raise ConfigError(f"model {config.name}: {str(error).splitlines()[0]}") from error


def _check_size(teacher: nn.Module, size_px: int) -> None:
    patch_embed: Any = getattr(teacher, "patch_embed", None)
    patch_size = getattr(patch_embed, "patch_size", (1, 1))
    patch_px = max(patch_size) if isinstance(patch_size, tuple) else int(patch_size)
    if size_px < 1 or size_px % patch_px:
        nearest = max(1, round(size_px / patch_px)) * patch_px
        raise ConfigError(f"data.size_px must be a multiple of the patch size {patch_px}, got {size_px}; try {nearest}")


def _task(config: DistillationRun, teacher: nn.Module) -> DistillationTask:
    try:
        student = performerize(teacher, config.model.attention, **config.model.options)
        return DistillationTask(teacher, student, config.optim)
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"model: {error}") from error


def _save_student(task: DistillationTask, folder: Path) -> Path:
    """Write the best checkpoint's student."""
    best = torch.load(folder / "checkpoints" / "best.ckpt", map_location="cpu", weights_only=True)
    state = {
        name.removeprefix(_STUDENT_PREFIX): value
        for name, value in best["state_dict"].items()
        if name.startswith(_STUDENT_PREFIX)
    }
    task.student.load_state_dict(state)
    path = folder / "student.safetensors"
    save_file({name: value.detach().cpu().contiguous() for name, value in task.student.state_dict().items()}, path)
    return path
