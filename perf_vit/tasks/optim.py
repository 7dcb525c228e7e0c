"""Optimizers, learning rate schedules, averaged weights and sharded training (FSDP2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from perf_vit.data.base import ShareSampler
from perf_vit.errors import ConfigError, reason_line
from perf_vit.layers.performer_mixer import copy_projections
from perf_vit.metrics import RegisteredMetrics
from perf_vit.models import backbone_body, backbone_layers

__all__ = [
    "ClassificationOptimConfig",
    "FullyShardedStrategy",
    "OptimizerConfig",
    "TrainingTask",
    "WeightAverage",
    "build_schedule",
    "check_class_weights",
    "check_classification_loss",
    "parameter_groups",
    "shard_network",
    "warmup_cosine",
    "with_valid",
]


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning strategy for PyTorch's `fully_shard` over all processes, with one file per checkpoint."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Shard over all processes; by default Lightning shards over machines only."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def shard_network(model: nn.Module, body: nn.Module, mesh: Any) -> None:
    """Shard the weights: each block of the body is gathered for its computation, all other weights at once.

    Args:
        model: Network.
        body: Part of the network with the blocks.
        mesh: One-dimensional device mesh.
    """
    # Not available in every build of PyTorch.
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # Only contiguous weights can be sharded.
    model.to(memory_format=torch.contiguous_format)
    for block in _blocks(body):
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if hasattr(model, "losses"):
        register_fsdp_forward_method(model, "losses")


def _blocks(body: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that are called one after the other; a ModuleList is never called itself."""
    for block in getattr(body, "blocks", None) or body.children():
        yield from block if isinstance(block, nn.ModuleList) else (block,)


_NO_DECAY = ("pos_embed", "cls_token", "reg_token")

_Schedule = Literal["cosine", "constant", "multistep", "poly", "rsqrt", "step", "tanh", "wsd"]
_SCHEDULES: tuple[str, ...] = get_args(_Schedule)


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and a schedule, by default cosine decay to zero, over the steps of the whole run.

    Attributes:
        lr: Peak learning rate.
        backbone_lr_scale: Factor of the learning rate in the backbone; below 1 preserves more of pretrained weights.
        layer_decay: Factor of the learning rate from each backbone layer to the one before it; 1 for a constant rate,
            .65 to .9 for pretrained ViTs, whose first blocks are already general.
        weight_decay: Weight decay of matrices and kernels; vectors (norms, biases) and position embeddings have none.
        warmup_fraction: Fraction of the steps with linear warm-up.
        schedule: timm schedule after the warm-up: cosine, constant, multistep, poly, rsqrt, step, tanh or wsd.
        schedule_kwargs: Arguments of `timm.scheduler.create_scheduler_v2`, e.g. {decay_epochs: 10, decay_rate: 0.5};
            epochs are counted from the end of the warm-up.
    """

    lr: float = 1e-3
    backbone_lr_scale: float = 1.0
    layer_decay: float = 1.0
    weight_decay: float = 0.05
    warmup_fraction: float = 0.05
    schedule: _Schedule = "cosine"
    schedule_kwargs: dict[str, Any] = field(default_factory=dict)


def with_valid(sample: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Return (image, labels, valid pixels) of a sample or batch; valid is None for data sets that give pairs."""
    image, labels, *valid = sample
    return image, labels, valid[0] if valid else None


class TrainingTask(lightning.LightningModule):
    """Base of training modules, with the optimizer, schedule and sharding of `self.model`.

    The network has a `backbone`; otherwise `body` and `backbone_layers` are overridden.

    Args:
        optim: Optimizer and schedule.

    Raises:
        ConfigError: Values are out of range, or timm doesn't have the schedule.
    """

    model: Any
    registered_metrics: RegisteredMetrics

    def __init__(self, optim: OptimizerConfig) -> None:
        super().__init__()
        _check(optim)
        self.optim: Any = optim
        self._is_sharded = False
        self.counted_loss: Tensor | float | None = None

    @property
    def body(self) -> nn.Module:
        """Return the part of the network whose blocks are sharded one by one."""
        return backbone_body(self.model.backbone)

    def configure_model(self) -> None:
        """Shard the weights once if the strategy requires it."""
        if self.device_mesh is not None and not self._is_sharded:
            shard_network(self.model, self.body, self.device_mesh["data_parallel"])
            self._is_sharded = True

    def on_fit_start(self) -> None:
        """Set the network to training mode except for frozen parts; Lightning leaves the mode unchanged."""
        self.model.train()

    def num_counted(self, batch_idx: int, batch_size: int) -> int:
        """Return the number of samples of a validation batch to count, from its start; see `ShareSampler`.

        Args:
            batch_idx: Index of the batch.
            batch_size: Number of samples in the batch.
        """
        loader: Any = self.trainer.val_dataloaders
        sampler = getattr(loader, "sampler", None)
        if not isinstance(sampler, ShareSampler):
            return batch_size
        return max(0, min(batch_size, sampler.num_counted - batch_idx * loader.batch_size))

    def log_counted(self, name: str, mean: Tensor | float, num: int, *, prog_bar: bool = False) -> None:
        """Log a mean over the counted samples of all batches and processes.

        Args:
            name: Name of the value.
            mean: Mean over the batch.
            num: Number of counted samples in the batch.
            prog_bar: Whether to show the value in the progress bar.
        """
        if name == "val/loss":
            self.counted_loss = mean
        # Lightning rounds the mean of integers over processes down.
        self.log(name, mean, batch_size=float(num), sync_dist=True, prog_bar=prog_bar)

    def log_registered_metrics(self) -> None:
        """Log the known values of the registered metrics, and reset them."""
        values = self.registered_metrics.compute()
        self.log_dict({f"val/{name}": value for name, value in values.items() if not math.isnan(value)})
        self.registered_metrics.reset()

    def configure_optimizers(self) -> Any:
        """Build AdamW and the schedule, which is stepped with the optimizer."""
        groups = parameter_groups(self.model, self.optim, self.backbone_layers())
        optimizer = AdamW(groups, lr=self.optim.lr)
        total_steps = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = build_schedule(optimizer, self.optim, total_steps, num_epochs=self.trainer.max_epochs or 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepSchedule(schedule), "interval": "step"}}

    def backbone_layers(self) -> dict[str, int]:
        """Return the layer index of each backbone parameter, counted from the input."""
        return {f"backbone.{name}": layer for name, layer in backbone_layers(self.model.backbone).items()}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Set the learning rates of the next step."""
        scheduler.step(self.trainer.global_step)


class StepSchedule:
    """Schedule whose only state is the number of steps taken.

    After loading a checkpoint, only the optimizer's momenta come from the checkpoint; learning rates, decays and
    schedule come from the config, so a run resumed with another config follows that one from its current step.
    Optimizer states must be loaded before, as Lightning does.

    Args:
        schedule: Schedule from `build_schedule`.
    """

    def __init__(self, schedule: Scheduler) -> None:
        self.optimizer = schedule.optimizer
        self._schedule = schedule
        self._settings = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        self._num_steps = 0

    def step(self, num_steps: int) -> None:
        """Set the learning rates of the step after `num_steps` steps."""
        self._num_steps = num_steps
        self._schedule.step_update(num_steps)

    def state_dict(self) -> dict[str, int]:
        """Return the number of steps taken."""
        return {"num_steps": self._num_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the number of steps; reset the rates and decays of loaded optimizer states to the config's values."""
        for group, settings in zip(self.optimizer.param_groups, self._settings, strict=True):
            group.update(settings)
        self.step(state["num_steps"])


class WeightAverage(EMAWeightAveraging):
    """Lightning's exponential moving average of the weights, with buffers that have no mean taken from the model.

    Lightning also averages buffers. That fits the statistics of batch norms, but not indices, which rounding lowers by
    one, or random projections, of which an average of several draws is not a draw. Buffers of other than floating
    point numbers and those outside checkpoints are those of the last training batch.
    """

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        assert self._average_model is not None
        average: nn.Module = self._average_model.module
        for buffer, averaged in zip(_exact_buffers(pl_module), _exact_buffers(average), strict=True):
            averaged.copy_(buffer)
        copy_projections(pl_module, average)


def _exact_buffers(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_floating_point() or name in module._non_persistent_buffers_set:
                yield buffer


def parameter_groups(model: nn.Module, config: OptimizerConfig, layers: Mapping[str, int]) -> list[dict[str, Any]]:
    """Group the trained parameters for AdamW and timm's schedules, which apply `lr_scale`.

    Parameters outside the backbone come first, at the full rate; layer d of a backbone with D layers has
    `backbone_lr_scale * layer_decay ** (D - d)` times the rate.

    Args:
        model: Network.
        config: Learning rates and decays.
        layers: Layer index of each backbone parameter by name; all other parameters are outside the backbone.
    """
    num_layers = 1 + max(layers.values(), default=0)
    exempt = tuple({*_NO_DECAY, *_own_exemptions(model)})
    members: dict[tuple[int, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or name.endswith(exempt)
            members.setdefault((num_layers - layers.get(name, num_layers), plain), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.lr,
            "lr_scale": config.backbone_lr_scale * config.layer_decay**steps_down if steps_down else 1.0,
            "weight_decay": 0.0 if plain else config.weight_decay,
        }
        for (steps_down, plain), parameters in sorted(members.items(), key=lambda item: item[0])
    ]


def _own_exemptions(model: nn.Module) -> set[str]:
    """Return the names of parameters without weight decay, as timm models list them."""
    return {name for part in model.modules() for name in getattr(part, "no_weight_decay", set)()}


def build_schedule(optimizer: Optimizer, config: OptimizerConfig, total_steps: int, num_epochs: int) -> Scheduler:
    """Build a timm schedule that is stepped with the optimizer and ends with the run.

    Args:
        optimizer: Optimizer with groups from `parameter_groups`.
        config: Schedule and its arguments.
        total_steps: Number of steps of the whole run.
        num_epochs: Number of epochs of the whole run.

    Raises:
        ConfigError: The schedule doesn't accept the arguments.
    """
    warmup = round(total_steps * config.warmup_fraction)
    steps_per_epoch = max(1, total_steps // num_epochs)
    try:
        schedule, _ = create_scheduler_v2(
            optimizer,
            config.schedule,
            num_epochs=max(1, total_steps - warmup) / steps_per_epoch,
            warmup_epochs=warmup / steps_per_epoch,
            # The first step already has one share of the peak rate, and each further step one more.
            warmup_lr=config.lr / max(1, warmup),
            warmup_prefix=True,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
            **config.schedule_kwargs,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"optim.schedule {config.schedule}: {reason_line(error)}") from error
    if schedule is None:
        raise ConfigError(f"optim.schedule {config.schedule} is newer than this timm; choose another, or update timm")
    return schedule


def warmup_cosine(step: int, total: int, warmup_fraction: float) -> float:
    """Return the learning rate factor of a step: linear up to 1, then a half cosine down to 0 at `total`."""
    warmup = max(1, round(total * warmup_fraction))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def _check(config: OptimizerConfig) -> None:
    # NaN compares false.
    if not (0 < config.lr < math.inf and 0 <= config.backbone_lr_scale < math.inf):
        raise ConfigError(
            "optim.lr must be a number above 0 and optim.backbone_lr_scale one of at least 0, got "
            f"{config.lr:g} and {config.backbone_lr_scale:g}"
        )
    if not 0 <= config.weight_decay < math.inf:
        raise ConfigError(f"optim.weight_decay must be a number of at least 0, got {config.weight_decay:g}")
    if not 0 < config.layer_decay <= 1 or not 0 <= config.warmup_fraction < 1:
        raise ConfigError(
            "expected optim.layer_decay above 0 and at most 1 and optim.warmup_fraction from 0 to below 1, got "
            f"{config.layer_decay:g} and {config.warmup_fraction:g}"
        )
    if config.schedule not in _SCHEDULES:
        raise ConfigError(f"optim.schedule must be one of {', '.join(_SCHEDULES)}, got {config.schedule}")
    # Reject invalid arguments before any data is read, whatever the length of the run.
    build_schedule(AdamW([torch.zeros(1, requires_grad=True)], lr=config.lr), config, 10_000, num_epochs=100)


@dataclass(kw_only=True)
class ClassificationOptimConfig(OptimizerConfig):
    """Optimizer, schedule and loss of classification and regression.

    Attributes:
        label_smoothing: Label smoothing, the share of the target spread evenly over all classes.
        class_weights: One factor per class in the classification loss; None for 1.
    """

    lr: float = 5e-4
    label_smoothing: float = 0.0
    class_weights: list[float] | None = None


def check_classification_loss(config: ClassificationOptimConfig, num_classes: int) -> None:
    """Check label smoothing and class weights.

    Raises:
        ConfigError: The smoothing is out of range, or the weights are none of the classes.
    """
    if not 0 <= config.label_smoothing < 1:
        raise ConfigError(f"expected optim.label_smoothing from 0 to below 1, got {config.label_smoothing:g}")
    check_class_weights(config.class_weights, num_classes)


def check_class_weights(weights: Any, num_classes: int, values: str = "numbers") -> None:
    """Check that there is one factor per class, of which none is negative and one is positive.

    Args:
        weights: Factors, or None.
        num_classes: Number of classes.
        values: Name of possible values in messages.

    Raises:
        ConfigError: The number of factors is wrong, or a factor isn't a number of at least 0, or all are 0.
    """
    if weights is None:
        return
    is_list = isinstance(weights, Sequence) and not isinstance(weights, str)
    if not is_list or not all(isinstance(w, int | float) and 0 <= w < math.inf for w in weights) or not any(weights):
        raise ConfigError(
            f"optim.class_weights must be {values} of at least 0, one of them above 0, got {weights}; leave it out for "
            "equal weights"
        )
    if len(weights) != num_classes:
        raise ConfigError(f"optim.class_weights must give one weight a class, got {len(weights)} for {num_classes}")
