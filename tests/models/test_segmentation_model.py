from dataclasses import replace

import pytest
import torch

from perf_vit.errors import ConfigError
from perf_vit.models import (
    CHECKPOINT_KEY,
    SegmentationModelConfig,
    SegmentationSpec,
    build_segmenter,
    checkpoint_metadata,
    load_segmenter,
)
from perf_vit.models.heads import FullResolutionHead, LinearHead
from perf_vit.transforms import Normalizer
from perf_vit.types import FeatureSpec

TINY = SegmentationModelConfig(
    backbone="performer_vit_tiny_patch16_224",
    backbone_kwargs={"depth": 2, "attn_kwargs": {"num_features": 32}},
    out_indices=[0, 1],
)


def spec(num_bands: int = 3, tile_px: int = 64) -> SegmentationSpec:
    statistics = Normalizer((0.0,) * num_bands, (1.0,) * num_bands)
    return SegmentationSpec(classes=("a", "b", "c"), normalizer=statistics, tile_px=tile_px)


@pytest.mark.parametrize("num_bands", [1, 3, 7])
@pytest.mark.parametrize("size", [(64, 64), (96, 32)])
def test_logits_have_the_resolution_of_the_image(num_bands: int, size: tuple[int, int]) -> None:
    model = build_segmenter(TINY, spec(num_bands)).eval()
    with torch.no_grad():
        assert model(torch.randn(2, num_bands, *size)).shape == (2, 3, *size)


@pytest.mark.parametrize(
    ("backbone", "backbone_kwargs", "out_indices", "stride"),
    [
        ("hct_base", {"attn_kwargs": {"num_features": 16}}, [1], 8),
        ("resnet18", {}, [1], 4),
        ("performer_vit_rope_small_patch16_224", {"depth": 2}, [0, 1], 16),
        (
            "clustered_vit_tiny_patch8_224",
            {"depth": 2, "attn_kwargs": {"max_exact_tokens": 0, "window_size": 3, "num_sinks": 4}},
            [1],
            8,
        ),
    ],
)
def test_backbones_of_every_kind_segment_images_of_any_size(
    backbone: str, backbone_kwargs: dict, out_indices: list[int], stride: int
) -> None:
    config = SegmentationModelConfig(backbone=backbone, backbone_kwargs=backbone_kwargs, out_indices=out_indices)
    model = build_segmenter(config, spec(num_bands=4)).eval()
    assert model.size_multiple == stride
    for size in ((64, 64), (96, 160)):
        with torch.no_grad():
            assert model(torch.randn(2, 4, *size)).shape == (2, 3, *size)
    model.train()(torch.randn(2, 4, 64, 64)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_every_parameter_gets_a_gradient() -> None:
    model = build_segmenter(TINY, spec())
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # softmax over keys ignores a constant added to all of them, so the bias of the keys alone can be flat
    assert without == []


def test_a_single_pixel_changes_the_output_beside_it_most() -> None:
    torch.manual_seed(0)
    model = build_segmenter(TINY, spec()).eval()
    image = torch.randn(1, 3, 64, 64)
    touched = image.clone()
    touched[..., 40, 21] += 5
    with torch.no_grad():
        change = (model(image) - model(touched)).abs().sum(1)[0]
    assert divmod(int(change.argmax()), 64) in {(r, c) for r in range(38, 43) for c in range(19, 24)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "performer_vit_tinny_patch16_224"}, "did you mean performer_vit_tiny_patch16_224?"),
        (
            {"backbone": "hct_base", "backbone_kwargs": {}, "out_indices": [0, 1], "head": "full_resolution"},
            "one stride",
        ),
        ({"backbone": "hct_base", "backbone_kwargs": {"img_size": 64}}, "unexpected keyword argument 'img_size'"),
        ({"backbone_kwargs": {"num_heads": 0}}, "model.backbone performer_vit_tiny_patch16_224: ZeroDivisionError"),
        ({"out_indices": [0, 0]}, "model.out_indices must not repeat an index, got [0, 0]"),
        ({"head": "unet"}, "model.head must be one of dpt, full_resolution, linear, segformer, upernet, got 'unet'"),
        ({"head_kwargs": {"widths": 3}}, "widths"),
        ({"backbone_kwargs": {"attn_kwargs": {"num_feature": 3}}}, "num_features"),
    ],
)
def test_wrong_configs_are_one_line(change: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_segmenter(replace(TINY, **change), spec())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tile_that_the_patch_size_does_not_divide_is_an_error() -> None:
    with pytest.raises(ConfigError, match="multiple of the patch size 16, got 1000; try 992"):
        build_segmenter(TINY, spec(tile_px=1000))


@pytest.mark.parametrize("stride", [4, 8, 14, 32])
def test_head_takes_any_stride(stride: int) -> None:
    head = FullResolutionHead([FeatureSpec(24, stride)] * 2, in_chans=2, num_classes=5).eval()
    height, width = 4 * stride, 5 * stride
    features = [torch.randn(1, 24, 4, 5) for _ in range(2)]
    assert head(features, torch.randn(1, 2, height, width)).shape == (1, 5, height, width)


def test_a_linear_head_gives_the_scores_of_its_tokens_and_takes_several_strides() -> None:
    head = LinearHead([FeatureSpec(8, 14), FeatureSpec(16, 28)], in_chans=3, num_classes=4).eval()
    fine, coarse = torch.randn(2, 8, 6, 10), torch.randn(2, 16, 3, 5)
    image = torch.zeros(2, 3, 84, 140)
    logits = head([fine, coarse], image)
    assert logits.shape == (2, 4, 84, 140)
    # Linear in each map's scores: a map that a classifier turns to nothing leaves the other's.
    with torch.no_grad():
        for parameter in head.classifiers[1][-1].parameters():
            parameter.zero_()
    alone = head.classifiers[0](fine)
    expected = torch.nn.functional.interpolate(alone, (84, 140), mode="bilinear")
    torch.testing.assert_close(head([fine, coarse], image), expected)


def test_head_refuses_feature_maps_of_several_strides() -> None:
    with pytest.raises(ValueError, match="one stride"):
        FullResolutionHead([FeatureSpec(24, 8), FeatureSpec(24, 16)], in_chans=3, num_classes=2)


def test_a_frozen_backbone_keeps_weights_and_statistics_and_stays_in_evaluation_mode() -> None:
    model = build_segmenter(replace(TINY, freeze_backbone=True), spec()).train()
    assert model.is_backbone_frozen
    assert not model.backbone.training
    assert model.head.training
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    image = torch.randn(2, len(spec().normalizer.mean), 64, 64)
    model(image).square().mean().backward()
    optimizer.step()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(parameter.grad is not None for parameter in model.head.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items())
    assert not build_segmenter(TINY, spec()).is_backbone_frozen


def test_a_network_whose_config_holds_tuples_is_loaded_again(tmp_path) -> None:
    kwargs = {"depth": 1, "embed_dim": 64, "num_heads": 2, "attn_kwargs": {"num_features": 16}}
    config = SegmentationModelConfig(
        backbone="performer_vit_tiny_patch16_224", backbone_kwargs=kwargs, out_indices=(0,), head="linear"
    )
    network = build_segmenter(config, spec())
    state = {f"model.{name}": value for name, value in network.state_dict().items()}
    torch.save({CHECKPOINT_KEY: checkpoint_metadata(config, network), "state_dict": state}, tmp_path / "a.ckpt")
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(load_segmenter(tmp_path / "a.ckpt")(image), network.eval()(image))


def test_classes_that_exclude_each_other_or_not_are_decided_from_logits() -> None:
    logits = torch.tensor([[[[2.0, -1.0]], [[1.0, -2.0]], [[-1.0, -3.0]]]])
    model = build_segmenter(TINY, spec())
    assert model.to_labels(logits).tolist() == [[[0, 0]]]
    model.spec = replace(model.spec, multilabel=True)
    assert model.to_labels(logits).tolist() == [[[[1, 0]], [[1, 0]], [[0, 0]]]]
