"""What a student is asked to reproduce of its teacher: each block's change of the tokens, or the final tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer

from perf_vit.errors import ConfigError
from perf_vit.layers import LinearizedAttention
from perf_vit.models.valid_tokens import forward_tokens, key_mask
from perf_vit.tasks.optim import warmup_cosine

__all__ = [
    "BlockCall",
    "DistillationOptimConfig",
    "DistillationTask",
    "kept_tokens",
    "match_blocks",
    "recorded_blocks",
    "token_loss",
]


@dataclass(frozen=True, slots=True)
class BlockCall:
    """One call of a transformer block: what it was given and what came out."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    output: Tensor


@contextmanager
def recorded_blocks(model: nn.Module) -> Iterator[list[BlockCall]]:
    """Write down every call of a model's `blocks`, in order, rotary embeddings and masks included."""
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
    """How far the student's blocks are from the teacher's, each given the teacher's tokens.

    The loss of block l, with T_l and S_l the blocks and x_l the teacher's tokens before it, is

        |S_l(x_l) - T_l(x_l)|^2 / |T_l(x_l) - x_l|^2

    the part of the block's change that is wrong, whatever the size of the tokens. As no block depends on another's
    weights, each loss goes backward by itself: memory holds one block's graph at a time.

    Args:
        teacher: a timm model with `blocks`.
        student: its converted copy.
        image: standardised tiles, [B, C, H, W].
        backward: called with each block's loss, in order; None to measure only.
        valid: valid pixels, bool [B, H, W], None where all are; patches without one are left out of attention and loss.

    Returns:
        The mean loss of the blocks whose attention is linear, without a graph; the others are the teacher's still.
    """
    mask = key_mask(teacher, valid)
    with torch.no_grad(), recorded_blocks(teacher) as calls:
        forward_tokens(teacher, image, mask)
        # The student's layers learn rows and columns from its patch embedding.
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
    """Values of the tokens that take part in attention, [n, ...] of [B, P + N, ...]; of no mask, all as they are.

    Args:
        values: of all tokens.
        mask: of `key_mask`.
    """
    return values if mask is None else values[mask[:, 0, 0]]


def token_loss(tokens: Tensor, target: Tensor, num_prefix_tokens: int, mask: Tensor | None = None) -> Tensor:
    """1 - cosine, averaged over patch tokens, plus the same over class and register tokens.

    Args:
        tokens: final tokens, [B, N, C].
        target: the teacher's, of the same shape.
        num_prefix_tokens: class and register tokens, which come first.
        mask: of `key_mask`; patch tokens that take no part in attention take none in the mean.
    """
    cosine = F.cosine_similarity(tokens, target, dim=-1)
    patch_mask = None if mask is None else mask[..., num_prefix_tokens:]
    loss = 1 - kept_tokens(cosine[:, num_prefix_tokens:], patch_mask).mean()
    return loss + 1 - cosine[:, :num_prefix_tokens].mean() if num_prefix_tokens else loss


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
