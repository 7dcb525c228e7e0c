"""Training with weights, gradients and optimizer states shared out among the processes (FSDP2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from perf_vit.data.base import ShareSampler
from perf_vit.errors import ConfigError, reason_line
from perf_vit.models import backbone_body, backbone_layers

__all__ = [
    "ClassificationOptimConfig",
    "FullyShardedStrategy",
    "OptimizerConfig",
    "TrainingTask",
    "build_schedule",
    "check_classification_loss",
    "parameter_groups",
    "shard_network",
    "warmup_cosine",
    "with_valid",
]


class FullyShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for PyTorch's `fully_shard`, over all processes, with checkpoints of one file each."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Let every process have its share; by itself Lightning shares out among machines only."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def shard_network(model: nn.Module, body: nn.Module, mesh: Any) -> None:
    """Share out the weights: each of the body's blocks is gathered while it is computed, the rest all along.

    Args:
        model: a network.
        body: the part of it with the blocks.
        mesh: of the processes, one-dimensional.
    """
    # Not part of every build of PyTorch.
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # Weights of any other order can't be shared out.
    model.to(memory_format=torch.contiguous_format)
    for block in _blocks(body):
        if any(True for _ in block.parameters()):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if hasattr(model, "losses"):
        register_fsdp_forward_method(model, "losses")


def _blocks(body: nn.Module) -> Iterator[nn.Module]:
    """Blocks, or what else is called one after the other; a list of modules is never called itself."""
    for block in getattr(body, "blocks", None) or body.children():
        yield from block if isinstance(block, nn.ModuleList) else (block,)


_NO_DECAY = ("pos_embed", "cls_token", "reg_token")

_SCHEDULES = ("cosine", "constant", "multistep", "poly", "rsqrt", "step", "tanh", "wsd")


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and, by default, a cosine decay to zero, over the steps of the whole run.

    Attributes:
        lr: peak learning rate.
        backbone_lr_scale: factor of the rate in the backbone; below 1 keeps more of pretrained weights.
        layer_decay: factor of the rate from each of the backbone's layers to the one before it: 1 for the same rate
            everywhere, .65 to .9 for pretrained ViTs, whose first blocks are general already.
        weight_decay: of matrices and kernels; vectors (norms, biases) and position embeddings have none.
        warmup_fraction: share of the steps over which the rate rises.
        schedule: after the warm-up, by timm's name: cosine, constant, multistep, poly, rsqrt, step, tanh or wsd.
        schedule_kwargs: passed to `timm.scheduler.create_scheduler_v2`, e.g. {decay_epochs: 10, decay_rate: 0.5};
            epochs are counted from the end of the warm-up.
    """

    lr: float = 1e-3
    backbone_lr_scale: float = 1.0
    layer_decay: float = 1.0
    weight_decay: float = 0.05
    warmup_fraction: float = 0.05
    schedule: str = "cosine"
    schedule_kwargs: dict[str, Any] = field(default_factory=dict)


def with_valid(sample: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Return (image, labels, valid pixels) of a sample or a batch; valid is None for a data set that gives pairs."""
    image, labels, *valid = sample
    return image, labels, valid[0] if valid else None


class TrainingTask(lightning.LightningModule):
    """A Lightning module whose network `model` has a `backbone`, or says of its layers itself, trained as `optim` says.

    Args:
        optim: optimizer and schedule.

    Raises:
        ConfigError: values out of range, or a schedule that timm doesn't have.
    """

    model: Any

    def __init__(self, optim: OptimizerConfig) -> None:
        super().__init__()
        _check(optim)
        self.optim: Any = optim
        self._is_sharded = False

    @property
    def body(self) -> nn.Module:
        """The part of the network whose blocks are shared out one by one."""
        return backbone_body(self.model.backbone)

    def configure_model(self) -> None:
        """Share out the weights where the strategy asks for it, once."""
        if self.device_mesh is not None and not self._is_sharded:
            shard_network(self.model, self.body, self.device_mesh["data_parallel"])
            self._is_sharded = True

    def on_fit_start(self) -> None:
        """Put the network into training mode, but for its frozen parts; Lightning leaves the mode as it is."""
        self.model.train()

    def num_counted(self, batch_idx: int, batch_size: int) -> int:
        """How many samples of a validation batch count, the first ones; see `ShareSampler`.

        Args:
            batch_idx: number of the batch.
            batch_size: samples in it.
        """
        loader: Any = self.trainer.val_dataloaders
        sampler = getattr(loader, "sampler", None)
        if not isinstance(sampler, ShareSampler):
            return batch_size
        return max(0, min(batch_size, sampler.num_counted - batch_idx * loader.batch_size))

    def log_counted(self, name: str, mean: Tensor | float, num: int, **options: Any) -> None:
        """Log a mean over the samples that count, in the end over those of all batches and processes.

        Args:
            name: of the value.
            mean: over the batch.
            num: samples of the batch that count.
            **options: of Lightning's `log`.
        """
        # Over processes, Lightning rounds the mean of whole numbers down.
        self.log(name, mean, batch_size=float(num), sync_dist=True, **options)

    def configure_optimizers(self) -> Any:
        """AdamW and the schedule, stepped with the optimizer."""
        groups = parameter_groups(self.model, self.optim, self.backbone_layers())
        optimizer = AdamW(groups, lr=self.optim.lr)
        total_steps = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = build_schedule(optimizer, self.optim, total_steps, num_epochs=self.trainer.max_epochs or 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepSchedule(schedule), "interval": "step"}}

    def backbone_layers(self) -> dict[str, int]:
        """The layer that each parameter of the network's backbone belongs to, counted from the input."""
        return {f"backbone.{name}": layer for name, layer in backbone_layers(self.model.backbone).items()}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Set the rates of the next step."""
        scheduler.step(self.trainer.global_step)


class StepSchedule:
    """A schedule whose only state is the number of steps taken.

    Loading a checkpoint keeps the optimizer's momenta and takes everything else (rates, decays, schedule) from the
    config, so a run resumed with another config follows that one from the step it is at. Optimizer states must be
    loaded before, as Lightning does.

    Args:
        schedule: from `build_schedule`.
    """

    def __init__(self, schedule: Scheduler) -> None:
        self.optimizer = schedule.optimizer
        self._schedule = schedule
        self._settings = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        self._num_steps = 0

    def step(self, num_steps: int) -> None:
        """Set the rates of the step after `num_steps` steps."""
        self._num_steps = num_steps
        self._schedule.step_update(num_steps)

    def state_dict(self) -> dict[str, int]:
        """The number of steps taken."""
        return {"num_steps": self._num_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Replace what a checkpoint's optimizer states say of rates and decays by the config's values."""
        for group, settings in zip(self.optimizer.param_groups, self._settings, strict=True):
            group.update(settings)
        self.step(state["num_steps"])


def parameter_groups(model: nn.Module, config: OptimizerConfig, layers: Mapping[str, int]) -> list[dict[str, Any]]:
    """Groups of the trained parameters, for AdamW and timm's schedules, which heed `lr_scale`.

    What lies on top of the backbone comes first, at the full rate; layer d of a backbone of D layers has
    `backbone_lr_scale * layer_decay ** (D - d)` times the rate.

    Args:
        model: a network.
        config: rates and decays.
        layers: of the parameters of its backbone, by name; those of all others are on top.
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
    """Names of parameters without decay, as timm's models give them."""
    return {name for part in model.modules() for name in getattr(part, "no_weight_decay", set)()}


def build_schedule(optimizer: Optimizer, config: OptimizerConfig, total_steps: int, num_epochs: int) -> Scheduler:
    """A schedule of timm's that is stepped with the optimizer and ends with the run.

    Args:
        optimizer: with groups of `parameter_groups`.
        config: which schedule.
        total_steps: of the whole run.
        num_epochs: of the whole run.

    Raises:
        ConfigError: arguments that the schedule doesn't take.
    """
    warmup = round(total_steps * config.warmup_fraction)
    steps_per_epoch = max(1, total_steps // num_epochs)
    try:
        schedule, _ = create_scheduler_v2(
            optimizer,
            config.schedule,
            num_epochs=max(1, total_steps - warmup) / steps_per_epoch,
            warmup_epochs=warmup / steps_per_epoch,
            # The first step has a rate already, as every further one has one more share of the peak.
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
    """Factor of the learning rate at a step: linear up to 1, then half a cosine down to 0 at `total`."""
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
    if not 0 < config.layer_decay <= 1 or not 0 <= config.warmup_fraction < 1:
        raise ConfigError(
            "expected optim.layer_decay above 0 and at most 1 and optim.warmup_fraction from 0 to below 1, got "
            f"{config.layer_decay:g} and {config.warmup_fraction:g}"
        )
    if config.schedule not in _SCHEDULES:
        raise ConfigError(f"optim.schedule must be one of {', '.join(_SCHEDULES)}, got {config.schedule}")
    # Arguments that no length of a run would make fit are refused before anything is read.
    build_schedule(AdamW([torch.zeros(1, requires_grad=True)], lr=config.lr), config, 10_000, num_epochs=100)


@dataclass(kw_only=True)
class ClassificationOptimConfig(OptimizerConfig):
    """Optimizer, schedule and loss.

    Attributes:
        label_smoothing: share of the target that all classes have in common.
        class_weights: one factor a class in the loss of classes.
    """

    lr: float = 5e-4
    label_smoothing: float = 0.0
    class_weights: list[float] | None = None


def check_classification_loss(config: ClassificationOptimConfig, num_classes: int) -> None:
    """Refuse values that no training can go with.

    Raises:
        ConfigError: smoothing out of range, or another number of weights than of classes.
    """
    if not 0 <= config.label_smoothing < 1:
        raise ConfigError(f"expected optim.label_smoothing from 0 to below 1, got {config.label_smoothing:g}")
    if config.class_weights is not None and len(config.class_weights) != num_classes:
        raise ConfigError(
            f"optim.class_weights must give one weight a class, got {len(config.class_weights)} for {num_classes}"
        )
