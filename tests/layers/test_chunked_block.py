import pytest
import timm
import torch
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch.nn.utils import parametrize

import perf_vit
from perf_vit.layers import chunked_block
from perf_vit.layers.converted_attention import ConvertedAttention

MODELS = {
    "vit_small_patch14_reg4_dinov2": Block,
    "eva02_tiny_patch14_224": EvaBlock,
    "vit_small_patch16_dinov3": EvaBlock,
    "vit_small_patch16_rope_224": EvaBlock,
}


def build(name: str, attention: str = "clustered") -> torch.nn.Module:
    torch.manual_seed(0)
    kwargs = {"depth": 3, "embed_dim": 96, "num_heads": 3, "num_classes": 5, "dynamic_img_size": True, "patch_size": 16}
    kwargs["img_size"] = 112
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "gamma" in parameter_name:
                parameter.fill_(0.5)
    return perf_vit.performerize(model, attention)


def images(height: int = 112, width: int = 112, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """Chunks of 10 tokens; how many tokens each projection after an attention got."""
    monkeypatch.setattr(chunked_block, "_CHUNK_TOKENS", 10)
    seen: list[int] = []
    finish = ConvertedAttention.finish
    monkeypatch.setattr(
        ConvertedAttention,
        "finish",
        lambda self, x, *gate: seen.append(x[..., 0].numel()) or finish(self, x, *gate),
    )
    return seen


@pytest.mark.parametrize("attention", ["clustered", "scatterbrain", "performer"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_chunks_change_rounding_alone(name: str, attention: str, sizes, monkeypatch) -> None:
    model = build(name, attention)
    assert all(isinstance(block, MODELS[name]) for block in model.blocks)
    for batch, width in ((1, 112), (3, 128)):
        x = images(width=width, batch=batch)
        monkeypatch.setattr(chunked_block, "_CHUNK_TOKENS", 10)
        sizes.clear()
        chunked = model(x)
        assert max(sizes) <= 10
        monkeypatch.setattr(chunked_block, "_CHUNK_TOKENS", 10**6)
        torch.testing.assert_close(chunked, model(x), rtol=1e-4, atol=1e-5)
        assert max(sizes) > 10


@torch.no_grad()
def test_memory_goes_along_with_the_tokens_and_ends_with_the_blocks(sizes, monkeypatch) -> None:
    model = build("vit_small_patch14_reg4_dinov2")
    places = []
    unpack = ConvertedAttention.unpack
    monkeypatch.setattr(
        ConvertedAttention, "unpack", lambda self, x, rope: places.append(x.data_ptr()) or unpack(self, x, rope)
    )
    expected = model(images())
    assert len(places) == 3
    assert len(set(places)) == 1
    states = model.forward_intermediates(images(), output_fmt="NLC", intermediates_only=True)
    copies = [state.clone() for state in states]
    assert torch.equal(model(images()), expected)
    assert all(torch.equal(state, copy) for state, copy in zip(states, copies, strict=True))
    model.blocks(torch.randn(1, 54, 96))
    assert not chunked_block._handed_on.memory


@torch.no_grad()
def test_memory_is_let_go_with_the_tokens_and_is_no_part_of_them(sizes) -> None:
    first, second, _ = build("vit_small_patch14_reg4_dinov2").blocks
    first.attn.grid.size = (7, 7)
    tokens = torch.randn(1, 54, 96)
    out = first(tokens)
    assert len(chunked_block._handed_on.memory) == 1
    assert not vars(out)
    expected = second(out.clone())
    assert not chunked_block._handed_on.memory or chunked_block._handed_on.tokens() is not out
    assert torch.equal(second(first(tokens)), expected)
    held = first(tokens)
    del held, out
    assert not chunked_block._handed_on.memory


def test_another_attention_another_forward_and_hooks_on_all_modules_are_called(sizes) -> None:
    model, calls = build("vit_small_patch14_reg4_dinov2"), []
    softmax = timm.create_model(
        "vit_small_patch14_reg4_dinov2", depth=1, embed_dim=96, num_heads=3, img_size=112, patch_size=16
    )
    model.blocks[0].attn = softmax.blocks[0].attn
    forward = model.blocks[1].attn.forward
    model.blocks[1].attn.forward = lambda *args, **kwargs: calls.append("forward") or forward(*args, **kwargs)
    with torch.no_grad():
        model(images())
        assert calls == ["forward"]
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, *_: calls.append(type(module).__name__)
        )
        model(images())
        handle.remove()
    assert calls.count("ConvertedAttention") == 2


def test_gradients_training_and_hooks_take_whole_blocks(sizes) -> None:
    model, whole = build("vit_small_patch14_reg4_dinov2"), 2 * 54
    model(images())
    assert set(sizes) == {whole}
    sizes.clear()
    with torch.no_grad():
        model.train()(images())
        assert set(sizes) == {whole}
        seen = []
        model.eval().blocks[1].attn.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
        sizes.clear()
        model(images())
    assert seen == [(2, 54, 96)]
    assert sizes.count(whole) == 1


HOOKS = {
    "forward": lambda part: part.register_forward_hook(lambda *_: None),
    "forward pre": lambda part: part.register_forward_pre_hook(lambda *_: None),
    "backward": lambda part: part.register_full_backward_hook(lambda *_: None),
    "backward pre": lambda part: part.register_full_backward_pre_hook(lambda *_: None),
    "parametrization": lambda part: parametrize.register_parametrization(part, "weight", torch.nn.Identity()),
}


@pytest.mark.parametrize("part", ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"])
@pytest.mark.parametrize("hook", HOOKS)
@torch.no_grad()
def test_a_hook_on_any_part_takes_whole_blocks(hook: str, part: str, sizes) -> None:
    model, whole = build("vit_small_patch14_reg4_dinov2"), 2 * 54
    HOOKS[hook](model.blocks[1].get_submodule(part))
    model(images())
    # The two other blocks go in chunks.
    assert sizes.count(whole) == 1
    assert max(size for size in sizes if size != whole) <= 10
