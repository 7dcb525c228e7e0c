"""Splits into training and validation that never divide a patient, a place or another group."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from perf_vit.errors import ConfigError, DataWarning
from perf_vit.labels.tables import read_csv_rows
from perf_vit.sources.base import has_place
from perf_vit.types import Source, Window

__all__ = ["HoldOutConfig", "check_groups_apart", "read_groups", "split_groups", "split_items", "warn_of_shared_places"]


@dataclass(kw_only=True)
class HoldOutConfig:
    """What is held out for validation where `val` is left out.

    Attributes:
        val_share: Fraction of the images of `train` to validate on if `val` is None, of each class alike.
        num_folds: Number of parts of `train` for cross-validation, one of which is held out instead of `val_share`:
            runs with fold 0, 1, ... validate on each image once. None for a single split.
        fold: Part that is held out, from 0.
    """

    val_share: float = 0.2
    num_folds: int | None = None
    fold: int = 0

    def check_hold_out(self, val: object) -> None:
        """Check the ranges of the keys.

        Args:
            val: Validation images of the config; None if they are held out.

        Raises:
            ConfigError: A value is out of range, or folds are asked for beside images to validate on.
        """
        if val is not None and self.num_folds is not None:
            raise ConfigError("data.num_folds holds out a part of data.train, and data.val is given; leave one out")
        if not 0 <= self.val_share <= 1:
            raise ConfigError(f"data.val_share must lie between 0 and 1, got {self.val_share:g}")
        if self.num_folds is None:
            if self.fold:
                raise ConfigError(f"data.fold {self.fold} is one of data.num_folds, which is left out; give both")
        elif self.num_folds < 2 or not 0 <= self.fold < self.num_folds:
            raise ConfigError(
                "data.num_folds must be at least 2 and data.fold from 0 to data.num_folds - 1, got "
                f"{self.num_folds} and {self.fold}"
            )


def split_items(
    num_items: int,
    config: HoldOutConfig,
    seed: int,
    what: str,
    *,
    labels: npt.NDArray[np.int64] | None = None,
    groups: Sequence[str] | None = None,
    key: str | None = None,
) -> tuple[list[int], list[int]]:
    """Split items at random into training and validation, or hold out a fold.

    Args:
        num_items: Number of items.
        config: Share, or number of folds and fold.
        seed: Seed of the split; all folds of a cross-validation need the same.
        what: Name of the items, for errors.
        labels: Class index of each item, whose shares both sides keep; None for items of one kind.
        groups: Group of each item; all items of a group are on one side. None if each item is a group of its own.
        key: Config key of the groups and its value, for errors.

    Returns:
        Indices of training and validation items, sorted.

    Raises:
        ConfigError: One of the sides would be empty, or no group can be held out.
    """
    if config.num_folds is not None:
        return _hold_out_fold(num_items, config, seed, what, labels=labels, groups=groups, key=key)
    if groups is not None:
        return split_groups(groups, labels, config.val_share, seed, key or what)
    kinds = np.zeros(num_items, np.int64) if labels is None else labels
    rng = np.random.default_rng(seed)
    held: list[int] = []
    for kind in np.unique(kinds):
        members = rng.permutation(np.flatnonzero(kinds == kind))
        number = min(len(members) - 1, max(1, round(len(members) * config.val_share)))
        held += members[:number].tolist()
    if not held or config.val_share == 1:
        raise ConfigError(
            f"data.val_share {config.val_share:g} of {num_items} {what} leaves none to train or validate on; give "
            "data.val"
        )
    return sorted(set(range(num_items)) - set(held)), sorted(held)


def _hold_out_fold(
    num_items: int,
    config: HoldOutConfig,
    seed: int,
    what: str,
    *,
    labels: npt.NDArray[np.int64] | None,
    groups: Sequence[str] | None,
    key: str | None,
) -> tuple[list[int], list[int]]:
    """Deal groups to folds, the largest first, each to the fold that has least of its classes."""
    assert config.num_folds is not None
    own = np.arange(num_items) if groups is None else np.asarray(groups, dtype=object).astype(str)
    counts, members = _class_counts(own, labels)
    if len(counts) < config.num_folds:
        of = f"groups of {key}" if groups is not None else what
        raise ConfigError(
            f"data.num_folds {config.num_folds} needs at least as many {of}, got {len(counts)}; take fewer folds"
        )
    shares = counts / counts.sum(axis=0)
    order = np.random.default_rng(seed).permutation(len(counts))
    order = order[np.argsort(-counts[order].sum(axis=1), kind="stable")]
    dealt, sizes = np.zeros((config.num_folds, shares.shape[1])), np.zeros(config.num_folds)
    fold_of = np.zeros(len(counts), np.int64)
    for group in order.tolist():
        # Of folds with equal shares of its classes, the smallest.
        fold = int(np.lexsort((sizes, np.round(dealt @ (counts[group] > 0), 9)))[0])
        fold_of[group] = fold
        dealt[fold] += shares[group]
        sizes[fold] += counts[group].sum()
    is_val = fold_of[members] == config.fold
    untrained = counts[fold_of != config.fold].sum(axis=0) == 0
    if untrained.any():
        warnings.warn(
            f"fold {config.fold} holds all {what} of {int(untrained.sum())} of {len(untrained)} classes, which are not "
            "trained on; take fewer folds or other groups",
            DataWarning,
            stacklevel=3,
        )
    return np.flatnonzero(~is_val).tolist(), np.flatnonzero(is_val).tolist()


def _class_counts(
    groups: npt.NDArray[Any], labels: npt.NDArray[np.int64] | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the number of items of each group and class that occurs, [G, K], and the group of each item."""
    kinds = np.zeros(len(groups), np.int64) if labels is None else np.unique(labels, return_inverse=True)[1]
    names, members = np.unique(groups, return_inverse=True)
    counts = np.zeros((len(names), int(kinds.max()) + 1), np.int64)
    np.add.at(counts, (members, kinds), 1)
    return counts, members


def warn_of_shared_places(
    train: Iterable[tuple[Source, Window]],
    val: Iterable[tuple[Source, Window]],
    *,
    hint: str = "choose other images or regions for one of them",
) -> None:
    """Warn if pixels to validate on are also trained on.

    Places are compared by their coordinates in files that have the same CRS and a transform, and by pixels of the same
    file otherwise.

    Args:
        train: Images and the windows of them to train on.
        val: The same for validation.
        hint: What to do.
    """
    trained, validated = _by_system(train), _by_system(val)
    total = sum(float(area) for _, _, areas in validated.values() for area in areas)
    shared, first = 0.0, ""
    for key, (outlines, paths, areas) in validated.items():
        if key not in trained:
            continue
        common = _common_shares(outlines, trained[key][0])
        # Files side by side may overlap by rounding.
        common = np.where(common > _ROUNDING, common, 0.0)
        shared += float((common * areas).sum())
        if common.any():
            first = first or paths[int(np.argmax(common > 0))]
    if first:
        warnings.warn(
            f"{max(1, round(100 * shared / total))} % of data.val is also in data.train, the first {first}, so "
            f"validation scores will be too good; {hint}",
            DataWarning,
            stacklevel=3,
        )


def _by_system(
    places: Iterable[tuple[Source, Window]],
) -> dict[str, tuple[npt.NDArray[Any], list[str], npt.NDArray[np.float64]]]:
    """Return outlines [n], paths and areas in pixels of windows, by the coordinate system that they share."""
    found: dict[str, list[tuple[shapely.Polygon, str, float]]] = {}
    for source, window in places:
        key, outline = _place(source, window)
        found.setdefault(key, []).append((outline, source.path, float(window.height * window.width)))
    return {
        key: (
            np.array([outline for outline, _, _ in rows], object),
            [path for _, path, _ in rows],
            np.array([area for *_, area in rows]),
        )
        for key, rows in found.items()
    }


_ROUNDING = 1e-3
# Few enough for outlines that all overlap.
_OUTLINES_AT_ONCE = 64


def _common_shares(windows: npt.NDArray[Any], others: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the part of each outline that others cover, at most 1, counting overlaps of different ones twice."""
    # Many images of one place would make a pair each with each.
    _, first, place_of = np.unique(shapely.to_wkb(windows), return_index=True, return_inverse=True)
    windows, others = windows[first], others[np.unique(shapely.to_wkb(others), return_index=True)[1]]
    tree, covered = shapely.STRtree(others), np.zeros(len(windows))
    (our_bounds, our_upright), (their_bounds, their_upright) = _boxes(windows), _boxes(others)
    for start in range(0, len(windows), _OUTLINES_AT_ONCE):
        ours, theirs = tree.query(windows[start : start + _OUTLINES_AT_ONCE])
        ours += start
        areas = _common_areas(our_bounds[ours], their_bounds[theirs])
        tilted = ~(our_upright[ours] & their_upright[theirs])
        areas[tilted] = shapely.area(shapely.intersection(windows[ours[tilted]], others[theirs[tilted]]))
        np.add.at(covered, ours, areas)
    return np.minimum(1.0, covered / shapely.area(windows))[place_of]


def _boxes(outlines: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Return the bounds of outlines, [n, 4], and whether they fill them, [n]."""
    bounds = shapely.bounds(outlines)
    return bounds, shapely.area(outlines) >= (1 - 1e-9) * (bounds[:, 2:] - bounds[:, :2]).prod(axis=1)


def _common_areas(bounds: npt.NDArray[np.float64], others: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the area that each box has in common with another one, [n]."""
    sides = np.minimum(bounds[:, 2:], others[:, 2:]) - np.maximum(bounds[:, :2], others[:, :2])
    areas: npt.NDArray[np.float64] = np.maximum(sides, 0).prod(axis=1)
    return areas


def _place(source: Source, window: Window) -> tuple[str, shapely.Polygon]:
    """Return a coordinate system and the outline of a window in it, which isn't upright in rotated rasters."""
    if source.mpp is not None or not has_place(source):
        # The file may be read at other pixel sizes; its sides are 1.
        corner = np.array([window.col / source.width, window.row / source.height])
        sides = np.array([window.width / source.width, window.height / source.height])
        return os.path.realpath(source.path), shapely.box(*corner, *(corner + sides))
    (top, bottom), (left, right) = (window.row, window.row_stop), (window.col, window.col_stop)
    corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
    return str(source.crs), shapely.Polygon([source.transform @ corner for corner in corners])


def read_groups(table: str | Path | None, column: str, part: str = "train") -> list[str]:
    """Read the group of each row of the CSV file `data.PART.labels`.

    Raises:
        ConfigError: There is no file.
        InputError: The file can't be read, lacks the column, or a row lacks a value.
    """
    if table is None:
        raise ConfigError(f"data.group_column {column} is a column of a CSV file of labels; give data.{part}.labels")
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
    groups: Sequence[str], labels: npt.NDArray[np.int64] | None, share: float, seed: int, key: str
) -> tuple[list[int], list[int]]:
    """Split items at random into training and validation, all items of a group on one side.

    Groups are taken for validation as long as they bring the number of items of each class nearer to the share. Each
    class keeps training items.

    Args:
        groups: Group of each item.
        labels: Class index of each item; None for items of one kind.
        share: Fraction of the items of each class to validate on.
        seed: Seed of the split.
        key: Config key of the groups and its value, for errors.

    Returns:
        Indices of training and validation items, sorted.

    Raises:
        ConfigError: No group can be held out.
    """
    counts, members = _class_counts(np.asarray(groups, dtype=object).astype(str), labels)
    total = counts.sum(axis=0)
    wanted = np.minimum(total - 1, np.maximum(1, np.rint(total * share))).clip(min=0)
    held, chosen = np.zeros_like(total), set[int]()
    order = np.random.default_rng(seed).permutation(len(counts)).tolist()
    for group in order:
        new = held + counts[group]
        is_nearer = np.abs(wanted - new).sum() < np.abs(wanted - held).sum()
        if is_nearer and _leaves_all(total, new):
            held, chosen = new, chosen | {group}
    if not chosen:
        free = [group for group in order if _leaves_all(total, counts[group])]
        if not free:
            raise ConfigError(
                f"{key} has {len(counts)} groups, none of which can be held out without leaving a "
                "class without training data; give data.val"
            )
        chosen = {min(free, key=lambda group: int(counts[group].sum()))}
    is_val = np.isin(members, sorted(chosen))
    return np.flatnonzero(~is_val).tolist(), np.flatnonzero(is_val).tolist()


def _leaves_all(total: npt.NDArray[np.int64], held: npt.NDArray[np.int64]) -> bool:
    """Whether each class keeps training items."""
    return bool(((total > held) | (total == 0)).all())
