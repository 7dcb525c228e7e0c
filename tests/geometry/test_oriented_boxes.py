import math

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given
from hypothesis import strategies as st

from perf_vit.geometry.boxes import oriented_box_corners
from perf_vit.geometry.oriented_boxes import (
    corners_of_oriented,
    normalize_oriented,
    oriented_from_polygons,
    oriented_from_xyxy,
    oriented_iou,
    oriented_iou_matrix,
    oriented_nms,
)

PI = math.pi
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}

HARD = {
    "identical": ((40, 30, 20, 8, 0.7), (40, 30, 20, 8, 0.7)),
    "identical, written differently": ((40, 30, 20, 8, 0.7), (40, 30, 8, 20, 0.7 - PI / 2)),
    "a square and itself turned by a quarter": ((40, 30, 20, 20, 0.3), (40, 30, 20, 20, 0.3 + PI / 2)),
    "contained": ((40, 30, 20, 8, 0.7), (41, 30.5, 6, 2, -0.4)),
    "contained, sharing a side": ((0, 0, 20, 8, 0), (0, 2, 20, 4, 0)),
    "contained, touching with corners": ((0, 0, 2, 2, 0), (0, 0, math.sqrt(2), math.sqrt(2), PI / 4)),
    "a shared edge": ((0, 0, 10, 4, 0), (0, 4, 10, 4, 0)),
    "a shared edge, turned": ((0, 0, 10, 4, 0.5), (-4 * math.sin(0.5), 4 * math.cos(0.5), 10, 4, 0.5)),
    "a shared corner": ((0, 0, 10, 4, 0), (10, 4, 10, 4, 0)),
    "a cross": ((5, 5, 30, 2, 0), (5, 5, 30, 2, PI / 2)),
    "an octagon": ((5, 5, 4, 4, 0), (5, 5, 4, 4, PI / 4)),
    "thin, nearly parallel": ((0, 0, 1000, 0.5, 0.1), (0, 0, 1000, 0.5, 0.1001)),
    "thin against thin": ((0, 0, 1000, 0.1, 0.1), (3, 2, 1000, 0.1, 1.3)),
    "far apart": ((0, 0, 10, 4, 0), (1000, 0, 10, 4, 1)),
    "turned by almost nothing": ((7, 9, 30, 5, 0.25), (7, 9, 30, 5, 0.25 + 1e-9)),
    "far from the origin": ((50_000.5, 80_000.25, 10, 4, 0.4), (50_001.5, 80_001.0, 12, 3, -0.4)),
}


def polygons(boxes: torch.Tensor) -> np.ndarray:
    return shapely.polygons(oriented_box_corners(boxes.double().numpy()))


def shapely_iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    a, b = polygons(first), polygons(second)
    shared = shapely.area(shapely.intersection(a, b))
    return torch.from_numpy(shared / (shapely.area(a) + shapely.area(b) - shared))


def random_boxes(num: int, seed: int, extent: float = 60) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    centers, sides = rng.uniform(0, extent, (num, 2)), np.exp(rng.uniform(np.log(0.5), np.log(60), (num, 2)))
    return torch.from_numpy(np.column_stack([centers, sides, rng.uniform(-4, 4, num)]))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_iou_is_that_of_polygons(dtype) -> None:
    first, second = random_boxes(1000, 0, extent=20).to(dtype), random_boxes(1000, 1, extent=20).to(dtype)
    expected = shapely_iou(first, second)
    assert 200 < (expected > 0.01).sum() < 900
    got = oriented_iou(first, second)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", HARD)
def test_iou_of_hard_pairs(case, dtype) -> None:
    first, second = (torch.tensor(box, dtype=dtype) for box in HARD[case])
    expected = float(shapely_iou(first[None], second[None]))
    for got in (oriented_iou(first, second), oriented_iou(second, first)):
        assert float(got) == pytest.approx(expected, abs=TOLERANCE[dtype])


def test_boxes_without_area_overlap_nothing() -> None:
    point, line, box = torch.tensor([[3.0, 3, 0, 0, 0.5], [3, 3, 5, 0, 0.5], [3, 3, 4, 2, 0.1]])
    assert [float(oriented_iou(a, b)) for a in (point, line) for b in (point, line, box)] == [0] * 6


@given(
    st.tuples(*[st.integers(-8, 8)] * 2, *[st.integers(0, 6)] * 2, st.integers(-4, 4)),
    st.tuples(*[st.integers(-8, 8)] * 2, *[st.integers(0, 6)] * 2, st.integers(-4, 4)),
)
def test_boxes_on_a_lattice_overlap_as_polygons_do(first, second) -> None:
    scale = torch.tensor([1, 1, 1, 1, PI / 4], dtype=torch.float64)
    a, b = torch.tensor(first) * scale, torch.tensor(second) * scale
    got = float(oriented_iou(a, b))
    union = first[2] * first[3] + second[2] * second[3] > 0
    shared = shapely.area(shapely.intersection(polygons(a[None]), polygons(b[None])))[0] if union else 0
    areas = first[2] * first[3] + second[2] * second[3]
    assert got == pytest.approx(shared / (areas - shared) if areas else 0, abs=1e-9)


def test_the_matrix_holds_the_pairs() -> None:
    first, second = random_boxes(37, 2), random_boxes(61, 3)
    pairs = oriented_iou(first[:, None], second)
    torch.testing.assert_close(oriented_iou_matrix(first, second), pairs, rtol=0, atol=1e-15)
    assert oriented_iou_matrix(first[:0], second).shape == (0, 61)


def test_normalized_boxes_are_the_same_rectangles_written_one_way() -> None:
    boxes = random_boxes(197, 4)
    got = normalize_oriented(boxes)
    assert (got[:, 2] >= got[:, 3]).all()
    assert ((got[:, 4] >= -PI / 2) & (got[:, 4] < PI / 2)).all()
    assert shapely.area(shapely.symmetric_difference(polygons(boxes), polygons(got))).max() < 1e-9
    assert torch.allclose(normalize_oriented(got), got, atol=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("offset", [-1e-9, 0, 1e-9])
@pytest.mark.parametrize("turns", [-2, -1, 0, 1, 2])
def test_angles_at_the_border_stay_below_it(dtype, offset, turns) -> None:
    angle = normalize_oriented(torch.tensor([0, 0, 4, 2, turns * PI + PI / 2 + offset], dtype=dtype))[4]
    border = torch.tensor(PI / 2, dtype=dtype)
    assert -border <= angle < border


def test_corners_are_those_of_the_arrays() -> None:
    boxes = random_boxes(19, 5)
    assert np.allclose(corners_of_oriented(boxes).numpy(), oriented_box_corners(boxes.numpy()))


def test_rectangles_come_back_from_their_corners_in_any_order() -> None:
    boxes = normalize_oriented(random_boxes(197, 6))
    corners = corners_of_oriented(boxes)[:, [2, 0, 3, 1]]
    torch.testing.assert_close(oriented_from_polygons(corners.flatten(1)), boxes, rtol=0, atol=1e-8)
    torch.testing.assert_close(oriented_from_polygons(corners), boxes, rtol=0, atol=1e-8)


@pytest.mark.parametrize("num_points", [3, 4, 7])
def test_rectangles_around_points_have_the_least_area(num_points) -> None:
    points = np.random.default_rng(7).uniform(0, 50, (60, num_points, 2))
    got = oriented_from_polygons(torch.from_numpy(points))
    rectangles = shapely.oriented_envelope(shapely.multipoints(points))
    assert np.allclose(got[:, 2:4].prod(-1).numpy(), shapely.area(rectangles), rtol=1e-9)
    assert shapely.covers(shapely.buffer(polygons(got), 1e-6), shapely.multipoints(points)).all()


def test_a_polygon_without_area_gives_a_box_without_area() -> None:
    line, point = oriented_from_polygons(torch.tensor([[0.0, 0, 3, 3, 6, 6, 6, 6], [5.0, 7] * 4]))
    assert torch.allclose(line, torch.tensor([3, 3, 72**0.5, 0, PI / 4]), atol=1e-5)
    assert point[:4].tolist() == [5, 7, 0, 0]


def test_upright_boxes_keep_their_rectangle() -> None:
    got = oriented_from_xyxy(torch.tensor([[1.0, 2, 11, 5], [1, 2, 4, 12]]))
    assert torch.allclose(got, torch.tensor([[6, 3.5, 10, 3, 0], [2.5, 7, 10, 3, -PI / 2]]))


def reference_nms(boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, threshold: float) -> list[int]:
    outlines, kept = polygons(boxes), []
    for index in sorted(range(len(boxes)), key=lambda i: (-float(scores[i]), i)):
        rivals = [outlines[k] for k in kept if labels[k] == labels[index]]
        shared = [rival.intersection(outlines[index]).area for rival in rivals]
        unions = [rival.area + outlines[index].area - part for rival, part in zip(rivals, shared, strict=True)]
        if all(part <= threshold * union for part, union in zip(shared, unions, strict=True)):
            kept.append(index)
    return kept


@pytest.mark.parametrize("threshold", [0.1, 0.5])
def test_nms_keeps_what_a_greedy_walk_over_polygons_keeps(threshold, monkeypatch) -> None:
    # Blocks smaller than the crowd, so that boxes are hidden by those of earlier blocks too.
    monkeypatch.setattr("perf_vit.geometry.oriented_boxes._BLOCK_BOXES", 20)
    monkeypatch.setattr("perf_vit.geometry.oriented_boxes._CHUNK_PAIRS", 33)
    generator = torch.Generator().manual_seed(0)
    boxes, labels = random_boxes(197, 8, extent=25), torch.randint(0, 2, (197,), generator=generator)
    boxes[:, 2:4] = boxes[:, 2:4].clamp(min=12)
    # Rounded scores have ties.
    scores = torch.rand(197, generator=generator).mul(20).round()
    expected = reference_nms(boxes, scores, labels, threshold)
    assert 5 < len(expected) < 190
    assert oriented_nms(boxes, scores, labels, threshold).tolist() == expected


def test_nms_keeps_what_a_greedy_walk_keeps_in_small_crowds() -> None:
    suppressed = 0
    for case in range(300):
        generator = torch.Generator().manual_seed(case)
        number = int(torch.randint(1, 25, (1,), generator=generator))
        boxes, labels = (
            random_boxes(number, 1000 + case, extent=25),
            torch.randint(0, 2, (number,), generator=generator),
        )
        boxes[:, 2:4] = boxes[:, 2:4].clamp(min=4)
        scores, threshold = torch.rand(number, generator=generator).mul(20).round(), (0.1, 0.3, 0.5, 0.7)[case % 4]
        expected = reference_nms(boxes, scores, labels, threshold)
        assert oriented_nms(boxes, scores, labels, threshold).tolist() == expected
        suppressed += len(expected) < number
    assert suppressed > 60


def test_nms_of_no_boxes_keeps_none() -> None:
    assert oriented_nms(torch.zeros(0, 5), torch.zeros(0), torch.zeros(0)).shape == (0,)


def test_a_box_hidden_by_a_hidden_box_stays() -> None:
    boxes = torch.tensor([[x, 0.0, 10, 4, 0] for x in (0.0, 3, 6)])
    assert oriented_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3), 0.4).tolist() == [0, 2]
