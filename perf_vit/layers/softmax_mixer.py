"""Mixer of exact softmax attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from perf_vit.layers.mixer import Mixer, MixerOptions, register_mixer, softmax_attention

__all__ = ["SoftmaxMixer", "SoftmaxOptions"]


@dataclass(frozen=True, kw_only=True)
class SoftmaxOptions(MixerOptions):
    """Options of exact attention."""

    def is_exact(self, grid: tuple[int, int]) -> bool:
        """Return True."""
        return True


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
        return softmax_attention(q, k, v, key_mask, is_causal)
