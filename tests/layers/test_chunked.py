import pickle

import pytest
import timm
import torch
from lively import sharpened
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint

import perf_vit
from perf_vit.layers import LinearizedAttention, chunked
from perf_vit.layers.chunked import chunk_modules, to_chunked

MODELS = {
    "vit_small_patch14_reg4_dinov2": Block,
    "eva02_tiny_patch14_224": EvaBlock,
    "vit_small_patch16_dinov3": EvaBlock,
    "vit_small_patch16_rope_224": EvaBlock,
}


def build(name: str, mixer: str = "clustered") -> torch.nn.Module:
    torch.manual_seed(0)
    kwargs = {"depth": 3, "embed_dim": 96, "num_heads": 3, "num_classes": 5, "dynamic_img_size": True, "patch_size": 16}
    kwargs["img_size"] = 112
    model = sharpened(timm.create_model(name, **kwargs).eval(), 0.5)
    options = {"max_exact_tokens": 0, "window_size": 3, "num_sinks": 4} if mixer == "clustered" else {}
    return perf_vit.linearize(model, mixer, **options)


def images(height: int = 112, width: int = 112, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """Chunks of 10 tokens; how many tokens each projection after an attention got."""
    monkeypatch.setattr(chunked, "_BLOCK_TOKENS", 10)
    seen: list[int] = []
    finish = LinearizedAttention.finish
    monkeypatch.setattr(
        LinearizedAttention,
        "finish",
        lambda self, x, *gate: seen.append(x[..., 0].numel()) or finish(self, x, *gate),
    )
    return seen


@pytest.mark.parametrize("mixer", ["clustered", "performer"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_chunks_change_rounding_alone(name: str, mixer: str, sizes, monkeypatch) -> None:
    model = build(name, mixer)
    assert all(isinstance(block, MODELS[name]) for block in model.blocks)
    for batch, width in ((1, 112), (3, 128)):
        x = images(width=width, batch=batch)
        monkeypatch.setattr(chunked, "_BLOCK_TOKENS", 10)
        sizes.clear()
        to_chunked = model(x)
        assert max(sizes) <= 10
        monkeypatch.setattr(chunked, "_BLOCK_TOKENS", 10**6)
        torch.testing.assert_close(to_chunked, model(x), rtol=1e-4, atol=1e-5)
        assert max(sizes) > 10


@torch.no_grad()
def test_blocks_keep_their_parts_hooks_and_names() -> None:
    model = timm.create_model("vit_small_patch14_reg4_dinov2", depth=2, embed_dim=96, num_heads=3, img_size=112).eval()
    calls = []
    model.blocks[1].register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    converted = perf_vit.linearize(model)
    assert list(converted.state_dict()) == list(model.state_dict())
    assert type(model.blocks[0]) is Block
    assert type(converted.blocks[0]) is not Block
    converted(images())
    assert calls == [(2, 69, 96)]
    again = pickle.loads(pickle.dumps(perf_vit.linearize(build_softmax())))
    assert isinstance(again.blocks[0].mlp, Mlp)


def build_softmax() -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64).eval()


def test_another_attention_and_another_forward_are_called(sizes) -> None:
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
    "forward with options": lambda part: part.register_forward_hook(lambda *_: None, with_kwargs=True),
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


MLPS = {"mlp": Mlp(8, 24), "glu": GluMlp(8, 24), "swiglu": SwiGLU(8, 24)}


class Sizes(nn.Module):
    """An activation that writes down how many tokens it saw."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act, self.seen = act, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.shape[1])
        return self.act(x)


@pytest.mark.parametrize("name", MLPS)
@pytest.mark.parametrize("length", [1, 2048, 2049, 5001])
def test_chunks_of_an_mlp_change_nothing_but_the_size_of_the_hidden_layer(name: str, length: int) -> None:
    whole, chunked = MLPS[name].eval(), to_chunked(pickle.loads(pickle.dumps(MLPS[name])).eval())
    x = torch.randn(2, length, 8, generator=torch.Generator().manual_seed(length))
    chunked.act = Sizes(chunked.act)
    with torch.no_grad():
        torch.testing.assert_close(chunked(x), whole(x))
    assert sum(chunked.act.seen) == length
    assert max(chunked.act.seen) <= 2048


def test_it_is_still_the_same_kind_of_module_with_the_same_names() -> None:
    model = nn.Sequential(Mlp(8), nn.Linear(8, 8))
    names = list(model.state_dict())
    chunk_modules(model)
    assert isinstance(model[0], Mlp)
    assert list(model.state_dict()) == names
    assert type(model[1]) is nn.Linear


def test_gradients_take_the_whole_layer_at_once() -> None:
    mlp = Mlp(8)
    expected = torch.autograd.grad(mlp(torch.ones(1, 3000, 8)).sum(), mlp.fc1.weight)[0]
    mlp = to_chunked(mlp)
    actual = torch.autograd.grad(mlp(torch.ones(1, 3000, 8)).sum(), mlp.fc1.weight)[0]
    assert torch.equal(actual, expected)


WATCHERS = {
    "forward pre-hook of a layer": lambda mlp: mlp.fc1.register_forward_pre_hook(lambda *_: None),
    "forward hook of a layer": lambda mlp: mlp.act.register_forward_hook(lambda *_: None),
    "forward hook with options": lambda mlp: mlp.fc2.register_forward_hook(lambda *_: None, with_kwargs=True),
}


@pytest.mark.parametrize("name", MLPS)
@pytest.mark.parametrize("watcher", WATCHERS)
def test_whoever_watches_a_part_sees_all_tokens_at_once(watcher: str, name: str) -> None:
    mlp = pickle.loads(pickle.dumps(MLPS[name])).eval()
    if name == "swiglu":
        # The name of the first layer in the others; the module is one of its own anyway.
        mlp.fc1 = mlp.fc1_g
    mlp = to_chunked(mlp)
    mlp.act = Sizes(mlp.act)
    WATCHERS[watcher](mlp)
    with torch.no_grad():
        mlp(torch.ones(1, 3000, 8))
    assert mlp.act.seen == [3000]


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_of_a_checkpoint_is_that_of_its_second_pass(reentrant: bool) -> None:
    torch.manual_seed(0)
    whole = Mlp(8, 24, drop=0.5).train()
    chunked = pickle.loads(pickle.dumps(whole))
    chunked = to_chunked(chunked)
    outputs = []
    for mlp in (whole, chunked):
        torch.manual_seed(0)
        x = torch.ones(1, 3000, 8, requires_grad=True)
        out = checkpoint(mlp, x, use_reentrant=reentrant)
        out.sum().backward()
        outputs.append((out.detach(), x.grad))
    assert all(torch.equal(expected, got) for expected, got in zip(*outputs, strict=True))
