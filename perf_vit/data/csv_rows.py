"""Rows of CSV files with the columns that somebody asked for."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perf_vit.errors import InputError

__all__ = ["CsvRow", "read_csv_rows"]


@dataclass(frozen=True, slots=True)
class CsvRow:
    """One row.

    Attributes:
        place: file and line, for messages.
        values: by column, without blanks around them.
    """

    place: str
    values: dict[str, str]


def read_csv_rows(path: str | Path, columns: Sequence[str]) -> list[CsvRow]:
    """The rows of a CSV file; every one has all the columns.

    Raises:
        InputError: it can't be read, lacks a column, has no row, or a row without a value.
    """
    names, rows = _read(Path(path))
    missing = [column for column in columns if column not in names]
    if missing:
        raise InputError(f"{path} has no column {missing[0]}; its columns are {', '.join(names) or 'none'}")
    if not rows:
        raise InputError(f"{path} has no rows; expected one an image below the names of the columns")
    found = []
    for line, row in rows:
        values = {column: (row[column] or "").strip() for column in columns}
        empty = [column for column, value in values.items() if not value]
        if empty:
            raise InputError(f"line {line} of {path} has no {empty[0]}; fill it in, or leave the row out")
        found.append(CsvRow(f"line {line} of {path}", values))
    return found


def _read(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str | None]]]]:
    try:
        # Spreadsheets write a byte-order mark.
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = list(reader.fieldnames or ())
            return names, [(reader.line_num, row) for row in reader]
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"can't read {path} as CSV: {error}") from error
