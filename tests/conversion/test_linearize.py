import copy

import pytest
import timm
import torch
from lively import sharpened
from torch.nn import functional as F

import perf_vit
from perf_vit.layers import ClusteredOptions, LinearizedAttention, PerformerOptions
from perf_vit.ops.naive import naive_favor_attention

# One of each kind of attention: plain, rotary, EVA's packed and apart, with register tokens and without class token.
MODELS = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {"depth": 2, "embed_dim": 96, "num_heads": 3},
    "vit_base_patch16_siglip_224": {"depth": 2, "embed_dim": 96, "num_heads": 3},
    "eva02_tiny_patch14_224": {"depth": 2},
    "vit_small_patch16_dinov3": {"depth": 2, "embed_dim": 96, "num_heads": 3},
}
SIZE = 112


def build(name: str, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    kwargs = {"img_size": SIZE, "num_classes": 5, **MODELS[name], **kwargs}
    return sharpened(timm.create_model(name, **kwargs).eval())


def images(height: int = SIZE, width: int = SIZE, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_windows_as_large_as_the_image_give_the_softmax_model(name: str) -> None:
    model = build(name)
    converted = perf_vit.linearize(model, max_exact_tokens=0, window_size=20, num_sinks=0)
    torch.testing.assert_close(converted(images()), model(images()), rtol=1e-4, atol=1e-4)
    assert list(converted.state_dict()) == list(model.state_dict())
    assert any(isinstance(module, LinearizedAttention) for module in converted.modules())
    assert not any(isinstance(module, LinearizedAttention) for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_trains_and_clusters_are_closer_than_the_performer(name: str) -> None:
    model = build(name)
    with torch.no_grad():
        exact = model.forward_features(images())
        options = {"max_exact_tokens": 0, "window_size": 4, "num_sinks": 16, "num_clusters": 8}
        near = perf_vit.linearize(model, **options).forward_features(images())
        far = perf_vit.linearize(model, "performer", num_features=64).forward_features(images())
    cosines = [F.cosine_similarity(x, exact, dim=-1).mean() for x in (near, far)]
    assert cosines[0] > cosines[1]
    converted = perf_vit.linearize(model, **options).train()
    converted(images()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in converted.parameters() if p.requires_grad)


@torch.no_grad()
def test_plain_performer_is_favor_of_the_models_own_queries_and_keys() -> None:
    model = build("vit_tiny_patch16_224")
    attention = perf_vit.linearize(model, "performer").blocks[3].attn
    x = torch.randn(2, 50, 192, generator=torch.Generator().manual_seed(0))
    q, k, v = attention.qkv(x).reshape(2, 50, 3, 3, 64).permute(2, 0, 3, 1, 4)
    expected = naive_favor_attention(q.double(), k.double(), v.double(), attention.mixer.projection).float()
    torch.testing.assert_close(attention(x), attention.proj(expected.transpose(1, 2).flatten(2)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_local_enhancement_is_added_to_softmax_attention_too() -> None:
    model = build("vit_tiny_patch16_224")
    converted = perf_vit.linearize(model, "softmax", layers=[2], local_enhancement=True)
    assert [isinstance(block.attn, LinearizedAttention) for block in converted.blocks[:4]] == [
        False,
        False,
        True,
        False,
    ]
    torch.testing.assert_close(converted(images()), model(images()), rtol=1e-4, atol=1e-4)
    converted.blocks[2].attn.local_enhancement.weight.fill_(0.5)
    assert not torch.allclose(converted(images()), model(images()), atol=1e-3)


@torch.no_grad()
def test_the_grid_follows_the_image_of_each_pass() -> None:
    model = build("vit_tiny_patch16_224", dynamic_img_size=True)
    converted = perf_vit.linearize(model, max_exact_tokens=0, window_size=64, num_sinks=0)
    for height, width in ((112, 112), (64, 160), (160, 64), (112, 112)):
        x = images(height, width)
        torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_copy_has_a_grid_of_its_own() -> None:
    converted = perf_vit.linearize(
        build("vit_tiny_patch16_224", dynamic_img_size=True), max_exact_tokens=0, window_size=2, num_sinks=4
    )
    twin = copy.deepcopy(converted)
    expected = converted(images())
    twin(images(64, 160))
    assert converted.blocks[0].attn.grid.size == (7, 7)
    assert twin.blocks[0].attn.grid.size == twin.blocks[5].attn.grid.size == (4, 10)
    assert torch.equal(twin(images()), expected)


@torch.no_grad()
def test_layers_can_be_chosen() -> None:
    model = build("vit_tiny_patch16_224")
    converted = perf_vit.linearize(model, "performer", layers=[1, 4])
    kinds = [isinstance(block.attn, LinearizedAttention) for block in converted.blocks]
    assert [index for index, is_converted in enumerate(kinds) if is_converted] == [1, 4]
    assert torch.equal(perf_vit.linearize(model, "softmax")(images()), model(images()))


def test_timms_utilities_take_a_converted_model() -> None:
    model = perf_vit.linearize(build("vit_tiny_patch16_224", depth=3), max_exact_tokens=0, window_size=3, num_sinks=8)
    expected = model(images())
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(model.train()(images()), expected)
    model.eval().set_grad_checkpointing(False)
    features = model.forward_intermediates(images(), indices=[0, 2], intermediates_only=True)
    assert [x.shape for x in features] == [(2, 192, 7, 7)] * 2
    model.reset_classifier(0)
    assert model(images()).shape == (2, 192)
    model.set_input_size(img_size=(64, 160))
    assert model(images(64, 160)).shape == (2, 192)


@torch.no_grad()
def test_half_precision_and_autocast() -> None:
    model = perf_vit.linearize(build("vit_tiny_patch16_224"), max_exact_tokens=0, window_size=4, num_sinks=8)
    expected = model(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.cosine_similarity(model(images()).float(), expected).min() > 0.99
    half = copy.deepcopy(model).bfloat16()
    assert F.cosine_similarity(half(images().bfloat16()).float(), expected).min() > 0.99


@pytest.mark.slow
@torch.no_grad()
def test_a_converted_model_exports() -> None:
    model = perf_vit.linearize(build("vit_tiny_patch16_224", depth=2), max_exact_tokens=0, window_size=3, num_sinks=8)
    exported = torch.export.export(model, (images(),)).module()
    torch.testing.assert_close(exported(images()), model(images()), rtol=1e-4, atol=1e-4)


def test_single_layers_have_options_and_a_mixer_of_their_own() -> None:
    per_layer = {0: {"mixer": "softmax"}, 1: {"mixer": "performer", "num_features": 64}, 2: {"window_size": 4}}
    model = perf_vit.linearize(build("vit_tiny_patch16_224"), per_layer=per_layer, num_sinks=8)
    assert not isinstance(model.blocks[0].attn, LinearizedAttention)
    options = [block.attn.options for block in model.blocks[1:4]]
    assert options[0] == PerformerOptions(num_features=64, layer_index=1, num_prefix_tokens=1)
    assert options[1] == ClusteredOptions(window_size=4, num_sinks=8, layer_index=2, num_prefix_tokens=1)
    assert options[2] == ClusteredOptions(num_sinks=8, layer_index=3, num_prefix_tokens=1)
    assert model.conversion.per_layer == per_layer


def test_one_layer_of_a_model_that_stays_softmax_can_be_converted() -> None:
    per_layer = {3: {"mixer": "clustered", "num_sinks": 8, "max_exact_tokens": 0}}
    model = perf_vit.linearize(build("vit_tiny_patch16_224"), "softmax", per_layer=per_layer)
    assert [isinstance(block.attn, LinearizedAttention) for block in model.blocks] == [i == 3 for i in range(12)]
    assert model(images()).shape == (2, 5)


def test_wrong_options_for_single_layers_are_named() -> None:
    model = build("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="layers that are converted, 0 to 11; got 12"):
        perf_vit.linearize(model, per_layer={12: {"window_size": 8}})
    with pytest.raises(ValueError, match="layers that are converted, 2, 5; got 3"):
        perf_vit.linearize(model, layers=[5, 2], per_layer={3: {"window_size": 8}})
    with pytest.raises(ValueError, match=r"got 'sinks'; did you mean 'num_sinks'\?"):
        perf_vit.linearize(model, per_layer={3: {"sinks": 8}})
    with pytest.raises(ValueError, match=r"one of clustered, .*, got 'linear'"):
        perf_vit.linearize(model, per_layer={3: {"mixer": "linear"}})


@torch.no_grad()
def test_a_features_only_model_converts_too() -> None:
    kwargs = {"features_only": True, "out_indices": (0, 2)}
    model = timm.create_model("vit_tiny_patch16_224", img_size=SIZE, **kwargs).eval()
    converted = perf_vit.linearize(model, max_exact_tokens=0, window_size=20, num_sinks=0)
    assert all(isinstance(block.attn, LinearizedAttention) for block in converted.model.blocks)
    for x, y in zip(converted(images()), model(images()), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_converted_is_named() -> None:
    model = build("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"one of clustered, .*, got 'longformer'"):
        perf_vit.linearize(model, "longformer")
    with pytest.raises(ValueError, match=r"ResNet with none of them"):
        perf_vit.linearize(timm.create_model("resnet18"))
    with pytest.raises(ValueError, match="from 0 to 11, got 12"):
        perf_vit.linearize(model, layers=[3, 12])
    with pytest.raises(ValueError, match=r"options of .* are .*, got 'window'; did you mean 'window_size'\?"):
        perf_vit.linearize(model, window=8)
    with pytest.raises(ValueError, match=r"linear already \(blocks.0.attn\)"):
        perf_vit.linearize(perf_vit.linearize(model))
    with pytest.raises(ValueError, match="multiple of 2 for kernel 'softmax-hyp"):
        perf_vit.linearize(model, "performer", kernel="softmax-hyp+", num_features=33)
    with pytest.raises(ValueError, match=r"attn_drop must be 0, got 0\.1"):
        perf_vit.linearize(build("vit_tiny_patch16_224", attn_drop_rate=0.1))
    attention = perf_vit.linearize(model).blocks[0].attn
    with pytest.raises(ValueError, match="patch embedding to record the grid of 49 patch tokens, got None"):
        attention(torch.zeros(1, 50, 192))
    with pytest.raises(ValueError, match="is_causal=True isn't possible with mixer='clustered'"):
        attention(torch.zeros(1, 50, 192), is_causal=True)
    with pytest.raises(ValueError, match="attn_mask must be bool"):
        attention(torch.zeros(1, 50, 192), attn_mask=torch.zeros(50, 50))


@torch.no_grad()
def test_sinks_are_as_many_as_the_size_of_an_image_affords() -> None:
    model = build("vit_tiny_patch16_224", depth=2, dynamic_img_size=True)
    for rows, columns, number in ((10, 40, 256), (40, 65, 0), (120, 180, 0)):
        by_size = perf_vit.linearize(model, max_exact_tokens=0, window_size=5, num_clusters=8)
        given = perf_vit.linearize(model, max_exact_tokens=0, window_size=5, num_clusters=8, num_sinks=number)
        x = images(16 * rows, 16 * columns)[:1]
        assert torch.equal(by_size(x), given(x))
        other = perf_vit.linearize(model, max_exact_tokens=0, window_size=5, num_clusters=8, num_sinks=number + 1)
        assert not torch.equal(by_size(x), other(x))
    assert by_size.conversion.to_dict()["options"]["num_sinks"] is None


@pytest.mark.parametrize(
    ("mixer", "options"),
    [
        ("clustered", {"max_exact_tokens": 0, "window_size": 3, "num_sinks": 4, "num_clusters": 6}),
        ("performer", {"num_features": 32}),
    ],
)
@pytest.mark.parametrize("ndim", [2, 4])
@torch.no_grad()
def test_masked_tokens_change_no_other(mixer: str, options: dict, ndim: int) -> None:
    model = perf_vit.linearize(build("vit_tiny_patch16_224", depth=1), mixer, **options)
    layer = model.blocks[0].attn
    layer.grid.size = (7, 7)
    x = torch.randn(2, 50, 192, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[0, 20:31], mask[1, 40:] = False, False
    shaped = mask if ndim == 2 else mask[:, None, None]
    masked = layer(x, attn_mask=shaped)
    other = layer(x.masked_fill(~mask[..., None], 9.0), attn_mask=shaped)
    torch.testing.assert_close(other[mask], masked[mask], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(masked[mask], layer(x)[mask], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"num_features": 96}, {"kernel": "softmax+"}, {"norms": "sqrt"}, {"center": True}, {"balance": True}, {"seed": 1}],
)
def test_an_option_of_another_mixer_is_refused_by_the_name_of_that_one(options: dict) -> None:
    name = next(iter(options))
    with pytest.raises(ValueError, match=rf"^{name} is an option of mixer='performer', got mixer='clustered'; use"):
        perf_vit.linearize(build("vit_tiny_patch16_224", depth=1), **options)
    with pytest.raises(ValueError, match=r"^window_size is an option of mixer='clustered', got mixer='performer'"):
        perf_vit.linearize(build("vit_tiny_patch16_224", depth=1), "performer", window_size=8)
