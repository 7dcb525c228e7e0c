import copy
import io
import pickle
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import create_feature_extractor
from timm.models._manipulate import reinit_non_persistent_buffers
from torch import nn

from perf_vit import backbones
from perf_vit.layers import LinearizedAttention

SIZES = ("tiny", "small", "base", "large")
NAMES = [f"performer_vit_{size}_patch{patch_size}_224" for size in SIZES for patch_size in (8, 14, 16)]
TINY = "performer_vit_tiny_patch16_224"
SOFTMAX_TINY = TINY.removeprefix("performer_")


def build(name: str = TINY, model_seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(model_seed)
    return timm.create_model(name, **{"depth": 3, "img_size": 64, "num_classes": 7, **kwargs}).eval()


def images(height: int = 64, width: int = 64, in_chans: int = 3) -> torch.Tensor:
    return torch.randn(2, in_chans, height, width, generator=torch.Generator().manual_seed(1))


def attentions(model: nn.Module) -> list[LinearizedAttention]:
    return [module for module in model.modules() if isinstance(module, LinearizedAttention)]


def softmax_twin(name: str, **kwargs) -> nn.Module:
    """The ViT of timm with the same shape: the 16 px one with other patches, as not every size has its own."""
    _, _, size, patch, _ = name.split("_")
    patch_size = int(patch.removeprefix("patch"))
    return timm.create_model(f"vit_{size}_patch16_224", patch_size=patch_size, **kwargs)


def test_timm_lists_the_models() -> None:
    assert sorted(timm.list_models("performer_vit_*_patch*", exclude_filters="*rope*")) == sorted(NAMES)
    assert set(NAMES) < set(backbones.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_entrypoints_are_functions_of_their_module(name: str) -> None:
    entrypoint = timm.model_entrypoint(name)
    assert entrypoint is getattr(backbones, name)
    assert pickle.loads(pickle.dumps(entrypoint)) is entrypoint
    assert f"patches of {name.split('_')[3].removeprefix('patch')} px" in entrypoint.__doc__


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_timms_vit(name: str) -> None:
    ours, theirs = timm.create_model(name, device="meta"), softmax_twin(name, device="meta")
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert len(attentions(ours)) == len(ours.blocks)


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg_is_timms_without_weights(name: str) -> None:
    ours = timm.get_pretrained_cfg(name).to_dict()
    theirs = timm.get_pretrained_cfg(f"vit_{name.split('_')[2]}_patch16_224.augreg_in21k_ft_in1k").to_dict()
    for key in ("num_classes", "input_size", "fixed_input_size", "crop_pct", "interpolation", "mean", "std"):
        assert ours[key] == theirs[key], key
    for key in ("pool_size", "first_conv", "classifier"):
        assert ours[key] == theirs[key], key
    assert not timm.is_model_pretrained(name)


def test_a_base_model_runs() -> None:
    assert build("performer_vit_base_patch16_224", depth=1)(images()).shape == (2, 7)


@pytest.mark.parametrize("name", ["performer_vit_tiny_patch8_224", "performer_vit_small_patch14_224"])
def test_softmax_checkpoint_of_any_patch_size_loads_strictly(name: str) -> None:
    ours, theirs = build(name, img_size=56), softmax_twin(name, depth=3, img_size=56, num_classes=7)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours(images(56, 56)).isfinite().all()


def test_softmax_checkpoint_loads_strictly() -> None:
    ours, theirs = build(), build(SOFTMAX_TINY, model_seed=5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    features = ours.patch_embed(images()), theirs.patch_embed(images())
    assert torch.equal(*features)


def test_softmax_checkpoint_is_adapted_to_another_size_and_channels(tmp_path: Path) -> None:
    theirs = build(SOFTMAX_TINY, img_size=64)
    path = tmp_path / "vit.pth"
    torch.save(theirs.state_dict(), path)
    overlay = {"file": str(path), "num_classes": 7}
    ours = build(img_size=(96, 128), in_chans=6, pretrained=True, pretrained_cfg_overlay=overlay)
    assert ours.pos_embed.shape == (1, 1 + 6 * 8, 192)
    assert torch.equal(ours.blocks[1].attn.qkv.weight, theirs.blocks[1].attn.qkv.weight)
    assert ours(images(96, 128, in_chans=6)).shape == (2, 7)


def test_attn_kwargs_reach_every_block_with_its_index() -> None:
    model = build(attn_kwargs={"kernel": "relu", "num_features": 40, "seed": 3})
    assert [(a.options.kernel, a.options.seed, a.options.layer_index) for a in attentions(model)] == [
        ("relu", 3, 0),
        ("relu", 3, 1),
        ("relu", 3, 2),
    ]
    first, second, third = (a.mixer.projection for a in attentions(model))
    assert first.shape == (40, 64)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"attn_kwargs": {"num_feature": 3}}, "did you mean 'num_features'"),
        ({"attn_kwargs": {"layer_index": 3}}, "must not hold layer_index"),
        ({"attn_kwargs": {"kernel": "softmax"}}, r"did you mean 'softmax\+'"),
        ({"attn_drop_rate": 0.1}, "attn_drop must be 0"),
    ],
)
def test_wrong_attention_arguments_are_named(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


def test_features_of_a_large_multispectral_image() -> None:
    model = timm.create_model(
        TINY,
        attn_kwargs={"kernel": "relu", "num_features": 128},
        in_chans=6,
        img_size=1024,
        features_only=True,
        dynamic_img_size=True,
        num_classes=0,
        depth=3,
    ).eval()
    assert model.feature_info.channels() == [192] * 3
    assert model.feature_info.reduction() == [16] * 3
    for height, width in [(1024, 1024), (64, 208)]:
        with torch.no_grad():
            maps = model(images(height, width, in_chans=6)[:1])
        assert [tuple(m.shape) for m in maps] == [(1, 192, height // 16, width // 16)] * 3


def test_intermediates_are_those_of_the_forward_pass() -> None:
    model = build()
    final, maps = model.forward_intermediates(images(), norm=True)
    assert len(maps) == 3
    assert torch.equal(model.forward_head(final), model(images()))
    assert torch.equal(maps[-1].flatten(2).mT, final[:, 1:])


@pytest.mark.parametrize("kernel", ["softmax+", "relu"])
def test_every_parameter_gets_a_finite_gradient(kernel: str) -> None:
    model = build(attn_kwargs={"kernel": kernel}).train()
    model(images()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_traced_features_equal_the_eager_ones_bit_for_bit() -> None:
    model = build()
    extractor = create_feature_extractor(model, ["blocks.1", "head"])
    features = extractor(images())
    assert torch.equal(features["head"], model(images()))
    expected = model.forward_intermediates(images(), output_fmt="NLC", return_prefix_tokens=True)[1][1]
    assert torch.equal(features["blocks.1"], torch.cat([expected[1], expected[0]], dim=1))


def test_symbolic_trace_equals_eager_bit_for_bit() -> None:
    model = build()
    traced = torch.fx.symbolic_trace(model, concrete_args={"attn_mask": None, "is_causal": False})
    assert torch.equal(traced(images()), model(images()))
    assert torch.equal(traced(images()[:1]), model(images()[:1]))


def test_exported_program_equals_eager() -> None:
    model = build()
    exported = torch.export.export(model, (images(),)).module()
    torch.testing.assert_close(exported(images()), model(images()))


def test_a_model_from_the_meta_device_equals_one_built_in_place() -> None:
    model = build()
    empty = build(device="meta").to_empty(device="cpu")
    reinit_non_persistent_buffers(empty)
    empty.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(empty(images()), model(images()))


def test_copies_pickles_and_saved_models_give_the_same_output() -> None:
    model = build(attn_kwargs={"seed": 4})
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(images()), model(images()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_model_runs(dtype: torch.dtype) -> None:
    model = build()
    expected = model(images())
    out = model.to(dtype)(images().to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.05)
    assert {a.mixer.projection.dtype for a in attentions(model)} == {torch.float32}
