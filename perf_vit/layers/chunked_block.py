"""Transformer blocks of which only what attention needs exists for all tokens at once."""

from __future__ import annotations

import threading
import weakref
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.fx
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from perf_vit.layers.converted_attention import ConvertedAttention
from perf_vit.layers.hooked import is_hooked

__all__ = ["chunk_blocks"]

# Queries, keys and values of so many tokens, or their MLP's hidden layer, stay in a processor's cache.
_CHUNK_TOKENS = 1024


class _HandedOn(threading.local):
    """Memory that a block leaves for the one that takes its tokens next, as long as there are these tokens."""

    def __init__(self) -> None:
        self.tokens: Callable[[], Any] = lambda: None
        self.memory: list[Tensor] = []

    def put(self, tokens: Tensor, memory: Tensor) -> None:
        self.memory = memory_of_these = [memory]

        def let_go(_: object) -> None:
            memory_of_these.clear()

        self.tokens = weakref.ref(tokens, let_go)

    def take(self, tokens: Tensor) -> Tensor | None:
        """The memory, if the block before gave these tokens; whoever else gave them, it is let go."""
        memory = self.memory.pop() if self.memory and self.tokens() is tokens else None
        self.memory = []
        return memory


_handed_on = _HandedOn()


class _InChunks(nn.Module):
    """A pre-norm block with a `ConvertedAttention`: the norm and projections before it, and all that comes after it.

    Attributes:
        hands_on: whether a block comes after it that takes its memory.
    """

    # What timm's block hands on to its attention, in the order of its own arguments.
    _options: ClassVar[tuple[str, ...]]
    hands_on: bool = True
    norm1: Any
    attn: Any
    ls1: Any
    ls2: Any
    norm2: Any
    mlp: Any
    gamma_1: Any
    gamma_2: Any

    def forward(self, x: Any, *arguments: Any, **options: Any) -> Tensor:
        if not self._goes_in_chunks(x):
            whole: Tensor = super().forward(x, *arguments, **options)
            return whole
        options = dict(zip(self._options, arguments, strict=False)) | options
        rope = options.pop("rope", None)
        packed = _joined(lambda tokens: self.attn.pack(self.norm1(x[:, tokens])), x, _handed_on.take(x))
        attended = self.attn.attend(*self.attn.unpack(packed, rope), **options)
        out = _joined(lambda tokens: self._after_attention(x[:, tokens], attended[:, tokens]), x)
        if self.hands_on:
            # The next block writes over it: new memory takes a third of the time of what is computed into it.
            _handed_on.put(out, packed)
        return out

    @abstractmethod
    def _after_attention(self, x: Tensor, out: Tensor) -> Tensor:
        """Projection, residual and MLP of some tokens, [B, n, C], and what was attended for them, [B, n, H x D]."""

    def _goes_in_chunks(self, x: Any) -> bool:
        # Dropped paths are drawn once for all tokens of a sample, a hook should see its module called once, and who
        # puts another attention in place, or another forward, wants that to be called.
        return _is_ours(self.attn) and not (
            isinstance(x, torch.fx.Proxy)
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
            or torch.is_grad_enabled()
            or self.training
            or x.ndim != 3
            or x.shape[1] <= _CHUNK_TOKENS
            or not self.attn.is_packed
            or is_hooked(self)
        )


class _ChunkedBlock(_InChunks, Block):
    _options = ("attn_mask", "is_causal")

    def _after_attention(self, x: Tensor, out: Tensor) -> Tensor:
        x = x + self.ls1(self.attn.finish(out))
        return x + self.ls2(self.mlp(self.norm2(x)))


class _ChunkedEvaBlock(_InChunks, EvaBlock):
    _options = ("rope", "attn_mask", "is_causal")

    def _after_attention(self, x: Tensor, out: Tensor) -> Tensor:
        attended, gamma_1, gamma_2 = self.attn.finish(out), self.gamma_1, self.gamma_2
        x = x + (attended if gamma_1 is None else gamma_1 * attended)
        grown = self.mlp(self.norm2(x))
        return x + (grown if gamma_2 is None else gamma_2 * grown)


_CHUNKED: dict[type[nn.Module], type[nn.Module]] = {Block: _ChunkedBlock, EvaBlock: _ChunkedEvaBlock}


def chunk_blocks(model: nn.Module) -> None:
    """Let pre-norm blocks of a converted model go through 1,024 tokens at a time wherever no gradient is asked for.

    Attention alone joins tokens, so results change by rounding at most. What is saved is memory for norms, projections,
    scales and residuals, and the time to bring it in from there. Blocks become instances of a subclass, with the same
    parameters under the same names. Those in training mode, or with a hook on one of their modules (`is_hooked`), run
    as timm has them.
    """
    last: _InChunks | None = None
    for module in model.modules():
        chunked = _CHUNKED.get(type(module))
        if chunked is not None and isinstance(module.attn, ConvertedAttention):
            module.__class__ = chunked
            assert isinstance(module, _InChunks)
            last = module
    if last is not None:
        # What comes out of a model's blocks may be kept for long.
        last.hands_on = False


def _joined(function: Callable[[slice], Tensor], x: Tensor, out: Tensor | None = None) -> Tensor:
    """What a function gives for the tokens of each chunk, [B, n, C], as one tensor, [B, N, C].

    Args:
        function: of the places of some tokens.
        x: tokens, [B, N, ..].
        out: memory to write to, if it is of the right kind.
    """
    for tokens in _chunks(x.shape[1], max(1, _CHUNK_TOKENS // x.shape[0])):
        part = function(tokens)
        if tokens.start == 0:
            shape = (*x.shape[:2], part.shape[-1])
            if out is None or out.shape != shape or not _alike(out, part):
                out = part.new_empty(shape)
        assert out is not None
        out[:, tokens] = part
    assert out is not None
    return out


def _is_ours(attention: Any) -> bool:
    return isinstance(attention, ConvertedAttention) and "forward" not in vars(attention)


def _alike(x: Tensor, y: Tensor) -> bool:
    return (x.dtype, x.device, x.is_inference()) == (y.dtype, y.device, y.is_inference())


def _chunks(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, start + size)
