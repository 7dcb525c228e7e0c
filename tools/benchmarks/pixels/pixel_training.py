"""Training of a model under a budget of steps or of processor time, and the curve of its bits per dimension."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pixel_model import PixelTransformer, bits_per_dim
from pixel_tiles import TileSource
from torch import Tensor

from perf_vit.tasks.optim import warmup_cosine

__all__ = ["Budget", "train_model"]

_WARMUP = 0.1
# Parts of a budget, in which the schedule counts.
_PARTS = 10_000


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long a model is trained.

    Attributes:
        steps: Training steps.
        cpu_s: Processor seconds of training, tests not counted; None for `steps`.
        num_tests: Number of tests in between, at equal distances.
    """

    steps: int
    cpu_s: float | None = None
    num_tests: int = 12

    def spent(self, steps: int, cpu_s: float) -> float:
        """Return the share of the budget that is spent, 1 or more at its end."""
        return steps / self.steps if self.cpu_s is None else cpu_s / self.cpu_s


def train_model(
    model: PixelTransformer, tiles: TileSource, test: Tensor, budget: Budget, *, batch_size: int, lr: float, seed: int
) -> Iterator[dict[str, float]]:
    """Train a model, and yield step, CPU seconds and bits per dimension in between.

    The learning rate rises to `lr` and falls to 0 by the share of the budget that is spent.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    step, seconds, tests = 0, 0.0, 0
    while tests < budget.num_tests:
        values = tiles.draw("train", batch_size, (seed, step))
        start = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup_cosine(int(_PARTS * budget.spent(step, seconds)), _PARTS, _WARMUP)
        loss = bits_per_dim(model(values), values)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds += time.process_time() - start
        step += 1
        due = int(budget.num_tests * min(1.0, budget.spent(step, seconds)) + 1e-6)
        if due > tests:
            tests = due
            yield {"step": step, "cpu_s": seconds, "train": loss.item(), "test": tested(model, test)}


@torch.inference_mode()
def tested(model: PixelTransformer, test: Tensor) -> float:
    """Return the mean bits per dimension of test tiles, one at a time."""
    bits = [bits_per_dim(model(tile[None]), tile[None]).item() for tile in test]
    return sum(bits) / len(bits)
