"""What a student is asked to reproduce of its teacher: each block's change of the tokens, or the final tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.layers.linearized_attention import LinearizedAttention
from perf_vit.models.valid_tokens import forward_tokens, key_mask

__all__ = ["BlockCall", "kept_tokens", "match_blocks", "recorded_blocks", "token_loss"]


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
