"""Tokens of an image of any size from one forward pass, for notebooks and scripts."""

from __future__ import annotations

import operator
import tempfile
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from torch import nn

from perf_vit.errors import CheckpointError, OptionError, OutputError, PerfVitError, extra
from perf_vit.types import GeoImage, InputPath, Source

with extra("geo", "stream"):
    from perf_vit.models import InputSpec
    from perf_vit.streaming import ImageTokens, StreamedTokens, check_streamable, stream_tokens
    from perf_vit.streaming.processes import Processes
    from perf_vit.streaming.store import STORED_DTYPES
    from perf_vit.workflows.progress import progress_shown, windows_progress

__all__ = ["StreamedImage", "stream"]


@dataclass(eq=False)
class StreamedImage(AbstractContextManager["StreamedImage"]):
    """Tokens of an image; closing it deletes their file.

    Attributes:
        last: Tokens after the last block.
        blocks: Tokens after the blocks that were asked for, by their index from 0.
    """

    last: StreamedTokens
    blocks: dict[int, StreamedTokens]
    _files: ExitStack

    def close(self) -> None:
        """Delete the file of the tokens, if there is one."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def stream(
    model: nn.Module,
    image: InputPath | Source,
    *,
    spec: InputSpec | None = None,
    indices: Iterable[int] = (),
    folder: str | Path | None = None,
    dtype: str | None = None,
    progress: bool = True,
) -> StreamedImage:
    """Run a ViT with linear attention over a whole image: every token attends to all others, memory holds a few rows.

    The result equals a forward pass of the image in memory up to rounding. Tokens without a valid pixel are neither
    computed nor stored, and no token attends to them. Each block goes over the tokens once (FAVOR+) or twice (clustered
    attention).

    Processes of an initialised group (`torch.distributed`) share the image: each has the tokens of a stripe of rows.

    Args:
        model: Plain ViT of timm with linear attention, in evaluation mode: a backbone of this package, or the result of
            `linearize`.
        image: Path, URL or open source.
        spec: How the image is opened and normalised; None for all bands as they are.
        indices: Blocks, from 0, whose tokens are kept besides the last.
        folder: Folder on a local disk for the tokens, in a file that is deleted with the result; None to keep tokens in
            memory.
        dtype: "float32", "bfloat16" or "float16" for stored tokens; None for the dtype of the model.
        progress: Show a progress bar.

    Returns:
        Tokens; close it, or use it in a `with` statement.

    Raises:
        CheckpointError: The model needs all tokens at once; the message names the block.
        OptionError: An option has no such value, or there are more processes than rows of windows.
        InputError: The image can't be read or has no valid pixel.
        OutputError: The disk is too small for the tokens.
    """
    if dtype is not None and dtype not in STORED_DTYPES:
        raise OptionError(f"dtype must be one of {', '.join(STORED_DTYPES)}, got {dtype}")
    blocks_kept = _block_indices(indices, len(getattr(model, "blocks", ())))
    spec = InputSpec() if spec is None else spec
    with ExitStack() as files:
        place = None if folder is None else Path(files.enter_context(_temporary(Path(folder))))
        with ExitStack() as opened, progress_shown(progress), windows_progress("streaming", "rows") as on_progress:
            with Processes().failing_together():
                source = spec.open(image)
                if source is not image:
                    opened.callback(source.close)
                tokens = _tokens_of(model, source, spec)
                check_streamable(model, tokens.grid)
            last, kept = stream_tokens(
                model,
                tokens,
                indices=blocks_kept,
                folder=place,
                dtype=None if dtype is None else STORED_DTYPES[dtype],
                on_progress=on_progress,
            )
        blocks = dict(zip(blocks_kept, kept, strict=True))
        return StreamedImage(last, blocks, files.pop_all())


def _block_indices(indices: Any, num_blocks: int) -> tuple[int, ...]:
    """Return the indices of blocks in ascending order, each once.

    Raises:
        OptionError: There are no such blocks.
    """
    try:
        several = {operator.index(each) for each in (indices if isinstance(indices, Iterable) else (indices,))}
    except TypeError as error:
        raise OptionError(f"indices must be whole numbers, got {indices!r}") from error
    for index in sorted(several):
        if not 0 <= index < num_blocks:
            raise OptionError(f"indices must be from 0 to {num_blocks - 1}, got {index}")
    return tuple(sorted(several))


def _tokens_of(model: nn.Module, source: Source, spec: InputSpec) -> ImageTokens:
    try:
        return ImageTokens(model, source, spec.normalizer or _as_they_are)
    except PerfVitError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _as_they_are(image: GeoImage) -> npt.NDArray[np.float32]:
    """Return pixels, 0 where they aren't valid, [C, H, W]."""
    return np.where(image.valid, image.pixels, 0).astype(np.float32)


def _temporary(folder: Path) -> Any:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix="perf_vit_tokens_", dir=folder)
    except OSError as error:
        raise OutputError(f"can't make files in {folder}: {(error.strerror or str(error)).lower()}") from error
