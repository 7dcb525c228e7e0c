import math
import pickle

import pytest
import timm
import torch
from torch import nn

import perf_vit  # noqa: F401  (registers the models)
from perf_vit.backbones.hct import AttentionConvBlock, ResidualBlock
from perf_vit.layers import LinearizedAttention
from perf_vit.ops.naive import naive_favor_attention


def build(model_seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(model_seed)
    return timm.create_model("hct_base", **{"num_classes": 7, **kwargs}).eval()


def images(height: int, width: int, in_chans: int = 3) -> torch.Tensor:
    return torch.randn(2, in_chans, height, width, generator=torch.Generator().manual_seed(1))


def attentions(model: nn.Module) -> list[LinearizedAttention]:
    return [module for module in model.modules() if isinstance(module, LinearizedAttention)]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameters_number_those_of_the_paper() -> None:
    assert count(build(in_chans=1, num_classes=2)) == 1_737_010


def test_the_comments_sum_is_that_of_the_layers() -> None:
    model = build(in_chans=1, num_classes=2)
    layers = list(model.modules())
    assert sum(count(m) for m in layers if isinstance(m, nn.Conv2d)) == 1_320_976
    assert sum(p.numel() for a in attentions(model) for n, p in a.named_parameters() if "weight" in n) == 409_600
    assert sum(p.numel() for a in attentions(model) for n, p in a.named_parameters() if "bias" in n) == 2_304
    assert sum(count(m) for m in layers if isinstance(m, nn.BatchNorm2d)) == 3_616
    assert count(model.head) == 514


def test_attention_is_the_relu_performer_of_the_paper() -> None:
    model = build()
    head_dims = [8, 16, 16, 32]
    assert [a.head_dim for a in attentions(model)] == head_dims
    assert [a.options.num_features for a in attentions(model)] == [16, 44, 44, 110]
    assert [a.options.layer_index for a in attentions(model)] == [0, 1, 2, 3]
    for attention in attentions(model):
        assert (attention.options.kernel, attention.num_heads) == ("relu", 8)
        norms = attention.mixer.projection.norm(dim=1)
        torch.testing.assert_close(norms, torch.full_like(norms, math.sqrt(attention.head_dim)))


def test_three_stages_convolve_and_two_attend() -> None:
    kinds = [{type(block) for block in stage} for stage in build().stages]
    assert kinds == [{ResidualBlock}] * 3 + [{AttentionConvBlock}] * 2


@pytest.mark.parametrize(("in_chans", "out_chans", "stride"), [(16, 16, 1), (16, 24, 2)])
def test_attention_block_equals_its_description(in_chans: int, out_chans: int, stride: int) -> None:
    torch.manual_seed(0)
    block = AttentionConvBlock(in_chans, out_chans, stride, num_heads=2).train()
    x = torch.randn(2, in_chans, 7, 5)

    def norm_act(x_BCHW: torch.Tensor) -> torch.Tensor:
        mean, var = x_BCHW.mean((0, 2, 3), keepdim=True), x_BCHW.var((0, 2, 3), keepdim=True, correction=0)
        return ((x_BCHW - mean) / (var + 1e-5).sqrt()).relu()

    y = norm_act(x)
    residual = x if stride == 1 else block.shortcut(y)
    qkv = block.attn.qkv(y.flatten(2).mT).reshape(2, 35, 3, 2, in_chans // 2).permute(2, 0, 3, 1, 4)
    attended = naive_favor_attention(*qkv, block.attn.mixer.projection, kernel="relu")
    attended = block.attn.proj(attended.transpose(1, 2).flatten(2)).mT.reshape(x.shape)
    expected = block.conv(norm_act(attended + x)) + residual
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(256, 384), (97, 201), (1, 300)])
def test_any_size_gives_maps_of_the_promised_strides(size: tuple[int, int]) -> None:
    model = build(features_only=True)
    with torch.no_grad():
        maps = model(images(*size))
    assert model.feature_info.reduction() == [4, 8, 16, 32, 64, 128]
    for each, channels, stride in zip(maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True):
        assert each.shape == (2, channels, *(math.ceil(length / stride) for length in size))


def test_attn_kwargs_reach_every_layer() -> None:
    model = build(attn_kwargs={"kernel": "softmax+", "num_features": 32, "seed": 5})
    assert [(a.options.kernel, a.options.seed, len(a.mixer.projection)) for a in attentions(model)] == [
        ("softmax+", 5, 32)
    ] * 4
    with pytest.raises(ValueError, match="must not hold layer_index"):
        build(attn_kwargs={"layer_index": 0})


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="one entry per stage"):
        build(channels=(16, 32, 64))
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW'"):
        build().forward_intermediates(images(64, 64), output_fmt="NLC")


def test_a_pickled_model_gives_the_same_output() -> None:
    model = build()
    x = images(64, 96)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


@pytest.mark.slow
def test_an_exported_program_takes_other_sizes() -> None:
    model = build()
    sides = {axis: torch.export.Dim(f"side_{axis}", min=300, max=4096) for axis in (2, 3)}
    program = torch.export.export(model, (images(384, 512),), dynamic_shapes=(sides,)).module()
    torch.testing.assert_close(program(images(301, 780)), model(images(301, 780)))
