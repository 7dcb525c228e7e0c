import math

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from perf_vit.errors import InputError
from perf_vit.geometry.boxes import oriented_box_corners
from perf_vit.geometry.oriented_boxes import normalize_oriented, oriented_iou
from perf_vit.models.heads import OrientedFCOSHead
from perf_vit.models.heads.oriented_fcos import assign_objects, centerness_targets, ignored_locations, make_locations
from perf_vit.types import ObjectLabels

SIZES, STRIDES = [(23, 31), (12, 16), (6, 8)], [4, 8, 16]
CPU = torch.device("cpu")
LOCATIONS = make_locations(SIZES, STRIDES, CPU)


def random_boxes(num: int, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    sides = np.exp(rng.uniform(np.log(1), np.log(300), (num, 2)))
    boxes = np.column_stack([rng.uniform(0, 124, num), rng.uniform(0, 92, num), sides, rng.uniform(-2, 2, num)])
    return normalize_oriented(torch.from_numpy(boxes).float())


def labels_of(boxes: Tensor, labels: list[int], ignored: list[bool] | None = None) -> ObjectLabels:
    corners = oriented_box_corners(boxes.numpy())
    return ObjectLabels(
        labels=np.asarray(labels, np.int64),
        boxes_xyxy=np.concatenate([corners.min(1), corners.max(1)], 1),
        oriented_boxes=boxes.numpy(),
        ignored=np.asarray(ignored or [False] * len(boxes), bool),
    )


def offsets(point: Tensor, box: Tensor) -> tuple[float, float]:
    """The point along and across the box, by complex numbers."""
    turned = complex(*(point - box[:2]).tolist()) * complex(math.cos(box[4]), -math.sin(box[4]))
    return abs(turned.real), abs(turned.imag)


def reference_owner(boxes: Tensor, point: Tensor, stride: int, low: float, high: float) -> int:
    owner, least = -1, math.inf
    for index, box in enumerate(boxes):
        reach = [max(min(float(side) / 2, 1.5 * stride), stride / math.sqrt(2)) for side in box[2:4]]
        inside = all(offset <= limit for offset, limit in zip(offsets(point, box), reach, strict=True))
        if inside and low < box[2] / 2 <= high and box[2] * box[3] < least:
            owner, least = index, float(box[2] * box[3])
    return owner


def test_owners_are_those_of_a_loop_over_all_locations_and_objects() -> None:
    boxes = random_boxes(60, 0)
    ranges = {4: (-1, 32), 8: (32, 64), 16: (64, math.inf)}
    expected = [
        reference_owner(boxes, point, int(stride), *ranges[int(stride)])
        for point, stride in zip(LOCATIONS.points, LOCATIONS.strides, strict=True)
    ]
    assert len(set(expected)) > 30
    assert assign_objects(boxes, LOCATIONS).tolist() == expected


@given(
    st.floats(8, 116), st.floats(8, 84), st.floats(0.5, 200), st.floats(0.5, 200), st.floats(-1.57, 1.57), st.booleans()
)
def test_every_object_owns_a_location_however_thin(x, y, width, height, angle, on_corner) -> None:
    center = (round(x / 4) * 4.0, round(y / 4) * 4.0) if on_corner else (x, y)
    box = normalize_oriented(torch.tensor([[*center, width, height, angle]]))
    owners = assign_objects(box, LOCATIONS)
    cells = (owners == 0).nonzero()[:, 0]
    assert len(cells) > 0
    central = centerness_targets(LOCATIONS.points[cells], LOCATIONS.strides[cells], box.expand(len(cells), 5))
    assert central.max() > 0.1


def test_no_objects_leave_all_to_the_background() -> None:
    assert assign_objects(torch.zeros(0, 5), LOCATIONS).unique().tolist() == [-1]
    assert not ignored_locations(torch.zeros(0, 5), LOCATIONS).any()


def test_centerness_is_that_of_distances_to_the_sides() -> None:
    box = torch.tensor([[50.0, 40, 60, 30, 0.6]])
    along, across = torch.tensor([math.cos(0.6), math.sin(0.6)]), torch.tensor([-math.sin(0.6), math.cos(0.6)])
    points = torch.stack([box[0, :2], box[0, :2] + 10 * along - 5 * across, box[0, :2] + 15 * across])
    got = centerness_targets(points, torch.full((3,), 4.0), box.expand(3, 5))
    assert got.tolist() == pytest.approx([1, math.sqrt(20 / 40 * 10 / 20), 0], abs=1e-5)


def test_ignored_locations_are_those_inside_the_boxes() -> None:
    boxes = torch.cat([random_boxes(7, 3), torch.tensor([[-40.0, 20, 30, 8, 0], [123, 91, 40, 30, 0.5]])])
    boxes[:, 2:4] = boxes[:, 2:4].clamp(min=32)
    outlines = shapely.union_all(shapely.polygons(oriented_box_corners(boxes.numpy())))
    expected = shapely.contains_xy(outlines, *LOCATIONS.points.numpy().T)
    assert 20 < expected.sum() < 0.9 * len(expected)
    assert ignored_locations(boxes, LOCATIONS).tolist() == expected.tolist()


def features(batch: int, channels: int = 16, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, channels, *size, generator=generator) for size in SIZES]


def make_head(num_classes: int = 2, **options) -> OrientedFCOSHead:
    torch.manual_seed(0)
    return OrientedFCOSHead(16, num_classes, STRIDES, **options)


@pytest.mark.parametrize("box_loss", ["probiou", "kfiou"])
def test_losses_reach_every_parameter(box_loss) -> None:
    head = make_head(box_loss=box_loss)
    losses = head.losses(
        features(2), [labels_of(random_boxes(5, 1), [0, 1, 0, 1, 0]), labels_of(torch.zeros(0, 5), [])]
    )
    assert sorted(losses) == ["box", "centerness", "classification"]
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in head.parameters())


def test_images_without_objects_train_the_background_alone() -> None:
    losses = make_head().losses(features(1), [labels_of(torch.zeros(0, 5), [])])
    assert losses["classification"] > 0
    assert losses["box"] == losses["centerness"] == 0


class Answers(nn.Module):
    """A head's output that is the same for all inputs."""

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps = {tuple(each.shape[-2:]): each for each in maps}

    def forward(self, feature: Tensor) -> Tensor:
        return self.maps[tuple(feature.shape[-2:])].expand(len(feature), -1, -1, -1)


def answer(head: OrientedFCOSHead, boxes: Tensor, labels: list[int]) -> OrientedFCOSHead:
    """The head with outputs that are exactly what it should learn."""
    owner = assign_objects(boxes, LOCATIONS)
    own, stride = boxes[owner], LOCATIONS.strides[:, None]
    sides, double = (own[:, 2:4] / stride / 4).log(), 2 * own[:, 4:]
    elongation = (sides[:, :1] - sides[:, 1:]) / 2 * torch.cat([double.cos(), double.sin()], 1)
    deltas = torch.cat([(own[:, :2] - LOCATIONS.points) / stride, sides.mean(1, keepdim=True), elongation], 1)
    logits = torch.full((len(owner), head.num_classes), -20.0)
    logits[owner >= 0, torch.tensor(labels)[owner[owner >= 0]]] = 20
    central = centerness_targets(LOCATIONS.points, LOCATIONS.strides, own)
    for name, values in (
        ("class_logits", logits),
        ("box_deltas", deltas),
        ("centerness", central.logit(1e-6)[:, None]),
    ):
        levels = torch.split(values, LOCATIONS.level_lengths)
        maps = [level.T.reshape(1, -1, *size) for level, size in zip(levels, SIZES, strict=True)]
        setattr(head, name, Answers(maps))
    return head


def spread_boxes() -> Tensor:
    return torch.tensor([[20.0, 20, 22, 3, 0.5], [90, 30, 45, 12, -1.2], [60, 70, 90, 20, 0.1], [20, 80, 3, 1, 1.5]])


def test_a_head_that_says_what_it_should_has_no_loss_and_finds_each_object_once() -> None:
    boxes, labels = spread_boxes(), [0, 1, 1, 0]
    head = answer(make_head(), boxes, labels)
    losses = head.losses(features(1), [labels_of(boxes, labels)])
    assert losses["classification"] < 1e-6
    assert losses["box"] < 1e-2
    (found,) = head.detect(features(1))
    assert sorted(found.labels.tolist()) == sorted(labels)
    for box, label in zip(boxes, labels, strict=True):
        assert oriented_iou(found.oriented_boxes[found.labels == label], box).max() > 0.99
    assert found.scores.diff().max() <= 0
    assert found.scores.min() > 0.3


def test_ignored_objects_count_neither_as_objects_nor_as_background() -> None:
    boxes, labels = spread_boxes(), [0, 1, 1, 0]
    head = answer(make_head(), boxes, labels)
    seen = head.losses(features(1), [labels_of(boxes, labels, [False, False, True, False])])
    assert seen["classification"] < 1e-6
    missing = head.losses(features(1), [labels_of(boxes[[0, 1, 3]], [0, 1, 0])])
    assert missing["classification"] > 1


def test_objects_centred_outside_or_without_area_count_as_ignored() -> None:
    boxes, labels = spread_boxes(), [0, 1, 1, 0]
    more = torch.cat([boxes, torch.tensor([[-2.0, 40, 30, 20, 0], [40, 93, 50, 30, 1], [60, 40, 0, 0, 0]])])
    losses = answer(make_head(), boxes, labels).losses(features(1), [labels_of(more, [*labels, 1, 0, 0])])
    assert losses["classification"] < 1e-6
    assert losses["box"] < 1e-2


def test_losses_under_autocast_are_close_to_those_in_full_precision() -> None:
    head, labels = make_head(), [labels_of(random_boxes(5, 1), [0, 1, 0, 1, 0])]
    expected = head.losses(features(1), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = head.losses(features(1), labels)
    for name, loss in got.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected[name].item(), rel=0.02)


def test_detections_stop_at_the_limit_and_the_threshold() -> None:
    head = answer(make_head(detections_per_tile=2), spread_boxes(), [0, 1, 1, 0])
    assert len(head.detect(features(1))[0].scores) == 2
    assert len(make_head(score_threshold=0.9).detect(features(1))[0].scores) == 0


def test_labels_without_oriented_boxes_are_an_error() -> None:
    upright = ObjectLabels(
        labels=np.zeros(1, np.int64), boxes_xyxy=np.ones((1, 4), np.float32), ignored=np.zeros(1, bool)
    )
    with pytest.raises(InputError, match="expected labels with oriented boxes"):
        make_head().losses(features(1), [upright])
