"""Progress of a forward pass over an image in a folder: after a crash, the next call goes on after the last block."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perf_vit._version import __version__
from perf_vit.errors import OutputError
from perf_vit.files import atomic_file, read_json_or_none
from perf_vit.streaming.layout import TokenLayout
from perf_vit.text import to_json

__all__ = ["JOURNAL", "TokenJournal"]

JOURNAL = "journal.json"
"""Name of the file in the folder that tells which blocks are finished."""

_KEYS = {"identity", "num_done", "rows_at_once"}


class TokenJournal:
    """Folder of the tokens of one image, and the number of blocks that are finished.

    Each block writes a file of its own and leaves that of the block before until it is finished, so a process may end
    at any moment: its tokens are those of the last finished block.

    Args:
        folder: Folder for the files; it is made, and removed by `remove`.
        identity: Plain values of JSON that decide the tokens: model, image and how it is read.
        resume: Go on with what is there; else remove it.

    Attributes:
        folder: Folder as given.
        num_done: Number of finished blocks; None before the first tokens are there.
        rows_at_once: Rows of a part of the last finished block.

    Raises:
        OutputError: The folder can't be made, or holds tokens of another model or image.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, resume: bool = True) -> None:
        self.folder = folder
        self.num_done: int | None = None
        self.rows_at_once = 1
        self._is_begun = False
        self._identity = dict(identity)
        nearest = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
        if not nearest.is_dir():
            raise OutputError(f"can't keep tokens in {folder}: {nearest} is not a folder; choose another folder")
        if not resume:
            self.remove()
        before = read_json_or_none(folder / JOURNAL)
        self._before = before if isinstance(before, dict) and before.keys() >= _KEYS else None

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Go on with tokens of the same model, image and settings, or begin.

        Args:
            settings: Further plain values that decide the tokens.

        Raises:
            OutputError: The folder holds other tokens, or can't be made.
        """
        self._identity = json.loads(to_json({**self._identity, **settings, "version": __version__}))
        if self._before is not None:
            self._check(self._before["identity"])
            self._is_begun = True
            self.num_done, self.rows_at_once = self._before["num_done"], self._before["rows_at_once"]
            return
        # What a process left that ended before its first tokens.
        self.remove()
        self._is_begun = True
        with self._writing():
            self.folder.mkdir(parents=True)

    def commit(self, num_done: int, prefix: Tensor, layout: TokenLayout, rows_at_once: int) -> None:
        """Note that a block is finished, whose tokens are on disk.

        Args:
            num_done: Number of finished blocks.
            prefix: Prefix tokens after it, [P, C].
            layout: Which tokens are stored.
            rows_at_once: Rows of its parts are multiples of this number.

        Raises:
            OutputError: The disk is full.
        """
        with self._writing():
            if num_done == 0:
                self._save("valid", layout.valid)
                self._save("stored", layout.valid if layout.stored is None else layout.stored)
            self._save(f"prefix_{num_done}", prefix)
            content = {"identity": self._identity, "num_done": num_done, "rows_at_once": rows_at_once}
            with atomic_file(self.folder / JOURNAL) as path:
                path.write_text(to_json(content), encoding="utf-8")
        self.num_done = num_done

    def prefix(self, num_done: int) -> Tensor:
        """Return the prefix tokens after a number of blocks, [P, C]."""
        with self._writing():
            return self._load(f"prefix_{num_done}")

    def layout(self) -> TokenLayout:
        """Return which tokens are stored."""
        with self._writing():
            valid, stored = self._load("valid"), self._load("stored")
        return TokenLayout(valid, stored=None if torch.equal(valid, stored) else stored)

    def keep_only(self, names: Iterable[str]) -> None:
        """Delete the files of tokens that aren't of finished blocks, or aren't needed any more."""
        kept = set(names)
        for path in self.folder.glob("*.bin"):
            if path.name not in kept:
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the folder."""
        # Without it, the rest counts as nothing.
        (self.folder / JOURNAL).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def kept(self, *, after_interrupt: bool) -> Iterator[None]:
        """Delete the folder when all is done; keep finished blocks after an error.

        Args:
            after_interrupt: Keep them after Ctrl-C too.
        """
        try:
            yield
        except BaseException as error:
            is_empty = self.num_done is None or (isinstance(error, KeyboardInterrupt) and not after_interrupt)
            # Before, the files may be those of another map.
            if self._is_begun and is_empty:
                self.remove()
            raise
        self.remove()

    def _check(self, before: Mapping[str, Any]) -> None:
        for name in [*self._identity, *before]:
            if before.get(name) != self._identity.get(name):
                raise OutputError(
                    f"{self.folder} holds unfinished tokens made with {name} = {before.get(name)}, now "
                    f"{self._identity.get(name)}; go on with the same, or begin again with `resume=False`"
                )

    def _save(self, name: str, values: Tensor) -> None:
        """Write an array that is on the disk before the journal names it."""
        with atomic_file(self.folder / f"{name}.npy") as path, path.open("wb") as file:
            np.save(file, values.numpy())

    def _load(self, name: str) -> Tensor:
        return torch.from_numpy(np.load(self.folder / f"{name}.npy"))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        # NumPy raises EOFError at an empty file.
        except (OSError, ValueError, EOFError) as error:
            cause = error.__cause__ if isinstance(error, OutputError) else error
            reason = os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno else str(error)
            raise OutputError(
                f"can't keep tokens in {self.folder}: {reason.lower()}; choose a folder on a larger disk, or begin "
                "again with `resume=False`"
            ) from error
