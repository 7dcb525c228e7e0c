"""Mixer of clustered attention: exact within windows and on sinks, clusters of keys elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from perf_vit.layers.mixer import BidirectionalMixer, MixerOptions, check_integers, register_mixer, softmax_attention
from perf_vit.ops import clustered_attention
from perf_vit.ops.clustered import clustered_stripe
from perf_vit.ops.clusters import clusters_for_size
from perf_vit.ops.sinks import sinks_for_size
from perf_vit.ops.streaming import AttentionStream, ClusteredStream

__all__ = ["ClusteredMixer", "ClusteredOptions"]


@dataclass(frozen=True, kw_only=True)
class ClusteredOptions(MixerOptions):
    """Options of clustered attention; prefix tokens attend and are attended to exactly.

    Attributes:
        window_size: Largest number of rows and columns of a window in which attention is exact; 0 for no windows.
        num_sinks: Number of keys per head to which every query attends exactly; 0 for none, None for 256 in images of
            up to 2,560 tokens and none in larger ones.
        num_clusters: Number of clusters per head, which summarise all other keys; None for 128 in images of up to
            32,768 tokens and 160 in larger ones.
        max_exact_tokens: Largest number of patch tokens of an image for which softmax attention runs instead, which is
            exact and not slower; 0 for clusters at every size. The default is the crossover of heads of 64 channels.
        chunk_size: Largest number of tokens per sample and head that are processed at once, see
            `perf_vit.ops.clustered_attention`; None suits the device.

    Raises:
        ValueError: a value is negative or not an integer, or `num_clusters` or `chunk_size` is 0.
    """

    window_size: int = 16
    num_sinks: int | None = None
    num_clusters: int | None = None
    max_exact_tokens: int = 48 * 48
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        check_integers(window_size=self.window_size, max_exact_tokens=self.max_exact_tokens)
        if self.num_clusters is not None:
            check_integers(1, num_clusters=self.num_clusters)
        if self.num_sinks is not None:
            check_integers(num_sinks=self.num_sinks)
        if self.chunk_size is not None:
            check_integers(1, chunk_size=self.chunk_size)
        super().__post_init__()

    def sinks_of(self, grid: tuple[int, int]) -> int:
        """Return the number of sinks for an image with a grid of (rows, columns) of tokens."""
        num_tokens = grid[0] * grid[1]
        return min(num_tokens, sinks_for_size(num_tokens) if self.num_sinks is None else self.num_sinks)

    def clusters_of(self, grid: tuple[int, int]) -> int:
        """Return the number of clusters for an image with a grid of (rows, columns) of tokens."""
        return clusters_for_size(grid[0] * grid[1]) if self.num_clusters is None else self.num_clusters

    def is_exact(self, grid: tuple[int, int]) -> bool:
        """Return whether softmax attention runs for an image with a grid of (rows, columns) of tokens.

        Unless clusters are forced, it also runs where one window or the sinks hold all tokens.
        """
        if not self.max_exact_tokens:
            return False
        num_tokens = grid[0] * grid[1]
        covered = max(grid) <= self.window_size or self.sinks_of(grid) >= num_tokens
        return num_tokens <= self.max_exact_tokens or covered

    def summary(self, grid: tuple[int, int]) -> dict[str, int]:
        """Return the sizes shown in reports for an image with a grid of (rows, columns) of tokens."""
        return {"window": self.window_size, "sinks": self.sinks_of(grid), "clusters": self.clusters_of(grid)}


@register_mixer("clustered")
class ClusteredMixer(BidirectionalMixer):
    """Clustered attention (`clustered_attention`) in large images, softmax attention in small ones."""

    options_type = ClusteredOptions
    needs_grid: ClassVar[bool] = True
    needs_sample: ClassVar[bool] = True
    options: ClusteredOptions

    def mix(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int] | None, key_mask: Tensor | None) -> Tensor:
        """Attend, see `Mixer.forward`."""
        assert grid is not None
        options = self.options
        if self.stripe is not None:
            return clustered_stripe(
                q,
                k,
                v,
                self.stripe,
                options.window_size,
                options.clusters_of(self.stripe.grid),
                options.num_prefix_tokens,
                key_mask,
                options.chunk_size,
            )
        if options.is_exact(grid):
            return softmax_attention(q, k, v, key_mask)
        return clustered_attention(
            q,
            k,
            v,
            grid,
            options.window_size,
            options.sinks_of(grid),
            options.clusters_of(grid),
            options.num_prefix_tokens,
            key_mask,
            options.chunk_size,
        )

    def stream(
        self,
        prefix: tuple[Tensor, Tensor, Tensor],
        sample: tuple[Tensor, Tensor, Tensor] | None,
        grid: tuple[int, int],
    ) -> AttentionStream:
        """Start the attention over an image in parts, see `Mixer.stream`.

        Raises:
            ValueError: The image is large, and attention is exact or has sinks, which are chosen among all keys.
        """
        options = self.options
        if sample is None or not self.adds_up(grid):
            return super().stream(prefix, sample, grid)
        return ClusteredStream(sample, prefix, grid, options.window_size, options.clusters_of(grid))

    def adds_up(self, grid: tuple[int, int]) -> bool:
        """Return whether the attention is made of sums over parts, see `Mixer.adds_up`."""
        return not (self.options.is_exact(grid) or self.options.sinks_of(grid))
