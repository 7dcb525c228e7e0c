"""Average precision of target platelets by their distance from the control."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lanes import CLASSES, distances
from scores import average_precision, greedy, overlap
from torchvision.ops import nms

from perf_vit.types import Detections, ObjectLabels

DISTANCE_BOUNDS = (0, 64, 192, 448, 704, 960)
"""In pixels. Windows of 128 px hold control and platelet in the first bin only; tiles of 256, 512 and 1,024 px reach to
192, 448 and 960 px."""

_IOU = 0.5
_TARGET = CLASSES.index("target")


@dataclass(frozen=True, eq=False)
class _Tile:
    """Detections of one tile, best first, and its objects.

    Attributes:
        scores: [D].
        distances: Distances of the detections, [D].
        matched: Index of the object, -1 for none, [D].
        object_distances: [G].
        ignored: Objects that count neither way, [G].
    """

    scores: npt.NDArray[np.float32]
    distances: npt.NDArray[np.float32]
    matched: npt.NDArray[np.int64]
    object_distances: npt.NDArray[np.float32]
    ignored: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, boxes: torch.Tensor, scores: torch.Tensor, truth: ObjectLabels) -> _Tile:
        order = scores.argsort(descending=True, stable=True)
        near = overlap(boxes[order], torch.from_numpy(truth.boxes_xyxy).float(), truth.ignored)
        return cls(
            scores[order].numpy(),
            distances(boxes[order].numpy()),
            greedy(near, truth.ignored, _IOU),
            distances(truth.boxes_xyxy),
            truth.ignored,
        )


class DistanceScores:
    """AP50 of the target and of all platelets, and how well scores tell the lanes' classes apart, by distance.

    The AUC is that of targets among all platelets that count, ranked by the score of the target minus that of the other
    class; the score of a class is the highest of the detections of an IoU of .5 or more, 0 without any. It doesn't
    depend on how well platelets are found. Chance is .5 within tiles. Over all tiles, a network that knows how many of
    a tile's lanes are targets' reaches `auc_of_share`; normalisation over a tile, as in FCOS's head, may tell that. The
    AP of the target without any knowledge is that of all platelets times the targets' share, about.
    """

    def __init__(self) -> None:
        self._targets: list[_Tile] = []
        self._platelets: list[_Tile] = []
        self._ranks: list[npt.NDArray[np.float64]] = []

    def update(self, found: Detections, truth: ObjectLabels) -> None:
        """Update with the detections and the objects of one tile."""
        boxes, scores = found.boxes_xyxy.float(), found.scores.float()
        is_target = found.labels == _TARGET
        targets = replace(
            truth,
            labels=truth.labels[kept := (truth.labels == _TARGET) | truth.ignored],
            boxes_xyxy=truth.boxes_xyxy[kept],
            ignored=truth.ignored[kept],
        )
        self._targets.append(_Tile.of(boxes[is_target], scores[is_target], targets))
        # A platelet that is found as both classes counts once.
        once = nms(boxes, scores, _IOU)
        self._platelets.append(_Tile.of(boxes[once], scores[once], truth))
        near = overlap(boxes, torch.from_numpy(truth.boxes_xyxy).float(), np.zeros(len(truth.labels), bool)) >= _IOU
        best = [
            np.where(near & chosen.numpy()[:, None], scores.numpy()[:, None], 0.0).max(axis=0, initial=0.0)
            for chosen in (is_target, ~is_target)
        ]
        counted = ~truth.ignored
        rows = np.stack([distances(truth.boxes_xyxy), truth.labels == _TARGET, best[0] - best[1]], axis=1)
        self._ranks.append(rows[counted])

    def to_dict(self) -> dict[str, Any]:
        """Return all scores as plain values."""
        bins = [(-np.inf, np.inf), *pairwise(DISTANCE_BOUNDS)]
        whole, *by_distance = [
            {
                "low": low,
                "high": high,
                "num_targets": _num(self._targets, low, high),
                "num_platelets": _num(self._platelets, low, high),
                "target_ap50": _ap(self._targets, low, high),
                "platelet_ap50": _ap(self._platelets, low, high),
                "auc": _auc([np.concatenate(self._ranks)], low, high),
                "auc_in_tiles": _auc(self._ranks, low, high),
                "auc_of_share": _auc([np.concatenate([_with_share(each) for each in self._ranks])], low, high),
            }
            for low, high in bins
        ]
        return {**{name: whole[name] for name in whole if name not in ("low", "high")}, "by_distance": by_distance}


def _num(tiles: list[_Tile], low: float, high: float) -> int:
    return sum(int(_counted(tile, low, high).sum()) for tile in tiles)


def _counted(tile: _Tile, low: float, high: float) -> npt.NDArray[np.bool_]:
    inside: npt.NDArray[np.bool_] = ~tile.ignored & (tile.object_distances >= low) & (tile.object_distances < high)
    return inside


def _ap(tiles: list[_Tile], low: float, high: float) -> float:
    """Average precision within a range of distances; a detection that finds nothing counts at its own distance."""
    scores, right = [], []
    for tile in tiles:
        hit = tile.matched >= 0
        is_right = np.zeros(len(hit), bool)
        is_right[hit] = _counted(tile, low, high)[tile.matched[hit]]
        is_wrong = ~hit & (tile.distances >= low) & (tile.distances < high)
        scores.append(tile.scores[is_right | is_wrong])
        right.append(is_right[is_right | is_wrong])
    return average_precision(np.concatenate(scores), np.concatenate(right), _num(tiles, low, high))


def _auc(groups: list[npt.NDArray[np.float64]], low: float, high: float) -> float:
    """Share of pairs of a target and another platelet of a group in which the target ranks higher; ties are half.

    Args:
        groups: Distance, whether it is a target and rank of each platelet, [n, 3].
        low: Lowest distance.
        high: Distance above the highest.
    """
    above, pairs = 0.0, 0
    for ranks in groups:
        inside = (ranks[:, 0] >= low) & (ranks[:, 0] < high)
        is_target = ranks[:, 1] > 0
        first, second = ranks[inside & is_target, 2], np.sort(ranks[inside & ~is_target, 2])
        above += sum(np.searchsorted(second, first, side=side).sum() for side in ("left", "right")) / 2
        pairs += len(first) * len(second)
    return float(above / pairs) if pairs else float("nan")


def _with_share(ranks: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the ranks of a network that knows the share of targets in the tile, and nothing else."""
    return np.stack([ranks[:, 0], ranks[:, 1], np.full(len(ranks), ranks[:, 1].mean())], axis=1)
