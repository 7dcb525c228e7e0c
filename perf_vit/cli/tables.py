"""CSV files that appear when they are complete."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from perf_vit.errors import OutputError
from perf_vit.io import staged

__all__ = ["write_rows"]


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file.

    Args:
        path: the file; missing parent folders are made.
        header: names of the columns.
        rows: their values.

    Raises:
        OutputError: nothing can be written there.
    """
    with staged(path) as folder:
        try:
            with (folder / path.name).open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
                writer = csv.writer(file)
                writer.writerow(header)
                writer.writerows(rows)
        except OSError as error:
            raise OutputError(f"can't write {path}: {error.strerror}; choose another output") from error
