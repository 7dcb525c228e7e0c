"""JSON and other text files in UTF-8 that appear when they are complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from perf_vit.errors import OutputError
from perf_vit.io._staging import staged
from perf_vit.text import to_json

__all__ = ["write_json", "write_text"]


def write_json(path: str | Path, value: Any) -> None:
    """Write plain values as strict JSON; NaN and infinities become null.

    Raises:
        OutputError: nothing can be written there.
    """
    write_text(path, to_json(value, indent=2) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write text as UTF-8.

    Raises:
        OutputError: nothing can be written there.
    """
    path = Path(path)
    with staged(path) as folder:
        try:
            (folder / path.name).write_text(text, encoding="utf-8", newline="\n")
        except OSError as error:
            raise OutputError(f"can't write {path}: {error.strerror or error}; choose another output") from error
