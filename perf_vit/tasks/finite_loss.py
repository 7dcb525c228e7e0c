"""End of training at a loss or weights that are no numbers, with the names of the samples of the batch."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from perf_vit.data.base import EpochSampler
from perf_vit.distributed import sample_rank_and_world_size
from perf_vit.errors import NotFiniteError

__all__ = ["FiniteLoss", "samples_of"]

_NUM_NAMED = 3

# On GPUs, each look waits for the device, and with several processes for all of them.
_EVERY_BATCHES = 20

# Batch index that stands for no bad batch, above all others.
_NONE = 2**62


class FiniteLoss(Callback):
    """Stops training at a loss that is infinite or not a number, before validation or a checkpoint could save a model.

    In one process on a CPU each batch is checked. On GPUs and in several processes a flag is looked at every 20
    batches, at the end of an epoch and before each checkpoint, which names the first bad batch of all processes all the
    same.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget the last epoch."""
        self._first = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at the loss of a training batch."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._note(loss.detach(), batch_idx)
        if (batch_idx + 1) % self.num_between(trainer) == 0:
            self._raise(trainer, "training")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Look at the losses of the last batches."""
        self._raise(trainer, "training")

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Look at the losses since the last look, and at the weights, before a checkpoint replaces a good one.

        Finite losses don't keep gradients from being infinite.
        """
        if not trainer.training:
            return
        self._raise(trainer, "training")
        if _anywhere(trainer, ~_all_finite(pl_module)):
            raise NotFiniteError(
                f"the weights after step {trainer.global_step} are not finite numbers (NaN or inf), so the model is "
                "useless, although its losses were finite; no checkpoint of them is written; lower optim.lr, or train "
                "with trainer.precision bf16 or 32"
            )

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at the losses of training before the model is validated, and begin with those of validation."""
        if not trainer.sanity_checking and trainer.train_dataloader is not None:
            self._raise(trainer, "training")
        self._first = None

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Look at the loss of a validation batch, which the task keeps in `counted_loss`."""
        loss = getattr(pl_module, "counted_loss", None)
        if isinstance(loss, Tensor):
            self._note(loss.detach(), batch_idx)
            pl_module.counted_loss = None

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Look at the losses of validation."""
        self._raise(trainer, "validation")
        self._first = None

    def num_between(self, trainer: Any) -> int:
        """Return the number of batches between looks at the losses."""
        return 1 if trainer.world_size == 1 and trainer.strategy.root_device.type == "cpu" else _EVERY_BATCHES

    def _note(self, loss: Tensor, batch_idx: int) -> None:
        if self._first is None:
            self._first = torch.full((), _NONE, device=loss.device)
        is_first = ~torch.isfinite(loss).all() & (self._first == _NONE)
        self._first = torch.where(is_first, batch_idx, self._first)

    def _raise(self, trainer: Any, part: str) -> None:
        own = number = _NONE if self._first is None else int(self._first)
        if trainer.world_size > 1:
            first = torch.tensor(own, device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(first, reduce_op="min"))
        if number == _NONE:
            return
        is_training = part == "training"
        loader, epoch = (
            (trainer.train_dataloader, trainer.current_epoch) if is_training else (trainer.val_dataloaders, 0)
        )
        names = samples_of(loader, number, epoch) if number == own else ["samples of another process"]
        samples = f", of {' and '.join(names)}," if names else ""
        raise NotFiniteError(
            f"the {part} loss of batch {number + 1}{samples} is not a finite number (NaN or inf), so the model is "
            "useless; look at these samples, lower optim.lr, or train with trainer.precision bf16 or 32"
        )


def _all_finite(model: nn.Module) -> Tensor:
    """Return whether all trained weights are finite, those of this process if they are sharded."""
    # Sharded weights are DTensors.
    weights: list[Any] = [weight.detach() for weight in model.parameters() if weight.requires_grad]
    weights = [each.to_local() if hasattr(each, "to_local") else each for each in weights]
    return torch.stack([torch.isfinite(each).all() for each in weights]).all() if weights else torch.tensor(True)


def _anywhere(trainer: Any, flag: Tensor) -> bool:
    """Return whether a flag is set in any process."""
    if trainer.world_size > 1:
        flag = trainer.strategy.reduce(flag.int().to(trainer.strategy.root_device), reduce_op="max")
    return bool(flag)


def samples_of(loader: Any, batch_idx: int, epoch: int) -> list[str]:
    """Name the first samples of a batch, as far as the dataset can.

    Args:
        loader: Loader of the batch.
        batch_idx: Index of the batch in its epoch.
        epoch: Index of the epoch.
    """
    dataset, size = getattr(loader, "dataset", None), getattr(loader, "batch_size", None)
    if dataset is None or not isinstance(size, int):
        return []
    indices = list(_indices(loader.sampler, batch_idx * size, size, epoch))
    named = [name for index in indices[:_NUM_NAMED] if (name := _described(dataset, index)) is not None]
    more = len(indices) - _NUM_NAMED
    return [*named, f"{more} more"] if named and more > 0 else named


def _indices(sampler: Any, start: int, size: int, epoch: int) -> Iterator[int]:
    if isinstance(sampler, EpochSampler):
        rank, world_size = sample_rank_and_world_size()
        first = epoch * sampler.length + rank
        return iter(range(first, first + len(sampler) * world_size, world_size)[start : start + size])
    return islice(iter(sampler), start, start + size)


def _described(dataset: Any, index: int) -> str | None:
    if isinstance(dataset, ConcatDataset):
        part = bisect.bisect_right(dataset.cumulative_sizes, index)
        before = dataset.cumulative_sizes[part - 1] if part else 0
        return _described(dataset.datasets[part], index - before)
    describe = getattr(dataset, "describe", None)
    return None if describe is None else str(describe(index))
