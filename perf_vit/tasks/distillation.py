"""Distillation of a softmax ViT into its linear copy, on images without labels."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer

from perf_vit.errors import ConfigError
from perf_vit.layers.linearized_attention import LinearizedAttention
from perf_vit.models.valid_tokens import forward_tokens, key_mask
from perf_vit.tasks.matching import kept_tokens, match_blocks, token_loss
from perf_vit.tasks.optimize import warmup_cosine

__all__ = ["DistillationOptimConfig", "DistillationTask"]

_TRAINABLE = ("attention", "all")
# Of a block, what attention's share of it goes through: its norm before and its scale after (ViT's and EVA's names).
_AROUND_ATTENTION = ("norm1.", "ls1.", "gamma_1")
_STATE_KEY = "distillation"


@dataclass(kw_only=True)
class DistillationOptimConfig:
    """Two stages, each with a linear warm-up and a cosine decay to zero.

    First each block is given the teacher's tokens and asked for the teacher's output (`match_blocks`), then the whole
    student is asked for the teacher's final tokens (`token_loss`).

    Attributes:
        block_steps: steps of the first stage, 0 to leave it out.
        block_lr: its peak learning rate.
        token_steps: steps of the second stage, 0 to leave it out.
        token_lr: its peak learning rate.
        trainable: "attention" for the attention layers with the norm before and the scale after them, or "all" weights.
        warmup_fraction: share of a stage's steps over which the rate rises.
        gradient_clip: largest norm of the gradient, 0 for no clipping.
        max_minutes: training time of both stages; where it is too short for the steps, the schedule goes on by the
            clock and reaches its end in time, so such a run can't be repeated exactly. None for no limit.
    """

    block_steps: int = 200
    block_lr: float = 3e-5
    token_steps: int = 0
    token_lr: float = 1e-5
    trainable: str = "attention"
    warmup_fraction: float = 0.1
    gradient_clip: float = 1.0
    max_minutes: float | None = None

    @property
    def total_steps(self) -> int:
        """Steps of both stages."""
        return self.block_steps + self.token_steps

    def check(self) -> None:
        """Raise a ConfigError for values that don't make a run."""
        if self.trainable not in _TRAINABLE:
            raise ConfigError(f"optim.trainable must be one of {', '.join(_TRAINABLE)}, got {self.trainable}")
        if min(self.block_steps, self.token_steps) < 0 or self.total_steps < 1:
            raise ConfigError(
                "optim.block_steps and optim.token_steps must be 0 or more and one of them above 0, got "
                f"{self.block_steps} and {self.token_steps}"
            )
        if self.max_minutes is not None and self.max_minutes <= 0:
            raise ConfigError(f"optim.max_minutes must be above 0, got {self.max_minutes}; leave it out for no limit")


class DistillationTask(lightning.LightningModule):
    """Trains a converted copy to give the tokens of the model that it came from.

    Batches are standardised tiles [B, C, H, W] without labels, and their valid pixels: patches without one take part
    neither in attention nor in the loss. Both models stay in evaluation mode: the student is to
    give what the teacher gives, without dropped paths. Checkpoints hold the student alone.

    Args:
        teacher: the softmax model, which is frozen.
        student: its copy by `linearize`.
        config: stages and schedule.

    Raises:
        ConfigError: a config that makes no run.
        ValueError: a model without blocks, or a student without converted attention.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, config: DistillationOptimConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.teacher = teacher.requires_grad_(False)
        self.student = student
        self.num_prefix_tokens = int(getattr(teacher, "num_prefix_tokens", 0))
        self.seconds = 0.0
        _select_parameters(student, config.trainable)
        # Each block's loss goes backward by itself.
        self.automatic_optimization = False
        # The teacher is no part of a checkpoint.
        self.strict_loading = False

    def train(self, mode: bool = True) -> DistillationTask:
        """Both models stay in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        self.student.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the teacher out; add the time spent."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if not name.startswith("teacher.")}
        checkpoint[_STATE_KEY] = {"seconds": self.seconds}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the time spent, and the epoch where the run ended inside one."""
        self.seconds = checkpoint[_STATE_KEY]["seconds"]
        _reopen_epoch(checkpoint["loops"]["fit_loop"])

    def on_train_start(self) -> None:
        """Stop at once if nothing is left to do."""
        self.trainer.should_stop = self._position() >= self.config.total_steps

    def on_train_epoch_start(self) -> None:
        """Forget the last epoch's losses, which may be of the other stage."""
        metrics = self.trainer.callback_metrics
        for name in [name for name in metrics if name.startswith("train/")]:
            del metrics[name]

    def training_step(self, batch: tuple[Tensor, Tensor | None], batch_idx: int) -> Tensor:
        """One optimizer step on the loss of the stage that the run is in."""
        start = time.perf_counter()
        image, valid = batch
        optimizer: Any = self.optimizers()
        in_blocks = self._follow_schedule(optimizer)
        optimizer.zero_grad()
        if in_blocks:
            loss = match_blocks(self.teacher, self.student, image, self.manual_backward, valid)
        else:
            mask = key_mask(self.teacher, valid)
            with torch.no_grad():
                target = forward_tokens(self.teacher, image, mask)
            tokens = forward_tokens(self.student, image, mask)
            loss = token_loss(tokens, target, self.num_prefix_tokens, mask)
            self.manual_backward(loss)
        optimizer.step()
        self.seconds += time.perf_counter() - start
        stage = "block" if in_blocks else "token"
        options: Any = {"on_step": False, "on_epoch": True, "prog_bar": True, "batch_size": len(image)}
        self.log(f"train/{stage}_loss", loss.detach(), **options)
        if self._position() >= self.config.total_steps:
            # Lightning then validates and saves once more.
            self.trainer.should_stop = True
        return loss.detach()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip gradients, which have their own scale by now, in half precision too."""
        if self.config.gradient_clip:
            clip_grad_norm_(_trained(self.student), self.config.gradient_clip)

    def validation_step(self, batch: tuple[Tensor, Tensor | None], batch_idx: int) -> None:
        """Cosines of the final tokens."""
        image, valid = batch
        mask = key_mask(self.teacher, valid)
        target, tokens = (forward_tokens(model, image, mask) for model in (self.teacher, self.student))
        cosine = F.cosine_similarity(tokens, target, dim=-1)
        options: Any = {"batch_size": len(image), "prog_bar": True}
        patch_mask = None if mask is None else mask[..., self.num_prefix_tokens :]
        self.log("val/patch_cosine", kept_tokens(cosine[:, self.num_prefix_tokens :], patch_mask).mean(), **options)
        if getattr(self.teacher, "cls_token", None) is not None:
            self.log("val/class_cosine", cosine[:, 0].mean(), **options)

    def configure_optimizers(self) -> Optimizer:
        """AdamW; nothing decays, as the weights start where they should stay near."""
        return AdamW(_trained(self.student), lr=self.config.block_lr, weight_decay=0.0)

    def _position(self) -> int:
        """The step that the schedule is at: the number of steps done, or more where the clock is ahead of them."""
        steps, limit = self.trainer.global_step, self.config.max_minutes
        if limit is None:
            return steps
        return max(steps, int(self.config.total_steps * self.seconds / (60 * limit)))

    def _follow_schedule(self, optimizer: Optimizer) -> bool:
        """Set the learning rate; whether the run is in the first stage."""
        config, position = self.config, self._position()
        in_blocks = position < config.block_steps
        if in_blocks:
            peak, step, total = config.block_lr, position, config.block_steps
        else:
            peak, step, total = config.token_lr, position - config.block_steps, config.token_steps
        for group in optimizer.param_groups:
            group["lr"] = peak * warmup_cosine(step, total, config.warmup_fraction)
        return in_blocks


def _reopen_epoch(loop: dict[str, Any]) -> None:
    """Let a run that ended inside an epoch, and is to go on, complete that epoch.

    Lightning's counters after an epoch that was cut short become those after its last batch.
    """
    epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    if batches["is_last_batch"] or epochs["current"]["processed"] < epochs["current"]["started"]:
        return
    for part in ("current", "total"):
        epochs[part]["processed"] -= 1
        batches[part]["completed"] -= 1


def _select_parameters(student: nn.Module, train: str) -> None:
    """Freeze what isn't trained."""
    if not hasattr(student, "blocks"):
        raise ValueError(f"expected a timm ViT or EVA with blocks, got {type(student).__name__}")
    attentions = [name for name, module in student.named_modules() if isinstance(module, LinearizedAttention)]
    if not attentions:
        raise ValueError(f"expected a student with converted attention, got {type(student).__name__} with none")
    prefixes = [f"{name}." for name in attentions]
    prefixes += [f"{name.rpartition('.')[0]}.{around}" for name in attentions for around in _AROUND_ATTENTION]
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(train == "all" or name.startswith(tuple(prefixes)))


def _trained(student: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in student.parameters() if parameter.requires_grad]
