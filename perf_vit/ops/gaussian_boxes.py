"""Oriented boxes as Gaussians: similarities with gradients everywhere, where an exact IoU has none.

A box is the Gaussian with its centre and, per side, a variance that grows with the square of the side. Half turns and
swapped sides give the same Gaussian, so nothing jumps where the angle wraps; a square's angle does not show.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perf_vit.ops.oriented_boxes import working_precision

__all__ = ["kfiou", "kfiou_loss", "probiou", "probiou_loss"]

_SMALLEST_SIDE = 1e-3
# The root below has no gradient at 0.
_SMALLEST_SQUARE = 1e-12


def probiou(oriented_boxes: Tensor, others: Tensor) -> Tensor:
    """ProbIoU: 1 less the Hellinger distance of the boxes' Gaussians (Murrugarra-Llerena et al. 2021, eq. 3 to 8).

    Args:
        oriented_boxes: [..., 5].
        others: [..., 5]; both broadcast.

    Returns:
        0, far apart, to 1, the same rectangle, [...].
    """
    return 1 - probiou_loss(oriented_boxes, others)


def probiou_loss(oriented_boxes: Tensor, others: Tensor) -> Tensor:
    """Hellinger distance of the boxes' Gaussians, the loss L1 of the paper of ProbIoU.

    Args:
        oriented_boxes: [..., 5].
        others: [..., 5]; both broadcast.

    Returns:
        0, the same rectangle, to 1, far apart, [...].
    """
    first, second = _covariances(oriented_boxes), _covariances(others)
    mean = (first + second) / 2
    shapes = (_determinant(mean) / (_determinant(first) * _determinant(second)).sqrt()).log() / 2
    bhattacharyya = _squared_distance(oriented_boxes, others, mean) / 8 + shapes
    return (-torch.expm1(-bhattacharyya)).clamp(min=_SMALLEST_SQUARE).sqrt().to(oriented_boxes.dtype)


def kfiou(oriented_boxes: Tensor, others: Tensor) -> Tensor:
    """KFIoU: the overlap of the boxes' Gaussians as if they shared a centre (Yang et al. 2023, arXiv 2201.12558).

    The product of two Gaussians is a Gaussian again, as in a Kalman filter; the ellipse of its covariance stands for
    the intersection. The value is stretched by 3, so that the same rectangle gives 1.

    Args:
        oriented_boxes: [..., 5].
        others: [..., 5]; both broadcast.

    Returns:
        0 to 1, [...], whatever the centres.
    """
    first, second = _covariances(oriented_boxes), _covariances(others)
    areas = _determinant(first).sqrt(), _determinant(second).sqrt()
    shared = areas[0] * areas[1] / _determinant(first + second).sqrt()
    return (3 * shared / (areas[0] + areas[1] - shared)).to(oriented_boxes.dtype)


def kfiou_loss(oriented_boxes: Tensor, targets: Tensor) -> Tensor:
    """exp(1 - KFIoU) - 1, and for the centre ln(1 + d^2), d their distance in the target's standard deviations.

    Args:
        oriented_boxes: [..., 5].
        targets: [..., 5]; both broadcast.

    Returns:
        0, the same rectangle, and up without bound, [...].
    """
    distance = _squared_distance(oriented_boxes, targets, _covariances(targets))
    shapes = torch.expm1(1 - working_precision(kfiou(oriented_boxes, targets)))
    return (torch.log1p(distance) + shapes).to(oriented_boxes.dtype)


def _covariances(boxes: Tensor) -> Tensor:
    """Variances in x and y, and the covariance, of uniform densities on the boxes, [..., 3]."""
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
    """Squared Mahalanobis distance of the centres."""
    dx, dy = (working_precision(boxes[..., :2]) - working_precision(others[..., :2])).unbind(-1)
    xx, yy, xy = covariances.unbind(-1)
    return (yy * dx**2 - 2 * xy * dx * dy + xx * dy**2) / _determinant(covariances)
