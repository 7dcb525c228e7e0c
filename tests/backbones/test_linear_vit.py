"""Our ViTs by name and mixer: what `linearize` makes of timm's ViTs."""

import pickle

import pytest
import timm
import torch
from lively import sharpened
from torch import nn

import perf_vit
from perf_vit import backbones
from perf_vit.layers import MIXERS, LinearizedAttention

NAMES = [
    f"{mixer}_vit_{size}_patch{patch_size}_224"
    for mixer in ("performer", "clustered")
    for size in ("tiny", "small", "base", "large")
    for patch_size in (8, 14, 16)
]
TINY = "clustered_vit_tiny_patch16_224"


def build(name: str = TINY, model_seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(model_seed)
    return sharpened(timm.create_model(name, **{"depth": 3, "img_size": 64, "num_classes": 7, **kwargs}).eval())


def images(height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_timm_lists_the_models() -> None:
    assert sorted(timm.list_models(module="linear_vit")) == sorted(NAMES)
    assert set(NAMES) < set(backbones.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_timms_vit(name: str) -> None:
    mixer, _, size, patch, _ = name.split("_")
    ours = timm.create_model(name, device="meta")
    theirs = timm.create_model(f"vit_{size}_patch16_224", patch_size=int(patch.removeprefix("patch")), device="meta")
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    for index, block in enumerate(ours.blocks):
        assert isinstance(block.attn, LinearizedAttention)
        assert block.attn.mixer.name == mixer
        assert block.attn.options == MIXERS[mixer].options_type(layer_index=index, num_prefix_tokens=1)


@torch.no_grad()
def test_a_loaded_checkpoint_gives_the_converted_model() -> None:
    softmax = build("vit_tiny_patch16_224", model_seed=5, dynamic_img_size=True)
    options = {"max_exact_tokens": 0, "window_size": 2, "num_sinks": 3, "num_clusters": 4}
    ours = build(dynamic_img_size=True, attn_kwargs=options)
    ours.load_state_dict(softmax.state_dict(), strict=True)
    converted = perf_vit.linearize(softmax, **options)
    for size in ((64, 64), (32, 160), (160, 32)):
        assert torch.equal(ours(images(*size)), converted(images(*size)))
        assert not torch.allclose(ours(images(*size)), softmax(images(*size)))


@torch.no_grad()
def test_windows_as_large_as_the_image_give_the_softmax_model() -> None:
    softmax, ours = build("vit_tiny_patch16_224"), build(attn_kwargs={"num_sinks": 0, "max_exact_tokens": 0})
    torch.testing.assert_close(ours(images()), softmax(images()), rtol=1e-4, atol=1e-4)


def test_wrong_attention_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"got 'window'; did you mean 'window_size'\?"):
        build(attn_kwargs={"window": 8})
    with pytest.raises(ValueError, match="num_features is an option of mixer='performer', got mixer='clustered'"):
        build(attn_kwargs={"num_features": 8})
    with pytest.raises(ValueError, match=r"mixer must be one of clustered, .* did you mean 'linformer'"):
        build(mixer="linfomer")
    for name in ("layer_index", "num_prefix_tokens"):
        with pytest.raises(ValueError, match=f"must not hold {name}"):
            build(attn_kwargs={name: 1})
    with pytest.raises(ValueError, match="attn_drop must be 0"):
        build(attn_drop_rate=0.1)
    with pytest.raises(ValueError, match="without patch dropout"):
        build(patch_drop_rate=0.5).train()(images())


FAMILIES = {
    "performer_vit_tiny_patch16_224": {"depth": 2, "img_size": 64},
    "clustered_vit_tiny_patch16_224": {"depth": 2, "img_size": 64},
    "performer_vit_rope_small_patch16_224": {"depth": 2, "embed_dim": 96, "num_heads": 3, "init_values": 1.0},
    "clustered_vit_rope_small_patch16_224": {"depth": 2, "embed_dim": 96, "num_heads": 3, "init_values": 1.0},
    "hct_base": {"depths": (1, 1, 1, 1, 1)},
}
SIZES = {
    "performer": {"num_features": 16},
    "clustered": {"max_exact_tokens": 0, "window_size": 2, "num_clusters": 3},
    "softmax": {},
    "linformer": {"num_projected": 5, "native_side": 4},
    "reformer": {"chunk_size": 4},
    "s4": {"num_states": 2},
    "h3": {"num_states": 2},
    "windowed": {"window_size": 2},
    "registers": {"window_size": 2},
}


@pytest.mark.parametrize("mixer", SIZES)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_every_mixer(name: str, mixer: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, mixer=mixer, attn_kwargs=SIZES[mixer], num_classes=3, **FAMILIES[name]).eval()
    layers = [module for module in model.modules() if isinstance(module, LinearizedAttention)]
    assert {layer.mixer.name for layer in layers} <= {mixer}
    assert all(getattr(layer.options, option) == value for layer in layers for option, value in SIZES[mixer].items())
    assert layers or mixer == "softmax"
    side = 256 if name == "hct_base" else 64
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    expected = model(x)
    expected.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    torch.manual_seed(9)
    twin = timm.create_model(name, mixer=mixer, attn_kwargs=SIZES[mixer], num_classes=3, **FAMILIES[name]).eval()
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(twin(x), expected)


def test_the_registry_lists_the_mixers_that_the_families_take() -> None:
    assert set(MIXERS) >= set(SIZES)


@torch.no_grad()
def test_a_map_of_hct_is_attended_exactly_where_windows_hold_it() -> None:
    arguments = {"num_classes": 3, "depths": (1, 1, 1, 1, 1)}
    models = []
    for mixer, options in (("softmax", {}), ("clustered", {"max_exact_tokens": 0, "window_size": 64, "num_sinks": 0})):
        torch.manual_seed(0)
        models.append(timm.create_model("hct_base", mixer=mixer, attn_kwargs=options, **arguments).eval())
    # No square, so that rows and columns must be in their places.
    x = torch.randn(1, 3, 256, 384, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(models[1](x), models[0](x), rtol=1e-4, atol=1e-5)
