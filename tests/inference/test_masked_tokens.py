"""Tokens of patches without a valid pixel have no part in the features of others, in prediction and in training."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from perf_vit.data import AugmentConfig, SegmentationDataConfig, SegmentationSplitConfig, build_segmentation_datamodule
from perf_vit.inference import SegmentationPredictOptions, SegmentationPredictor
from perf_vit.models import SegmentationModelConfig, SegmentationSpec, Segmenter, build_segmenter
from perf_vit.sources import open_source
from perf_vit.tasks import SegmentationOptimConfig, SegmentationTask
from perf_vit.transforms import Normalizer

TILE_PX = 64
STATISTICS = {"mean": [15_000.0] * 3, "std": [8_000.0] * 3}
SPEC = SegmentationSpec(
    classes=("a", "b"), normalizer=Normalizer(*(tuple(each) for each in STATISTICS.values())), tile_px=TILE_PX
)
# Small features of attention, that differ from token to token.
BACKBONES = {
    "performer_vit_tiny_patch16_224": {"depth": 2, "attn_kwargs": {"num_features": 32}},
    # Its layer scale of 1e-5 would hide what attention does.
    "performer_vit_rope_small_patch16_224": {"depth": 2, "init_values": 1.0},
    "clustered_vit_tiny_patch8_224": {
        "depth": 2,
        "attn_kwargs": {"max_exact_tokens": 0, "window_size": 3, "num_sinks": 4},
    },
    "vit_tiny_patch16_224": {"depth": 2, "dynamic_img_size": True},
}


@pytest.fixture
def half_empty(make_scene):
    """A scene of one tile; from column 30 on nothing is valid, so the token of columns 16 to 32 has valid pixels."""
    pixels = np.random.default_rng(0).integers(1, 30_000, (3, TILE_PX, TILE_PX)).astype(np.uint16)
    pixels[:, :, 30:] = 0
    return make_scene(pixels=pixels, nodata=0)


def config_of(backbone: str) -> SegmentationModelConfig:
    return SegmentationModelConfig(
        backbone=backbone, backbone_kwargs=BACKBONES[backbone], out_indices=[1], head="linear"
    )


def token_mask(tile: Tensor, patch_px: int) -> Tensor:
    """Which patches have a valid pixel: one that isn't 0, the mean, in all bands; [B, rows, cols]."""
    return nn.functional.max_pool2d((tile != 0).any(1, keepdim=True).float(), patch_px)[:, 0] > 0


def features_of(model: Segmenter, run: Callable[[], object]) -> tuple[Tensor, Tensor]:
    """What the backbone is given, and what it makes of it, while something runs."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.backbone.register_forward_hook(
        lambda module, args, out: seen.append((args[0].detach().clone(), out[-1].detach().clone()))
    )
    run()
    handle.remove()
    return seen[0]


def masked_features(model: Segmenter, tile: Tensor, mask: Tensor) -> Tensor:
    """The backbone's features where every attention layer leaves the masked tokens out, by its own argument."""

    def leave_out(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        num_prefix = args[0].shape[1] - mask[0].numel()
        keys = torch.cat([torch.ones(len(mask), num_prefix, dtype=torch.bool), mask.flatten(1)], dim=1)
        return args, {**kwargs, "attn_mask": keys[:, None, None]}

    layers = [module for name, module in model.backbone.named_modules() if name.endswith(".attn")]
    assert len(layers) == 2
    handles = [layer.register_forward_pre_hook(leave_out, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        out = model.backbone(tile)[-1]
    for handle in handles:
        handle.remove()
    return out


def check(model: Segmenter, tile: Tensor, features: Tensor) -> None:
    mask = token_mask(tile, model.size_multiple)
    assert 0 < mask.float().mean() < 1
    expected = masked_features(model, tile, mask)
    kept = mask[:, None].expand_as(expected)
    torch.testing.assert_close(features[kept], expected[kept], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_prediction_masks_tokens_without_a_valid_pixel(half_empty, backbone) -> None:
    torch.manual_seed(0)
    model = build_segmenter(config_of(backbone), SPEC).eval()
    source = open_source(half_empty)
    tile, features = features_of(
        model, lambda: list(SegmentationPredictor(model, SegmentationPredictOptions()).strips(source, source.extent))
    )
    check(model, tile, features)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_training_masks_tokens_without_a_valid_pixel(half_empty, make_scene, backbone) -> None:
    torch.manual_seed(0)
    classes = np.random.default_rng(1).integers(0, 2, (1, TILE_PX, TILE_PX)).astype(np.uint8)
    labels = make_scene(pixels=classes, nodata=None)
    region = SegmentationSplitConfig(image=str(half_empty), labels=str(labels))
    data = build_segmentation_datamodule(
        SegmentationDataConfig(
            train=region, val=region, classes=["a", "b"], tile_px=TILE_PX, tiles_per_epoch=2, batch_size=2,
            augment=AugmentConfig(), **STATISTICS,
        ),
        seed=0,
    )  # fmt: skip
    task = SegmentationTask(config_of(backbone), SPEC, SegmentationOptimConfig())
    task.model.train()
    batch = next(iter(data.train_dataloader()))
    tile, features = features_of(task.model, lambda: task.training_step(batch, 0))
    check(task.model, tile, features)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_tile_of_valid_pixels_needs_no_mask(make_scene, backbone) -> None:
    """What the tests above compare is the same where nothing is masked."""
    torch.manual_seed(0)
    model = build_segmenter(config_of(backbone), SPEC).eval()
    source = open_source(make_scene(height=TILE_PX, width=TILE_PX, nodata=None))
    tile, features = features_of(
        model, lambda: list(SegmentationPredictor(model, SegmentationPredictOptions()).strips(source, source.extent))
    )
    mask = token_mask(tile, model.size_multiple)
    assert mask.all()
    torch.testing.assert_close(masked_features(model, tile, mask), features, rtol=1e-4, atol=1e-4)
