"""How classifiers of images and slides are optimised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from perf_vit.errors import ConfigError
from perf_vit.tasks.optimize import warmup_cosine

__all__ = ["PooledOptimConfig", "check_class_weights", "pooled_optimizers"]

_NO_DECAY = ("pos_embed", "cls_token", "reg_token", "latent")


@dataclass(kw_only=True)
class PooledOptimConfig:
    """AdamW with a linear warm-up and a cosine decay to zero, over the steps of the whole run; and the loss.

    Attributes:
        lr: peak learning rate.
        backbone_lr_scale: factor of the rate in the backbone; below 1 keeps more of pretrained weights.
        weight_decay: of matrices and kernels; vectors (norms, biases) and position embeddings have none.
        warmup_fraction: share of the steps over which the rate rises.
        label_smoothing: share of the target that all classes have in common.
        class_weights: one factor a class in the loss of classes.
    """

    lr: float = 5e-4
    backbone_lr_scale: float = 1.0
    weight_decay: float = 0.05
    warmup_fraction: float = 0.05
    label_smoothing: float = 0.0
    class_weights: list[float] | None = None


def check_class_weights(config: PooledOptimConfig, num_classes: int) -> None:
    """Refuse values that no training can go with.

    Raises:
        ConfigError: rates that are no rates, or another number of weights than of classes.
    """
    if config.lr <= 0 or config.backbone_lr_scale < 0 or not 0 <= config.label_smoothing < 1:
        raise ConfigError(
            "expected optim.lr above 0, optim.backbone_lr_scale from 0 on and optim.label_smoothing from 0 to below "
            f"1, got {config.lr:g}, {config.backbone_lr_scale:g} and {config.label_smoothing:g}"
        )
    if config.class_weights is not None and len(config.class_weights) != num_classes:
        raise ConfigError(
            f"optim.class_weights must give one weight a class, got {len(config.class_weights)} for {num_classes}"
        )


def pooled_optimizers(
    task: lightning.LightningModule, config: PooledOptimConfig, head: set[int], model: nn.Module
) -> dict[str, Any]:
    """AdamW and the schedule, stepped every batch, as Lightning takes them.

    Args:
        task: that is trained.
        config: rates.
        head: ids of the parameters that are no part of the backbone.
        model: whose parameters are trained.
    """
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or name.endswith(_NO_DECAY)
            groups.setdefault((id(parameter) not in head, plain), []).append(parameter)
    optimizer = AdamW(
        [
            {
                "params": parameters,
                "lr": config.lr * (config.backbone_lr_scale if in_backbone else 1.0),
                "weight_decay": 0.0 if plain else config.weight_decay,
            }
            # The history shows the first group's rate: that of the head.
            for (in_backbone, plain), parameters in sorted(groups.items(), key=lambda item: item[0])
        ]
    )
    total = max(1, int(task.trainer.estimated_stepping_batches))
    schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, total, config.warmup_fraction))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
