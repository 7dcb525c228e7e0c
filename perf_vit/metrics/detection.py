"""Average precision of detectors, overall, per class and per object size."""

from __future__ import annotations

import contextlib
import io
import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import distributed

from perf_vit.geometry.boxes import oriented_box_bounds
from perf_vit.geometry.objects import mask_intersections
from perf_vit.geometry.oriented_boxes import oriented_iou_matrix
from perf_vit.metrics.matching import compared_geometry, split_independent
from perf_vit.text import without_nan
from perf_vit.types import Detections, MaskCrops, ObjectLabels

__all__ = ["OBJECT_SIZES", "DetectionClassScores", "DetectionMetrics", "DetectionScores"]

OBJECT_SIZES = {
    "very_tiny": (2.0, 8.0),
    "tiny": (8.0, 16.0),
    "small": (16.0, 32.0),
    "medium": (32.0, 64.0),
    "large": (64.0, 1e5),
}
"""Ranges of the square root of an object's area in pixels, as in AI-TOD (Wang et al. 2021, "Tiny Object Detection in
Aerial Images", ICPR 2020), plus "large" for larger objects."""

# AI-TOD's limit; COCO's limit of 100 would cut dense tiles. Denser images get _DETECTIONS_PER_OBJECT per object.
_MAX_DETECTIONS = 1500
_DETECTIONS_PER_OBJECT = 3
_IOU_50, _IOU_75 = 0, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionClassScores:
    """Scores of one class, from 0 to 1; NaN if the class has no labelled objects.

    Attributes:
        name: Class name.
        ap: Average precision, mean over IoUs of .5 to .95.
        ap50: Average precision at an IoU of .5.
        f1: Highest F1 over all score thresholds, at an IoU of .5.
        precision: Precision at `threshold`, at an IoU of .5.
        recall: Recall at `threshold`, at an IoU of .5.
        threshold: Score threshold with the highest F1.
        num_objects: Number of labelled objects, ignored ones excluded.
        precision_curve: Precision at an IoU of .5 and recalls of 0, .01, ..., 1.
    """

    name: str
    ap: float
    ap50: float
    f1: float
    precision: float
    recall: float
    threshold: float
    num_objects: int
    precision_curve: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionScores:
    """Means over the classes with labelled objects, from 0 to 1; NaN if there are none.

    Attributes:
        ap: Average precision, mean over IoUs of .5 to .95.
        ap50: Average precision at an IoU of .5.
        ap75: Average precision at an IoU of .75.
        recall: Recall without a score threshold, mean over IoUs of .5 to .95.
        ap_by_size: Average precision per size range of `OBJECT_SIZES`.
        threshold: Score threshold with the highest F1 over all classes together, at an IoU of .5.
        classes: Scores per class.
    """

    ap: float
    ap50: float
    ap75: float
    recall: float
    ap_by_size: dict[str, float]
    threshold: float
    classes: tuple[DetectionClassScores, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as plain values for JSON, NaN as None."""
        return without_nan(asdict(self))


class DetectionMetrics:
    """COCO average precision, computed by pycocotools; ignored objects count as crowds.

    Objects of all images are kept until `compute`, which gathers them over processes. Time and memory grow linearly
    with the number of objects in an image.

    Args:
        classes: Class names, in the order of the class indices.
        kind: Geometry to compare: boxes, oriented boxes (exact IoU) or masks.
        max_detections: Maximum number of detections per image and class, highest scores first; None for 1,500 or three
            per labelled object of the class, whichever is larger.
    """

    def __init__(
        self,
        classes: Sequence[str],
        kind: Literal["boxes", "oriented_boxes", "masks"] = "boxes",
        max_detections: int | None = None,
    ) -> None:
        self.classes = tuple(classes)
        self.kind = kind
        self.max_detections = max_detections
        self.images: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]] = []

    def update(self, detections: Sequence[Detections], labels: Sequence[ObjectLabels]) -> None:
        """Update with predictions and ground truth.

        Args:
            detections: Detections of each image.
            labels: Labelled objects of each image.

        Raises:
            InputError: The objects have no geometry of this kind.
        """
        for found, truth in zip(detections, labels, strict=True):
            objects = self._truth(truth)
            self.images += split_independent(objects, self._surest(self._found(found), objects))

    def reset(self) -> None:
        """Remove all images."""
        self.images = []

    def compute(self) -> DetectionScores:
        """Compute the scores of all images."""
        evaluation = self._evaluate(_from_all_processes(self.images))
        precision = evaluation.eval["precision"][..., -1]
        labelled = [
            sum(not obj["iscrowd"] for obj in evaluation.cocoGt.dataset["annotations"] if obj["category_id"] == index)
            for index in range(len(self.classes))
        ]
        outcomes = [_outcomes(evaluation, index) for index in range(len(self.classes))]
        scores, right = (np.concatenate([outcome[part] for outcome in outcomes]) for part in (0, 1))
        best = _best_f1(scores, right, sum(labelled))
        return DetectionScores(
            ap=_mean(precision[..., 0]),
            ap50=_mean(precision[_IOU_50, ..., 0]),
            ap75=_mean(precision[_IOU_75, ..., 0]),
            recall=_mean(evaluation.eval["recall"][..., 0, -1]),
            ap_by_size={name: _mean(precision[..., index + 1]) for index, name in enumerate(OBJECT_SIZES)},
            threshold=best["threshold"],
            classes=tuple(
                DetectionClassScores(
                    name=name,
                    ap=_mean(precision[:, :, index, 0]),
                    ap50=_mean(precision[_IOU_50, :, index, 0]),
                    num_objects=labelled[index],
                    precision_curve=tuple(np.where(precision < 0, np.nan, precision)[_IOU_50, :, index, 0].tolist()),
                    **_best_f1(*outcomes[index], labelled[index]),
                )
                for index, name in enumerate(self.classes)
            ),
        )

    def _truth(self, truth: ObjectLabels) -> list[dict[str, Any]]:
        shapes = self._shapes(truth)
        return [
            {**shape, "category_id": int(label), "iscrowd": int(ignored)}
            for shape, label, ignored in zip(shapes, truth.labels, truth.ignored, strict=True)
        ]

    def _found(self, found: Detections) -> list[dict[str, Any]]:
        shapes = self._shapes(found)
        return [
            {**shape, "category_id": label, "score": score, "iscrowd": 0}
            for shape, label, score in zip(shapes, _list(found.labels), _list(found.scores), strict=True)
        ]

    def _surest(self, found: list[dict[str, Any]], truth: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Select the detections that count, by class and descending score."""
        kept = []
        for index in range(len(self.classes)):
            ranked = sorted((s for s in found if s["category_id"] == index), key=lambda shape: -shape["score"])
            num_objects = sum(shape["category_id"] == index for shape in truth)
            limit = max(_MAX_DETECTIONS, _DETECTIONS_PER_OBJECT * num_objects)
            kept += ranked[: limit if self.max_detections is None else self.max_detections]
        return kept

    def _shapes(self, objects: Detections | ObjectLabels) -> list[dict[str, Any]]:
        values = compared_geometry(objects, self.kind)
        if self.kind == "masks":
            return _mask_shapes(values)
        bounds = values if self.kind == "boxes" else oriented_box_bounds(values)
        sizes = (values[:, 2:] - values[:, :2] if self.kind == "boxes" else values[:, 2:4]).prod(axis=1)
        shapes = [
            {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": area}
            for (x0, y0, x1, y1), area in zip(bounds.tolist(), sizes.tolist(), strict=True)
        ]
        if self.kind == "boxes":
            return shapes
        return [{**shape, "oriented_box": box} for shape, box in zip(shapes, values.tolist(), strict=True)]

    def _evaluate(self, images: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]) -> COCOeval:
        # pycocotools prints its progress.
        with contextlib.redirect_stdout(io.StringIO()):
            truth, found = (_coco([image[side] for image in images], len(self.classes)) for side in (0, 1))
            protocol = {"oriented_boxes": _OrientedEvaluation, "masks": _MaskEvaluation}.get(self.kind, COCOeval)
            evaluation = protocol(truth, found, "bbox")
            evaluation.params.areaRng = [[0, 1e10], *([low**2, high**2] for low, high in OBJECT_SIZES.values())]
            evaluation.params.areaRngLbl = ["all", *OBJECT_SIZES]
            # Detections beyond the limit are already removed.
            evaluation.params.maxDets = [max((len(shapes) for _, shapes in images), default=1)]
            evaluation.evaluate()
            evaluation.accumulate()
        return evaluation


class _OrientedEvaluation(COCOeval):
    """COCO evaluation with the exact IoU of oriented boxes."""

    def computeIoU(self, imgId: int, catId: int) -> Any:  # noqa: N802
        """Return the IoU of an image's detections and objects of a class; for crowds, the share inside."""
        found = sorted(self._dts[imgId, catId], key=lambda shape: -shape["score"])[: self.params.maxDets[-1]]
        truth = self._gts[imgId, catId]
        if not found or not truth:
            return []
        boxes, objects = (
            torch.tensor([shape["oriented_box"] for shape in shapes], dtype=torch.float64) for shapes in (found, truth)
        )
        iou = oriented_iou_matrix(boxes, objects)
        areas, other_areas = boxes[:, 2:4].prod(1, keepdim=True), objects[:, 2:4].prod(1)
        inside = iou * (areas + other_areas) / (1 + iou) / areas.clamp(min=1e-9)
        return torch.where(torch.tensor([bool(shape["iscrowd"]) for shape in truth]), inside, iou).numpy()


class _MaskEvaluation(COCOeval):
    """COCO evaluation of masks stored as crops."""

    def computeIoU(self, imgId: int, catId: int) -> Any:  # noqa: N802
        """Return the IoU of an image's detections and objects of a class; for crowds, the share inside."""
        found = sorted(self._dts[imgId, catId], key=lambda shape: -shape["score"])[: self.params.maxDets[-1]]
        truth = self._gts[imgId, catId]
        if not found or not truth:
            return []
        ours, theirs = (_mask_crops(shapes) for shapes in (found, truth))
        first, second, shared = mask_intersections(ours, theirs)
        areas, crowds = ours.areas()[first], np.array([bool(shape["iscrowd"]) for shape in truth])[second]
        iou = np.zeros((len(found), len(truth)))
        iou[first, second] = shared / np.where(crowds, areas, areas + theirs.areas()[second] - shared)
        return iou


def _coco(images: Sequence[Sequence[dict[str, Any]]], num_classes: int) -> COCO:
    """Build the pycocotools index of the objects of all images; ids start at 1, as 0 means unmatched there."""
    objects = [{**shape, "image_id": index} for index, image in enumerate(images) for shape in image]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": index} for index in range(len(images))],
        "categories": [{"id": index} for index in range(num_classes)],
        "annotations": [{**shape, "id": index} for index, shape in enumerate(objects, 1)],
    }
    coco.createIndex()
    return coco


def _mask_shapes(masks: MaskCrops) -> list[dict[str, Any]]:
    """Return the packed mask crops and their positions."""
    return [
        {
            "crop": zlib.compress(np.packbits(crop).tobytes(), level=1),
            "shape": crop.shape,
            "corner": corner,
            "area": float(np.count_nonzero(crop)),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
        }
        for crop, corner, (x0, y0, x1, y1) in zip(
            masks.crops, masks.corners.tolist(), masks.rectangles().tolist(), strict=True
        )
    ]


def _mask_crops(shapes: Sequence[dict[str, Any]]) -> MaskCrops:
    crops = [
        np.unpackbits(np.frombuffer(zlib.decompress(shape["crop"]), np.uint8), count=math.prod(shape["shape"]))
        .reshape(shape["shape"])
        .astype(bool)
        for shape in shapes
    ]
    # The image size isn't used here.
    return MaskCrops(crops, np.array([shape["corner"] for shape in shapes], np.int64), (0, 0))


def _outcomes(evaluation: COCOeval, index: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Return the scores of a class's detections that count, and which are true positives at an IoU of .5."""
    num_images, num_sizes = len(evaluation.params.imgIds), len(evaluation.params.areaRng)
    # Sorted by class, size and image; the first size is "all".
    first = index * num_sizes * num_images
    parts = [part for part in evaluation.evalImgs[first : first + num_images] if part is not None]
    counts = [~np.asarray(part["dtIgnore"][_IOU_50], bool) for part in parts]
    scores = [np.asarray(part["dtScores"])[count] for part, count in zip(parts, counts, strict=True)]
    right = [part["dtMatches"][_IOU_50][count] > 0 for part, count in zip(parts, counts, strict=True)]
    return np.concatenate([np.zeros(0), *scores]), np.concatenate([np.zeros(0, bool), *right])


def _best_f1(scores: npt.NDArray[np.float64], right: npt.NDArray[np.bool_], num_objects: int) -> dict[str, float]:
    """Find the highest F1 over all thresholds, with its precision, recall and threshold."""
    if not num_objects or not right.any():
        value = 0.0 if num_objects else math.nan
        return {"f1": value, "precision": value, "recall": value, "threshold": math.nan}
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    # Detections of equal scores share a threshold.
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    hits, taken = np.cumsum(right[order])[last], last + 1
    best = int(np.argmax(2 * hits / (taken + num_objects)))
    return {
        "f1": float(2 * hits[best] / (taken[best] + num_objects)),
        "precision": float(hits[best] / taken[best]),
        "recall": float(hits[best] / num_objects),
        "threshold": float(ranked[last[best]]),
    }


def _mean(values: npt.NDArray[np.float64]) -> float:
    """Return the mean without pycocotools' -1, which marks classes without objects."""
    known = values[values > -1]
    return float(known.mean()) if known.size else math.nan


def _from_all_processes(images: list[Any]) -> list[Any]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return images
    gathered: list[list[Any]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(gathered, images)
    return [image for part in gathered for image in part]


def _list(values: Any) -> list[Any]:
    return torch.as_tensor(values).cpu().tolist()
