"""Local enhancement: a depth-wise convolution of the values, beside attention of every kind."""

import pytest
import timm
import torch
from lively import sharpened
from timm.layers import Attention
from torch import nn

import perf_vit
from perf_vit.layers import LinearizedAttention, PerformerOptions
from perf_vit.layers.linearized_attention import LocalEnhancement
from perf_vit.layers.token_grid import TokenGrid

GRID = (3, 5)
NAMES = ["performer_vit_tiny_patch16_224", "clustered_vit_tiny_patch16_224", "performer_vit_rope_small_patch16_224"]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def enhancement(dim: int = 8) -> LocalEnhancement:
    grid = TokenGrid()
    grid.size = GRID
    module = LocalEnhancement(dim, grid, dtype=torch.float64)
    for seed, parameter in enumerate(module.parameters()):
        parameter.data.copy_(normal(*parameter.shape, seed=seed))
    return module


def naive(v: torch.Tensor, module: LocalEnhancement, num_prefix_tokens: int) -> torch.Tensor:
    """Sum over the neighbours of every token, channel by channel."""
    out = torch.zeros_like(v)
    head_dim = v.shape[-1]
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            place = num_prefix_tokens + row * GRID[1] + column
            for head in range(v.shape[1]):
                channels = slice(head * head_dim, (head + 1) * head_dim)
                out[:, head, place] += module.bias[channels]
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        y, x = row + dy, column + dx
                        if 0 <= y < GRID[0] and 0 <= x < GRID[1]:
                            weight = module.weight[channels, 0, dy + 1, dx + 1]
                            out[:, head, place] += weight * v[:, head, num_prefix_tokens + y * GRID[1] + x]
    return out


@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 5])
def test_values_and_gradients_are_those_of_the_sum_over_neighbours(num_prefix_tokens: int) -> None:
    module = enhancement()
    v = normal(2, 2, num_prefix_tokens + 15, 4, seed=3).requires_grad_()
    results = []
    for out in (module(v, num_prefix_tokens), naive(v, module, num_prefix_tokens)):
        grads = torch.autograd.grad((out * normal(*out.shape, seed=4)).sum(), [v, module.weight, module.bias])
        results.append([out, *grads])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)
    assert not results[0][0][:, :, :num_prefix_tokens].any()


def test_masked_values_count_as_zeros() -> None:
    module, v = enhancement(), normal(2, 2, 16, 4)
    mask = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) > 0.3
    poisoned = v.masked_fill(~mask[:, None, :, None], float("nan"))
    expected = naive(v * mask[:, None, :, None], module, 1)
    torch.testing.assert_close(module(poisoned, 1, mask[:, None, None, :]), expected)


def test_what_it_cannot_do_is_named() -> None:
    module, v = enhancement(), normal(2, 2, 16, 4)
    with pytest.raises(ValueError, match="is_causal=True needs local_enhancement=False"):
        module(v, 1, is_causal=True)
    with pytest.raises(ValueError, match="attn_mask must be bool"):
        module(v, 1, torch.zeros(16, 16))
    with pytest.raises(ValueError, match=r"grid of 14 patch tokens, got \(3, 5\)"):
        module(v, 2)


def test_it_is_added_to_what_a_layer_puts_out_before_the_projection() -> None:
    torch.manual_seed(0)
    attention = Attention(32, num_heads=4).double()
    plain, enhanced = (
        LinearizedAttention(attention, PerformerOptions(local_enhancement=local, num_prefix_tokens=1), TokenGrid())
        for local in (False, True)
    )
    enhanced.load_state_dict(plain.state_dict(), strict=False)
    enhanced.grid.size = GRID
    x = normal(2, 16, 32)
    assert torch.equal(enhanced(x), plain(x))
    local = enhancement(32)
    enhanced.local_enhancement.load_state_dict(local.state_dict())
    v = enhanced.qkv(x).reshape(2, 16, 3, 4, 8).permute(2, 0, 3, 1, 4)[2]
    added = naive(v, local, 1).transpose(1, 2).flatten(2) @ enhanced.proj.weight.mT
    torch.testing.assert_close(enhanced(x), plain(x) + added)
    assert plain.local_enhancement is None


def build(name: str, model_seed: int = 0, **attn_kwargs) -> nn.Module:
    torch.manual_seed(model_seed)
    model = timm.create_model(name, depth=2, num_classes=7, img_size=64, dynamic_img_size=True, attn_kwargs=attn_kwargs)
    return sharpened(model.eval())


def images(height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_gains_parameters_that_change_nothing_at_first(name: str, tmp_path) -> None:
    plain, enhanced = build(name), build(name, model_seed=3, local_enhancement=True)
    added = set(enhanced.state_dict()) - set(plain.state_dict())
    assert added == {f"blocks.{i}.attn.local_enhancement.{key}" for i in (0, 1) for key in ("weight", "bias")}
    path = tmp_path / "plain.pth"
    torch.save(plain.state_dict(), path)
    loaded = timm.create_model(
        name,
        depth=2,
        img_size=64,
        dynamic_img_size=True,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path), "num_classes": 7},
        attn_kwargs={"local_enhancement": True},
    ).eval()
    assert torch.equal(loaded(images()), plain(images()))
    torch.save(enhanced.state_dict(), path)
    loaded.load_state_dict(torch.load(path), strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_grid_of_each_image_is_taken_and_every_parameter_learns(name: str) -> None:
    model = build(name, local_enhancement=True)
    for block in model.blocks:
        nn.init.normal_(block.attn.local_enhancement.weight)
    for key, parameter in model.named_parameters():
        if "gamma" in key:
            nn.init.ones_(parameter)
    shapes = []
    for size in ((64, 64), (32, 160), (160, 32)):
        # Of all tokens: the class token alone sees nothing of what the last block adds to the others.
        features = model.forward_features(images(*size))
        (features * normal(*features.shape).float()).sum().backward()
        shapes.append(model.blocks[1].attn.local_enhancement.grid.size)
        for block in model.blocks:
            assert all(p.grad.isfinite().all() and p.grad.any() for p in block.attn.local_enhancement.parameters())
    assert shapes == [(4, 4), (2, 10), (10, 2)]


@torch.no_grad()
def test_a_converted_layer_adds_it_too() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, num_classes=5).eval()
    converted = perf_vit.linearize(model, max_exact_tokens=0, window_size=8, num_sinks=0, local_enhancement=True)
    assert isinstance(model.blocks[0].attn, Attention)
    torch.testing.assert_close(converted(images()), model(images()), rtol=1e-4, atol=1e-4)
    local = converted.blocks[0].attn.local_enhancement
    nn.init.normal_(local.weight)
    x, before = normal(2, 17, 192).float(), model.blocks[0].attn
    v = before.qkv(x).reshape(2, 17, 3, 3, 64).permute(2, 0, 3, 1, 4)[2]
    added = local(v, 1).transpose(1, 2).flatten(2) @ before.proj.weight.mT
    torch.testing.assert_close(converted.blocks[0].attn(x), before(x) + added, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_maps_of_hct_take_it() -> None:
    torch.manual_seed(0)
    model = timm.create_model("hct_base", attn_kwargs={"local_enhancement": True}, depths=(1, 1, 1, 1, 1)).eval()
    torch.manual_seed(0)
    plain = timm.create_model("hct_base", depths=(1, 1, 1, 1, 1)).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    x = images(256, 384)
    assert torch.equal(model(x), plain(x))
    for module in model.modules():
        if isinstance(module, LocalEnhancement):
            nn.init.normal_(module.weight)
    assert not torch.allclose(model(x), plain(x))
