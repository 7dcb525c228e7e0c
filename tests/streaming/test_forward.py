"""A forward pass over parts of an image equals that over the whole image."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from lively import sharpened
from streamed_models import MODELS, Image, build, build_for, holes, streamed
from torch import nn

import perf_vit
from perf_vit.errors import CheckpointError, InputError, OptionError
from perf_vit.streaming import ImageTokens, TokenLayout, check_streamable


def check(model: nn.Module, image: Image, patch: int, *, rtol: float = 1e-9, **options) -> None:
    """Compare the tokens after the last norm, and after block 1, with those of the model."""
    pixels, valid = image.whole(patch)
    prefix = torch.ones(model.num_prefix_tokens, dtype=torch.bool)
    mask = torch.cat([prefix, valid.flatten()])
    with torch.inference_mode():
        masked = {} if mask.all() else {"attn_mask": mask[None, None, None]}
        dtype = model.patch_embed.proj.weight.dtype
        last, (middle,) = model.forward_intermediates(
            pixels.to(dtype), indices=[1], output_fmt="NLC", return_prefix_tokens=False, **masked
        )
    found, (kept,) = streamed(model, image, indices=(1,), **options)
    tokens = torch.cat([found.normed_prefix(), found.norm(found.store.read(slice(0, int(valid.sum()))))])
    for ours, expected in ((tokens, last[0, mask]), (kept.store.read(slice(None)), middle[0, valid.flatten()])):
        assert ours.dtype == expected.dtype
        assert float((ours - expected).norm() / expected.norm()) < rtol


@pytest.mark.parametrize("part_tokens", [1, 40, 10**6])
@pytest.mark.parametrize("with_holes", [False, True], ids=["all valid", "nodata"])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_equal_those_of_the_whole_image(name: str, with_holes: bool, part_tokens: int) -> None:
    model, patch = build_for(name, 203, 311)
    check(model, Image(203, 311, holes(203, 311) if with_holes else None), patch, part_tokens=part_tokens)


@pytest.mark.parametrize("size", [(203, 311), (64, 500), (300, 100)])
def test_resampled_positions_equal_those_of_timm(size: tuple[int, int]) -> None:
    check(build("performer_vit_tiny_patch16_224"), Image(*size), 16, rtol=1e-8, part_tokens=30)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_in_a_file_equal_tokens_in_memory(tmp_path: Path, dtype: str) -> None:
    model = build("performer_vit_tiny_patch16_224").float()
    image = Image(100, 164)
    options = {"dtype": getattr(torch, dtype), "part_tokens": 20}
    inside, _ = streamed(model, image, **options)
    outside, _ = streamed(model, image, folder=tmp_path, **options)
    num = inside.layout.num_tokens
    assert num == 7 * 11
    assert torch.equal(inside.store.read(slice(0, num)), outside.store.read(slice(0, num)))
    assert (tmp_path / "tokens.bin").stat().st_size == num * 32 * outside.store.num_bytes // (num * 32)
    outside.store.remove()
    assert list(tmp_path.iterdir()) == []


def test_float32_tokens_are_close() -> None:
    for name in ("performer", "clustered without sinks", "rope"):
        model_name, options = MODELS[name]
        model = build(model_name, **options).float()
        check(model, Image(203, 311), 8 if "patch8" in model_name else 16, rtol=1e-5, part_tokens=50)


def test_a_linearized_model_equals_the_model_in_memory() -> None:
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_small_patch14_dinov2",
        img_size=98,
        embed_dim=32,
        depth=3,
        num_heads=2,
        num_classes=0,
        dynamic_img_size=True,
    )
    options = {"max_exact_tokens": 0, "num_sinks": 0, "num_clusters": 6}
    linear = perf_vit.linearize(sharpened(vit.double().eval()), mixer="clustered", **options)
    check(linear, Image(210, 301), 14, rtol=1e-8, part_tokens=100)


def test_maps_and_means_leave_out_what_is_invalid() -> None:
    model = build("performer_vit_tiny_patch16_224")
    valid = np.ones((64, 96), bool)
    valid[:32, :48] = False
    found, _ = streamed(model, Image(64, 96, valid), part_tokens=7)
    tokens = found.norm(found.store.read(slice(0, 18)))
    torch.testing.assert_close(found.mean(), tokens.mean(0))
    plane = found.rows(1, 3)
    assert plane.shape == (32, 2, 6)
    assert plane[:, 0, :3].abs().sum() == 0
    torch.testing.assert_close(plane[:, 1], tokens[6:12].mT)
    pooled = model.forward_head(torch.cat([found.normed_prefix(), tokens])[None], pre_logits=True)
    torch.testing.assert_close(found.normed_prefix()[0], pooled[0])


@pytest.mark.parametrize(("name", "num_passes"), [("performer", 5), ("clustered", 7)])
def test_progress_counts_the_rows_of_each_pass(name: str, num_passes: int) -> None:
    """The embedding and each block are a pass; the sums of the first block, or of each clustered block, another."""
    calls: list[tuple[int, int]] = []
    model_name, options = MODELS[name]
    size = 6 * (8 if "patch8" in model_name else 16)
    image = Image(size, size)
    streamed(build(model_name, **options), image, part_tokens=12, on_progress=lambda *call: calls.append(call))
    assert calls[-1] == (6 * num_passes, 6 * num_passes)
    assert calls == sorted(set(calls))
    assert len(calls) > num_passes


def test_models_that_need_all_tokens_are_refused() -> None:
    image = Image(64, 64)
    for model, message in (
        (build("performer_vit_tiny_patch16_224").train(), r"evaluation mode.*call model\.eval\(\)"),
        (build("vit_tiny_patch16_224"), r"block 0 has softmax attention \(Attention\).*perf_vit\.linearize"),
        (build("performer_vit_tiny_patch16_224", attn_kwargs={"local_enhancement": True}), "block 0 has local_enhance"),
    ):
        with pytest.raises(CheckpointError, match=message):
            streamed(model, image)
    large = Image(16 * 129, 16 * 128)
    # Before anything is read.
    large.read = None
    centred = build(MODELS["performer, centred"][0], **MODELS["performer, centred"][1], depth=1)
    with pytest.raises(CheckpointError, match="block 0 can't run over an image in parts: mixer='performer' with these"):
        streamed(centred, large)
    with pytest.raises(ValueError, match="plain ViT with timm's PatchEmbed, got ResNet"):
        ImageTokens(timm.create_model("resnet18"), image, lambda found: found.pixels)
    with pytest.raises(InputError, match="no valid pixel"):
        streamed(build("performer_vit_tiny_patch16_224"), Image(64, 64, np.zeros((64, 64), bool)))


@pytest.mark.parametrize(
    ("mixer", "options"),
    [
        ("clustered", {"max_exact_tokens": 0, "num_sinks": 8}),
        ("clustered", {"max_exact_tokens": 10**6, "num_sinks": 0}),
        ("performer", {"center": True}),
        ("performer", {"balance": True}),
        ("performer", {"kernel": "oprf"}),
    ],
)
def test_options_that_need_all_tokens_are_refused_in_large_images(mixer: str, options: dict) -> None:
    model = build(f"{mixer}_vit_tiny_patch16_224", depth=1, attn_kwargs=options)
    check_streamable(model, (128, 128))
    with pytest.raises(CheckpointError) as refused:
        check_streamable(model, (128, 129))
    assert str(refused.value) == (
        f"block 0 can't run over an image in parts: mixer='{mixer}' with these options needs all tokens at once, which "
        "is possible up to 16,384 tokens, got 128 x 129; in larger images 'clustered' needs num_sinks=0 and a smaller "
        "max_exact_tokens, 'performer' center=False, balance=False and a kernel other than 'oprf'"
    )


def test_other_prefixes_and_bands_are_refused() -> None:
    image = Image(64, 64)
    with pytest.raises(ValueError, match="VisionTransformerDistilled has prefix tokens other than class and register"):
        ImageTokens(timm.create_model("deit_tiny_distilled_patch16_224"), image, lambda found: found.pixels)
    image.num_bands = 4
    with pytest.raises(InputError, match=r"the model takes 3 bands, image has 4; choose bands with spec="):
        streamed(build("performer_vit_tiny_patch16_224"), image)


def test_rows_that_a_process_does_not_have_are_refused() -> None:
    found, _ = streamed(build("performer_vit_tiny_patch16_224"), Image(64, 96))
    for first, stop in ((-1, 2), (0, 5), (2, 2)):
        with pytest.raises(
            OptionError, match=f"rows must be within 0 to 4, which this process has, got {first} to {stop}"
        ):
            found.rows(first, stop)
    stripe = replace(found, layout=TokenLayout(found.layout.valid, 2, 4))
    with pytest.raises(OptionError, match="rows must be within 2 to 4"):
        stripe.rows(0, 4)
    assert stripe.rows(2, 4).shape == (32, 2, 6)
