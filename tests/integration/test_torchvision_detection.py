"""The backbones under torchvision's detectors; timm brings torchvision."""

import pytest
import timm
import torch
from doc_examples import examples, run
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

import perf_vit
from perf_vit.layers import LinearizedAttention

VITS = [
    "performer_vit_tiny_patch16_224",
    "performer_vit_rope_small_patch16_224",
    "clustered_vit_tiny_patch16_224",
]
BLOCKS = examples("integrations.md", "torchvision's detectors")
OPTIONS = {"features_only": True, "out_indices": 1, "dynamic_img_size": True, "depth": 2}


@pytest.fixture(scope="module")
def documented() -> dict:
    torch.manual_seed(0)
    return run(BLOCKS)


def scenes() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Two images of different sizes, with boxes from 8 px to nearly all of an image."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 96, 128, generator=generator), torch.rand(3, 112, 80, generator=generator)]
    boxes = [[[4, 6, 12, 16], [20, 20, 90, 70], [2, 2, 126, 92]], [[30, 10, 60, 100]]]
    labels = [[1, 2, 1], [2]]
    return images, [
        {"boxes": torch.tensor(b, dtype=torch.float32), "labels": torch.tensor(y)}
        for b, y in zip(boxes, labels, strict=True)
    ]


def anchors(per_place: int) -> AnchorGenerator:
    ratios = (0.5, 1.0, 2.0) if per_place == 3 else (1.0,)
    return AnchorGenerator(((8,), (16,), (32,), (64,)), (ratios,) * 4)


def detector(kind: str, backbone: nn.Module) -> nn.Module:
    size = {"min_size": 96, "max_size": 160}
    if kind == "faster_rcnn":
        return FasterRCNN(backbone, num_classes=3, rpn_anchor_generator=anchors(3), **size)
    if kind == "retinanet":
        return RetinaNet(backbone, num_classes=3, anchor_generator=anchors(3), **size)
    return FCOS(backbone, num_classes=3, anchor_generator=anchors(1), **size)


def assert_trains_and_detects(model: nn.Module, first: nn.Parameter) -> None:
    images, targets = scenes()
    losses = model.train()(images, targets)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert first.grad.any()
    with torch.no_grad():
        found = model.eval()(images)
    assert [set(each) for each in found] == [{"boxes", "labels", "scores"}] * 2


# Each detector and each model once.
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if column == row else pytest.mark.slow)
        for row, name in enumerate(VITS)
        for column, kind in enumerate(["faster_rcnn", "retinanet", "fcos"])
    ],
)
def test_detectors_train_on_a_vit(documented: dict, name: str, kind: str) -> None:
    torch.manual_seed(0)
    vit = timm.create_model(name, **OPTIONS)
    model = detector(kind, documented["SimpleFeaturePyramid"](vit, 32))
    assert_trains_and_detects(model, vit.model.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("mixer", ["clustered", "performer"])
def test_detectors_train_on_a_converted_vit(documented: dict, mixer: str) -> None:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **OPTIONS)
    options = (
        {"max_exact_tokens": 0, "window_size": 4, "num_sinks": 8} if mixer == "clustered" else {"num_features": 32}
    )
    vit = perf_vit.linearize(vit, mixer, **options)
    assert all(isinstance(block.attn, LinearizedAttention) for block in vit.model.blocks)
    model = detector("faster_rcnn", documented["SimpleFeaturePyramid"](vit, 32))
    assert_trains_and_detects(model, vit.model.blocks[0].attn.qkv.weight)


def test_the_pyramid_has_its_strides(documented: dict) -> None:
    pyramid = documented["SimpleFeaturePyramid"](timm.create_model(VITS[0], **OPTIONS), 32)
    maps = pyramid(torch.zeros(1, 3, 96, 160))
    assert [tuple(each.shape) for each in maps.values()] == [(1, 32, 96 // s, 160 // s) for s in (4, 8, 16, 32)]


def test_the_documented_examples_run(documented: dict) -> None:
    assert all(loss.isfinite() for loss in documented["losses"].values())
    assert documented["detector"].backbone.vit.model.blocks[0].attn.qkv.weight.grad.any()
    assert_trains_and_detects(documented["fcos"], documented["fcos"].backbone.hct.model.stem.conv.weight)


def test_patches_of_14_px_pad_to_their_multiple(documented: dict) -> None:
    vit = timm.create_model("performer_vit_tiny_patch14_224", **OPTIONS)
    backbone = documented["SimpleFeaturePyramid"](vit, 32)
    model = RetinaNet(
        backbone, num_classes=3, anchor_generator=anchors(3), min_size=96, max_size=160, size_divisible=14
    )
    assert_trains_and_detects(model, vit.model.blocks[0].attn.qkv.weight)
