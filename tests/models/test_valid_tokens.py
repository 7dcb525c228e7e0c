"""Networks leave patches without a valid pixel out, as if these tokens weren't there: values and gradients."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from perf_vit.conversion import linearize
from perf_vit.inference.prefetch import takes_valid
from perf_vit.models import (
    ClassificationModelConfig,
    ClassificationSpec,
    Classifier,
    DetectionModelConfig,
    DetectionSpec,
    SegmentationModelConfig,
    SegmentationSpec,
    Segmenter,
    SlideClassificationModelConfig,
    SlideClassificationSpec,
    build_classifier,
    build_detector,
    build_segmenter,
    build_slide_classifier,
)
from perf_vit.tasks.distillation import match_blocks, token_loss
from perf_vit.transforms import Normalizer
from perf_vit.types import ObjectLabels

TILE_PX, PATCH_PX = 64, 16
SPEC: dict[str, Any] = {"normalizer": Normalizer((0.0,) * 3, (1.0,) * 3), "tile_px": TILE_PX}
LINEAR = {"attn_kwargs": {"num_features": 32}}
BACKBONES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"depth": 2, "dynamic_img_size": True},
    # Their layer scale of 1e-5 would hide what attention does.
    "vit_small_patch16_rope_224": {"depth": 2, "init_values": 1.0},
    "performer_vit_tiny_patch16_224": {"depth": 2, **LINEAR},
    "performer_vit_rope_small_patch16_224": {"depth": 2, "init_values": 1.0, **LINEAR},
}
SIZES = {"img_size": TILE_PX, "dynamic_img_size": True}


def batch() -> tuple[Tensor, Tensor]:
    """Two tiles, of which the second has patches that are valid in part, in no pixel and in all."""
    image = torch.randn(2, 3, TILE_PX, TILE_PX, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, TILE_PX, TILE_PX, dtype=torch.bool)
    valid[1, :, 33:] = False
    valid[1, :16, 16:] = False
    return image, valid


def kept_patches(valid: Tensor) -> Tensor:
    return nn.functional.max_pool2d(valid[:, None].float(), PATCH_PX)[:, 0].flatten(1) > 0


def noisy(image: Tensor, valid: Tensor) -> Tensor:
    """The same tiles with other pixels in the patches without a valid one."""
    rows, cols = (side // PATCH_PX for side in image.shape[-2:])
    kept = kept_patches(valid).view(-1, 1, rows, cols).repeat_interleave(PATCH_PX, 2).repeat_interleave(PATCH_PX, 3)
    return torch.where(kept, image, torch.randn(image.shape, generator=torch.Generator().manual_seed(1)) * 5)


def tokens_without(model: Any, image: Tensor, kept: Tensor, *, norm: bool) -> Tensor:
    """The tokens [1, P + n, C] of one image [1, C, H, W] by a model that never sees the others."""
    x = model.patch_embed(image)
    embedded = model._pos_embed(x)
    x, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
    keys = torch.cat([torch.ones(model.num_prefix_tokens, dtype=torch.bool), kept])
    x = model.norm_pre(x)[:, keys]
    for block in model.blocks:
        x = block(x) if rope is None else block(x, rope=rope[kept])
    return model.norm(x) if norm else x


def segmenter(backbone: str, **config: Any) -> Segmenter:
    torch.manual_seed(0)
    model_config = SegmentationModelConfig(
        backbone=backbone, backbone_kwargs=BACKBONES[backbone], out_indices=[1], head="linear", **config
    )
    return build_segmenter(model_config, SegmentationSpec(classes=("a", "b"), **SPEC)).eval()


def gradients_of(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [each.grad.clone() for name, each in model.named_parameters() if each.grad is not None and "blocks" in name]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_maps_and_gradients_are_those_of_the_valid_tokens_alone(backbone, checkpointed) -> None:
    image, valid = batch()
    model, kept = segmenter(backbone, grad_checkpointing=checkpointed), kept_patches(valid)
    maps: list[Tensor] = []
    calls: list[int] = []
    model.backbone.register_forward_hook(lambda module, args, out: maps.append(out[-1]))
    # What is computed again stops before the block's end.
    model.backbone.model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model(image, valid)
    tokens = maps[0].flatten(2).mT
    torch.manual_seed(0)
    weights = torch.randn(tokens.shape)
    found = gradients_of(model, (tokens * weights)[kept].sum())
    assert len(calls) == 1 + checkpointed

    body: Any = model.backbone.model
    body.set_grad_checkpointing(False)
    losses = []
    for index, keys in enumerate(kept):
        alone = tokens_without(body, image[index : index + 1], keys, norm=False)[:, body.num_prefix_tokens :]
        torch.testing.assert_close(tokens[index][keys], alone[0], rtol=1e-4, atol=1e-4)
        losses.append((alone[0] * weights[index][keys]).sum())
    expected = gradients_of(model, torch.stack(losses).sum())
    assert len(found) > 10
    for one, other in zip(found, expected, strict=True):
        scale = float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * max(scale, 1e-3))


def classifier(backbone: str, pool: str | None) -> tuple[Any, Callable[..., Tensor]]:
    config = ClassificationModelConfig(backbone=backbone, backbone_kwargs=BACKBONES[backbone], pool=pool)
    model: Classifier = build_classifier(
        config, ClassificationSpec(kind="single_label", classes=("a", "b", "c"), **SPEC)
    ).eval()
    nn.init.normal_(model.network.get_classifier().weight)
    return model.network, model


def slide_encoder(backbone: str, pool: str | None) -> tuple[Any, Callable[..., Tensor]]:
    config = SlideClassificationModelConfig(backbone=backbone, backbone_kwargs=BACKBONES[backbone], pool=pool)
    model = build_slide_classifier(config, SlideClassificationSpec(classes=("a", "b"), **SPEC))
    return model.encoder, model.embed


POOLED = [
    *((make, name, None) for make in (classifier, slide_encoder) for name in BACKBONES),
    *(
        (make, "vit_tiny_patch16_224", pool)
        for make in (classifier, slide_encoder)
        for pool in ("avg", "max", "avgmax")
    ),
    (classifier, "vit_tiny_patch16_224", "map"),
]


@pytest.mark.parametrize(("make", "backbone", "pool"), POOLED)
def test_whole_images_are_pooled_from_their_valid_tokens(make, backbone, pool) -> None:
    torch.manual_seed(0)
    network, call = make(backbone, pool)
    image, valid = batch()
    with torch.no_grad():
        found = call(image, valid)
        for index, keys in enumerate(kept_patches(valid)):
            tokens = tokens_without(network, image[index : index + 1], keys, norm=True)
            torch.testing.assert_close(found[index], network.forward_head(tokens)[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(call(image)[1], found[1], atol=1e-3)
    torch.testing.assert_close(call(noisy(image, valid), valid), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reduce", [1, 2])
def test_a_detector_finds_and_learns_without_what_is_not_valid(reduce) -> None:
    torch.manual_seed(0)
    config = DetectionModelConfig(
        backbone="vit_tiny_patch16_224",
        backbone_kwargs={"depth": 2, "patch_size": PATCH_PX // reduce, "dynamic_img_size": True},
        out_indices=[1],
        strides=[16],
        channels=64,
        head_kwargs={"num_convs": 1, "score_threshold": 0.0},
        reduce=reduce,
    )
    model = build_detector(config, DetectionSpec(classes=("a",), **SPEC)).eval()
    image, valid = batch()
    # Of another size than the backbone's, so that it is padded.
    image, valid = image[..., :60], valid[..., :60]
    maps: list[Tensor] = []
    model.backbone.register_forward_hook(lambda module, args, out: maps.append(out[-1]))
    none = np.zeros((0, 4), np.float32)
    labels = [ObjectLabels(labels=np.zeros(0, np.int64), boxes_xyxy=none, ignored=np.zeros(0, bool))] * 2
    padded = nn.functional.pad(valid, (0, 4))
    kept = kept_patches(padded)
    for each in (image, noisy(nn.functional.pad(image, (0, 4)), padded)[..., :60]):
        model(each, valid)
        model.losses(list(each), labels, list(valid))
    model(image)
    found = [each.flatten(2).mT[kept] for each in maps]
    for other in found[1:4]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[4], found[0], atol=1e-3)


def test_a_student_learns_from_the_valid_tokens_alone() -> None:
    torch.manual_seed(0)
    teacher = timm.create_model("vit_tiny_patch16_224", depth=2, **SIZES).eval()
    for parameter in teacher.blocks.parameters():
        nn.init.normal_(parameter, std=0.1)
    student = linearize(teacher, "performer", num_features=32).eval()
    image, valid = batch()
    other = noisy(image, valid)
    losses = [float(match_blocks(teacher, student, each, valid=valid)) for each in (image, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != pytest.approx(float(match_blocks(teacher, student, image)), rel=1e-4)
    mask = torch.cat([torch.ones(2, 1, dtype=torch.bool), kept_patches(valid)], dim=1)[:, None, None]
    target = torch.randn(2, 17, 8)
    tokens = torch.where(mask[:, 0, 0, :, None], target, -target)
    assert float(token_loss(tokens, target, 1, mask)) == pytest.approx(0, abs=1e-6)
    assert float(token_loss(tokens, target, 1)) > 0.1


@pytest.mark.parametrize("backbone", [*BACKBONES, "clustered_vit_tiny_patch8_224"])
@pytest.mark.parametrize("norm", ["class_token", "no prefix"])
def test_a_tile_without_a_valid_pixel_is_finite_and_attends_to_itself(backbone, norm, monkeypatch) -> None:
    options = {"depth": 2, "attn_kwargs": {"max_exact_tokens": 0, "window_size": 3, "num_sinks": 4}}
    monkeypatch.setitem(BACKBONES, backbone, dict(BACKBONES.get(backbone, options)))
    if norm == "no prefix":
        keys = {"num_reg_tokens": 0, "class_token": False, "global_pool": "avg"}
        if "rope" not in backbone:
            keys["reg_tokens"] = keys.pop("num_reg_tokens")
        BACKBONES[backbone].update(keys)
    model = segmenter(backbone)
    image, valid = batch()
    valid[0] = False
    maps: list[Tensor] = []
    model.backbone.register_forward_hook(lambda module, args, out: maps.append(out[-1]))
    logits = model(image, valid)
    assert logits.isfinite().all()
    logits.square().mean().backward()
    assert all(each.grad.isfinite().all() for each in model.parameters() if each.grad is not None)
    with torch.no_grad():
        model(image[:1])
    torch.testing.assert_close(maps[0][:1], maps[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_valid_tiles_and_patches_valid_in_part_change_no_bit(backbone) -> None:
    model = segmenter(backbone)
    image, valid = batch()
    expected = model(image)
    assert torch.equal(model(image, torch.ones_like(valid)), expected)
    sparse = torch.zeros_like(valid)
    sparse[:, 5::PATCH_PX, 3::PATCH_PX] = True
    assert torch.equal(model(image, sparse), expected)


@pytest.mark.parametrize("backbone", ["resnet18", "hct_base", "pvt_v2_b0"])
@torch.no_grad()
def test_other_backbones_take_no_mask(backbone) -> None:
    config = SegmentationModelConfig(backbone=backbone, out_indices=[1, 2], head="linear")
    model = build_segmenter(config, SegmentationSpec(classes=("a", "b"), **SPEC)).eval()
    image, valid = batch()
    assert torch.equal(model(image, valid), model(image))


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "performer_vit_tiny_patch16_224"])
@torch.no_grad()
def test_a_masked_network_can_be_exported(backbone) -> None:
    model = segmenter(backbone)
    program = torch.export.export(model, batch()).module()
    torch.testing.assert_close(program(*batch()), model(*batch()), rtol=1e-4, atol=1e-4)


def test_models_say_whether_they_take_valid_pixels() -> None:
    assert takes_valid(segmenter("vit_tiny_patch16_224"))
    assert takes_valid(torch.compile(segmenter("vit_tiny_patch16_224")))
    assert not takes_valid(torch.compile(nn.Identity()))
    assert takes_valid(lambda tiles, valid=None: tiles)
    assert not takes_valid(lambda tiles: tiles)
    assert not takes_valid(nn.Identity())
    assert not takes_valid(torch.abs)
