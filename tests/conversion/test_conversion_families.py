"""timm's families of ViTs that conversion takes over: one small model of each."""

import pytest
import timm
import torch
from torch import nn

import perf_vit
from perf_vit.layers import LinearizedAttention
from perf_vit.layers.linearized_attention import CONVERTIBLE

# Whatever a family does its own way: prefix tokens, norms, rotary embeddings, blocks, patches, pooling.
FAMILIES = [
    "vit_tiny_patch16_224",
    "vit_base_patch16_18x2_224",
    "vit_base_patch16_rpn_224",
    "vit_little_patch16_reg1_gap_256",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_xsmall_patch16_clip_224",
    "vit_base_patch16_siglip_224",
    "flexivit_small",
    "beit3_base_patch16_224",
    "aimv2_large_patch14_224",
    "vit_tiny_r_s16_p8_224",
    "vitamin_small_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_ape_224",
    "vit_pe_core_tiny_patch16_384",
    "vit_pe_spatial_tiny_patch16_512",
    "qwen3_vit_88m_enc",
    "qwen3_vit_88m_merge",
]
# Not every timm that we take knows all of them.
NUM_FAMILIES = len(FAMILIES)
FAMILIES = [name for name in FAMILIES if timm.is_model(name)]
# These take most of the time and have nothing that others of the list lack.
LARGE = {
    "vit_base_patch16_18x2_224", "deit3_small_patch16_224", "vit_base_patch16_siglip_224", "aimv2_large_patch14_224",
    "vitamin_small_224", "vit_small_patch16_rope_ape_224", "vit_pe_spatial_tiny_patch16_512", "qwen3_vit_88m_enc",
}  # fmt: skip
each_family = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in FAMILIES]
)
# Their trunk of convolutions is no argument of theirs.
FIXED_DEPTH = {"vitamin_small_224"}


def image_size(name: str) -> int:
    return 112 if "patch14" in name else 128


def build(name: str) -> nn.Module:
    """Two blocks, with weights that make attention more than a mean."""
    torch.manual_seed(0)
    depth = {} if name in FIXED_DEPTH else {"depth": 2}
    model = timm.create_model(name, img_size=image_size(name), **depth).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 2
            elif parameter.ndim == 1 and parameter.abs().max() < 1e-3:
                parameter.normal_(std=0.5)
    return model


@pytest.mark.skipif(timm.__version__ != "1.0.31", reason="names are those of timm 1.0.31")
def test_no_name_is_misspelt() -> None:
    assert len(FAMILIES) == NUM_FAMILIES


@each_family
@torch.no_grad()
def test_exact_everywhere_a_converted_model_is_the_softmax_model(name: str) -> None:
    model, size = build(name), image_size(name)
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = model.forward_features(x)
    attentions = sum(isinstance(module, CONVERTIBLE) for module in model.modules())
    # Windows of the whole grid; then sinks alone, as many as there are patches.
    for options in ({"window_size": 16, "num_sinks": 0}, {"window_size": 0, "num_sinks": 256}):
        converted = perf_vit.linearize(model, max_exact_tokens=0, **options)
        assert sum(isinstance(module, LinearizedAttention) for module in converted.modules()) == attentions > 0
        torch.testing.assert_close(converted.forward_features(x), expected, rtol=1e-4, atol=1e-4)
    # What is compared depends on attention at all.
    performer = perf_vit.linearize(model, "performer", num_features=32)
    assert not torch.allclose(performer.forward_features(x), expected, rtol=1e-3, atol=1e-3)


@each_family
@torch.no_grad()
def test_a_converted_model_is_saved_and_loaded(name: str, tmp_path) -> None:
    options = {"max_exact_tokens": 0, "window_size": 4, "num_sinks": 3, "num_clusters": 5}
    model, size = perf_vit.linearize(build(name), **options), image_size(name)
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    loaded = perf_vit.conversion.load_converted(perf_vit.save_converted(model, tmp_path / "saved"))
    assert torch.equal(loaded.forward_features(x), model.forward_features(x))


def test_what_has_no_one_grid_is_converted_but_not_saved(tmp_path) -> None:
    model = perf_vit.linearize(timm.create_model("mobilevit_xxs"), "performer", num_features=32)
    with pytest.raises(ValueError, match="with one grid of patches to save, got mobilevit_xxs; save its state_dict"):
        perf_vit.save_converted(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
@torch.no_grad()
def test_clusters_compile_as_one_graph(name: str) -> None:
    options = {"max_exact_tokens": 0, "window_size": 3, "num_sinks": 4, "num_clusters": 5}
    model, size = perf_vit.linearize(build(name), **options), image_size(name)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    with torch.enable_grad():
        found, expected = (
            torch.autograd.grad(each(x).square().sum(), list(model.parameters())) for each in (compiled, model)
        )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def test_pooling_by_attention_stays_softmax() -> None:
    model = perf_vit.linearize(build("vit_base_patch16_siglip_224"))
    assert type(model.attn_pool).__name__ == "AttentionPoolLatent"
    assert all(isinstance(block.attn, LinearizedAttention) for block in model.blocks)
