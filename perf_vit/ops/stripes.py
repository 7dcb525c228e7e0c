"""Attention over an image whose rows several processes share: what each holds, and what all compute together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from perf_vit.ops.clusters import SAMPLE_TOKENS, Sample, sample_step

__all__ = ["Reduce", "Stripe", "sum_together"]


class Reduce(Protocol):
    """Element-wise reduction of a tensor over processes."""

    def __call__(self, values: Tensor, operation: Literal["sum", "max"]) -> Tensor:
        """Return the sum or maximum of a tensor over all processes, which call it with tensors of one shape.

        Sums have a gradient: the sum of the gradients of all processes.
        """


def sum_together(reduce: Reduce, *tensors: Tensor) -> list[Tensor]:
    """Return the sums of tensors of one dtype over all processes, which wait for each other once."""
    sums = reduce(torch.cat([each.flatten() for each in tensors]), "sum")
    parts = torch.split(sums, [each.numel() for each in tensors])
    return [part.view(each.shape) for part, each in zip(parts, tensors, strict=True)]


@dataclass(eq=False)
class Stripe:
    """Rows of an image's tokens that this process holds, together with a copy of the prefix tokens.

    The stripes of all processes are one image: the loss of the image is the sum of what each computes from its stripe.
    Keys of prefix tokens count in the first process only, so that sums over all of them hold each key once, and the
    gradients of the copies add up to that of the tokens.

    Attributes:
        reduce: Sum or maximum over the processes that share the image.
        rank: Index of this process.
        number: Number of processes.
        grid: Rows and columns of the whole image.
        first_row: First row of this stripe.
    """

    reduce: Reduce
    rank: int
    number: int
    grid: tuple[int, int]
    first_row: int = 0

    def first_key(self, num_prefix_tokens: int) -> int:
        """Return the index of the first token of this process whose key counts."""
        return num_prefix_tokens if self.rank else 0

    def exact(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """Attend exactly with a few queries, [B, H, P, D], to the keys of all processes, [B, H, P, Dv].

        Args:
            q: Queries, equal in all processes.
            k: Keys of this process that count, [B, H, n, D].
            v: Their values, [B, H, n, Dv].
            key_mask: [B, n] bool, False for keys to ignore; each image has other keys.
        """
        if not q.shape[2]:
            return v[:, :, :0]
        dtype = torch.promote_types(q.dtype, torch.float32)
        logits = (q.to(dtype) * q.shape[-1] ** -0.5) @ k.to(dtype).mT
        if key_mask is not None:
            logits = logits.masked_fill(~key_mask[:, None, None], torch.finfo(dtype).min)
        weights = (logits - self.reduce(logits.detach().amax(dim=-1, keepdim=True), "max")).exp()
        # Numerators and denominators cross together.
        sums = torch.cat([weights @ v.to(dtype), weights.sum(dim=-1, keepdim=True)], dim=-1)
        sums = self.reduce(sums, "sum")
        return (sums[..., :-1] / sums[..., -1:]).to(q.dtype)

    def sample(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Sample:
        """Take the tokens that `sample_tokens` takes of the whole image.

        Args:
            q: Queries of this stripe, [B, H, n, D].
            k: Keys, [B, H, n, D].
            v: Values, [B, H, n, Dv].
            valid: Tokens that count, [B, n] bool; None where all of the image do.
        """
        length = self.grid[0] * self.grid[1]
        if valid is None:
            step = int(sample_step(length))
            wanted = (torch.arange(length // step, device=q.device) * step - self.first_row * self.grid[1])[None]
            q, k, v = self._gathered((q, k, v), wanted, (wanted >= 0) & (wanted < q.shape[2]))
            return Sample(q, k, v)
        seen = valid.sum(dim=1, keepdim=True)
        of_all = self.reduce(
            torch.cat([seen if i == self.rank else 0 * seen for i in range(self.number)], dim=1), "sum"
        )
        total, above = of_all.sum(dim=1, keepdim=True), of_all[:, : self.rank].sum(dim=1, keepdim=True)
        steps, places = sample_step(total), torch.arange(min(length, SAMPLE_TOKENS), device=q.device)
        wanted, counts = places * steps - above, places < total // steps
        seen_first = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
        indices = seen_first.gather(1, wanted.clamp(0, q.shape[2] - 1))
        q, k, v = self._gathered((q, k, v), indices, counts & (wanted >= 0) & (wanted < seen))
        return Sample(q, k, v, counts[:, None, :, None].to(q.dtype))

    def _gathered(self, tokens: tuple[Tensor, ...], indices: Tensor, own: Tensor) -> list[Tensor]:
        """Return tokens, [B, H, n, C] each, of which each process has those at `indices`, [B or 1, n], if `own`."""
        dtype = torch.promote_types(tokens[1].dtype, torch.float32)
        at, own = indices.clamp(0, tokens[0].shape[2] - 1)[:, None, :, None], own[:, None, :, None]
        few = torch.cat([x.take_along_dim(at, 2).to(dtype).where(own, 0.0) for x in tokens], dim=-1)
        return list(torch.split(self.reduce(few, "sum"), [x.shape[-1] for x in tokens], dim=-1))
