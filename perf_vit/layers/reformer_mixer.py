"""Mixer of attention within buckets of locality-sensitive hashing (Reformer)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perf_vit.layers.mixer import Mixer, MixerOptions, check_integers, register_mixer
from perf_vit.layers.performer_mixer import seeded_generator
from perf_vit.ops.lsh import draw_rotations, lsh_attention

__all__ = ["ReformerMixer", "ReformerOptions"]


@dataclass(frozen=True, kw_only=True)
class ReformerOptions(MixerOptions):
    """Options of Reformer.

    Attributes:
        chunk_size: Number of tokens of a chunk; buckets hold half as many on average.
        num_rounds: Number of rounds of hashing; more find more of the similar tokens.
        max_buckets: Largest number of buckets.
        seed: Seed of the model's hashes; each layer draws its own.

    Raises:
        ValueError: A value is not an integer or too small.
    """

    chunk_size: int = 64
    num_rounds: int = 2
    max_buckets: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        check_integers(1, chunk_size=self.chunk_size, num_rounds=self.num_rounds)
        check_integers(2, max_buckets=self.max_buckets)
        check_integers(seed=self.seed)
        super().__post_init__()

    def summary(self, grid: tuple[int, int]) -> dict[str, int]:
        """Return the sizes shown in reports."""
        return {"chunk": self.chunk_size, "rounds": self.num_rounds}


@register_mixer("reformer")
class ReformerMixer(Mixer):
    """Attention within hash buckets (`lsh_attention`). Queries are keys; the layer's are unused.

    The rotations, [rounds, D, buckets / 2], follow from (seed, layer_index), so checkpoints don't store them.
    """

    options_type = ReformerOptions
    options: ReformerOptions
    rotations: Tensor

    def __init__(
        self, options: ReformerOptions, head_dim: int, device: torch.device | None = None, num_heads: int = 1
    ) -> None:
        super().__init__(options, head_dim, device, num_heads)
        self.register_buffer("rotations", self._draw(torch.device(device or "cpu")), persistent=False)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend, see `Mixer.forward`; `k` is unused."""
        options = self.options
        return lsh_attention(q, v, self.rotations, options.chunk_size, key_mask, options.max_buckets, is_causal)

    def init_non_persistent_buffers(self) -> None:
        """Draw the rotations on the module's device."""
        self.rotations = self._draw(self.rotations.device)

    def _draw(self, device: torch.device) -> Tensor:
        options = self.options
        if device.type == "meta":
            return torch.empty(options.num_rounds, self.head_dim, options.max_buckets // 2, device=device)
        generator = seeded_generator(options.seed, options.layer_index)
        return draw_rotations(options.num_rounds, options.max_buckets, self.head_dim, generator).to(device)
