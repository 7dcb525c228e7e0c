"""ViTs with Scatterbrain attention: what `performerize` makes of timm's ViTs, by name."""

import pytest
import timm
import torch
from torch import nn

import perf_vit
from perf_vit.layers.converted_attention import ConvertedAttention
from perf_vit.models import backbones
from perf_vit.models.conversion import ATTENTIONS

NAMES = [
    f"scatterbrain_vit_{size}_patch{patch_size}_224"
    for size in ("tiny", "small", "base", "large")
    for patch_size in (8, 14, 16)
]
TINY = "scatterbrain_vit_tiny_patch16_224"


def build(name: str = TINY, model_seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(model_seed)
    return timm.create_model(name, **{"depth": 3, "img_size": 64, "num_classes": 7, **kwargs}).eval()


def images(height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_timm_lists_the_models() -> None:
    assert sorted(timm.list_models(module="scatterbrain_vit")) == sorted(NAMES)
    assert set(NAMES) < set(backbones.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_timms_vit(name: str) -> None:
    _, _, size, patch, _ = name.split("_")
    ours = timm.create_model(name, device="meta")
    theirs = timm.create_model(f"vit_{size}_patch16_224", patch_size=int(patch.removeprefix("patch")), device="meta")
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    for index, block in enumerate(ours.blocks):
        assert isinstance(block.attn, ConvertedAttention)
        options = {key: getattr(block.attn.options, key) for key in ATTENTIONS["scatterbrain"]}
        assert options == ATTENTIONS["scatterbrain"]
        assert (block.attn.options.layer_index, block.attn.options.num_prefix_tokens) == (index, 1)


@torch.no_grad()
def test_a_loaded_checkpoint_gives_the_converted_model() -> None:
    softmax = build("vit_tiny_patch16_224", model_seed=5, dynamic_img_size=True)
    options = {"window_size": 2, "num_sinks": 3, "num_features": 64, "seed": 4}
    ours = build(dynamic_img_size=True, attn_kwargs=options)
    ours.load_state_dict(softmax.state_dict(), strict=True)
    converted = perf_vit.performerize(softmax, **options)
    for size in ((64, 64), (32, 160), (160, 32)):
        assert torch.equal(ours(images(*size)), converted(images(*size)))
        assert not torch.allclose(ours(images(*size)), softmax(images(*size)))


@torch.no_grad()
def test_windows_as_large_as_the_image_give_the_softmax_model() -> None:
    softmax, ours = build("vit_tiny_patch16_224"), build(attn_kwargs={"num_sinks": 0})
    torch.testing.assert_close(ours(images()), softmax(images()), rtol=1e-4, atol=1e-4)


def test_wrong_attention_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"got 'window'; did you mean 'window_size'\?"):
        build(attn_kwargs={"window": 8})
    for name in ("layer_index", "num_prefix_tokens"):
        with pytest.raises(ValueError, match=f"must not hold {name}"):
            build(attn_kwargs={name: 1})
    with pytest.raises(ValueError, match="attn_drop must be 0"):
        build(attn_drop_rate=0.1)
    with pytest.raises(ValueError, match="without patch dropout"):
        build(patch_drop_rate=0.5).train()(images())
