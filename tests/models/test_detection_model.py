import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perf_vit.errors import CheckpointError, ConfigError, InputError
from perf_vit.models import (
    CHECKPOINT_KEY,
    DetectionModelConfig,
    DetectionSpec,
    build_detector,
    checkpoint_metadata,
    checkpoint_task,
    load_detector,
    load_segmenter,
)
from perf_vit.models.heads.fcos import match_locations
from perf_vit.models.heads.rcnn import region_pool
from perf_vit.transforms import Normalizer
from perf_vit.types import ObjectLabels

HEADS = ["fcos", "retinanet", "faster_rcnn", "mask_rcnn"]
# Untrained scores lie below any threshold that is worth having.
LIMITS = {"detections_per_tile": 20, "score_threshold": 0.0}
# Fewer and thinner parts, for speed.
OPTIONS = {
    "fcos": {"num_convs": 1},
    "retinanet": {},
    "faster_rcnn": {"hidden": 32, "proposals_per_tile": 50},
    "mask_rcnn": {"hidden": 32, "proposals_per_tile": 50},
}
VIT = {"backbone": "performer_vit_tiny_patch16_224", "backbone_kwargs": {"depth": 1}, "out_indices": [0]}


def spec_of(num_bands: int = 3, num_classes: int = 3) -> DetectionSpec:
    return DetectionSpec(
        classes=tuple("abcdef"[:num_classes]),
        normalizer=Normalizer((0.0,) * num_bands, (1.0,) * num_bands),
        tile_px=96,
    )


def detector(head: str = "fcos", num_bands: int = 3, **changes):
    torch.manual_seed(0)
    options = {"head_kwargs": {**LIMITS, **OPTIONS[head]}, "channels": 64, **VIT, **changes}
    return build_detector(DetectionModelConfig(head=head, **options), spec_of(num_bands))


def labels_of(boxes, labels, height: int, width: int, ignored=None) -> ObjectLabels:
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    masks = np.zeros((len(boxes), height, width), bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.round().astype(int), strict=True):
        mask[top:bottom, left:right] = True
    ignored = np.zeros(len(boxes), bool) if ignored is None else np.asarray(ignored, bool)
    return ObjectLabels(labels=np.asarray(labels, np.int64), boxes_xyxy=boxes, ignored=ignored, masks=masks)


def images_of(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("backbone", "bands"), [("vit16", 1), ("vit14", 13), ("resnet18", 4)])
def test_every_head_trains_on_every_kind_of_backbone_and_any_bands(head, backbone, bands) -> None:
    changes = {
        "vit16": {},
        "vit14": {"backbone": "performer_vit_tiny_patch14_224"},
        "resnet18": {"backbone": "resnet18", "backbone_kwargs": {}, "out_indices": None, "strides": [4, 8, 16, 32]},
    }[backbone]
    model = detector(head, bands, **changes).train()
    labels = [
        labels_of([[4, 6, 12, 16], [20, 20, 50, 60], [1, 1, 3, 3]], [0, 1, 2], 70, 90),
        labels_of([[0, 0, 30, 30]], [0], 81, 64, ignored=[True]),
    ]
    losses = model.losses(images_of((bands, 70, 90), (bands, 81, 64)), labels)
    assert all(loss.isfinite() for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("head", HEADS)
@settings(deadline=None, max_examples=4)
@given(height=st.integers(1, 130), width=st.integers(1, 130))
def test_detections_of_any_tile_lie_inside_it(head, height, width) -> None:
    model = detector(head).eval()
    with torch.inference_mode():
        found = model(torch.randn(2, 3, height, width))
    assert len(found) == 2
    for each in found:
        assert len(each.scores) == len(each.labels)
        assert set(each.labels.tolist()) <= {0, 1, 2}
        if head == "mask_rcnn":
            assert each.masks.shape == (len(each.scores), height, width)
            assert each.masks.dtype == torch.bool
        else:
            assert (each.boxes_xyxy >= 0).all()
            assert (each.boxes_xyxy[:, 2:] <= torch.tensor([width, height])).all()
            assert (each.boxes_xyxy[:, 2:] > each.boxes_xyxy[:, :2]).all()


@pytest.mark.parametrize("head", HEADS)
def test_images_without_objects_and_images_all_ignored_give_finite_losses(head) -> None:
    model = detector(head).train()
    nothing = labels_of([], [], 64, 64)
    hidden = labels_of([[0, 0, 64, 64]], [1], 64, 64, ignored=[True])
    for labels in (nothing, hidden):
        losses = model.losses(images_of((3, 64, 64)), [labels])
        assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("head", ["fcos", "retinanet"])
def test_ignored_objects_pull_no_class_score(head) -> None:
    model = detector(head, strides=[8]).train()
    kept = {}

    def keep_logits(module, args, output) -> None:
        output["cls_logits"].retain_grad()
        kept["logits"] = output["cls_logits"]

    model.head.model.head.register_forward_hook(keep_logits)
    box = [[16, 16, 48, 48]]
    pulled = {}
    for name, labels in {
        "ignored": labels_of(box, [1], 64, 64, ignored=[True]),
        "background": labels_of([], [], 64, 64),
        "object": labels_of(box, [1], 64, 64),
    }.items():
        losses = model.losses(images_of((3, 64, 64)), [labels])
        torch.stack(list(losses.values())).sum().backward()
        pulled[name] = kept["logits"].grad[0].abs().sum(-1).reshape(8, 8, -1).sum(-1) > 0
    assert not pulled["ignored"][3:5, 3:5].any()
    assert pulled["ignored"][0].all()
    assert pulled["background"].all()
    assert pulled["object"].all()


def test_ignored_objects_are_no_samples_of_region_heads() -> None:
    head = detector("faster_rcnn").head
    boxes = torch.tensor([[0.0, 0, 20, 20], [30, 30, 60, 60]])
    labels = torch.tensor([2, -1])
    proposals = torch.tensor([[1.0, 1, 20, 20], [32, 32, 40, 40], [70, 70, 80, 80], [30, 30, 60, 60]])
    matched, classes = head.roi_heads.assign_targets_to_proposals([proposals], [boxes], [labels])
    assert classes[0].tolist() == [2, -1, 0, -1]
    assert matched[0][0] == 0
    objectness, _ = head.rpn.assign_targets_to_anchors([proposals], [{"boxes": boxes, "labels": labels}])
    assert objectness[0].tolist() == [1, -1, 0, -1]


def cells_of(strides: list[int], size: int) -> torch.Tensor:
    cells = []
    for stride in strides:
        start = torch.arange(0, size, stride)
        y, x = torch.meshgrid(start, start, indexing="ij")
        cells.append(torch.stack([x, y, x + stride, y + stride], -1).reshape(-1, 4))
    return torch.cat(cells).float()


@given(
    boxes=st.lists(
        st.tuples(st.floats(0, 120), st.floats(0, 120), st.floats(0.5, 90), st.floats(0.5, 90)), min_size=1, max_size=90
    )
)
@settings(deadline=None, max_examples=40)
def test_locations_learn_the_smallest_fitting_object(boxes) -> None:
    x, y, width, height = torch.tensor(boxes).T
    boxes = torch.stack([x, y, x + width, y + height], 1)
    strides = [4, 8, 16]
    cells = cells_of(strides, 128)
    matched = match_locations(boxes, [(128 // stride, 128 // stride) for stride in strides], strides, 1.5)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for cell, index in list(zip(cells, matched.tolist(), strict=True))[::37]:
        point, stride = (cell[:2] + cell[2:]) / 2, float(cell[2] - cell[0])
        sure, possible = [], []
        for number, box in enumerate(boxes):
            center = (box[:2] + box[2:]) / 2
            half = ((box[2:] - box[:2]) / 2).clamp(min=0.51 * strides[0])
            offset = (point - center).abs()
            farthest = float((offset + half).max())
            low, high = (0 if stride == 4 else 4 * stride), (float("inf") if stride == 16 else 8 * stride)
            inside = (offset < half).all() and (offset < 1.5 * stride).all()
            if inside and low + 1e-3 < farthest <= high - 1e-3:
                sure.append(number)
            near = (offset < half + 1e-3).all() and (offset < 1.5 * stride + 1e-3).all()
            if near and low - 1e-3 < farthest <= high + 1e-3:
                possible.append(number)
        if index < 0:
            assert not sure
        else:
            assert index in possible
            assert areas[index] <= min((float(areas[number]) for number in sure), default=math.inf) + 1e-3


@pytest.mark.parametrize("head", ["fcos", "retinanet"])
def test_half_precision_moves_no_anchor(head: str) -> None:
    model = detector(head, strides=[8, 16]).head
    features = [torch.zeros(1, 64, rows, rows) for rows in (130, 65)]
    exact = model._outputs(features)[1]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model._outputs([each.bfloat16() for each in features])[1]
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0)


@pytest.mark.parametrize("corner", [(0.1, 0.1), (3.5, 7.7), (61.0, 30.2), (4.0, 4.0)])
def test_an_object_of_two_pixels_is_learnt_somewhere(corner) -> None:
    x, y = corner
    matched = match_locations(torch.tensor([[x, y, x + 2, y + 2]]), [(16, 16), (8, 8)], [4, 8], 1.5)
    assert (matched == 0).any()


@pytest.mark.parametrize("strides", [[4, 8, 16], [4, 16], [2, 16], [8, 16, 128]])
def test_objects_of_any_size_are_learnt_at_any_strides(strides) -> None:
    shapes = [(512 // stride, 512 // stride) for stride in strides]
    for side in range(2, 500, 3):
        box = torch.tensor([[250 - side / 2, 260 - side / 2, 250 + side / 2, 260 + side / 2]])
        assert (match_locations(box, shapes, strides, 1.5) == 0).any(), side


@pytest.mark.parametrize(
    ("strides", "strides_of_sides"),
    [
        ([4, 8, 16, 32], {6: 4, 111: 4, 112: 8, 223: 8, 224: 16, 450: 32, 900: 32}),
        ([4, 16], {6: 4, 112: 4, 223: 4, 224: 16, 900: 16}),
        ([2, 16, 128], {6: 2, 112: 2, 223: 2, 224: 16, 1700: 16, 1800: 128}),
    ],
)
def test_regions_are_pooled_from_the_level_of_their_size(strides, strides_of_sides) -> None:
    pool = region_pool(strides, output_size=3)
    # Each map holds its stride.
    features = {str(stride): torch.full((1, 1, 2048 // stride, 2048 // stride), float(stride)) for stride in strides}
    regions = torch.tensor([[100.0, 90.0, 100 + side, 90 + side] for side in strides_of_sides])
    pooled = pool(features, [regions], [(2048, 2048)])
    assert pooled.flatten(1).amin(1).tolist() == pooled.flatten(1).amax(1).tolist() == list(strides_of_sides.values())


@pytest.mark.slow
def test_a_detector_learns_objects_of_3_to_20_px() -> None:
    model = detector(
        "fcos", 1, backbone="resnet18", backbone_kwargs={}, out_indices=None, strides=[4, 8], freeze_norms=True
    )
    boxes = [[5, 5, 8, 8], [20, 10, 40, 24], [12, 34, 20, 41], [41, 41, 44, 45]]
    image = 0.1 * torch.randn(1, 48, 48, generator=torch.Generator().manual_seed(0))
    for left, top, right, bottom in boxes:
        image[0, top:bottom, left:right] += 3
    labels = labels_of(boxes, [0, 1, 1, 0], 48, 48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(50):
        loss = torch.stack(list(model.train().losses([image], [labels]).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        (found,) = model.eval()(image[None])
    best = found.scores.topk(4).indices
    ranked = found.boxes_xyxy[best][found.boxes_xyxy[best][:, 1].argsort()]
    expected = torch.tensor(sorted(boxes, key=lambda box: box[1]), dtype=torch.float32)
    assert (ranked - expected).abs().max() < 2
    assert found.scores[best].min() > 0.3


def test_frozen_norms_keep_statistics_and_weights_and_a_frozen_backbone_all() -> None:
    changes = {"backbone": "resnet18", "backbone_kwargs": {}, "out_indices": None, "strides": [8]}
    model = detector(freeze_norms=True, **changes).train()
    before = model.backbone.bn1.running_mean.clone()
    model.losses(images_of((3, 64, 64)), [labels_of([], [], 64, 64)])
    assert torch.equal(model.backbone.bn1.running_mean, before)
    assert not model.backbone.bn1.weight.requires_grad
    assert model.backbone.conv1.weight.requires_grad
    model = detector(freeze_backbone=True, **changes).train()
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert not model.backbone.training
    assert all(p.requires_grad for p in model.head.parameters())


@pytest.mark.parametrize("head", HEADS)
def test_a_checkpoint_gives_the_same_detections(head, tmp_path) -> None:
    config = DetectionModelConfig(head=head, head_kwargs=LIMITS, channels=64, **VIT)
    torch.manual_seed(0)
    model = build_detector(config, spec_of(4)).eval()
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    path = tmp_path / "best.ckpt"
    torch.save({CHECKPOINT_KEY: checkpoint_metadata(config, model), "state_dict": state}, path)
    loaded = load_detector(path)
    assert checkpoint_task(path) == "detection"
    assert loaded.spec == model.spec
    assert loaded.spec.kind == ("masks" if head == "mask_rcnn" else "boxes")
    tiles = torch.randn(1, 4, 60, 50)
    with torch.inference_mode():
        (first,), (second,) = model(tiles), loaded(tiles)
    assert len(first.scores) > 0
    for name in ("scores", "labels", "masks" if head == "mask_rcnn" else "boxes_xyxy"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    with pytest.raises(CheckpointError, match=r"expected a segmentation model in .*, got an object detector"):
        load_segmenter(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "yolo"}, "model.head must be one of fcos"),
        ({"channels": 40}, "multiple of 32 above 32, got 40"),
        ({"head_kwargs": {"convs": 2}}, "model.head_kwargs of fcos are num_convs, .* got convs; did you mean"),
        ({"strides": [8, 4]}, "model.strides: expected growing strides"),
        ({"backbone": "performer_vit_tini"}, "timm has no model"),
    ],
)
def test_configs_that_fit_nothing_are_one_clear_line(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build_detector(DetectionModelConfig(**{"channels": 64, **VIT, **changes}), spec_of())


def test_tiles_with_other_bands_and_labels_without_masks_are_refused() -> None:
    model = detector("mask_rcnn")
    with pytest.raises(InputError, match="expected 3 bands, got 4"):
        model(torch.zeros(1, 4, 32, 32))
    boxes = np.array([[1, 1, 9, 9]], np.float32)
    labels = ObjectLabels(labels=np.array([0]), boxes_xyxy=boxes, ignored=np.array([False]))
    with pytest.raises(InputError, match="expected labels with masks"):
        model.losses(images_of((3, 32, 32)), [labels])


def test_no_side_of_an_untrained_fcos_box_is_dead() -> None:
    model = detector("fcos").train()
    features, _ = model._levels(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    distances = model.head.model.head(features)["bbox_regression"]
    assert (distances > 0).float().mean() > 0.99


def test_a_reduced_backbone_sees_means_and_the_head_image_pixels() -> None:
    model = detector(backbone="resnet18", backbone_kwargs={}, out_indices=None, strides=[8, 16], reduce=4).eval()
    seen = {}
    model.backbone.register_forward_pre_hook(lambda module, args: seen.update(image=args[0]))
    image = torch.arange(128.0 * 128).reshape(1, 1, 128, 128).expand(1, 3, 128, 128)
    features, size = model._levels(image)
    assert size == (128, 128)
    assert [feature.shape[-1] for feature in features] == [16, 8]
    assert seen["image"].shape == (1, 3, 32, 32)
    assert seen["image"][0, 0, 0, 0] == image[0, 0, :4, :4].mean()


def test_a_reduced_vit_takes_tiles_that_fit_neither_patch_nor_factor() -> None:
    model = detector(reduce=3, strides=[16, 32]).eval()
    with torch.inference_mode():
        found = model(torch.randn(1, 3, 75, 101))
    assert len(found[0].scores) > 0
    assert (found[0].boxes_xyxy[:, 2:] <= torch.tensor([101, 75])).all()


def test_a_reduction_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.reduce must be at least 1, got 0"):
        detector(reduce=0)
