"""Attention that is exact nearby and sees what is far as clusters of keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from perf_vit.layers.mixer import Mixer, MixerOptions, check_whole, register_mixer
from perf_vit.ops import clustered_attention
from perf_vit.ops.sinks import sinks_for_size

__all__ = ["ClusteredMixer", "ClusteredOptions"]


@dataclass(frozen=True, kw_only=True)
class ClusteredOptions(MixerOptions):
    """Options of clustered attention; prefix tokens attend and are attended exactly.

    Attributes:
        window_size: largest number of rows and columns of a window in which attention is exact; 0 for no windows.
        num_sinks: keys of each head that every query sees exactly; 0 for none, None for 256 in small images down to 64
            in large ones.
        num_clusters: clusters of each head, which stand for all other keys.

    Raises:
        ValueError: a number that is negative or not whole, or no cluster.
    """

    window_size: int = 16
    num_sinks: int | None = None
    num_clusters: int = 96

    def __post_init__(self) -> None:
        check_whole(window_size=self.window_size)
        check_whole(1, num_clusters=self.num_clusters)
        if self.num_sinks is not None:
            check_whole(num_sinks=self.num_sinks)
        super().__post_init__()

    def sinks_of(self, grid: tuple[int, int]) -> int:
        """Number of sinks in an image of these rows and columns of tokens."""
        num_tokens = grid[0] * grid[1]
        return min(num_tokens, sinks_for_size(num_tokens) if self.num_sinks is None else self.num_sinks)

    def summary(self, grid: tuple[int, int]) -> dict[str, int]:
        """Sizes that a report shows for an image of these rows and columns of tokens."""
        return {"window": self.window_size, "sinks": self.sinks_of(grid), "clusters": self.num_clusters}


@register_mixer("clustered")
class ClusteredMixer(Mixer):
    """Windows and sinks exactly, all other keys as clusters (`clustered_attention`)."""

    options_type = ClusteredOptions
    needs_grid: ClassVar[bool] = True
    options: ClusteredOptions

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: tuple[int, int] | None = None,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend, as `Mixer.forward` says.

        Raises:
            ValueError: causal order.
        """
        if is_causal:
            raise ValueError(
                "is_causal=True isn't possible with mixer='clustered', whose windows and clusters look into the "
                "future; use mixer='performer'"
            )
        assert grid is not None
        options = self.options
        return clustered_attention(
            q,
            k,
            v,
            grid,
            options.window_size,
            options.sinks_of(grid),
            options.num_clusters,
            options.num_prefix_tokens,
            key_mask,
        )
