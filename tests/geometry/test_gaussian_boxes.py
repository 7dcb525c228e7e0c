import math

import pytest
import torch

from perf_vit.geometry.oriented_boxes import kfiou, kfiou_loss, normalize_oriented, oriented_iou, probiou, probiou_loss

LOSSES = [probiou_loss, kfiou_loss]


def random_boxes(num: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.tensor([0, 0, 3, 3, -4.0]), torch.tensor([20, 20, 40, 12, 4.0])
    return (low + (high - low) * torch.rand(num, 5, generator=generator)).to(dtype)


def other_writings(boxes: torch.Tensor) -> list[torch.Tensor]:
    swapped = boxes[:, [0, 1, 3, 2, 4]] + boxes.new_tensor([0, 0, 0, 0, math.pi / 2])
    return [boxes, swapped, boxes + boxes.new_tensor([0, 0, 0, 0, math.pi]), normalize_oriented(boxes)]


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=str)
def test_equal_rectangles_are_alike_however_they_are_written(dtype, largest) -> None:
    boxes = random_boxes(50, 0, dtype)
    for writing in other_writings(boxes):
        assert torch.allclose(probiou(boxes, writing), torch.ones(50, dtype=dtype), atol=1e-5)
        assert torch.allclose(kfiou(boxes, writing), torch.ones(50, dtype=dtype), rtol=0, atol=largest)
        assert torch.allclose(kfiou_loss(boxes, writing), torch.zeros(50, dtype=dtype), atol=10 * largest)


@pytest.mark.parametrize("similarity", [probiou, kfiou, probiou_loss, kfiou_loss])
def test_no_similarity_depends_on_how_boxes_are_written(similarity) -> None:
    boxes, others = random_boxes(50, 1), random_boxes(50, 2)
    expected = similarity(boxes, others)
    for writing in other_writings(boxes):
        assert torch.allclose(similarity(writing, others), expected, atol=1e-9)


def test_probiou_is_the_hellinger_distance_of_densities() -> None:
    first, second = torch.tensor([10.0, 12, 12, 5, 0.4], dtype=torch.float64), torch.tensor([12.0, 11, 9, 6, -0.5])
    axis = torch.linspace(-30, 50, 801, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    overlap = (density(first, points) * density(second.double(), points)).sqrt().sum() * 0.1**2
    assert float(probiou(first, second.double())) == pytest.approx(1 - math.sqrt(1 - overlap), abs=1e-6)


def density(box: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    cos, sin = math.cos(box[4]), math.sin(box[4])
    turn = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    covariance = turn @ torch.diag(box[2:4] ** 2 / 12) @ turn.T
    return torch.distributions.MultivariateNormal(box[:2], covariance).log_prob(points).exp()


def test_kfiou_is_that_of_a_kalman_filter() -> None:
    first, second = random_boxes(1, 3)[0], random_boxes(1, 4)[0]
    covariances = [covariance_of(box) for box in (first, second)]
    fused = covariances[0] - covariances[0] @ torch.linalg.inv(sum(covariances)) @ covariances[0]
    shared, a, b = (4 * torch.linalg.det(matrix).sqrt() for matrix in (fused, *covariances))
    assert float(kfiou(first, second)) == pytest.approx(float(3 * shared / (a + b - shared)), rel=1e-9)


def covariance_of(box: torch.Tensor) -> torch.Tensor:
    cos, sin = math.cos(box[4]), math.sin(box[4])
    turn = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    return turn @ torch.diag(box[2:4] ** 2 / 4) @ turn.T


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_differences(loss) -> None:
    boxes, targets = random_boxes(20, 5).requires_grad_(), random_boxes(20, 6)
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), boxes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_finite_at_the_target_far_away_and_without_area(loss, dtype) -> None:
    targets = random_boxes(3, 7, dtype)
    boxes = targets.clone()
    boxes[1, 0] += 1e5
    boxes[2, 2:4] = 0
    boxes.requires_grad_()
    loss(boxes, targets).sum().backward()
    assert boxes.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_following_the_loss_leads_onto_the_target(loss) -> None:
    targets = random_boxes(12, 8)
    start = targets + targets.new_tensor([4, -3, 5, 4, 0.6])
    boxes = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([boxes], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        loss(boxes, targets).sum().backward()
        optimizer.step()
    assert oriented_iou(boxes.detach(), targets).min() > 0.9 > oriented_iou(start, targets).max()
