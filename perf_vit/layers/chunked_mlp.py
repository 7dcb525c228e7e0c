"""MLPs whose hidden layer never exists for all tokens at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from perf_vit.layers.hooked import is_hooked

__all__ = ["chunk_mlps"]

# The hidden layer of so many tokens stays in a processor's cache.
_CHUNK_TOKENS = 2048


class _InChunks(nn.Module):
    def forward(self, x: Any) -> Tensor:
        if not self._goes_in_chunks(x):
            out: Tensor = super().forward(x)
            return out
        out = torch.empty_like(x)
        for start in range(0, x.shape[1], _CHUNK_TOKENS):
            tokens = slice(start, start + _CHUNK_TOKENS)
            out[:, tokens] = super().forward(x[:, tokens])
        return out

    def _goes_in_chunks(self, x: Any) -> bool:
        # Dropout is drawn for all tokens at once, the same whether a gradient is asked for or not: a checkpoint's first
        # pass asks for none. A hook should see its module called once, with all tokens.
        return not (
            isinstance(x, torch.fx.Proxy)
            or torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or self.training
            or x.ndim != 3
            or x.shape[1] <= _CHUNK_TOKENS
            or is_hooked(self)
        )


class _ChunkedMlp(_InChunks, Mlp):
    pass


class _ChunkedGluMlp(_InChunks, GluMlp):
    pass


class _ChunkedSwiGLU(_InChunks, SwiGLU):
    pass


_CHUNKED: dict[type[nn.Module], type[nn.Module]] = {Mlp: _ChunkedMlp, GluMlp: _ChunkedGluMlp, SwiGLU: _ChunkedSwiGLU}


def chunk_mlps(model: nn.Module) -> None:
    """Let a model's MLPs go through 2,048 tokens at a time wherever no gradient is asked for.

    A token's MLP sees that token alone, so results change by rounding at most. What is saved is memory, 8 x C numbers a
    token in a ViT, and the time to bring it in from there. Modules stay what they are: same parameters, same names.
    Those in training mode, or with a hook on one of their modules (`is_hooked`), run as timm has them.
    """
    for module in model.modules():
        chunked = _CHUNKED.get(type(module))
        if chunked is not None:
            module.__class__ = chunked
