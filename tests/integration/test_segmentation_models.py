"""The backbones as encoders of segmentation_models_pytorch."""

import pytest
import torch
from doc_examples import examples, run

import perf_vit
from perf_vit.layers import LinearizedAttention

smp = pytest.importorskip("segmentation_models_pytorch")

# DPT halves and doubles strides, so they must be powers of two.
VITS = [
    "performer_vit_tiny_patch8_224",
    "performer_vit_tiny_patch16_224",
    "performer_vit_rope_small_patch16_224",
    "clustered_vit_tiny_patch16_224",
]
# Those whose decoder takes a pyramid and no other output stride than 32.
PYRAMID_DECODERS = ["Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "UPerNet", "Segformer"]
DPT_OPTIONS = {"decoder_intermediate_channels": (32, 32, 32, 32), "decoder_fusion_channels": 32}
# Three stages of HCT, of which two attend: strides 4, 8, 16, 32, all that these decoders look at.
HCT_OPTIONS = {"channels": (16, 32, 64), "depths": (1, 1, 1)}


def dpt(name: str, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"in_channels": 4, "classes": 3, "dynamic_img_size": True, **DPT_OPTIONS, **kwargs}
    return smp.DPT(encoder_name=f"tu-{name}", encoder_weights=None, **options)


def images(height: int, width: int, in_chans: int = 4) -> torch.Tensor:
    return torch.randn(2, in_chans, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [VITS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in VITS[1:])])
def test_dpt_trains_on_a_vit_at_any_size(name: str) -> None:
    model = dpt(name)
    for height, width in [(64, 64), (64, 160), (224, 96)]:
        model.zero_grad()
        logits = model(images(height, width))
        assert logits.shape == (2, 3, height, width)
        logits.square().mean().backward()
        for block in model.encoder.model.blocks:
            assert block.attn.qkv.weight.grad.isfinite().all()
            assert block.attn.qkv.weight.grad.any()


@pytest.mark.parametrize("name", VITS)
def test_dpt_reads_channels_strides_and_prefix_tokens(name: str) -> None:
    encoder = dpt(name).encoder
    width, prefix_tokens = encoder.model.embed_dim, encoder.model.num_prefix_tokens
    assert encoder.out_channels == [width] * 4
    assert encoder.output_strides == [int(name.split("patch")[1].split("_")[0])] * 4
    features, prefixes = encoder(images(64, 96))
    assert all(feature.isfinite().all() for feature in features)
    assert [prefix.shape for prefix in prefixes] == [(2, prefix_tokens, width)] * 4


@pytest.mark.parametrize("readout", ["cat", "add", "ignore"])
def test_dpt_takes_every_readout_of_the_class_token(readout: str) -> None:
    assert dpt(VITS[0], decoder_readout=readout)(images(64, 64)).shape == (2, 3, 64, 64)


@torch.no_grad()
def test_a_whole_dpt_can_be_made_linear() -> None:
    model = dpt("vit_tiny_patch16_224").eval()
    linear = perf_vit.linearize(model, max_exact_tokens=0, window_size=10, num_sinks=0)
    assert sum(isinstance(module, LinearizedAttention) for module in linear.modules()) == 12
    for size in [(64, 64), (64, 160)]:
        torch.testing.assert_close(linear(images(*size)), model(images(*size)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decoder", PYRAMID_DECODERS)
def test_hct_is_a_pyramid_for_the_other_decoders(decoder: str) -> None:
    torch.manual_seed(0)
    build = getattr(smp, decoder)
    model = build(encoder_name="tu-hct_base", encoder_weights=None, in_channels=4, classes=3, **HCT_OPTIONS)
    logits = model(images(128, 192))
    assert logits.shape == (2, 3, 128, 192)
    logits.square().mean().backward()
    attentions = [module for module in model.modules() if isinstance(module, LinearizedAttention)]
    assert len(attentions) == 2 or decoder == "PSPNet"
    assert all(attention.qkv.weight.grad.any() for attention in attentions)
    assert model.encoder.model.model.stem.conv.weight.grad.any()


def test_the_published_hct_attends_beyond_what_a_unet_looks_at() -> None:
    unet = smp.Unet(encoder_name="tu-hct_base", encoder_weights=None)
    assert unet.encoder.out_channels == [3, 0, 16, 16, 32, 64]
    assert not any(isinstance(module, LinearizedAttention) for module in unet.modules())


def test_dpt_takes_hct() -> None:
    model = smp.DPT(
        encoder_name="tu-hct_base", encoder_weights=None, decoder_readout="ignore", in_channels=4, **DPT_OPTIONS
    )
    logits = model(images(128, 256))
    assert logits.shape == (2, 1, 128, 256)
    logits.square().mean().backward()
    assert any(m.qkv.weight.grad.any() for m in model.modules() if isinstance(m, LinearizedAttention))


@pytest.mark.parametrize("decoder", ["PAN", "DeepLabV3", "DeepLabV3Plus"])
def test_hct_has_no_other_output_stride(decoder: str) -> None:
    with pytest.raises(TypeError, match="output_stride"):
        getattr(smp, decoder)(encoder_name="tu-hct_base", encoder_weights=None)


def test_a_plain_vit_is_no_pyramid() -> None:
    with pytest.raises(ValueError, match="Unsupported model downsampling pattern"):
        smp.Unet(encoder_name=f"tu-{VITS[0]}", encoder_weights=None)


def test_the_documented_examples_run() -> None:
    names = run(examples("integrations.md", "segmentation_models_pytorch"))
    assert names["logits"].shape == (1, 5, 256, 384)
    assert any(isinstance(module, LinearizedAttention) for module in names["linear"].modules())
    with torch.no_grad():
        assert names["unet"].eval()(torch.zeros(1, 3, 64, 96)).shape == (1, 5, 64, 96)
