"""Processes that share each tile, as threads here, compute the logits, losses and gradients of one process."""

from copy import deepcopy

import pytest
import timm
import torch
from threaded_processes import in_threads
from timm.layers import Attention
from torch import Tensor, nn

import perf_vit
from perf_vit.errors import ConfigError
from perf_vit.models import SegmentationModelConfig, SegmentationSpec, Segmenter, build_segmenter
from perf_vit.models.heads.parts import Reach
from perf_vit.streaming.stripes import StripedSegmenter, check_striped
from perf_vit.transforms import Normalizer

SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2}
CLUSTERED = {"max_exact_tokens": 0, "num_clusters": 7, "window_size": 3, "num_sinks": 0}
BACKBONES = {
    "performer": ("performer_vit_tiny_patch16_224", {"attn_kwargs": {"num_features": 24}}),
    "performer with registers": (
        "performer_vit_tiny_patch16_224",
        {"attn_kwargs": {"num_features": 24}, "reg_tokens": 4, "no_embed_class": True},
    ),
    "performer without a class token": (
        "performer_vit_tiny_patch16_224",
        {"attn_kwargs": {"num_features": 24, "kernel": "relu"}, "class_token": False, "global_pool": "avg"},
    ),
    "rope": ("performer_vit_rope_small_patch16_224", {"attn_kwargs": {"num_features": 24}}),
    "clustered": ("clustered_vit_tiny_patch8_224", {"attn_kwargs": CLUSTERED}),
    "clustered without windows": ("clustered_vit_tiny_patch8_224", {"attn_kwargs": {**CLUSTERED, "window_size": 0}}),
    "clustered rope": ("clustered_vit_rope_small_patch16_224", {"attn_kwargs": CLUSTERED}),
}

HEADS = {
    "linear": {},
    "upernet": {},
    "full_resolution": {"norm": "group", "channels": [2, 2, 4]},
    "segformer": {"norm": "group", "channels": 8, "drop_rate": 0.0},
}


def build(
    name: str, tile_px: int, head: str = "linear", *, patch: int | None = None, attn: dict | None = None, **options
) -> Segmenter:
    """A segmenter of random weights in float64."""
    torch.manual_seed(0)
    backbone, kwargs = BACKBONES[name]
    more = {} if patch is None else {"patch_size": patch}
    config = SegmentationModelConfig(
        backbone=backbone,
        backbone_kwargs={**SMALL, **kwargs, "attn_kwargs": {**kwargs["attn_kwargs"], **(attn or {})}, **more},
        out_indices=[0, 2],
        head=head,
        head_kwargs=HEADS[head],
        **options,
    )
    spec = SegmentationSpec(classes=("a", "b", "c"), normalizer=Normalizer((0.0,) * 3, (1.0,) * 3), tile_px=tile_px)
    model = build_segmenter(config, spec).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def tiles(size: int, with_holes: bool) -> tuple[Tensor, Tensor | None]:
    """Two tiles; of the second one, more is missing."""
    image = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if not with_holes:
        return image, None
    valid = torch.ones(2, size, size, dtype=torch.bool)
    valid[:, : size // 4, : size // 2] = False
    valid[1, size // 2 :, size // 3 :] = False
    return image, valid


def alone(model: nn.Module, image: Tensor, valid: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    logits = model(image, valid)
    return logits.detach(), torch.autograd.grad((logits * logits.sin()).sum(), list(model.parameters()))


def shared(model: Segmenter, image: Tensor, valid: Tensor | None, number: int) -> tuple[Tensor, list[Tensor], list]:
    """Logits of all stripes, the sum of the gradients of all processes, and the bytes that each sent."""

    def run(processes):
        copy = deepcopy(model)
        striped = StripedSegmenter(copy, processes)
        striped.begin()
        logits = striped.logits(image, valid)
        sent = processes.num_bytes
        gradients = torch.autograd.grad((logits * logits.sin()).sum(), list(copy.parameters()))
        striped.end()
        return logits.detach(), gradients, (sent, processes.num_bytes)

    results = in_threads(run, number)
    gradients = [sum(each) for each in zip(*(each[1] for each in results), strict=True)]
    return torch.cat([each[0] for each in results], dim=2), gradients, [each[2] for each in results]


def assert_equal(model: Segmenter, image: Tensor, valid: Tensor | None, number: int, tolerance: float = 1e-9) -> None:
    expected, gradients = alone(model, image, valid)
    logits, summed, _ = shared(model, image, valid, number)
    assert float((logits - expected).norm() / expected.norm()) < tolerance
    for (name, _), ours, theirs in zip(model.named_parameters(), summed, gradients, strict=True):
        assert float((ours - theirs).norm()) <= tolerance * float(theirs.norm()) + 1e-12, name


@pytest.mark.parametrize("with_holes", [False, True], ids=["all valid", "nodata"])
@pytest.mark.parametrize("name", BACKBONES)
def test_logits_and_gradients_equal_those_of_one_process(name: str, with_holes: bool) -> None:
    size = 80 if "patch8" in BACKBONES[name][0] else 160
    assert_equal(build(name, size), *tiles(size, with_holes), 2)


@pytest.mark.parametrize(
    ("name", "head", "number", "size"),
    [
        ("performer", "full_resolution", 3, 240),
        ("clustered rope", "full_resolution", 2, 192),
        ("rope", "segformer", 2, 256),
    ],
)
def test_heads_see_their_neighbours_rows_and_norms_the_whole_tile(name: str, head: str, number: int, size: int) -> None:
    assert_equal(build(name, size, head), *tiles(size, True), number)


def test_patches_of_14_px_are_cut_where_the_heads_steps_meet() -> None:
    model = build("performer", 224, "full_resolution", patch=14)
    assert_equal(model, *tiles(224, False), 2)


@pytest.mark.parametrize("name", ["performer", "clustered", "rope"])
def test_blocks_that_are_computed_again_give_the_same_gradients(name: str) -> None:
    size = 80 if "patch8" in BACKBONES[name][0] else 160
    assert_equal(build(name, size, grad_checkpointing=True), *tiles(size, True), 2)


@pytest.mark.parametrize("head", ["linear", "full_resolution"])
@pytest.mark.parametrize("name", ["performer", "clustered", "rope"])
def test_float32_is_close(name: str, head: str) -> None:
    size = 96 if "patch8" in BACKBONES[name][0] else 160
    (image, valid), model = tiles(size, True), build(name, size, head).float()
    # The gradient of ReLU jumps where rounding changes the sign of a value, also in one process.
    for module in model.head.modules():
        for child, layer in module.named_children():
            if isinstance(layer, nn.ReLU):
                setattr(module, child, nn.SiLU())
    expected, gradients = alone(model, image.float(), valid)
    logits, summed, _ = shared(model, image.float(), valid, 2)
    assert float((logits - expected).norm() / expected.norm()) < 1e-5
    ours, theirs = (torch.cat([each.flatten() for each in every]) for every in (summed, gradients))
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("name", ["performer", "rope", "clustered"])
def test_traffic_of_blocks_does_not_depend_on_the_size_of_tiles(name: str) -> None:
    """In the forward and in the backward pass; of clusters, the sample grows up to its bound."""
    sent = []
    for size in (48, 96, 192) if name == "clustered" else (64, 128, 256):
        model = build(name, size)
        # Of the head, rows at the edges of stripes cross, as wide as the tile.
        model.head.reach = lambda: Reach(0)
        sent.append(shared(model, *tiles(size, False), 2)[2][0])
    (forward, both) = sent[0]
    blocks, heads, head_dim, features, itemsize, batch = 3, 2, 16, 24, 8, 2
    if name == "clustered":
        lengths = [36, 144, 576]
        growth = [3 * heads * batch * 3 * head_dim * itemsize * (length - lengths[0]) for length in lengths]
        assert sent == [(forward + each, both + 2 * each) for each in growth]
    else:
        numbers = blocks * batch * heads * features * itemsize
        assert forward == numbers * (head_dim + 2)
        assert both == forward + numbers * (head_dim + 1)
        assert sent == [(forward, both)] * 3


def test_whole_tiles_are_computed_after_the_end() -> None:
    model = build("performer", 64, "full_resolution")
    image, _ = tiles(64, False)
    before, state = model(image), set(vars(model.backbone.model))
    in_threads(lambda processes: _begun_and_ended(model, processes), 1)
    assert torch.equal(model(image), before)
    assert set(vars(model.backbone.model)) == state


def test_positions_that_repeat_in_windows_are_cut_and_put_back() -> None:
    torch.manual_seed(0)
    config = SegmentationModelConfig(backbone="vit_tiny_patch16_224", backbone_kwargs=SMALL, head="linear")
    spec = SegmentationSpec(classes=("a", "b"), normalizer=Normalizer((0.0,) * 3, (1.0,) * 3), tile_px=64)
    softmax = build_segmenter(config, spec).double()
    model = perf_vit.linearize(softmax, layers=[0, 1, 2], native_size=4, **CLUSTERED)
    assert_equal(model, *tiles(160, True), 2)
    expected = model(tiles(160, False)[0])
    in_threads(lambda processes: _begun_and_ended(model, processes), 1)
    assert torch.equal(model(tiles(160, False)[0]), expected)


def _begun_and_ended(model: Segmenter, processes) -> None:
    striped = StripedSegmenter(model, processes)
    striped.begin()
    striped.end()


@pytest.mark.parametrize(
    ("name", "head", "change", "message"),
    [
        ("softmax", "linear", None, "attention is made of sums: block 0 has softmax attention"),
        ("clustered", "linear", "sinks", "block 0 can't run over an image in parts"),
        (
            "performer",
            "upernet",
            None,
            "a head that sees a part of a tile, got UPerNetHead; set model.head to full_resolution",
        ),
        ("performer", "full_resolution", "batch", r"got batch norm in head\.\S+; set model.head_kwargs={norm: group}"),
        ("performer", "linear", "dropout", r"without dropout, got 0\.2 in head\.classifiers\.0\.1; set it to 0"),
        ("performer", "linear", "size", r"each of 5 processes 1 times 1 rows of patches, about 80, got 64"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, head: str, change: str | None, message: str) -> None:
    size = 16 * 130 if change == "sinks" else 64
    model = build("performer" if name == "softmax" else name, size, head)
    if name == "softmax":
        model.backbone.model.blocks[0].attn = Attention(32, 2)
    elif change == "sinks":
        model = build(name, size, attn={"num_sinks": 8})
    elif change == "batch":
        model.head.fuse[0][1] = nn.BatchNorm2d(4)
    elif change == "dropout":
        model.head.classifiers[0][1].p = 0.2
    with pytest.raises(ConfigError, match=f"trainer.sequence_parallel needs .*{message}"):
        check_striped(model, size, 5 if change == "size" else 2)


@pytest.mark.parametrize(
    ("mixer", "options"),
    [
        ("clustered", {}),
        ("clustered", {"max_exact_tokens": 0}),
        ("clustered", {"max_exact_tokens": 0, "num_sinks": 4}),
        ("performer", {"center": True}),
        ("performer", {"balance": True}),
        ("performer", {"kernel": "oprf"}),
        *((name, {}) for name in ("linformer", "reformer", "s4", "h3", "windowed", "registers")),
    ],
)
def test_attention_that_needs_all_tokens_of_a_small_tile_is_refused(mixer: str, options: dict) -> None:
    model = build("performer", 64)
    backbone = timm.create_model(
        "performer_vit_tiny_patch16_224", img_size=64, mixer=mixer, attn_kwargs=options, **SMALL
    )
    for block, other in zip(model.backbone.model.blocks, backbone.blocks, strict=True):
        block.attn = other.attn
    with pytest.raises(ConfigError, match=f"made of sums: mixer='{mixer}' of block 0 needs all 4 x 4 tokens"):
        check_striped(model, 64, 2)


def test_a_fitting_network_is_accepted() -> None:
    check_striped(build("performer", 256, "full_resolution"), 256, 2)
    check_striped(build("clustered", 64), 64, 2)
