"""Oriented boxes as tensors: normal form, corners, exact and Gaussian overlaps, non-maximum suppression.

A box is centre x, centre y, width, height and an angle in radians from the x axis towards the y axis; the width lies
along the angle.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "corners_of_oriented",
    "kfiou",
    "kfiou_loss",
    "normalize_oriented",
    "oriented_from_polygons",
    "oriented_from_xyxy",
    "oriented_iou",
    "oriented_iou_matrix",
    "oriented_nms",
    "probiou",
    "probiou_loss",
    "working_precision",
]

_CHUNK_PAIRS = 1 << 16

_BLOCK_BOXES = 1024


def working_precision(values: Tensor) -> Tensor:
    """Cast to float64, or to float32 on devices without float64: areas of thin boxes need the precision."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


def normalize_oriented(oriented_boxes: Tensor) -> Tensor:
    """Convert boxes to their normal form: width >= height, angle in [-pi/2, pi/2).

    Args:
        oriented_boxes: Boxes with any widths, heights and angles, [..., 5].

    Returns:
        The same rectangles, [..., 5].
    """
    center, width, height, angle = oriented_boxes[..., :2], *oriented_boxes[..., 2:].unbind(-1)
    upright = width < height
    turned = torch.where(upright, angle + math.pi / 2, angle)
    wrapped = torch.remainder(turned + math.pi / 2, math.pi) - math.pi / 2
    # Rounding maps angles just below -pi/2 to exactly pi/2.
    wrapped = torch.where(wrapped >= math.pi / 2, wrapped - math.pi, wrapped)
    sides = torch.where(upright[..., None], torch.stack([height, width], -1), torch.stack([width, height], -1))
    return torch.cat([center, sides, wrapped[..., None]], -1)


def corners_of_oriented(oriented_boxes: Tensor) -> Tensor:
    """Compute the corners of oriented boxes, [..., 5] -> [..., 4, 2]: x and y in cyclic order."""
    return oriented_boxes[..., None, :2] + _corner_offsets(oriented_boxes)


def oriented_from_xyxy(boxes_xyxy: Tensor) -> Tensor:
    """Convert upright boxes, [..., 4], to oriented boxes, [..., 5]."""
    low, high = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return normalize_oriented(torch.cat([(low + high) / 2, high - low, torch.zeros_like(low[..., :1])], -1))


def oriented_from_polygons(polygons: Tensor) -> Tensor:
    """Compute the minimum-area rectangles of polygons.

    The rectangle has a side along an edge of the convex hull (Freeman and Shapira 1975), and each edge joins two
    vertices, so the directions of all pairs of vertices are tried.

    Args:
        polygons: x and y of K vertices in any order, [..., K, 2] or flat [..., 2 K].

    Returns:
        Oriented boxes, [..., 5], width >= height.
    """
    points = polygons if polygons.shape[-1] == 2 else polygons.reshape(*polygons.shape[:-1], -1, 2)
    origin = points.mean(-2, keepdim=True)
    offsets = working_precision(points - origin)
    first, second = torch.triu_indices(points.shape[-2], points.shape[-2], 1, device=points.device)
    along = offsets[..., second, :] - offsets[..., first, :]
    angles = torch.atan2(along[..., 1], along[..., 0])
    turned = _turn(offsets[..., None, :, :], -angles[..., None])
    low, high = turned.amin(-2), turned.amax(-2)
    best = (high - low).prod(-1).argmin(-1, keepdim=True)
    angle = angles.gather(-1, best)
    low, high = (sides.gather(-2, best[..., None].expand(*best.shape, 2)).squeeze(-2) for sides in (low, high))
    center = origin.squeeze(-2) + _turn((low + high) / 2, angle.squeeze(-1))
    return normalize_oriented(torch.cat([center, high - low, angle], -1)).to(polygons.dtype)


def oriented_iou(oriented_boxes: Tensor, others: Tensor) -> Tensor:
    """Compute the exact intersection over union of pairs of boxes, 0 where both are empty.

    Args:
        oriented_boxes: Oriented boxes, [..., 5].
        others: Oriented boxes, [..., 5]; both broadcast.

    Returns:
        IoU, [...], in the dtype of the boxes.
    """
    boxes, partners = working_precision(oriented_boxes), working_precision(others)
    shared = _shared_areas(boxes, partners)
    union = boxes[..., 2:4].prod(-1) + partners[..., 2:4].prod(-1) - shared
    return (shared / torch.where(union > 0, union, 1)).to(oriented_boxes.dtype)


def oriented_iou_matrix(oriented_boxes: Tensor, others: Tensor) -> Tensor:
    """Compute the exact intersection over union of all pairs, in chunks: memory is that of the result.

    Args:
        oriented_boxes: Oriented boxes, [n, 5].
        others: Oriented boxes, [m, 5].

    Returns:
        IoU, [n, m].
    """
    near = _circles_intersect(oriented_boxes, others)
    return _iou_where(near, oriented_boxes, others)


def oriented_nms(oriented_boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float = 0.5) -> Tensor:
    """Apply non-maximum suppression per class.

    Args:
        oriented_boxes: Oriented boxes, [n, 5].
        scores: Confidence, [n]; ties are broken by order.
        labels: Class indices, [n]; only boxes of the same class suppress each other.
        iou_threshold: Largest IoU with a kept box of the same class.

    Returns:
        Indices of the kept boxes in descending order of score, [k].
    """
    order = scores.argsort(descending=True, stable=True)
    kept = order[:0]
    for block in torch.split(order, _BLOCK_BOXES):
        for earlier in torch.split(kept, 4 * _BLOCK_BOXES):
            hidden = _overlap(earlier, block, oriented_boxes, labels, iou_threshold).any(0)
            block = block[~hidden]
        suppresses = _overlap(block, block, oriented_boxes, labels, iou_threshold).triu(1)
        kept = torch.cat([kept, block[_greedy(suppresses)]])
    return kept


def _greedy(suppresses: Tensor) -> Tensor:
    """Return the boxes, best first, that no kept box suppresses; `suppresses` is strictly upper triangular, [n, n].

    Iterating to a fixed point takes as many steps as the longest chain of overlapping boxes, instead of n.
    """
    keep = torch.ones(len(suppresses), dtype=torch.bool, device=suppresses.device)
    while True:
        next_keep = ~(suppresses & keep[:, None]).any(0)
        if torch.equal(next_keep, keep):
            return keep
        keep = next_keep


def _overlap(rows: Tensor, columns: Tensor, boxes: Tensor, labels: Tensor, iou_threshold: float) -> Tensor:
    near = _circles_intersect(boxes[rows], boxes[columns]) & (labels[rows, None] == labels[columns])
    areas, other_areas = boxes[rows, None, 2:4].prod(-1), boxes[columns, 2:4].prod(-1)
    # The IoU is at most the smaller area over the larger.
    near &= torch.minimum(areas, other_areas) >= iou_threshold * torch.maximum(areas, other_areas)
    return _iou_where(near, boxes[rows], boxes[columns]) > iou_threshold


def _circles_intersect(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the pairs whose circumscribed circles intersect, bool [n, m]."""
    radii, other_radii = boxes[:, 2:4].norm(dim=-1) / 2, others[:, 2:4].norm(dim=-1) / 2
    # Distances computed by matrix products lose precision far from the origin.
    distances = torch.cdist(boxes[:, :2], others[:, :2], compute_mode="donot_use_mm_for_euclid_dist")
    return distances <= radii[:, None] + other_radii


def _iou_where(chosen: Tensor, boxes: Tensor, others: Tensor) -> Tensor:
    rows, columns = chosen.nonzero(as_tuple=True)
    chunks = zip(torch.split(rows, _CHUNK_PAIRS), torch.split(columns, _CHUNK_PAIRS), strict=True)
    iou = boxes.new_zeros(chosen.shape)
    iou[rows, columns] = torch.cat([oriented_iou(boxes[r], others[c]) for r, c in chunks])
    return iou


def _shared_areas(boxes: Tensor, others: Tensor) -> Tensor:
    """Compute the intersection areas, [..., 5] and [..., 5] -> [...].

    In the frame of the second box, clamping the outline of the first to the second's extent moves the parts outside
    onto its sides, where they enclose no area: the clamped outline encloses the intersection. A clamped edge is
    straight between its crossings with the lines of the four sides, so these crossings are its vertices. The
    computation has no special cases for edges that touch or coincide.
    """
    half_sides = others[..., None, 2:4] / 2
    corners = boxes[..., None, :2] - others[..., None, :2] + _corner_offsets(boxes)
    starts = _turn(corners, -others[..., None, 4])
    edges = starts.roll(-1, -2) - starts
    crossings = torch.cat([(-half_sides - starts) / edges, (half_sides - starts) / edges], -1)
    # An edge parallel to a side divides by 0; its crossing does not matter.
    crossings = crossings.nan_to_num(0, 0, 0).clamp(0, 1).sort(-1).values
    ends = (torch.zeros_like(crossings[..., :1]), torch.ones_like(crossings[..., :1]))
    steps = torch.cat([ends[0], crossings, ends[1]], -1)[..., None]
    outline = starts[..., None, :] + steps * edges[..., None, :]
    outline = torch.minimum(torch.maximum(outline, -half_sides[..., None, :]), half_sides[..., None, :])
    x, y = outline.unbind(-1)
    doubled = x[..., :-1] * y[..., 1:] - x[..., 1:] * y[..., :-1]
    return (doubled.sum((-1, -2)) / 2).clamp(min=0)


def _corner_offsets(boxes: Tensor) -> Tensor:
    signs = boxes.new_tensor([(0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5), (0.5, -0.5)])
    return _turn(signs * boxes[..., None, 2:4], boxes[..., None, 4])


def _turn(points: Tensor, angle: Tensor) -> Tensor:
    """Rotate points [..., 2] about the origin by angles [...], from x towards y."""
    (x, y), cos, sin = points.unbind(-1), angle.cos(), angle.sin()
    return torch.stack([x * cos - y * sin, x * sin + y * cos], -1)


_SMALLEST_SIDE = 1e-3

# The square root below has no gradient at 0.
_SMALLEST_SQUARE = 1e-12


def probiou(oriented_boxes: Tensor, others: Tensor) -> Tensor:
    """Compute ProbIoU: 1 - Hellinger distance of the boxes' Gaussians (Murrugarra-Llerena et al. 2021, eq. 3 to 8).

    Args:
        oriented_boxes: Oriented boxes, [..., 5].
        others: Oriented boxes, [..., 5]; both broadcast.

    Returns:
        ProbIoU, [...], from 0 for distant boxes to 1 for equal ones.
    """
    return 1 - probiou_loss(oriented_boxes, others)


def probiou_loss(oriented_boxes: Tensor, others: Tensor) -> Tensor:
    """Compute the Hellinger distance of the boxes' Gaussians, the loss L1 of the ProbIoU paper.

    Args:
        oriented_boxes: Oriented boxes, [..., 5].
        others: Oriented boxes, [..., 5]; both broadcast.

    Returns:
        Loss, [...], from 0 for equal boxes to 1 for distant ones.
    """
    first, second = _covariances(oriented_boxes), _covariances(others)
    mean = (first + second) / 2
    shapes = (_determinant(mean) / (_determinant(first) * _determinant(second)).sqrt()).log() / 2
    bhattacharyya = _squared_distance(oriented_boxes, others, mean) / 8 + shapes
    return (-torch.expm1(-bhattacharyya)).clamp(min=_SMALLEST_SQUARE).sqrt().to(oriented_boxes.dtype)


def kfiou(oriented_boxes: Tensor, others: Tensor) -> Tensor:
    """Compute KFIoU, the overlap of the boxes' Gaussians moved to one centre (Yang et al. 2023, arXiv 2201.12558).

    The product of two Gaussians is a Gaussian, as in a Kalman filter; the ellipse of its covariance represents the
    intersection. The value is scaled by 3 so that equal boxes give 1.

    Args:
        oriented_boxes: Oriented boxes, [..., 5].
        others: Oriented boxes, [..., 5]; both broadcast.

    Returns:
        KFIoU, [...], from 0 to 1, independent of the centres.
    """
    first, second = _covariances(oriented_boxes), _covariances(others)
    areas = _determinant(first).sqrt(), _determinant(second).sqrt()
    shared = areas[0] * areas[1] / _determinant(first + second).sqrt()
    return (3 * shared / (areas[0] + areas[1] - shared)).to(oriented_boxes.dtype)


def kfiou_loss(oriented_boxes: Tensor, targets: Tensor) -> Tensor:
    """Compute exp(1 - KFIoU) - 1 + ln(1 + d^2), d the distance of the centres in standard deviations of the target.

    Args:
        oriented_boxes: Oriented boxes, [..., 5].
        targets: Target boxes, [..., 5]; both broadcast.

    Returns:
        Loss, [...], 0 for equal boxes, unbounded above.
    """
    distance = _squared_distance(oriented_boxes, targets, _covariances(targets))
    shapes = torch.expm1(1 - working_precision(kfiou(oriented_boxes, targets)))
    return (torch.log1p(distance) + shapes).to(oriented_boxes.dtype)


def _covariances(boxes: Tensor) -> Tensor:
    """Return the variances in x and y and the covariance of uniform densities on the boxes, [..., 3]."""
    boxes = working_precision(boxes)
    along, across = (boxes[..., 2:4].clamp(min=_SMALLEST_SIDE) ** 2 / 12).unbind(-1)
    cos, sin = boxes[..., 4].cos(), boxes[..., 4].sin()
    return torch.stack(
        [along * cos**2 + across * sin**2, along * sin**2 + across * cos**2, (along - across) * cos * sin], -1
    )


def _determinant(covariances: Tensor) -> Tensor:
    xx, yy, xy = covariances.unbind(-1)
    return xx * yy - xy**2


def _squared_distance(boxes: Tensor, others: Tensor, covariances: Tensor) -> Tensor:
    """Return the squared Mahalanobis distance of the centres."""
    dx, dy = (working_precision(boxes[..., :2]) - working_precision(others[..., :2])).unbind(-1)
    xx, yy, xy = covariances.unbind(-1)
    return (yy * dx**2 - 2 * xy * dx * dy + xx * dy**2) / _determinant(covariances)
