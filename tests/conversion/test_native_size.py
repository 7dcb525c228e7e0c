"""`native_size`: windows of the pretraining's size in most layers, and positions that repeat in each window."""

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
from lively import sharpened
from streamed_models import Image, holes, streamed
from torch import nn

import perf_vit
from perf_vit.conversion import load_converted
from perf_vit.conversion.linearize import converted_layers, find_vit, max_exact_side
from perf_vit.conversion.native_size import native_size_of
from perf_vit.models.backbone import BackboneConfig, build_backbone
from perf_vit.ops.naive_mixers import naive_window_attention
from perf_vit.streaming import check_streamable
from perf_vit.streaming.forward import rows_of_windows, window_heights

NAME, NATIVE, PATCH = "vit_tiny_patch16_224", 4, 16
# Larger than any image here, so that layers that see all are softmax attention.
EXACT = {"max_exact_tokens": 10**6}
GRIDS = [(4, 4), (3, 2), (5, 7), (8, 8), (9, 1), (1, 13)]


def build(**options) -> nn.Module:
    torch.manual_seed(0)
    size = {"depth": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 3, "img_size": NATIVE * PATCH}
    return sharpened(timm.create_model(NAME, **{**size, **options}).double().eval())


def image(grid: tuple[int, int], batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, grid[0] * PATCH, grid[1] * PATCH, generator=generator, dtype=torch.float64)


def naive(model: nn.Module, x: torch.Tensor, see_all: tuple[int, ...], mask: torch.Tensor | None) -> torch.Tensor:
    """Final tokens: positions picked patch by patch, and attention as N x N matrices with masks."""
    rows, columns = x.shape[2] // PATCH, x.shape[3] // PATCH
    high, wide = (-(-side // -(-side // NATIVE)) for side in (rows, columns))
    prefix = model.num_prefix_tokens
    learned = 0 if model.no_embed_class else prefix
    table = model.pos_embed[:, learned:].unflatten(1, (NATIVE, NATIVE)).permute(0, 3, 1, 2)
    if (high, wide) != (NATIVE, NATIVE):
        # timm resamples in float32.
        table = nn.functional.interpolate(table.float(), (high, wide), mode="bicubic", antialias=True).double()
    positions = [table[0, :, row % high, column % wide] for row in range(rows) for column in range(columns)]
    patches = model.patch_embed.proj(x).flatten(2).mT + torch.stack(positions)
    first = torch.cat([token for token in (model.cls_token, model.reg_token) if token is not None], dim=1)
    tokens = torch.cat(
        [(first + model.pos_embed[:, :learned] if learned else first).expand(len(x), -1, -1), patches], 1
    )
    for index, block in enumerate(model.blocks):
        packed = block.attn.qkv(block.norm1(tokens)).unflatten(2, (3, block.attn.num_heads, -1))
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        side = max(rows, columns) if index in see_all else NATIVE
        seen = naive_window_attention(q, k, v, (rows, columns), side, prefix, to_prefix=True, key_mask=mask)
        tokens = tokens + block.attn.proj(seen.transpose(1, 2).flatten(2))
        tokens = tokens + block.mlp(block.norm2(tokens))
    return model.norm(tokens)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2, "no_embed_class": True}], ids=["class", "registers"])
@pytest.mark.parametrize("grid", GRIDS)
def test_values_and_gradients_equal_a_naive_reference(grid, options, masked) -> None:
    model = build(**options)
    converted = perf_vit.linearize(model, layers=[1, 3], native_size=NATIVE, **EXACT)
    mask = torch.rand(2, model.num_prefix_tokens + grid[0] * grid[1], generator=torch.Generator().manual_seed(2)) > 0.3
    mask[:, : model.num_prefix_tokens] = True
    mask = mask if masked else None
    results = []
    for network, forward in (
        (converted, lambda x: converted.forward_features(x, attn_mask=None if mask is None else mask[:, None, None])),
        (model, lambda x: naive(model, x, (1, 3), mask)),
    ):
        x = image(grid).requires_grad_()
        tokens = forward(x)
        tokens.square().mean().backward()
        results.append((tokens, x.grad, *(parameter.grad for parameter in network.parameters())))
    for ours, expected in zip(*results, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(4, 4), (3, 4), (2, 1)])
def test_images_of_up_to_the_native_size_give_the_softmax_model(grid) -> None:
    model = build(dynamic_img_size=True)
    converted = perf_vit.linearize(model, native_size=NATIVE)
    torch.testing.assert_close(converted(image(grid)), model(image(grid)), rtol=1e-9, atol=1e-9)
    assert max_exact_side(converted) == NATIVE


@torch.no_grad()
def test_without_layers_that_see_all_tokens_are_those_of_windows_apart() -> None:
    model = build(class_token=False, global_pool="avg")
    converted = perf_vit.linearize(model, layers=[], native_size=NATIVE)
    x, side = image((8, 12)), NATIVE * PATCH
    tokens = converted.forward_features(x).unflatten(1, (2, NATIVE, 3, NATIVE))
    for row in range(2):
        for column in range(3):
            own = model.forward_features(x[:, :, row * side :, column * side :][:, :, :side, :side])
            torch.testing.assert_close(tokens[:, row, :, column].flatten(1, 2), own, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("layers", "see_all"), [(None, []), ([], []), ([2], [2]), ([0, 1, 2, 3], [0, 1, 2, 3])])
def test_layers_name_those_that_see_the_whole_image(layers, see_all) -> None:
    converted = perf_vit.linearize(build(), layers=layers, native_size=NATIVE, num_clusters=5)
    mixers = {index: layer.mixer.name for index, layer in converted_layers(converted).items()}
    assert mixers == {index: "clustered" if index in see_all else "registers" for index in range(4)}
    assert all(converted_layers(converted)[index].options.num_clusters == 5 for index in see_all)


def test_options_of_one_layer_keep_its_native_windows_unless_they_name_a_mixer() -> None:
    per_layer = {0: {"window_size": 2}, 1: {"mixer": "windowed"}, 3: {"window_size": 3}}
    converted = perf_vit.linearize(build(), layers=[3], per_layer=per_layer, native_size=NATIVE)
    mixers = [layer.mixer.name for layer in converted_layers(converted).values()]
    assert mixers == ["registers", "windowed", "registers", "clustered"]
    sizes = {index: layer.options.window_size for index, layer in converted_layers(converted).items()}
    assert (sizes[0], sizes[2], sizes[3]) == (2, NATIVE, 3)


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["registers", "windowed"])
@pytest.mark.parametrize("part_tokens", [1, 40, 10**6])
@pytest.mark.parametrize("valid", [None, holes(203, 311)], ids=["all valid", "nodata"])
def test_tokens_of_an_image_in_parts_equal_those_of_the_whole_image(valid, part_tokens, mixer) -> None:
    clusters = {"max_exact_tokens": 0, "num_sinks": 0, "num_clusters": 6, "window_size": 3}
    per_layer = {2: {"mixer": mixer, "window_size": 5}}
    model = perf_vit.linearize(build(), layers=[1], per_layer=per_layer, native_size=NATIVE, **clusters)
    scene = Image(203, 311, valid)
    pixels, counted = scene.whole(PATCH)
    mask = torch.cat([torch.ones(1, dtype=torch.bool), counted.flatten()])
    expected = model.forward_features(pixels, attn_mask=mask[None, None, None])[0, mask]
    found, _ = streamed(model, scene, part_tokens=part_tokens)
    tokens = torch.cat([found.normed_prefix(), found.norm(found.store.read(slice(0, int(counted.sum()))))])
    assert float((tokens - expected).norm() / expected.norm()) < 1e-8
    check_streamable(model, (10**4, 10**4))
    # Stripes of several processes end where windows of all blocks do; parts of one need not.
    assert (rows_of_windows(model.blocks, (13, 20)), window_heights(model.blocks, (13, 20))) == (60, {4, 3, 5})


@torch.no_grad()
def test_a_saved_model_comes_back_whatever_the_size_it_is_loaded_for(tmp_path) -> None:
    model = build().float()
    converted = perf_vit.linearize(model, layers=[3], native_size=NATIVE, num_clusters=3, max_exact_tokens=0)
    folder = perf_vit.save_converted(converted, tmp_path / "saved")
    assert json.loads((folder / "config.json").read_text())["perf_vit"]["conversion"]["native_size"] == NATIVE
    x = image((5, 9)).float()
    expected = converted(x)
    for options in ({}, {"img_size": 144}, {"img_size": (80, 144), "dynamic_img_size": True}):
        loaded = load_converted(folder, **options)
        assert native_size_of(loaded) == NATIVE
        assert torch.equal(loaded.pos_embed, model.pos_embed)
        assert torch.equal(loaded(x), expected)
    maps = load_converted(folder, features_only=True, out_indices=(1, 3), img_size=144)(x)
    middle, last = converted.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
    assert torch.equal(maps[0], middle)
    assert torch.equal(maps[1], last)
    backbone, config = build_backbone(BackboneConfig(backbone=str(folder)), (1, 3), 3, 144)
    assert torch.equal(backbone.eval()(x)[1], last)
    # A checkpoint's network is built from the config alone.
    again, _ = build_backbone(BackboneConfig(backbone="gone"), (1, 3), 3, 96, config)
    again.load_state_dict(backbone.state_dict())
    assert torch.equal(again.eval()(x)[1], last)
    again_saved = perf_vit.save_converted(load_converted(folder, img_size=144), tmp_path / "again")
    assert torch.equal(load_converted(again_saved)(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("patch", [8, 20])
def test_a_saved_model_takes_another_size_of_patches_and_keeps_its_positions(patch, tmp_path) -> None:
    converted = perf_vit.linearize(build().float(), layers=[3], native_size=NATIVE, **EXACT)
    folder = perf_vit.save_converted(converted, tmp_path / "saved")
    backbone, config = build_backbone(BackboneConfig(backbone=str(folder), patch_size=patch), (1, 3), 3, 160)
    assert torch.equal(find_vit(backbone).pos_embed, converted.pos_embed)
    assert find_vit(backbone).patch_embed.proj.weight.shape[-2:] == (patch, patch)
    again, _ = build_backbone(BackboneConfig(backbone="gone", patch_size=patch), (1, 3), 3, 160, config)
    again.load_state_dict(backbone.state_dict())
    x = image((5, 5)).float()
    expected = backbone.eval()(x)[1]
    assert torch.equal(again.eval()(x)[1], expected)
    # timm resamples the weights of patches in the same way whether before or after conversion.
    converted.set_input_size(img_size=96, patch_size=patch)
    assert torch.equal(converted.pos_embed, find_vit(backbone).pos_embed)
    last = converted.forward_intermediates(x, indices=[3], intermediates_only=True)[0]
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-4)
    load_converted(perf_vit.save_converted(load_converted(folder, patch_size=patch), tmp_path / "again"))


def test_the_image_size_changes_nothing_and_copies_are_independent() -> None:
    converted = perf_vit.linearize(build(), native_size=NATIVE, **EXACT)
    x = image((7, 6))
    expected = converted(x)
    twin = copy.deepcopy(converted)
    twin.set_input_size(img_size=(112, 96))
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin.pos_embed.zero_()
    assert not torch.allclose(twin(x), expected)
    assert torch.equal(converted(x), expected)
    converted.set_grad_checkpointing(True)
    torch.testing.assert_close(converted.train()(x), expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (NAME, {"native_size": 0}, "native_size must be at least 1, got 0"),
        (NAME, {"native_size": 4, "layers": [4]}, "layers must be indices from 0 to 3, got 4"),
        (NAME, {"native_size": 5}, r"native_size=5 needs positions of as many .* got 4 x 4; .* img_size=\(80, 80\)"),
        (
            "vit_small_patch16_dinov3",
            {"native_size": 4},
            "tiles the learned positions of timm's VisionTransformer, got",
        ),
        (
            "deit_tiny_distilled_patch16_224",
            {"native_size": 4},
            "got VisionTransformerDistilled with other ones; leave",
        ),
        ("resnet18", {"native_size": 4}, "expected a model with timm's Attention"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(name, options, message) -> None:
    size = {} if name == "resnet18" else {"img_size": 64, "depth": 4}
    model = build() if name == NAME else timm.create_model(name, **size)
    with pytest.raises(ValueError, match=message) as refused:
        perf_vit.linearize(model, **options)
    assert "\n" not in str(refused.value)


def test_a_folder_of_an_earlier_version_has_no_native_size(tmp_path: Path) -> None:
    folder = perf_vit.save_converted(perf_vit.linearize(build().float()), tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    del config["perf_vit"]["conversion"]["native_size"]
    (folder / "config.json").write_text(json.dumps(config))
    assert native_size_of(load_converted(folder)) is None
