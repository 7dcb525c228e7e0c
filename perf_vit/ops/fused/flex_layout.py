"""Where tokens, sinks and clusters lie in the queries and keys of FlexAttention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from perf_vit.ops.clustered_call import ClusteredCall, lowest_logit
from perf_vit.ops.windows import WindowGrid

__all__ = ["FlexLayout", "FlexSizes"]

# The kernels work on blocks of at most so many queries and keys; a block of 16 is the smallest that they take.
_BLOCKS = (128, 64, 32, 16)


@dataclass(frozen=True)
class FlexSizes:
    """Sizes of the layout of one grid.

    Attributes:
        grid: Rows and columns of tokens.
        windows: Windows of the grid; one that holds it where there are none.
        num_near: Number of keys that only the queries of a window see, T; 0 where there are no windows.
        num_shared: Number of prefix tokens and sinks, S.
        num_clusters: Number of clusters, M.
    """

    grid: tuple[int, int]
    windows: WindowGrid
    num_near: int
    num_shared: int
    num_clusters: int

    @classmethod
    def of(cls, call: ClusteredCall, grid: tuple[int, int]) -> FlexSizes:
        """Return the sizes of one call of attention."""
        windows = call.windows if call.exact_near else WindowGrid(grid[1], *grid)
        num_near = windows.height * windows.width if call.exact_near else 0
        return cls(grid, windows, num_near, int(call.shared[0].shape[2]), call.clusters.num_clusters)

    @property
    def num_windows(self) -> int:
        """Number of windows, W."""
        return -(-self.grid[0] // self.windows.height) * self.windows.across

    @property
    def num_tokens(self) -> int:
        """Number of tokens of a window, T, some of which may lie outside the grid."""
        return self.windows.height * self.windows.width

    @property
    def is_padded(self) -> bool:
        """Whether windows reach outside the grid."""
        return bool(self.grid[0] % self.windows.height or self.grid[1] % self.windows.width)

    @property
    def shared(self) -> slice:
        """Slots of the prefix tokens and sinks among the keys of a window."""
        return slice(self.num_near, self.num_near + self.num_shared)

    @property
    def far(self) -> slice:
        """Slots of the clusters among the keys of a window."""
        return slice(self.shared.stop, self.shared.stop + self.num_clusters)

    @property
    def blocks(self) -> tuple[int, int]:
        """Sizes of blocks of queries and of keys."""
        return _block(self.num_tokens), _block(self.far.stop)

    @property
    def rooms(self) -> tuple[int, int]:
        """Numbers of slots of a window among the queries, t, and among the keys, n."""
        of_queries, of_keys = self.blocks
        return -(-self.num_tokens // of_queries) * of_queries, -(-self.far.stop // of_keys) * of_keys


@dataclass(frozen=True, eq=False)
class FlexLayout:
    """Tables of one grid on one device.

    Attributes:
        sizes: Sizes of the layout.
        query_tokens: Token of the grid in each slot of the queries, [W x t]; 0 where there is none.
        query_slots: Slot of each token of the grid among the queries, [N].
        key_slots: Slot of each token of the grid among the keys, [N].
        token_slots: Slot of each token of the grid among the tokens of the windows, [N].
        counted: Slots of keys with a token of the grid, bool [1, 1, W, n, 1].
        terms: Additive terms of the logits where all tokens are valid, and all clusters weigh 1, [1, 1, W, n].
        block_mask: Blocks of keys for each block of queries, and the reverse.
    """

    sizes: FlexSizes
    query_tokens: Tensor
    query_slots: Tensor
    key_slots: Tensor
    token_slots: Tensor
    counted: Tensor
    terms: Tensor
    block_mask: BlockMask

    @classmethod
    def of(cls, sizes: FlexSizes, device: torch.device) -> FlexLayout:
        """Return the tables, which are made once for each of the last 16 grids and devices."""
        return (_make if torch.compiler.is_compiling() else _kept)(sizes, device)


def _make(sizes: FlexSizes, device: torch.device) -> FlexLayout:
    windows, (query_room, key_room) = sizes.windows, sizes.rooms
    row, column = (torch.arange(length, device=device) for length in sizes.grid)
    row = row[:, None]
    window = row // windows.height * windows.across + column // windows.width
    place = row % windows.height * windows.width + column % windows.width
    query_slots, key_slots, token_slots = (
        (window * room + place).flatten() for room in (query_room, key_room, sizes.num_tokens)
    )
    tokens = torch.arange(len(query_slots), device=device)
    query_tokens = tokens.new_zeros(sizes.num_windows * query_room).index_copy(0, query_slots, tokens)
    counted = torch.zeros(sizes.num_windows * key_room, dtype=torch.bool, device=device)
    if sizes.num_near:
        counted = counted.index_fill(0, key_slots, True)
    counted = counted.view(1, 1, sizes.num_windows, key_room, 1)
    terms = (~counted[..., 0]).float() * lowest_logit(torch.float32)
    # Prefix tokens, sinks and clusters have no place in the grid.
    others = terms.new_zeros(1, 1, sizes.num_windows, sizes.far.stop - sizes.num_near)
    terms = torch.cat([terms[..., : sizes.num_near], others, terms[..., sizes.far.stop :]], dim=-1)
    slots = (query_tokens, query_slots, key_slots, token_slots)
    return FlexLayout(sizes, *slots, counted, terms, _block_mask(sizes, device))


@lru_cache(maxsize=16)
def _kept(sizes: FlexSizes, device: torch.device) -> FlexLayout:
    # Tensors of inference mode can't be part of a later graph of gradients.
    with torch.inference_mode(False), torch.no_grad():
        return _make(sizes, device)


def _block_mask(sizes: FlexSizes, device: torch.device) -> BlockMask:
    """Return the blocks of the pairs of each window, all of them full; their lists are linear in the number of windows.

    `BlockMask.from_kv_blocks` would find the reverse lists in a dense matrix of all pairs of blocks.
    """
    rooms, blocks = sizes.rooms, sizes.blocks
    each = (rooms[0] // blocks[0], rooms[1] // blocks[1])
    window = torch.arange(sizes.num_windows, dtype=torch.int32, device=device).view(-1, 1, 1)

    def full_blocks(own: int, other: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        indices = window * other + torch.arange(other, dtype=torch.int32, device=device)
        indices = indices.expand(-1, own, -1).reshape(1, 1, sizes.num_windows * own, other)
        number = torch.full_like(indices[..., 0], other)
        # No block needs `mask_mod`: the lists of such blocks are empty.
        return torch.zeros_like(number), torch.zeros_like(indices[..., :1]), number, indices

    def same_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query // rooms[0] == key // rooms[1]

    lengths = (sizes.num_windows * rooms[0], sizes.num_windows * rooms[1])
    return BlockMask(lengths, *full_blocks(*each), *full_blocks(*each[::-1]), blocks, same_window)


def _block(length: int) -> int:
    """Return the block that leaves the fewest slots empty, the larger of two; below 64 only for lengths up to 32."""
    candidates = _BLOCKS[:2] if length > _BLOCKS[2] else _BLOCKS[2:]
    return min(candidates, key=lambda block: -(-length // block) * block)
