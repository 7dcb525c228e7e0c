"""Mixer of exact softmax attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from perf_vit.layers.mixer import Mixer, MixerOptions, register_mixer

__all__ = ["SoftmaxMixer", "SoftmaxOptions"]


@dataclass(frozen=True, kw_only=True)
class SoftmaxOptions(MixerOptions):
    """Options of exact attention."""


@register_mixer("softmax")
class SoftmaxMixer(Mixer):
    """Exact attention softmax(q k^T / sqrt(D)) v, with a cost quadratic in the number of tokens.

    Without local enhancement, conversion keeps timm's layers, which compute the same, instead of using this mixer.
    """

    options_type = SoftmaxOptions

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend, see `Mixer.forward`."""
        mask = None if key_mask is None else key_mask[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
