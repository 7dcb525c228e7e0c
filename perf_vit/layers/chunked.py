"""Transformer blocks and MLPs that go through their tokens in chunks, so that less exists for all tokens at once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.fx
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from perf_vit.layers.linearized_attention import LinearizedAttention

__all__ = ["chunk_modules", "in_chunks"]

# Queries, keys and values of so many tokens, or the hidden layer of an MLP, stay in a processor's cache.
_BLOCK_TOKENS = 1024
_MLP_TOKENS = 2048


def chunk_modules(model: nn.Module) -> None:
    """Replace the MLPs and converted pre-norm blocks of a model by ones that go through their tokens in chunks.

    Blocks take 1,024 tokens at a time and MLPs 2,048, wherever no gradient is asked for. Attention alone joins tokens,
    so results change by rounding at most; memory for norms, projections, hidden layers and residuals is saved, and the
    time to bring them in from there. Modules in training mode, or with a forward hook on one of their parts, which
    should see all tokens in one call, run as timm has them.
    """
    made: dict[int, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            chunked = made.setdefault(id(child), in_chunks(child))
            if chunked is not child:
                setattr(parent, name, chunked)


def in_chunks(module: nn.Module) -> nn.Module:
    """The form of a block or MLP that goes in chunks, with the same parts; any other module itself."""
    chunked = _CHUNKED.get(type(module))
    is_softmax = hasattr(module, "attn") and not isinstance(module.attn, LinearizedAttention)
    return module if chunked is None or is_softmax else chunked(module)


class _InChunks(nn.Module):
    """Takes the place of a module of the class that it inherits from, with its parts, hooks and mode."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(module.__dict__)

    def _goes_in_chunks(self, x: Any, num_tokens: int) -> bool:
        # Dropout and dropped paths are drawn once for all tokens, the same whether a gradient is asked for or not: the
        # first pass of a checkpoint asks for none.
        return not (
            isinstance(x, torch.fx.Proxy)
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
            or torch.is_grad_enabled()
            or self.training
            or x.ndim != 3
            or x.shape[1] <= num_tokens
            or any(part._forward_hooks or part._forward_pre_hooks for part in self.modules() if part is not self)
        )


class _ChunkedMlp(_InChunks):
    def forward(self, x: Any) -> Tensor:
        whole: Callable[[Tensor], Tensor] = super().forward
        if not self._goes_in_chunks(x, _MLP_TOKENS):
            return whole(x)
        return _joined(lambda tokens: whole(x[:, tokens]), x, _MLP_TOKENS)


class _ChunkedPlainMlp(_ChunkedMlp, Mlp):
    pass


class _ChunkedGluMlp(_ChunkedMlp, GluMlp):
    pass


class _ChunkedSwiGLU(_ChunkedMlp, SwiGLU):
    pass


class _ChunkedPreNorm(_InChunks):
    """A pre-norm block with a `LinearizedAttention`: in chunks before the attention and after it."""

    # Arguments that timm's block passes to its attention, in its own order.
    _options: ClassVar[tuple[str, ...]]
    norm1: Any
    attn: Any
    ls1: Any
    ls2: Any
    norm2: Any
    mlp: Any
    gamma_1: Any
    gamma_2: Any

    def forward(self, x: Any, *arguments: Any, **options: Any) -> Tensor:
        if not (_is_ours(self.attn) and self._goes_in_chunks(x, _BLOCK_TOKENS)):
            whole: Tensor = super().forward(x, *arguments, **options)
            return whole
        options = dict(zip(self._options, arguments, strict=False)) | options
        rope, size = options.pop("rope", None), max(1, _BLOCK_TOKENS // x.shape[0])
        packed = _joined(lambda tokens: self.attn.pack(self.norm1(x[:, tokens])), x, size)
        attended = self.attn.attend(*self.attn.unpack(packed, rope), **options)
        # Its memory is free for what follows.
        del packed
        return _joined(lambda tokens: self._after_attention(x[:, tokens], attended[:, tokens]), x, size)

    @abstractmethod
    def _after_attention(self, x: Tensor, out: Tensor) -> Tensor:
        """Projection, residual and MLP of some tokens, [B, n, C], and what was attended for them, [B, n, H x D]."""


class _ChunkedBlock(_ChunkedPreNorm, Block):
    _options = ("attn_mask", "is_causal")

    def _after_attention(self, x: Tensor, out: Tensor) -> Tensor:
        x = x + self.ls1(self.attn.finish(out))
        return x + self.ls2(self.mlp(self.norm2(x)))


class _ChunkedEvaBlock(_ChunkedPreNorm, EvaBlock):
    _options = ("rope", "attn_mask", "is_causal")

    def _after_attention(self, x: Tensor, out: Tensor) -> Tensor:
        attended, gamma_1, gamma_2 = self.attn.finish(out), self.gamma_1, self.gamma_2
        x = x + (attended if gamma_1 is None else gamma_1 * attended)
        grown = self.mlp(self.norm2(x))
        return x + (grown if gamma_2 is None else gamma_2 * grown)


_CHUNKED: dict[type[nn.Module], type[_InChunks]] = {
    Mlp: _ChunkedPlainMlp,
    GluMlp: _ChunkedGluMlp,
    SwiGLU: _ChunkedSwiGLU,
    Block: _ChunkedBlock,
    EvaBlock: _ChunkedEvaBlock,
}


def _joined(function: Callable[[slice], Tensor], x: Tensor, size: int) -> Tensor:
    """Results of a function of the indices of some tokens, [B, n, C], for all tokens of [B, N, ..], as [B, N, C]."""
    out: Tensor | None = None
    for tokens in _chunks(x.shape[1], size):
        part = function(tokens)
        if out is None:
            out = part.new_empty(*x.shape[:2], part.shape[-1])
        out[:, tokens] = part
    assert out is not None
    return out


def _is_ours(attention: Any) -> bool:
    # Whoever puts another attention in place, or another forward, wants that to be called.
    return isinstance(attention, LinearizedAttention) and "forward" not in vars(attention) and attention.is_packed


def _chunks(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, start + size)
