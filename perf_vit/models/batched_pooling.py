"""Attention pooling of any number of windows with gradients through their encoder, in the memory of a batch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["ReadWindows", "pool_in_batches"]

ReadWindows = Callable[[], Generator[tuple[Tensor, Tensor | None], None, None]]
"""Reads the same windows at each call, in the same batches: pixels [n, C, H, W], and valid ones [n, H, W] or None."""


def pool_in_batches(
    score: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]],
    parameters: Sequence[Tensor],
    read: ReadWindows,
    *,
    seed: int | None = None,
) -> Tensor:
    """Compute sum_k a_k h_k with a = softmax(s) over all windows, of which memory holds a batch at a time.

    The forward pass computes features h and scores s of each batch without gradients, and adds them to running sums.
    The backward pass reads all windows again, and computes each batch again with gradients: those of the pooled
    features g give dL/dh_k = a_k g and dL/ds_k = a_k (h_k - pooled)^T g, for which the sums suffice. Neither pixels nor
    features of all windows are stored. Autocast is the same in both passes.

    Args:
        score: Function from windows [n, C, H, W] and their valid pixels to h, [n, D], and s, [n].
        parameters: Parameters that `score` depends on, all on one device; they get the gradients.
        read: Reader of the windows, at least one.
        seed: Seed of random operations in `score`; a batch draws the same numbers in both passes. None if there are
            none.

    Returns:
        Pooled features, [D], in float32 at least.
    """
    pooled: Tensor = _PooledBatches.apply(_Passes(score, parameters, read, seed), *parameters)
    return pooled


class _PooledBatches(torch.autograd.Function):
    """Pooling whose backward pass computes the batches again."""

    @staticmethod
    def forward(ctx: Any, passes: _Passes, *parameters: Tensor) -> Tensor:
        pooled, log_sum = passes.sums()
        ctx.passes = passes
        # Parameters are saved to notice changes between the passes.
        ctx.save_for_backward(pooled, log_sum, *parameters)
        return pooled

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # The result of this function is a constant here.
        pooled, log_sum = (each.detach() for each in ctx.saved_tensors[:2])
        return None, *ctx.passes.gradients(pooled, log_sum, gradients[0])


class _Passes:
    """Two passes over the same windows."""

    def __init__(
        self,
        score: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]],
        parameters: Sequence[Tensor],
        read: ReadWindows,
        seed: int | None,
    ) -> None:
        self.score = score
        self.parameters = tuple(parameters)
        self.read = read
        self.seed = seed
        self.device, self.dtype = parameters[0].device, parameters[0].dtype
        kind = self.device.type
        self.is_autocast, self.autocast_dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def sums(self) -> tuple[Tensor, Tensor]:
        """Return the pooled features, [D], and the logarithm of the sum of exp(s)."""
        found = None
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            for hidden, scores in self._batches():
                highest = scores.amax() if found is None else torch.maximum(found[0], scores.amax())
                weights = (scores - highest).exp()
                total, pooled = weights.sum(), weights @ hidden
                if found is not None:
                    shrunk = (found[0] - highest).exp()
                    total, pooled = total + shrunk * found[1], pooled + shrunk * found[2]
                found = highest, total, pooled
        assert found is not None, "there must be a window"
        highest, total, pooled = found
        return pooled / total, highest + total.log()

    def gradients(self, pooled: Tensor, log_sum: Tensor, gradient: Tensor) -> list[Tensor | None]:
        """Return the gradient of each parameter, None for unused ones.

        Args:
            pooled: First result of `sums`.
            log_sum: Second result of `sums`.
            gradient: Gradient of the pooled features, [D].
        """
        found: list[Tensor | None] = [None] * len(self.parameters)
        with torch.enable_grad(), torch.autocast(self.device.type, enabled=False):
            for hidden, scores in self._batches():
                share = (scores - log_sum).exp() @ (hidden - pooled)
                parts = torch.autograd.grad(share, self.parameters, gradient, allow_unused=True)
                for index, part in enumerate(parts):
                    total = found[index]
                    if total is not None and part is not None:
                        total += part
                    elif part is not None:
                        # It may be a view of a single number.
                        found[index] = part.clone()
        return found

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features and scores of each batch, in float32 at least."""
        gpus = [self.device] if self.device.type == "cuda" else []
        with closing(self.read()) as batches:
            for index, (windows, valid) in enumerate(batches):
                inputs = windows.to(self.device, self.dtype), None if valid is None else valid.to(self.device)
                is_random = self.seed is not None
                with torch.random.fork_rng(gpus, enabled=is_random), self._autocast():
                    if self.seed is not None:
                        torch.manual_seed(_batch_seed(self.seed, index))
                    hidden, scores = self.score(*inputs)
                wide = torch.promote_types(hidden.dtype, torch.float32)
                yield hidden.to(wide), scores.to(wide)

    def _autocast(self) -> torch.autocast:
        """Return the autocast of the forward pass."""
        # The cache would hand casts without gradient to the second pass.
        kind, dtype = self.device.type, self.autocast_dtype
        return torch.autocast(kind, dtype, enabled=self.is_autocast, cache_enabled=False)


def _batch_seed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0] >> 1)
