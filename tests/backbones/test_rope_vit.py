"""Rotary ViTs: positions that any image has, in timm's own parameters."""

import pytest
import timm
import torch
from lively import sharpened
from timm.layers import apply_rot_embed_cat
from timm.models.eva import Eva
from torch import nn

import perf_vit
from perf_vit.layers import LinearizedAttention
from perf_vit.layers.mixer import MIXERS
from perf_vit.ops.naive import naive_favor_attention

SMALL = "performer_vit_rope_small_patch16_224"
NAMES = sorted(timm.list_models(module="rope_vit"))


def lively(model: nn.Module) -> nn.Module:
    """Let blocks and attention show in the output, also through the head, which starts near 0."""
    nn.init.normal_(model.head.weight, std=0.02)
    return sharpened(model.eval(), 0.5)


def build(name: str = SMALL, model_seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(model_seed)
    return lively(timm.create_model(name, **{"depth": 2, "num_classes": 7, **kwargs}))


def images(height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def softmax_twin(**kwargs) -> Eva:
    torch.manual_seed(5)
    model = Eva(
        embed_dim=384,
        depth=2,
        num_heads=6,
        num_classes=7,
        attn_type="rope",
        init_values=1e-5,
        num_reg_tokens=4,
        global_pool="token",
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        rope_grid_indexing="xy",
        rope_temperature=100.0,
        dynamic_img_size=True,
        **kwargs,
    )
    return lively(model)


def test_the_models_are_listed() -> None:
    assert [
        f"{mixer}_vit_rope_{size}_patch16_224" for mixer in ("clustered", "performer") for size in ("base", "small")
    ] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_model_has_registers_and_no_table_of_positions(name: str) -> None:
    model = timm.create_model(name, device="meta")
    assert model.pos_embed is None
    assert model.dynamic_img_size
    assert model.reg_token.shape[1] == 4
    assert model.num_prefix_tokens == 5
    kinds = [isinstance(block.attn, LinearizedAttention) for block in model.blocks]
    assert kinds == [True] * 12
    mixer = MIXERS[name.partition("_")[0]]
    assert model.blocks[3].attn.options == mixer.options_type(layer_index=3, num_prefix_tokens=5)


@pytest.mark.parametrize("name", ["performer_vit_rope_small_patch16_224", "clustered_vit_rope_small_patch16_224"])
def test_a_softmax_checkpoint_loads_strictly(name: str) -> None:
    twin, model = softmax_twin(), build(name)
    model.load_state_dict(twin.state_dict(), strict=True)
    assert list(model.state_dict()) == list(twin.state_dict())
    assert model(images()).isfinite().all()


@torch.no_grad()
def test_windows_as_large_as_the_image_give_the_softmax_model() -> None:
    twin = softmax_twin()
    model = build("clustered_vit_rope_small_patch16_224", attn_kwargs={"max_exact_tokens": 0, "num_sinks": 0})
    model.load_state_dict(twin.state_dict(), strict=True)
    for size in ((64, 64), (32, 160), (160, 32)):
        torch.testing.assert_close(model(images(*size)), twin(images(*size)), rtol=1e-4, atol=1e-4)


def test_timms_rotary_vit_has_the_same_shapes_without_registers() -> None:
    for size in ("small", "base"):
        ours = timm.create_model(f"performer_vit_rope_{size}_patch16_224", num_reg_tokens=0, device="meta")
        theirs = timm.create_model(f"vit_{size}_patch16_rope_224", device="meta")
        shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
        assert shapes[0] == shapes[1]


@torch.no_grad()
def test_patches_are_turned_before_the_features_and_prefix_tokens_are_not() -> None:
    model = build()
    attention = model.blocks[1].attn
    x = torch.randn(2, 5 + 12, 384, generator=torch.Generator().manual_seed(0))
    rope = model.rope.get_embed(shape=(3, 4))
    q, k, v = attention.qkv(x).reshape(2, 17, 3, 6, 64).permute(2, 0, 3, 1, 4)
    turned = [torch.cat([y[:, :, :5], apply_rot_embed_cat(y[:, :, 5:], rope)], dim=2).double() for y in (q, k)]
    expected = naive_favor_attention(*turned, v.double(), attention.mixer.projection).float()
    torch.testing.assert_close(
        attention(x, rope), attention.proj(expected.transpose(1, 2).flatten(2)), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_the_same_patches_elsewhere_in_an_image_look_at_each_other_alike() -> None:
    model = build()
    small, large = model.rope.get_embed(shape=(4, 4)), model.rope.get_embed(shape=(9, 12))
    q, k = (torch.randn(1, 1, 16, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    moved = large.reshape(9, 12, -1)[3:7, 5:9].reshape(16, -1)
    products = [
        apply_rot_embed_cat(q, rope, half=False) @ apply_rot_embed_cat(k, rope, half=False).mT
        for rope in (small, moved)
    ]
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-4)


def test_attn_kwargs_reach_every_block_and_wrong_ones_are_named() -> None:
    model = build(attn_kwargs={"kernel": "relu", "num_features": 40, "seed": 3})
    options = [block.attn.options for block in model.blocks]
    assert [(o.kernel, o.num_features, o.seed, o.layer_index) for o in options] == [("relu", 40, 3, i) for i in (0, 1)]
    with pytest.raises(ValueError, match="did you mean 'num_features'"):
        build(attn_kwargs={"num_feature": 3})
    for name in ("layer_index", "num_prefix_tokens"):
        with pytest.raises(ValueError, match=f"must not hold {name}"):
            build(attn_kwargs={name: 3})
    with pytest.raises(ValueError, match="attn_drop must be 0"):
        build(attn_drop_rate=0.1)
    with pytest.raises(ValueError, match="linear already"):
        perf_vit.linearize(model)


@torch.no_grad()
def test_a_model_that_leaves_the_meta_device_has_zeros_where_eva_has_no_key_bias() -> None:
    model = perf_vit.linearize(
        timm.create_model("eva02_tiny_patch14_224", depth=2, img_size=56, device="meta"), "performer"
    )
    for block in model.to_empty(device="cpu").blocks:
        assert not block.attn.k_bias.any()
