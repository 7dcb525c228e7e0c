"""Distillation: from a config to a run folder with a trained student."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from perf_vit.errors import ConfigError, PerfVitError, extra, reason_line

with extra("train", "distillation"):
    from perf_vit.config import Config, Overrides, load_config
    from perf_vit.conversion import linearize, load_converted, save_converted
    from perf_vit.conversion.linearize import max_exact_side
    from perf_vit.conversion.save import check_output_folder
    from perf_vit.conversion.weights import check_file_arguments, create_with_weights, is_model, read_weights
    from perf_vit.data import build_distillation_datamodule
    from perf_vit.tasks import DistillationTask, build_distillation_trainer
    from perf_vit.workflows.progress import progress_shown
    from perf_vit.workflows.run_config import DistillationModelConfig, DistillationRun
    from perf_vit.workflows.run_folder import RunFolder, check_config_kept
    from perf_vit.workflows.train import Run, with_out

__all__ = ["distill"]

STUDENT = "student"
"""The saved student's folder inside the run folder."""


def distill(
    config: Config, overrides: Overrides | None = None, *, out: str | Path | None = None, progress: bool = True
) -> Run:
    """Train the linear copy of a pretrained ViT to give its tokens, on images without labels.

    Everything is opened and built before the folder is touched, so a wrong argument leaves nothing behind.

    Args:
        config: YAML file, name of a shipped config such as "distillation/vit_small_dinov2", or a mapping.
        overrides: Values by dotted key, such as {"optim.max_minutes": 20}, or ["optim.max_minutes=20"].
        out: Run folder, instead of the key `out`.
        progress: Show progress bars.

    Returns:
        The run; its best model is the student.

    Raises:
        PerfVitError: A config, input or output that doesn't fit.
    """
    run = load_config(config, DistillationRun, with_out(overrides, out))
    if not isinstance(config, Mapping):
        check_config_kept(config, run)
    with progress_shown(progress):
        _distill(run, progress=progress)
    return Run(Path(run.out))


def _distill(config: DistillationRun, *, progress: bool) -> None:
    run = RunFolder(config, more=[STUDENT])
    config = run.config
    check_output_folder(run.path / STUDENT, overwrite=True)
    teacher = _teacher(config.model)
    _check_size(teacher, config.data.tile_px)
    task = _task(config, teacher)
    _check_clusters(task.student, config.data.tile_px)
    pretrained: Any = teacher.pretrained_cfg
    data = build_distillation_datamodule(
        config.data,
        pretrained["mean"],
        pretrained["std"],
        steps_per_epoch=config.trainer.val_every_steps,
        seed=config.seed,
    )
    trainer = build_distillation_trainer(config.trainer, config.optim, run.path, progress=progress)
    run.fit(trainer, task, data)
    _save_student(task, run.path)


def _teacher(config: DistillationModelConfig) -> nn.Module:
    if not is_model(config.backbone):
        raise ConfigError(f"model.backbone: timm has no model {config.backbone}; see timm.list_models()")
    try:
        if config.weights is None:
            return timm.create_model(config.backbone, pretrained=True, **_timm_kwargs(config))
        weights = read_weights(config.weights)
        return create_with_weights(config.backbone, weights, config.weights, **_timm_kwargs(config))
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise _as_ours(error, f"model {config.backbone}") from error


def _timm_kwargs(config: DistillationModelConfig) -> dict[str, Any]:
    # The grid of position embeddings stays as it was trained, whatever the size of the crops.
    return {"dynamic_img_size": True, **check_file_arguments(config.backbone_kwargs, "model.backbone_kwargs")}


def _check_size(teacher: nn.Module, tile_px: int) -> None:
    patch_embed: Any = getattr(teacher, "patch_embed", None)
    patch_size = getattr(patch_embed, "patch_size", (1, 1))
    patch_px = max(patch_size) if isinstance(patch_size, tuple) else int(patch_size)
    if tile_px < 1 or tile_px % patch_px:
        nearest = max(1, round(tile_px / patch_px)) * patch_px
        raise ConfigError(f"data.tile_px must be a multiple of the patch size {patch_px}, got {tile_px}; try {nearest}")


def _check_clusters(student: nn.Module, tile_px: int) -> None:
    """Check that the student's attention differs from the teacher's in tiles of this size.

    Raises:
        ConfigError: It is softmax attention in all layers.
    """
    patch_embed: Any = getattr(student, "patch_embed", None)
    exact_px = (max_exact_side(student) or 0) * getattr(patch_embed, "patch_size", (1, 1))[0]
    if tile_px <= exact_px:
        raise ConfigError(
            f"data.tile_px must be above {exact_px}, up to which the student's attention is exact and has nothing to "
            f"learn, got {tile_px}; choose a larger one, or a student with max_exact_tokens=0"
        )


def _task(config: DistillationRun, teacher: nn.Module) -> DistillationTask:
    try:
        student = _student(config.model, teacher)
        task = DistillationTask(teacher, student, config.optim)
        # A student that can't be saved is found out before it is trained.
        with tempfile.TemporaryDirectory() as scratch:
            save_converted(student, Path(scratch, STUDENT))
    except (TypeError, ValueError) as error:
        raise _as_ours(error, "model") from error
    return task


def _student(config: DistillationModelConfig, teacher: nn.Module) -> nn.Module:
    if config.student is None:
        # With the default, tiles of a usual size would be attended to exactly, as by the teacher.
        defaults = {"max_exact_tokens": 0} if config.mixer == "clustered" else {}
        return linearize(teacher, config.mixer, **{**defaults, **config.options})
    student = load_converted(config.student, **_timm_kwargs(config))
    expected = {name: parameter.shape for name, parameter in teacher.named_parameters()}
    if {name: parameter.shape for name, parameter in student.named_parameters()} != expected:
        raise ConfigError(
            f"model.student {config.student} is not a conversion of {config.backbone}; give the model.backbone and "
            "model.weights that it was converted from"
        )
    return student


def _as_ours(error: Exception, where: str) -> PerfVitError:
    return error if isinstance(error, PerfVitError) else ConfigError(f"{where}: {reason_line(error)}")


def _save_student(task: DistillationTask, folder: Path) -> None:
    """Save the best checkpoint's student, over that of a run which was resumed."""
    best = torch.load(folder / "checkpoints" / "best.ckpt", map_location="cpu", weights_only=True)
    task.load_state_dict(best["state_dict"], strict=False)
    save_converted(task.student, folder / STUDENT, overwrite=True)
