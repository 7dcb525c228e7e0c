"""Distillation of a converted model: its blocks or its final tokens reproduce those of the teacher."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer

from perf_vit.errors import ConfigError
from perf_vit.layers import LinearizedAttention
from perf_vit.models.valid_tokens import forward_tokens, key_mask
from perf_vit.tasks.callbacks import Curves, HistoryCallback
from perf_vit.tasks.optim import warmup_cosine
from perf_vit.tasks.trainer import best_and_last, lightning_trainer, precision_name

__all__ = [
    "BlockCall",
    "DistillationOptimConfig",
    "DistillationTask",
    "DistillationTrainerConfig",
    "build_distillation_trainer",
    "kept_tokens",
    "match_blocks",
    "recorded_blocks",
    "token_loss",
]


@dataclass(frozen=True, slots=True)
class BlockCall:
    """Arguments and output of one call of a transformer block."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    output: Tensor


@contextmanager
def recorded_blocks(model: nn.Module) -> Iterator[list[BlockCall]]:
    """Record all calls of a model's `blocks` in order, with rotary embeddings and masks."""
    calls: list[BlockCall] = []

    def record(block: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Tensor) -> None:
        calls.append(BlockCall(arguments, options, output))

    blocks: Any = model.blocks
    hooks = [block.register_forward_hook(record, with_kwargs=True) for block in blocks]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def match_blocks(
    teacher: nn.Module,
    student: nn.Module,
    image: Tensor,
    backward: Callable[[Tensor], Any] | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Compute the error of the student's blocks on the teacher's tokens.

    The loss of block l, with T_l and S_l the blocks and x_l the teacher's tokens before it, is

        |S_l(x_l) - T_l(x_l)|^2 / |T_l(x_l) - x_l|^2

    i.e. the error relative to the block's update, whatever the scale of the tokens. As no block depends on the weights
    of another one, each loss is backpropagated separately and memory holds the graph of one block at a time.

    Args:
        teacher: A timm model with `blocks`.
        student: Its converted copy.
        image: Standardised tiles, [B, C, H, W].
        backward: Function called with the loss of each block, in order; None to measure only.
        valid: Valid pixels, bool [B, H, W]; patches without one are left out of attention and loss. None if all are
            valid.

    Returns:
        Mean loss of the blocks with linear attention, without a graph; other blocks equal the teacher's.
    """
    mask = key_mask(teacher, valid)
    with torch.no_grad(), recorded_blocks(teacher) as calls:
        forward_tokens(teacher, image, mask)
        # The patch embedding sets the grid size of the student's layers.
        student.patch_embed(image)  # type: ignore[operator]
    blocks: Any = student.blocks
    losses = []
    for block, call in zip(blocks, calls, strict=True):
        if not any(isinstance(module, LinearizedAttention) for module in block.modules()):
            continue
        tokens = call.arguments[0]
        with torch.set_grad_enabled(backward is not None):
            change = kept_tokens(call.output - tokens, mask).square().mean()
            error = kept_tokens(block(*call.arguments, **call.options) - call.output, mask)
            loss = error.square().mean() / change.clamp_min(1e-12)
        if backward is not None:
            backward(loss)
        losses.append(loss.detach())
    return torch.stack(losses).mean()


def kept_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Select the tokens that take part in attention, [n, ...].

    Args:
        values: Values of all tokens, [B, P + N, ...].
        mask: Mask from `key_mask`; None returns `values` unchanged.
    """
    return values if mask is None else values[mask[:, 0, 0]]


def token_loss(tokens: Tensor, target: Tensor, num_prefix_tokens: int, mask: Tensor | None = None) -> Tensor:
    """Compute 1 - cosine, averaged over patch tokens, plus its average over class and register tokens.

    Args:
        tokens: Final tokens of the student, [B, N, C].
        target: Final tokens of the teacher, [B, N, C].
        num_prefix_tokens: Number of class and register tokens, which come first.
        mask: Mask from `key_mask`; patch tokens that don't take part in attention are left out.
    """
    cosine = F.cosine_similarity(tokens, target, dim=-1)
    patch_mask = None if mask is None else mask[..., num_prefix_tokens:]
    loss = 1 - kept_tokens(cosine[:, num_prefix_tokens:], patch_mask).mean()
    return loss + 1 - cosine[:, :num_prefix_tokens].mean() if num_prefix_tokens else loss


_TRAINABLE = ("attention", "all")

# Norm before and layer scale after a block's attention (names of ViT and EVA).
_AROUND_ATTENTION = ("norm1.", "ls1.", "gamma_1")

_STATE_KEY = "distillation"


@dataclass(kw_only=True)
class DistillationOptimConfig:
    """Two training stages, each with a linear warm-up and a cosine decay to zero.

    The first stage matches each block's output to the teacher's, given the teacher's tokens (`match_blocks`). The
    second stage matches the final tokens of the whole student to the teacher's (`token_loss`).

    Attributes:
        block_steps: Number of steps of the first stage; 0 to skip it.
        block_lr: Peak learning rate of the first stage.
        token_steps: Number of steps of the second stage; 0 to skip it.
        token_lr: Peak learning rate of the second stage.
        trainable: Trained weights: "attention" for attention layers with the norm before and the scale after them, or
            "all".
        warmup_fraction: Fraction of a stage's steps with linear warm-up.
        gradient_clip: Maximum gradient norm; 0 for no clipping.
        max_minutes: Training time limit of both stages. If it is too short for all steps, the schedule follows the
            clock and still ends in time; such runs aren't reproducible. None for no limit.
    """

    block_steps: int = 200
    block_lr: float = 3e-5
    token_steps: int = 0
    token_lr: float = 1e-5
    trainable: Literal["attention", "all"] = "attention"
    warmup_fraction: float = 0.1
    gradient_clip: float = 1.0
    max_minutes: float | None = None

    @property
    def total_steps(self) -> int:
        """Number of steps of both stages."""
        return self.block_steps + self.token_steps

    def check(self) -> None:
        """Check the values.

        Raises:
            ConfigError: Values are out of range, or there are no steps.
        """
        if self.trainable not in _TRAINABLE:
            raise ConfigError(f"optim.trainable must be one of {', '.join(_TRAINABLE)}, got {self.trainable}")
        if min(self.block_steps, self.token_steps) < 0 or self.total_steps < 1:
            raise ConfigError(
                "optim.block_steps and optim.token_steps must be 0 or more and one of them above 0, got "
                f"{self.block_steps} and {self.token_steps}"
            )
        for name in ("block_lr", "token_lr"):
            # NaN compares false.
            if not 0 < (given := getattr(self, name)) < math.inf:
                raise ConfigError(f"optim.{name} must be a number above 0, got {given:g}")
        if not 0 <= self.gradient_clip < math.inf or not 0 <= self.warmup_fraction < 1:
            raise ConfigError(
                "expected optim.gradient_clip of at least 0 and optim.warmup_fraction from 0 to below 1, got "
                f"{self.gradient_clip:g} and {self.warmup_fraction:g}"
            )
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ConfigError(f"optim.max_minutes must be above 0, got {self.max_minutes}; leave it out for no limit")


class DistillationTask(lightning.LightningModule):
    """Training of a converted copy to reproduce the tokens of the original model.

    Batches are standardised tiles [B, C, H, W] and their valid pixels, without labels; patches without valid pixels are
    left out of attention and loss. Both models stay in evaluation mode, so there is no drop path. Checkpoints hold the
    student only.

    Args:
        teacher: Softmax model, which is frozen.
        student: Copy converted by `linearize`.
        config: Stages and schedule.

    Raises:
        ConfigError: The config is invalid.
        ValueError: The model has no blocks, or the student no linearized attention.
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
        # The loss of each block is backpropagated separately.
        self.automatic_optimization = False
        # Checkpoints don't hold the teacher.
        self.strict_loading = False

    def train(self, mode: bool = True) -> DistillationTask:
        """Keep both models in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        self.student.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remove the teacher; add the training time."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if not name.startswith("teacher.")}
        checkpoint[_STATE_KEY] = {"seconds": self.seconds}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the training time, and the epoch if the run ended within one."""
        self.seconds = checkpoint[_STATE_KEY]["seconds"]
        _reopen_epoch(checkpoint["loops"]["fit_loop"])

    def on_train_start(self) -> None:
        """Stop at once if all steps are done."""
        self.trainer.should_stop = self._position() >= self.config.total_steps

    def on_train_epoch_start(self) -> None:
        """Discard the losses of the last epoch, which may be of the other stage."""
        metrics = self.trainer.callback_metrics
        for name in [name for name in metrics if name.startswith("train/")]:
            del metrics[name]

    def training_step(self, batch: tuple[Tensor, Tensor | None], batch_idx: int) -> Tensor:
        """Run one optimizer step on the loss of the current stage."""
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
            # Lightning then validates and saves a last time.
            self.trainer.should_stop = True
        return loss.detach()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradients, which are already unscaled in half precision."""
        if self.config.gradient_clip:
            clip_grad_norm_(_trained(self.student), self.config.gradient_clip)

    def validation_step(self, batch: tuple[Tensor, Tensor | None], batch_idx: int) -> None:
        """Log the cosines of the final tokens."""
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
        """Build AdamW without weight decay, as the weights should stay near their start."""
        return AdamW(_trained(self.student), lr=self.config.block_lr, weight_decay=0.0)

    def _position(self) -> int:
        """Return the position in the schedule: the number of steps done, or more if the clock is ahead."""
        steps, limit = self.trainer.global_step, self.config.max_minutes
        if limit is None:
            return steps
        return max(steps, int(self.config.total_steps * self.seconds / (60 * limit)))

    def _follow_schedule(self, optimizer: Optimizer) -> bool:
        """Set the learning rate; return whether the run is in the first stage."""
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
    """Reset the loop of a run that ended within an epoch, so that it can complete the epoch.

    Lightning's counters after a shortened epoch are set to those after its last batch.
    """
    epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    if batches["is_last_batch"] or epochs["current"]["processed"] < epochs["current"]["started"]:
        return
    for part in ("current", "total"):
        epochs[part]["processed"] -= 1
        batches[part]["completed"] -= 1


def _select_parameters(student: nn.Module, train: str) -> None:
    """Freeze all weights that aren't trained."""
    if not hasattr(student, "blocks"):
        raise ValueError(f"expected a timm ViT or EVA with blocks, got {type(student).__name__}")
    attentions = [name for name, module in student.named_modules() if isinstance(module, LinearizedAttention)]
    if not attentions:
        raise ValueError(f"expected a student with linearized attention, got {type(student).__name__} with none")
    prefixes = [f"{name}." for name in attentions]
    prefixes += [f"{name.rpartition('.')[0]}.{around}" for name in attentions for around in _AROUND_ATTENTION]
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(train == "all" or name.startswith(tuple(prefixes)))


def _trained(student: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in student.parameters() if parameter.requires_grad]


_CURVES = Curves(
    losses=("train/block_loss", "train/token_loss"),
    scores=("val/patch_cosine", "val/class_cosine"),
    title="cosine with the teacher, held-out crops",
    log_losses=True,
    score_range=None,
)


@dataclass(kw_only=True)
class DistillationTrainerConfig:
    """Hardware and validation interval of a distillation.

    Attributes:
        val_every_steps: Number of steps between validations; each one saves a checkpoint to resume from.
        precision: Precision: 32-true, bf16-mixed, 16-mixed (GPU) or 64-true; auto for bf16-mixed on GPUs and CPUs with
            instructions for bfloat16, else 32-true.
        accelerator: Lightning accelerator: auto, cpu, gpu, mps. Training uses one device.
    """

    val_every_steps: int = 50
    precision: str = "32-true"
    accelerator: str = "auto"

    def __post_init__(self) -> None:
        self.precision = precision_name(self.precision)


def build_distillation_trainer(
    config: DistillationTrainerConfig, stages: DistillationOptimConfig, folder: Path, *, progress: bool = True
) -> lightning.Trainer:
    """Build a trainer that writes checkpoints, metrics and logs into the run folder.

    It writes `checkpoints/best.ckpt` (highest patch cosine), `checkpoints/last.ckpt`, `metrics.csv`, `loss_curve.png`
    and TensorBoard logs. An epoch has `val_every_steps` steps.

    Args:
        config: Hardware and validation interval.
        stages: Stages and schedule.
        folder: Run folder.
        progress: Whether to show a progress bar.

    Raises:
        ConfigError: Values are out of range or unknown to Lightning.
    """
    if config.val_every_steps < 1:
        raise ConfigError(f"trainer.val_every_steps must be at least 1, got {config.val_every_steps}")
    return lightning_trainer(
        folder,
        [HistoryCallback(folder, _CURVES), *best_and_last(folder, monitor="val/patch_cosine")],
        precision=config.precision,
        accelerator=config.accelerator,
        devices=1,
        progress=progress,
        options={
            "max_epochs": -(-stages.total_steps // config.val_every_steps),
            # Validate the untrained student first, on all crops.
            "num_sanity_val_steps": -1,
        },
    )
