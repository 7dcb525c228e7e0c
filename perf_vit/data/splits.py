"""Splits into training and validation that never divide a patient, a place or another group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from perf_vit.errors import ConfigError
from perf_vit.labels.tables import read_csv_rows

__all__ = ["check_groups_apart", "read_groups", "split_groups"]


def read_groups(table: str | Path | None, column: str) -> list[str]:
    """Read the group of each row of a CSV file.

    Raises:
        ConfigError: There is no file.
        InputError: The file can't be read, lacks the column, or a row lacks a value.
    """
    if table is None:
        raise ConfigError(f"data.group_column {column} is a column of a CSV file of labels; give data.train.labels")
    return [row.values[column] for row in read_csv_rows(table, [column])]


def check_groups_apart(train: Sequence[str], val: Sequence[str], column: str) -> None:
    """Refuse groups that are in both the training and the validation data.

    Raises:
        ConfigError: Names the first and says how many there are.
    """
    common = sorted(set(train) & set(val))
    if common:
        more = f" and {len(common) - 1} more" if len(common) > 1 else ""
        raise ConfigError(
            f"{column} {common[0]}{more} is in both data.train and data.val, so scores would be too good; keep each "
            f"{column} in one of them"
        )


def split_groups(
    groups: Sequence[str], labels: npt.NDArray[np.int64] | None, share: float, seed: int, column: str
) -> tuple[list[int], list[int]]:
    """Split items at random into training and validation, all items of a group on one side.

    Groups are taken for validation as long as they bring the number of items of each class nearer to the share. Each
    class keeps training items.

    Args:
        groups: Group of each item.
        labels: Class index of each item; None for items of one kind.
        share: Fraction of the items of each class to validate on.
        seed: Seed of the split.
        column: What the groups are, for errors.

    Returns:
        Indices of training and validation items, sorted.

    Raises:
        ConfigError: No group can be held out.
    """
    kinds = np.zeros(len(groups), np.int64) if labels is None else labels
    names, members = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)
    # Items of each group and class.
    counts = np.zeros((len(names), int(kinds.max()) + 1), np.int64)
    np.add.at(counts, (members, kinds), 1)
    total = counts.sum(axis=0)
    wanted = np.minimum(total - 1, np.maximum(1, np.rint(total * share))).clip(min=0)
    held, chosen = np.zeros_like(total), set[int]()
    order = np.random.default_rng(seed).permutation(len(names)).tolist()
    for group in order:
        new = held + counts[group]
        is_nearer = np.abs(wanted - new).sum() < np.abs(wanted - held).sum()
        if is_nearer and _leaves_all(total, new):
            held, chosen = new, chosen | {group}
    if not chosen:
        free = [group for group in order if _leaves_all(total, counts[group])]
        if not free:
            raise ConfigError(
                f"data.group_column {column} has {len(names)} groups, none of which can be held out without leaving a "
                "class without training data; give data.val"
            )
        chosen = {min(free, key=lambda group: int(counts[group].sum()))}
    is_val = np.isin(members, sorted(chosen))
    return np.flatnonzero(~is_val).tolist(), np.flatnonzero(is_val).tolist()


def _leaves_all(total: npt.NDArray[np.int64], held: npt.NDArray[np.int64]) -> bool:
    """Whether each class keeps training items."""
    return bool(((total > held) | (total == 0)).all())
