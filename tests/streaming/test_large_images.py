"""Images of thousands of tokens a side: a pass over parts equals one in memory.

With `--log-cli-level=INFO`, the relative differences in the Frobenius norm are shown.
"""

import logging

import numpy as np
import pytest
import timm
import torch
from lively import sharpened
from streamed_models import Image, streamed
from torch import nn

import perf_vit

pytestmark = pytest.mark.slow

TOLERANCES = {"float64": 1e-9, "float32": 1e-5}
SMALL_14 = ("performer S/14", "clustered S/14")
PATCH_16 = ("performer tiny/16", "clustered tiny/16", "rope tiny/16")
CASES = [(name, side) for name in SMALL_14 for side in (1022, 2044)]
CASES += [(name, side) for name in PATCH_16 for side in (2048, 4096)]


def build(name: str, side: int) -> tuple[nn.Module, int]:
    """A model of random weights with positions of the image's grid, and the side of its patches."""
    torch.manual_seed(0)
    mixer, size = name.split()
    if size == "S/14":
        vit = timm.create_model("vit_small_patch14_dinov2", img_size=side, num_classes=0, dynamic_img_size=True).eval()
        return perf_vit.linearize(sharpened(vit), mixer=mixer), 14
    if mixer == "rope":
        small = {"embed_dim": 192, "num_heads": 3}
        vit = timm.create_model("performer_vit_rope_small_patch16_224", num_classes=0, **small)
    else:
        vit = timm.create_model(f"{mixer}_vit_tiny_patch16_224", num_classes=0, img_size=side)
    return sharpened(vit.eval()), 16


def holes(side: int) -> np.ndarray:
    """Valid pixels: a corner, a band, and a hole of less than a patch are missing."""
    valid = np.ones((side, side), bool)
    valid[: side // 4, : side // 3], valid[side // 2 : side // 2 + 40] = False, False
    valid[-300:-100, -9:] = False
    return valid


@pytest.mark.parametrize("with_holes", [False, True], ids=["all valid", "nodata"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("name", "side"), CASES)
def test_a_pass_over_parts_equals_one_in_memory(name: str, side: int, dtype: str, with_holes: bool) -> None:
    model, patch = build(name, side)
    image = Image(side, side, holes(side) if with_holes else None)
    expected = in_memory(model, image, patch, dtype)
    found, _ = streamed(model, image)
    tokens = torch.cat([found.normed_prefix(), found.norm(found.store.read(slice(None)))])
    off = distance(tokens, expected)
    logging.getLogger(__name__).info("%s, %d px, %s, %s tokens: %.1e", name, side, dtype, f"{len(tokens):,}", off)
    if off < TOLERANCES[dtype]:
        return
    # A sampled key between two clusters falls to the other one by rounding, and later layers of random weights amplify
    # that. By chance it happens in an early or a late layer, in parts or in memory: both are then far from float64.
    assert dtype == "float32"
    assert name.startswith("clustered")
    exact = in_memory(model, image, patch, "float64")
    off, inherent = distance(tokens, exact), distance(expected, exact)
    logging.getLogger(__name__).info("from float64: %.1e, in memory %.1e", off, inherent)
    assert inherent > TOLERANCES[dtype]
    assert off < 1e-2


def in_memory(model: nn.Module, image: Image, patch: int, dtype: str) -> torch.Tensor:
    """Final tokens of the valid patches, after those of the prefix, and the model in this dtype."""
    model.to(getattr(torch, dtype))
    pixels, valid = image.whole(patch)
    mask = torch.cat([torch.ones(model.num_prefix_tokens, dtype=torch.bool), valid.flatten()])
    masked = {} if valid.all() else {"attn_mask": mask[None, None, None]}
    with torch.inference_mode():
        tokens, _ = model.forward_intermediates(pixels.to(getattr(torch, dtype)), indices=[0], **masked)
    return tokens[0, mask]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().double() - expected.double()).norm() / expected.double().norm())
