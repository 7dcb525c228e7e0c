"""Forward pass of a ViT over an image of any size: every token attends to the whole image, memory holds a part."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.nn import functional as F

from perf_vit.errors import CheckpointError, InputError
from perf_vit.layers.chunked import finish_block
from perf_vit.layers.linearized_attention import LinearizedAttention
from perf_vit.layers.mixer import Mixer
from perf_vit.ops.streaming import AttentionStream, Part, sampled_places
from perf_vit.ops.windows import WindowGrid
from perf_vit.streaming.embedding import ImageTokens
from perf_vit.streaming.journal import TokenJournal
from perf_vit.streaming.layout import TokenLayout
from perf_vit.streaming.processes import Processes
from perf_vit.streaming.store import TokenStore
from perf_vit.streaming.tokens import PART_TOKENS, READ_PARTS, StreamedTokens
from perf_vit.types import GeoImage

__all__ = ["check_blocks", "check_streamable", "num_passes", "rows_of_windows", "stream_tokens", "window_heights"]

OnProgress = Callable[[int, int], None]


def check_streamable(model: Any, grid: tuple[int, int]) -> None:
    """Check that a model can run over an image in parts.

    Args:
        model: Model.
        grid: Rows and columns of the image's tokens.

    Raises:
        CheckpointError: It is in training mode or not on the CPU, or one of its blocks needs all tokens at once; the
            message names it.
    """
    if model.training:
        raise CheckpointError("the model must be in evaluation mode to run over an image in parts; call model.eval()")
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices != {"cpu"}:
        raise CheckpointError(
            f"the model must be on the CPU to run over an image in parts, got {devices.pop()}; call .cpu()"
        )
    check_blocks(model, grid)


def check_blocks(model: Any, grid: tuple[int, int]) -> None:
    """Check that no block of a model needs all tokens of an image at once; see `check_streamable`."""
    for index, block in enumerate(getattr(model, "blocks", ())):
        attention = getattr(block, "attn", None)
        if not isinstance(block, Block | EvaBlock):
            raise CheckpointError(f"block {index} must be a pre-norm block of timm's ViT, got {type(block).__name__}")
        if not isinstance(attention, LinearizedAttention):
            raise CheckpointError(
                f"block {index} has softmax attention ({type(attention).__name__}), which needs all tokens at once; "
                "convert the model with perf_vit.linearize"
            )
        if attention.local_enhancement is not None:
            raise CheckpointError(f"block {index} has local_enhancement, whose convolution reaches past a part of rows")
        try:
            attention.mixer.check_stream(grid)
        except ValueError as error:
            raise CheckpointError(f"block {index} can't run over an image in parts: {error}") from error


def stream_tokens(
    model: Any,
    image: ImageTokens,
    *,
    indices: tuple[int, ...] = (),
    num_blocks: int | None = None,
    margin: int = 0,
    folder: Path | None = None,
    journal: TokenJournal | None = None,
    dtype: torch.dtype | None = None,
    part_tokens: int = PART_TOKENS,
    on_progress: OnProgress = lambda done, total: None,
) -> tuple[StreamedTokens, list[StreamedTokens]]:
    """Run a ViT over an image: each block goes over the parts of the image once or twice.

    FAVOR+ takes one pass a block, as the sums of a block are collected while the one before writes its tokens.
    Clustered attention takes two, as clusters are chosen among tokens of the whole image.

    Args:
        model: ViT in evaluation mode; see `check_streamable`.
        image: Its first tokens.
        indices: Blocks, from 0, whose tokens are kept as well.
        num_blocks: Number of blocks to run; None for all.
        margin: Tokens without a valid pixel that are computed too: those at most so many rows and columns from one that
            counts. They attend to others, and no other attends to them, as in a forward pass with a mask.
        folder: Folder for the tokens' files; None to keep tokens in memory.
        journal: Used instead of `folder`: a call that was killed goes on after its last finished block. Each block then
            writes a file of its own, so there is one file more.
        dtype: Dtype of stored tokens; that of the model by default.
        part_tokens: Number of tokens that a block processes at once.
        on_progress: Called with (rows of tokens done, in all), counted in each pass over the image.

    Processes of a group, if there is one, share the image: each holds a stripe of rows, and for each block only sums,
    and the tokens of a sample, cross between them. Their number doesn't depend on the size of the image.

    Returns:
        Tokens after the last block, and after the blocks at `indices`.

    Raises:
        CheckpointError: The model needs all tokens at once.
        OutputError: The disk is too small.
        InputError: The image can't be read, or has no valid pixel.
    """
    check_streamable(model, image.grid)
    with torch.no_grad():
        blocks = list(model.blocks)[:num_blocks]
        place = folder if journal is None else journal
        return _Forward(model, blocks, image, margin, place, dtype, part_tokens, on_progress).run(indices)


class _Forward:
    def __init__(
        self,
        model: Any,
        blocks: list[Any],
        image: ImageTokens,
        margin: int,
        place: Path | TokenJournal | None,
        dtype: torch.dtype | None,
        part_tokens: int,
        on_progress: OnProgress,
    ) -> None:
        self._model, self._image, self._margin = model, image, margin
        self._journal = place if isinstance(place, TokenJournal) else None
        self._folder = place.folder if isinstance(place, TokenJournal) else place
        self._computed = model.patch_embed.proj.weight.dtype
        self._dtype = self._computed if dtype is None else dtype
        self._part_tokens, self._on_progress = part_tokens, on_progress
        self._blocks = blocks
        self._collects = _collects(blocks)
        # One to embed.
        self._passes_done, self._num_passes = 0, 1 + num_passes(blocks)
        self._processes = Processes()

    def run(self, indices: tuple[int, ...]) -> tuple[StreamedTokens, list[StreamedTokens]]:
        self._processes.check_same(self._image.identity)
        first = self._begin(indices)
        kept: list[StreamedTokens] = []
        if self._journal is None or first is None:
            prefix = self._image.prefix()
            store, layout = self._embed()
            self._commit(0, prefix, store, layout, 1)
        else:
            prefix, store, layout, kept = self._resumed(self._journal, first, indices)
        stream: AttentionStream | None = None
        for index in range(first or 0, len(self._blocks)):
            if stream is None:
                stream = self._collected(index, prefix, store, layout)
            target = store if self._journal is None else self._new_store(layout.num_stored, f"block_{index}")
            rows_at_once = stream.rows_at_once
            prefix, stream = self._attend(index, prefix, store, target, layout, stream)
            self._commit(index + 1, prefix, target, layout, rows_at_once)
            if target is not store and index - 1 not in indices:
                store.remove()
            store = target
            if index in indices:
                # Those of the last block are given anyway, and others have files of their own with a journal.
                is_own = self._journal is not None or index + 1 == len(self._blocks)
                kept.append(self._given(prefix, store if is_own else self._copied(store, layout, index), layout))
        return self._given(prefix, store, layout), kept

    def _given(self, prefix: Tensor, store: TokenStore, layout: TokenLayout) -> StreamedTokens:
        return StreamedTokens(prefix, store, layout, self._model.norm, self._processes)

    def _begin(self, indices: tuple[int, ...]) -> int | None:
        """Return the number of blocks that an earlier call finished, None without its tokens."""
        if self._journal is None:
            return None
        settings = {"indices": indices, "num_blocks": len(self._blocks), "margin": self._margin}
        settings |= {"grid": self._image.grid, "part_tokens": self._part_tokens, "processes": self._processes.number}
        self._journal.begin({**settings, "dtype": str(self._dtype).removeprefix("torch.")})
        return self._journal.num_done

    def _resumed(
        self, journal: TokenJournal, num_done: int, indices: tuple[int, ...]
    ) -> tuple[Tensor, TokenStore, TokenLayout, list[StreamedTokens]]:
        """Open what an earlier call finished: prefix and tokens after the last block, and tokens that are kept."""
        layout, is_fused = journal.layout(), 0 < num_done < len(self._blocks) and not self._collects[num_done]
        self._passes_done = 1 + num_done + sum(self._collects[:num_done])
        # Sums that the pass before would have collected.
        self._num_passes += is_fused
        names = {
            index: f"block_{index}" if index >= 0 else "tokens"
            for index in sorted({*(each for each in indices if each < num_done), num_done - 1})
        }
        journal.keep_only(f"{name}.bin" for name in names.values())
        opened = {index: self._opened_store(layout, name) for index, name in names.items()}
        kept = [self._given(journal.prefix(index + 1), opened[index], layout) for index in opened if index in indices]
        return journal.prefix(num_done), opened[num_done - 1], layout, kept

    def _commit(self, num_done: int, prefix: Tensor, store: TokenStore, layout: TokenLayout, rows_at_once: int) -> None:
        if self._journal is not None:
            store.flush()
            self._journal.commit(num_done, prefix, layout, rows_at_once)

    def _embed(self) -> tuple[TokenStore, TokenLayout]:
        """Read this process's rows and store their first tokens; tokens without a valid pixel are left out."""
        rows, columns = self._image.grid
        first_row, stop_row = self._processes.stripe(rows, rows_of_windows(self._blocks, self._image.grid))
        valid = torch.zeros(rows, columns, dtype=torch.bool)
        stored = torch.zeros_like(valid) if self._margin else valid
        with self._processes.failing_together():
            store = self._new_store((stop_row - first_row) * columns, "tokens")
            self._embed_rows(range(first_row, stop_row), store, valid, stored)
        valid = self._processes.reduce(valid.to(torch.uint8), "max").bool()
        if not valid.any():
            raise InputError("the image has no valid pixel, so there is nothing to compute; check nodata and tissue")
        self._passes_done += 1
        self._processes.num_bytes = 0
        has_more = self._margin and not torch.equal(valid, stored)
        return store, TokenLayout(valid, first_row, stop_row, stored if has_more else None)

    def _embed_rows(self, rows: range, store: TokenStore, valid: Tensor, stored: Tensor) -> None:
        """Read and embed rows; fill in which of their tokens have a valid pixel, and which are stored."""
        step = max(1, READ_PARTS * self._part_tokens // self._image.grid[1])
        start, margin = 0, self._margin
        waiting: deque[tuple[int, int, GeoImage]] = deque()
        for first in range(rows.start, rows.stop, step):
            stop = min(first + step, rows.stop)
            image, valid[first:stop] = self._image.read(first, stop)
            waiting.append((first, stop, image))
            # Which tokens are stored depends on the rows below.
            while waiting and (waiting[0][1] + margin <= stop or stop == rows.stop):
                above, below, image = waiting.popleft()
                if margin:
                    stored[above:below] = _near(valid[max(0, above - margin) : below + margin], margin)[
                        min(above, margin) :
                    ][: below - above]
                part = TokenLayout(stored).part(above, below)
                if len(part.places):
                    store.write(slice(start, start + len(part.places)), self._image.embed(image, part))
                    start += len(part.places)
                self._report(part)
        store.shrink(start)

    def _collected(self, index: int, prefix: Tensor, store: TokenStore, layout: TokenLayout) -> AttentionStream:
        """Start the attention of a block and go over the image to collect its sums."""
        stream = self._start(index, prefix, store, layout)
        # Of a call that is resumed, sums are collected in the same order as while the block before wrote its tokens.
        unit = stream.rows_at_once if self._collects[index] or self._journal is None else self._journal.rows_at_once
        for part in layout.parts(unit, self._part_tokens):
            x = store.read(layout.tokens(part))
            stream.collect(*self._project(index, prefix, x, layout.places_of(part)).tokens, part)
            self._report(part)
        stream.reduce(self._processes.reduce)
        self._passes_done += 1
        return stream

    def _attend(
        self,
        index: int,
        prefix: Tensor,
        store: TokenStore,
        target: TokenStore,
        layout: TokenLayout,
        stream: AttentionStream,
    ) -> tuple[Tensor, AttentionStream | None]:
        """Go over the image to apply a block; collect the sums of the next one where it needs no sample of tokens."""
        following, own = index + 1, self._project(index, prefix)
        after = self._finish(index, prefix, stream.attend_prefix(), own.prefix_gate)
        fused = following < len(self._blocks) and not self._blocks[following].attn.mixer.needs_sample
        collecting = self._start(following, after, store, layout) if fused else None
        for part in layout.parts(stream.rows_at_once, self._part_tokens):
            x, places = store.read(layout.tokens(part)), layout.places_of(part)
            projected = self._project(index, prefix, x, places)
            x = self._finish(index, x, stream.attend(*projected.tokens, part), projected.gate)
            target.write(layout.tokens(part), x)
            if collecting is not None:
                x = target.read(layout.tokens(part))
                collecting.collect(*self._project(following, after, x, places).tokens, part)
            self._report(part)
        if collecting is not None:
            collecting.reduce(self._processes.reduce)
        self._passes_done += 1
        return after, collecting

    def _start(self, index: int, prefix: Tensor, store: TokenStore, layout: TokenLayout) -> AttentionStream:
        mixer: Mixer = self._blocks[index].attn.mixer
        sample = None
        if mixer.needs_sample:
            sample = self._sampled(index, prefix, store, layout)
        return mixer.stream(self._project(index, prefix).prefix, sample, layout.grid)

    def _sampled(
        self, index: int, prefix: Tensor, store: TokenStore, layout: TokenLayout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of a sample of all tokens, [1, H, n, D] each."""
        tokens, own = sampled_places(layout.num_tokens), layout.own_tokens
        is_own = (tokens >= own.start) & (tokens < own.stop)
        mine = tokens[is_own]
        places = layout.places(mine)
        projected = self._project(index, prefix, store.read(layout.stored_at(*places)), places).tokens
        if self._processes.number == 1:
            return projected
        stacked = torch.stack(projected)
        whole = stacked.new_zeros(*stacked.shape[:3], len(tokens), stacked.shape[4])
        whole[:, :, :, is_own] = stacked
        q, k, v = self._processes.reduce(whole, "sum").unbind(0)
        return q, k, v

    def _project(
        self, index: int, prefix: Tensor, x: Tensor | None = None, places: tuple[Tensor, Tensor] | None = None
    ) -> _Projected:
        """Compute queries, keys and values of the prefix and of tokens, [n, C], at rows and columns."""
        block = self._blocks[index]
        if x is None or places is None:
            x, nowhere = prefix[:0], torch.zeros(0, dtype=torch.int64)
            places = nowhere, nowhere
        normed = block.norm1(torch.cat([prefix, x])[None])
        gate = getattr(block.attn, "gate", None)
        return _Projected(
            block.attn.queries_keys_values(normed, self._image.rope(*places)),
            None if gate is None else gate(normed).sigmoid(),
            len(prefix),
        )

    def _finish(self, index: int, x: Tensor, attended: Tensor, gate: Tensor | None) -> Tensor:
        """Apply the rest of a block to tokens, [n, C], and their attended values, [1, H, n, D]."""
        block = self._blocks[index]
        attended = block.attn.finish(attended.transpose(1, 2).flatten(2), gate)
        return finish_block(block, x[None], attended)[0]

    def _new_store(self, num_tokens: int, name: str) -> TokenStore:
        path = None if self._folder is None else self._folder / f"{name}.bin"
        if self._journal is not None and path is not None:
            # Of a block that was not finished.
            path.unlink(missing_ok=True)
        return TokenStore(num_tokens, self._model.embed_dim, self._dtype, self._computed, path)

    def _opened_store(self, layout: TokenLayout, name: str) -> TokenStore:
        assert self._folder is not None
        path, channels = self._folder / f"{name}.bin", self._model.embed_dim
        return TokenStore(layout.num_stored, channels, self._dtype, self._computed, path, existing=True)

    def _copied(self, store: TokenStore, layout: TokenLayout, index: int) -> TokenStore:
        with self._processes.failing_together():
            copy = self._new_store(layout.num_stored, f"block_{index}")
            for part in layout.parts(1, self._part_tokens):
                copy.write(layout.tokens(part), store.read(layout.tokens(part)))
        return copy

    def _report(self, part: Part) -> None:
        rows = self._image.grid[0]
        self._on_progress(self._passes_done * rows + part.first_row + part.rows, self._num_passes * rows)


def num_passes(blocks: Sequence[Any]) -> int:
    """Return how often blocks go over an image: to attend, and to collect where the block before can't."""
    return len(blocks) + sum(_collects(blocks))


def _collects(blocks: Sequence[Any]) -> list[bool]:
    return [index == 0 or block.attn.mixer.needs_sample for index, block in enumerate(blocks)]


def rows_of_windows(blocks: Sequence[Any], grid: tuple[int, int]) -> int:
    """Return the number of rows that belong together: windows of all blocks lie within a stripe."""
    return math.lcm(*window_heights(blocks, grid))


def window_heights(blocks: Sequence[Any], grid: tuple[int, int]) -> set[int]:
    """Return the numbers of rows of the windows of all blocks."""
    sizes = {getattr(block.attn.options, "window_size", 0) for block in blocks}
    return {WindowGrid.of(grid, size).height for size in sizes if size}


def _near(valid: Tensor, margin: int) -> Tensor:
    """Return which tokens are at most `margin` rows and columns from one that counts."""
    return F.max_pool2d(valid[None, None].float(), 2 * margin + 1, stride=1, padding=margin)[0, 0] > 0


@dataclass(frozen=True, eq=False)
class _Projected:
    """Queries, keys and values of prefix tokens and others, [1, H, P + n, D] each, and the gate of their values."""

    queries_keys_values: tuple[Tensor, Tensor, Tensor]
    gate_of_all: Tensor | None
    num_prefix: int

    @property
    def prefix(self) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the prefix tokens, [1, H, P, D]."""
        q, k, v = (x[:, :, : self.num_prefix] for x in self.queries_keys_values)
        return q, k, v

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the others, [1, H, n, D]."""
        q, k, v = (x[:, :, self.num_prefix :] for x in self.queries_keys_values)
        return q, k, v

    @property
    def prefix_gate(self) -> Tensor | None:
        """Gate of the prefix tokens, [1, P, H x D]."""
        return None if self.gate_of_all is None else self.gate_of_all[:, : self.num_prefix]

    @property
    def gate(self) -> Tensor | None:
        """Gate of the others, [1, n, H x D]."""
        return None if self.gate_of_all is None else self.gate_of_all[:, self.num_prefix :]
