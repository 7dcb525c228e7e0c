import copy
import inspect

import pytest
import torch
from timm.layers import Attention, LayerNorm
from timm.models._manipulate import reinit_non_persistent_buffers
from torch import nn
from torch.nn import functional as F

from perf_vit.layers import MIXERS, LinearizedAttention, PerformerMixer, PerformerOptions, register_mixer
from perf_vit.layers.token_grid import TokenGrid
from perf_vit.ops.naive import naive_favor_attention

VARIANTS = [{}, {"qkv_bias": True}, {"qk_norm": True, "scale_norm": True}, {"attn_head_dim": 24, "dim_out": 40}]
if "gated" in inspect.signature(Attention).parameters:
    VARIANTS.append({"gated": True, "qkv_bias": True, "scale_norm": True})

LAYER_ARGS = {"dim": 32, "num_heads": 2, "norm_layer": LayerNorm}


def layer(options: dict | None = None, **kwargs) -> LinearizedAttention:
    torch.manual_seed(0)
    return LinearizedAttention(
        Attention(**LAYER_ARGS, **kwargs), PerformerOptions(**(options or {})), TokenGrid()
    ).eval()


def tokens(num_tokens: int = 21) -> torch.Tensor:
    return torch.randn(2, num_tokens, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_all_but_the_attention_itself_is_timms(variant: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = layer(**variant), Attention(**LAYER_ARGS, **variant).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    approximate = ours(tokens())
    assert approximate.shape == theirs(tokens()).shape
    assert not torch.allclose(approximate, theirs(tokens()))
    monkeypatch.setattr(PerformerMixer, "forward", lambda _, q, k, v, *__: F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(ours(tokens()), theirs(tokens()))


@pytest.mark.parametrize("kernel", ["softmax+", "softmax-hyp+", "relu"])
def test_heads_attend_by_the_configured_kernel_and_projection(kernel: str) -> None:
    attention = layer({"kernel": kernel, "num_features": 20}).double()
    x = tokens().double()
    q, k, v = attention.qkv(x).reshape(2, 21, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
    heads = naive_favor_attention(q, k, v, attention.mixer.projection, kernel)
    torch.testing.assert_close(attention(x), attention.proj(heads.transpose(1, 2).reshape(2, 21, 32)))


def test_many_features_approach_the_softmax_layer() -> None:
    theirs = Attention(**LAYER_ARGS).eval()
    theirs.load_state_dict(layer().state_dict())
    with torch.no_grad():
        exact = theirs(tokens())
        errors = [float((layer({"num_features": m})(tokens()) - exact).norm()) for m in (4, 128, 4096)]
    assert errors[0] > errors[1] > errors[2]


def test_defaults_are_those_of_the_options() -> None:
    attention = layer()
    assert attention.mixer.projection.shape == (256, 16)
    assert torch.equal(attention.mixer.projection, layer({"kernel": "softmax+", "seed": 0}).mixer.projection)
    assert "kernel='softmax+', num_features=256" in repr(attention)


def test_options_decide_the_projection() -> None:
    attention = layer({"kernel": "relu", "num_features": 20, "norms": "sqrt", "orthogonal": False})
    assert attention.options.kernel == "relu"
    torch.testing.assert_close(attention.mixer.projection.norm(dim=1), torch.full((20,), 4.0))


def test_seed_layer_and_draw_each_give_another_projection_and_repeat() -> None:
    entropies = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (2, 0, 0)]

    def projection(seed: int, layer_index: int, draw: int) -> torch.Tensor:
        attention = layer({"seed": seed, "layer_index": layer_index})
        attention.mixer.redraw(draw)
        return attention.mixer.projection

    drawn = [projection(*entropy) for entropy in entropies]
    for i, first in enumerate(drawn):
        assert torch.equal(first, projection(*entropies[i]))
        assert not any(torch.equal(first, other) for other in drawn[i + 1 :])


def test_building_leaves_global_randomness_to_the_weights() -> None:
    torch.manual_seed(0)
    Attention(**LAYER_ARGS)
    expected = torch.random.get_rng_state()
    layer({"num_features": 20})
    assert torch.equal(torch.random.get_rng_state(), expected)


def test_redraw_writes_into_the_same_buffer() -> None:
    attention = layer()
    address, before = attention.mixer.projection.data_ptr(), attention.mixer.projection.clone()
    attention.mixer.redraw(1)
    assert attention.mixer.projection.data_ptr() == address
    assert not torch.equal(attention.mixer.projection, before)
    attention.mixer.redraw(0)
    assert torch.equal(attention.mixer.projection, before)


def test_projection_is_in_no_checkpoint() -> None:
    assert set(layer(qkv_bias=True).state_dict()) == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float64, 1e-5)], ids=str
)
def test_projection_stays_the_same_float32_in_a_module_of_another_dtype(dtype: torch.dtype, largest: float) -> None:
    attention = layer()
    drawn = attention.mixer.projection.clone()
    expected = attention(tokens())
    moved = attention.to(dtype)
    assert moved.mixer.projection.dtype == torch.float32
    assert torch.equal(moved.mixer.projection, drawn)
    out = moved(tokens().to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=largest)


def test_other_dtypes_at_construction_keep_the_projection_float32() -> None:
    attention = layer(dtype=torch.bfloat16)
    assert attention.qkv.weight.dtype == torch.bfloat16
    assert torch.equal(attention.mixer.projection, layer().mixer.projection)


@pytest.mark.parametrize("build", [lambda: layer(device="meta"), lambda: layer().to("meta")])
def test_a_module_that_leaves_the_meta_device_has_its_projection(build) -> None:
    attention = build()
    assert attention.mixer.projection.is_meta
    attention.to_empty(device="cpu")
    assert torch.equal(attention.mixer.projection, layer().mixer.projection)


def test_timm_restores_the_projection() -> None:
    model = nn.Sequential(layer({"layer_index": 3}))
    expected = model[0].mixer.projection.clone()
    model[0].mixer.projection.zero_()
    assert "0.mixer" in reinit_non_persistent_buffers(model)
    assert torch.equal(model[0].mixer.projection, expected)


def test_copies_are_independent() -> None:
    attention = layer()
    twin = copy.deepcopy(attention)
    assert torch.equal(twin(tokens()), attention(tokens()))
    twin.mixer.redraw(1)
    assert not torch.equal(twin.mixer.projection, attention.mixer.projection)


@pytest.mark.parametrize("timm_form", [False, True])
def test_a_key_mask_equals_leaving_the_tokens_out(timm_form: bool) -> None:
    attention, x = layer().eval(), tokens()
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[:, 5:9] = False
    with torch.no_grad():
        masked = attention(x, attn_mask=mask[:, None, None] if timm_form else mask)
        left_out = attention(x[:, mask[0]])
    torch.testing.assert_close(masked[:, mask[0]], left_out)


def test_causal_tokens_see_nothing_of_later_ones() -> None:
    attention, x = layer(), tokens()
    with torch.no_grad():
        whole = attention(x, is_causal=True)
        torch.testing.assert_close(whole[:, :9], attention(x[:, :9], is_causal=True))
        torch.testing.assert_close(whole[:, -1], attention(x)[:, -1])
        assert not torch.allclose(whole[:, 0], attention(x)[:, 0])
    with pytest.raises(ValueError, match="needs center=False and balance=False"):
        layer({"center": True})(x, is_causal=True)


@pytest.mark.parametrize("options", [{"center": True}, {"balance": True}, {"center": True, "balance": True}], ids=str)
def test_centring_and_balancing_bring_the_layer_closer_to_softmax(options: dict) -> None:
    theirs, x = Attention(**LAYER_ARGS).eval(), tokens(197) + 0.5
    with torch.no_grad():
        # Keys and queries of a pretrained ViT: mostly a mean, in channels of very unequal size.
        theirs.qkv.weight[:32] *= torch.linspace(0.5, 8, 32).unsqueeze(-1)
        theirs.qkv.weight[32:64] *= torch.linspace(8, 0.5, 32).unsqueeze(-1)
        exact = theirs(x)
        errors = []
        for kwargs in ({}, options):
            ours = [layer({"seed": seed, **kwargs}) for seed in range(5)]
            for each in ours:
                each.load_state_dict(theirs.state_dict())
            errors.append(sum(float((each(x) - exact).norm()) for each in ours))
    assert errors[1] < errors[0]
    with pytest.raises(ValueError, match="estimates softmax, got 'relu'; use center=False"):
        PerformerOptions(kernel="relu", **options)


def test_other_masks_are_refused() -> None:
    for mask in (torch.ones(21, 21), torch.ones(21, 21, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"attn_mask must be bool, .* got torch\.\w+ \[21, 21\]"):
            layer()(tokens(), attn_mask=mask)


def test_attention_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attn_drop must be 0, got 0\.1"):
        layer(attn_drop=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "rely"}, "did you mean 'relu'"),
        ({"norms": "unit"}, "one of chi, sqrt"),
        ({"num_features": 0}, "at least 1"),
        ({"seed": -1}, "at least 0, got -1"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(options)


def test_a_mixer_with_the_options_of_another_is_refused_and_leaves_that_one_in_place() -> None:
    class Other(PerformerMixer):
        pass

    with pytest.raises(ValueError, match="mixer 'other' has the options_type of 'performer'; give it a subclass"):
        register_mixer("other")(Other)
    assert "other" not in MIXERS
    assert type(layer().mixer) is PerformerMixer
