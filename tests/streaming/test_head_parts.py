"""A head over parts of a streamed image gives the scores of a forward pass of the whole image."""

import pytest
import torch
from streamed_models import Image, holes
from torch import nn

import perf_vit  # noqa: F401  (registers the backbones)
from perf_vit.errors import CheckpointError
from perf_vit.models import SegmentationModelConfig, SegmentationSpec, Segmenter, build_segmenter
from perf_vit.models.heads.parts import reach_of
from perf_vit.streaming import ImageTokens, stream_tokens
from perf_vit.streaming.dense import DenseHead
from perf_vit.transforms import Normalizer
from perf_vit.types import Window

SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2, "init_values": None}
CLUSTERED = {"attn_kwargs": {"max_exact_tokens": 0, "num_clusters": 6, "window_size": 5, "num_sinks": 0}}
BACKBONES = {
    "performer": ("performer_vit_tiny_patch16_224", {"attn_kwargs": {"num_features": 16}}),
    "patches of 14 px": ("performer_vit_tiny_patch16_224", {"patch_size": 14, "attn_kwargs": {"num_features": 16}}),
    "clustered": ("clustered_vit_tiny_patch8_224", CLUSTERED),
    "rope": ("performer_vit_rope_small_patch16_224", {"attn_kwargs": {"num_features": 16}}),
}
HEADS = {
    "full_resolution": {"channels": [4, 6, 8, 8]},
    "linear": {},
    "segformer": {"channels": 8},
}


def build(backbone: str, head: str, grid: tuple[int, int], out_indices=(0, 1), **head_options) -> Segmenter:
    """A segmenter in float64 of random weights, with positions of the grid: timm resamples others in float32."""
    torch.manual_seed(0)
    name, options = BACKBONES[backbone]
    patch = options.get("patch_size", 8 if "patch8" in name else 16)
    spec = SegmentationSpec(classes=("a", "b", "c"), normalizer=Normalizer((0.0,) * 3, (1.0,) * 3), tile_px=patch * 4)
    size = tuple(patch * side for side in grid)
    config = SegmentationModelConfig(
        backbone=name, backbone_kwargs={**SMALL, **options, "img_size": size}, out_indices=list(out_indices), head=head,
        head_kwargs={**HEADS.get(head, {}), **head_options},
    )  # fmt: skip
    model = build_segmenter(config, spec).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return model


def scores_of(model: Segmenter, image: Image, parts: tuple[int, int]) -> torch.Tensor:
    """Scores by parts of so many tokens, [K, H, W]; H and W are multiples of the patch."""
    dense = DenseHead(model)
    tokens = ImageTokens(dense.vit, image, lambda found: found.pixels)
    kept = stream_tokens(
        dense.vit, tokens, indices=dense.indices, num_blocks=dense.indices[-1] + 1, margin=dense.reach.margin,
        part_tokens=40,
    )[1]  # fmt: skip
    (rows, columns), (height, width) = tokens.grid, parts
    found = torch.zeros(3, rows * dense.patch[0], columns * dense.patch[1], dtype=torch.float64)
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            part = Window(row, column, min(height, rows - row), min(width, columns - column))
            outer = dense.in_pixels(dense.with_margin(part, tokens.grid))
            pixels = torch.from_numpy(image.read(outer).pixels)[None]
            place = dense.in_pixels(part)
            found[:, place.row : place.row_stop, place.col : place.col_stop] = dense.scores(kept, part, pixels)
    return found


def check(backbone: str, head: str, with_holes: bool) -> None:
    patch = {"clustered": 8, "patches of 14 px": 14}.get(backbone, 16)
    height, width = patch * 25 - 3, patch * 31 - 5
    image = Image(height, width, holes(height, width) if with_holes else None)
    model = build(backbone, head, (25, 31))
    pixels, _ = image.whole(patch)
    valid = torch.from_numpy(image.read(Window(0, 0, *pixels.shape[-2:])).valid)
    with torch.inference_mode():
        expected = model(pixels, valid=valid[None])[0]
    found = scores_of(model, image, (4, 8))
    error = ((found - expected)[:, valid]).norm() / expected[:, valid].norm()
    assert error < 1e-9
    assert float((found - expected)[:, valid].abs().max()) < 1e-8


@pytest.mark.parametrize(
    ("backbone", "head"), [("performer", "linear"), ("clustered", "segformer"), ("patches of 14 px", "full_resolution")]
)
def test_scores_by_parts_equal_those_of_the_whole_image(backbone: str, head: str) -> None:
    check(backbone, head, with_holes=True)


@pytest.mark.slow
@pytest.mark.parametrize("with_holes", [False, True], ids=["all valid", "nodata"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_scores_of_all_heads_equal_those_of_the_whole_image(backbone: str, head: str, with_holes: bool) -> None:
    check(backbone, head, with_holes)


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        ("upernet", {}, "UPerNetHead needs the whole image at once, as .* is a AdaptiveAvgPool2d"),
        ("dpt", {}, "DPTHead needs the whole image at once: it resizes maps from corner to corner"),
        (
            "full_resolution",
            {"norm": "group"},
            "FullResolutionHead needs the whole image at once, as .* is a GroupNorm",
        ),
    ],
)
def test_heads_that_need_the_whole_image_are_refused(head: str, options: dict, message: str) -> None:
    model = build("performer", head, (4, 4), **{"channels": 16 if head != "full_resolution" else [8], **options})
    with pytest.raises(CheckpointError, match=f"{message}.*; train with model.head=full_resolution, linear or segf"):
        DenseHead(model)


def test_other_networks_are_refused() -> None:
    model = build("performer", "full_resolution", (4, 4)).train()
    with pytest.raises(CheckpointError, match=r"batch norm in training mode \(detail.*call model.eval\(\)"):
        DenseHead(model)
    with pytest.raises(CheckpointError, match="Linear must have a method `reach`"):
        reach_of(nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match=r"must be a plain ViT of perf_vit with a head .*, got Conv2d; predict"):
        DenseHead(nn.Conv2d(3, 3, 1))


@pytest.mark.parametrize("backbone", ["performer", "clustered"])
def test_parts_are_no_larger_than_the_memory_allows(backbone: str) -> None:
    dense = DenseHead(build(backbone, "segformer", (4, 4)))
    for most in (10**6, 200, 1):
        rows, columns = dense.part_size(most)
        assert rows % dense.reach.multiple == columns % dense.reach.multiple == 0
        assert rows * dense.patch[0] <= max(most, dense.reach.multiple * dense.patch[0])
        outer = dense.with_margin(Window(1000 * rows, 1000 * columns, rows, columns), (10**6, 10**6))
        assert outer.height * outer.width * dense.patch[0] ** 2 <= 2**20
