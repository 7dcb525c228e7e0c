"""Transformer blocks and MLPs that process their tokens in chunks, which saves memory."""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.fx
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from perf_vit.layers.linearized_attention import LinearizedAttention
from perf_vit.ops.workers import each_in_threads, num_workers

__all__ = ["chunk_modules", "finish_block", "to_chunked"]

# Chunk sizes whose queries, keys and values, or hidden layer of an MLP, fit in a processor's cache.
_BLOCK_TOKENS = 1024
_MLP_TOKENS = 2048

# Smaller chunks take more time than they save.
_LEAST_TOKENS = 256

# On other devices chunks only limit memory, and each chunk costs launches: an MLP of ViT-L holds 2 GiB in float32.
_DEVICE_TOKENS = 2**17


def chunk_modules(model: nn.Module) -> None:
    """Replace the MLPs and converted pre-norm blocks of a model by versions that process tokens in chunks.

    Without gradients, blocks process 1,024 tokens at a time and MLPs 2,048; on GPUs both process 131,072. Only
    attention mixes tokens, so results change by rounding at most. Chunking saves the memory of norms, projections,
    hidden layers and residuals, and the time to access it. Modules in training mode, and those with forward hooks on a
    submodule, which expect all tokens in one call, run as in timm.
    """
    made: dict[int, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            chunked = made.setdefault(id(child), to_chunked(child))
            if chunked is not child:
                setattr(parent, name, chunked)


def to_chunked(module: nn.Module) -> nn.Module:
    """Return the chunked version of a block or MLP, with the same submodules; return any other module unchanged."""
    chunked = _CHUNKED.get(type(module))
    is_softmax = hasattr(module, "attn") and not isinstance(module.attn, LinearizedAttention)
    return module if chunked is None or is_softmax else chunked(module)


class _Chunked(nn.Module):
    """Replacement of a module, of a subclass of its class, that takes over its submodules, hooks and mode."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(module.__dict__)

    def _use_chunks(self, x: Any, num_tokens: int) -> bool:
        # In training mode, dropout is drawn once for all tokens: the first pass of a checkpoint runs without gradients
        # and must draw the same as its recomputation.
        return not (
            isinstance(x, torch.fx.Proxy)
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
            or torch.is_grad_enabled()
            or self.training
            or x.ndim != 3
            or x.shape[1] <= _num_tokens(x, num_tokens)
            or any(part._forward_hooks or part._forward_pre_hooks for part in self.modules() if part is not self)
        )


class _ChunkedMlp(_Chunked):
    def forward(self, x: Any) -> Tensor:
        whole: Callable[[Tensor], Tensor] = super().forward
        if not self._use_chunks(x, _MLP_TOKENS):
            return whole(x)
        return _apply_in_chunks(lambda tokens: whole(x[:, tokens]), x, _num_tokens(x, _MLP_TOKENS))


class _ChunkedPlainMlp(_ChunkedMlp, Mlp):
    pass


class _ChunkedGluMlp(_ChunkedMlp, GluMlp):
    pass


class _ChunkedSwiGLU(_ChunkedMlp, SwiGLU):
    pass


class _ChunkedPreNorm(_Chunked):
    """Pre-norm block with a `LinearizedAttention`, chunked before and after the attention."""

    # Arguments that timm's block passes to its attention, in order.
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
        if not (_is_chunkable(self.attn) and self._use_chunks(x, _BLOCK_TOKENS)):
            whole: Tensor = super().forward(x, *arguments, **options)
            return whole
        options = dict(zip(self._options, arguments, strict=False)) | options
        rope, size = options.pop("rope", None), max(1, _num_tokens(x, _BLOCK_TOKENS) // x.shape[0])
        packed = _apply_in_chunks(lambda tokens: self.attn.pack(self.norm1(x[:, tokens])), x, size)
        attended = self.attn.attend(*self.attn.unpack(packed, rope), **options)
        # Free the memory for the second half of the block.
        del packed
        return _apply_in_chunks(lambda tokens: self._after_attention(x[:, tokens], attended[:, tokens]), x, size)

    @abstractmethod
    def _after_attention(self, x: Tensor, out: Tensor) -> Tensor:
        """Apply projection, residual and MLP to some tokens, [B, n, C], and their attended values, [B, n, H x D]."""


def finish_block(block: Block | EvaBlock, x: Tensor, attended: Tensor) -> Tensor:
    """Apply what follows the attention of a pre-norm block in evaluation mode: residual, norm and MLP.

    Args:
        block: Block of timm.
        x: Input of the block, [B, n, C]; any tokens of the image.
        attended: Output of its attention for these tokens, [B, n, C].

    Returns:
        Output of the block, [B, n, C].
    """
    if isinstance(block, Block):
        x = x + block.ls1(attended)
        return x + block.ls2(block.mlp(block.norm2(x)))
    gamma_1, gamma_2 = block.gamma_1, block.gamma_2
    x = x + (attended if gamma_1 is None else gamma_1 * attended)
    grown = block.mlp(block.norm2(x))
    return x + (grown if gamma_2 is None else gamma_2 * grown)


class _ChunkedBlock(_ChunkedPreNorm, Block):
    _options = ("attn_mask", "is_causal")

    def _after_attention(self, x: Tensor, out: Tensor) -> Tensor:
        return finish_block(self, x, self.attn.finish(out))


class _ChunkedEvaBlock(_ChunkedPreNorm, EvaBlock):
    _options = ("rope", "attn_mask", "is_causal")

    def _after_attention(self, x: Tensor, out: Tensor) -> Tensor:
        return finish_block(self, x, self.attn.finish(out))


_CHUNKED: dict[type[nn.Module], type[_Chunked]] = {
    Mlp: _ChunkedPlainMlp,
    GluMlp: _ChunkedGluMlp,
    SwiGLU: _ChunkedSwiGLU,
    Block: _ChunkedBlock,
    EvaBlock: _ChunkedEvaBlock,
}


def _num_tokens(x: Tensor, on_cpu: int) -> int:
    """Return the number of tokens of a chunk on the device of `x`."""
    return on_cpu if x.device.type == "cpu" else _DEVICE_TOKENS


def _apply_in_chunks(function: Callable[[slice], Tensor], x: Tensor, size: int) -> Tensor:
    """Apply a function of token slices, which returns [B, n, C], to all tokens of [B, N, ..]; return [B, N, C]."""
    made: list[Tensor] = []
    one_at_a_time = threading.Lock()

    def write(tokens: slice) -> None:
        part = function(tokens)
        with one_at_a_time:
            if not made:
                made.append(part.new_empty(*x.shape[:2], part.shape[-1]))
        made[0][:, tokens] = part

    number = num_workers(x)
    chunks = _chunks(x.shape[1], size, number)
    each_in_threads(write, chunks, number if len(chunks) >= number else 1)
    return made[0]


def _is_chunkable(attention: Any) -> bool:
    # A replaced attention module or forward method must be called as it is.
    return isinstance(attention, LinearizedAttention) and "forward" not in vars(attention) and attention.is_packed


def _chunks(length: int, size: int, num_threads: int) -> list[slice]:
    """Split tokens into chunks of one size, of which each of some threads gets as many.

    Threads hold a chunk each at the same time, so those of more than four threads are smaller.

    Args:
        length: Number of tokens.
        size: Largest number of tokens in a chunk.
        num_threads: Number of threads; where it leaves a thread fewer than 256 tokens, chunks are for one thread.
    """
    if num_threads * _LEAST_TOKENS > length:
        num_threads = 1
    size = max(min(size, _LEAST_TOKENS), min(size, 4 * size // num_threads))
    size = math.ceil(length / (num_threads * math.ceil(length / (num_threads * size))))
    return [slice(start, start + size) for start in range(0, length, size)]
