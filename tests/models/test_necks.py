import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from perf_vit.models.necks import SimpleFPN, TopDownFPN, build_neck
from perf_vit.types import FeatureSpec

STRIDES = [2, 4, 8, 16, 32, 64]


def maps_of(specs: list[FeatureSpec], height: int, width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, s.channels, height // s.stride, width // s.stride, generator=generator) for s in specs]


@pytest.mark.parametrize("patch", [8, 14, 16, 32])
def test_a_plain_vit_gets_levels_of_exactly_the_strides_asked_for(patch) -> None:
    specs = [FeatureSpec(24, patch)]
    neck = build_neck(specs, STRIDES, 16)
    assert isinstance(neck, SimpleFPN)
    size = (neck.size_multiple, 3 * neck.size_multiple)
    seen = [-(-side // patch) * patch for side in size]
    levels = neck(maps_of(specs, *seen), size)
    assert [tuple(level.shape) for level in levels] == [(2, 16, size[0] // s, size[1] // s) for s in STRIDES]


@pytest.mark.parametrize("strides", [[8, 16, 32], [4, 16], [2, 4, 64]])
def test_a_pyramid_gets_levels_of_exactly_the_strides_asked_for(strides) -> None:
    specs = [FeatureSpec(8 * k, stride) for k, stride in enumerate((4, 8, 16, 32), 1)]
    neck = build_neck(specs, strides, 16)
    assert isinstance(neck, TopDownFPN)
    levels = neck(maps_of(specs, 128, 64), (128, 64))
    assert [tuple(level.shape) for level in levels] == [(2, 16, 128 // s, 64 // s) for s in strides]
    torch.stack([level.sum() for level in levels]).sum().backward()
    assert [name for name, p in neck.named_parameters() if p.grad is None] == []


@settings(deadline=None, max_examples=25)
@given(patch=st.sampled_from([6, 7, 10, 12, 14, 28]), num=st.integers(1, 5))
def test_resized_maps_are_sampled_where_the_pixels_are(patch, num) -> None:
    neck = SimpleFPN([FeatureSpec(1, patch)], [8], 4)
    neck.levels = nn.ModuleList([nn.Identity()])
    size = (neck.size_multiple, num * neck.size_multiple)
    rows, columns = (-(-side // patch) for side in size)
    # Each token holds the x of its centre, so a level must hold that of its own cells' centres.
    x = (torch.arange(columns) + 0.5) * patch
    (level,) = neck([x.expand(1, 1, rows, columns)], size)
    expected = (torch.arange(size[1] // neck.base_stride) + 0.5) * neck.base_stride
    torch.testing.assert_close(level[0, 0, 0], expected.clamp(x[0], x[-1]))


def test_places_are_not_rounded_with_the_maps() -> None:
    neck = SimpleFPN([FeatureSpec(1, 14)], [8], 4)
    neck.levels = nn.ModuleList([nn.Identity()])
    side = 73 * 14
    size = (neck.size_multiple, -(-side // neck.size_multiple) * neck.size_multiple)
    ramp = (torch.arange(-(-size[1] // 14)) % 8.0).expand(1, 1, -(-size[0] // 14), -1)
    ((exact,), (rounded,)) = (neck([x], size) for x in (ramp, ramp.bfloat16()))
    torch.testing.assert_close(rounded.float(), exact, rtol=2**-8, atol=2**-8)


def test_several_maps_of_a_plain_vit_are_fused() -> None:
    specs = [FeatureSpec(12, 16), FeatureSpec(24, 16)]
    neck = build_neck(specs, [8], 16)
    maps = [each.requires_grad_() for each in maps_of(specs, 32, 32)]
    neck(maps, (32, 32))[0].square().sum().backward()
    assert all(each.grad is not None and each.grad.any() for each in maps)


@pytest.mark.parametrize("strides", [[], [8, 4], [4, 4], [6, 12], [0]])
def test_strides_that_make_no_pyramid_are_refused(strides) -> None:
    with pytest.raises(ValueError, match="growing strides that are powers of two"):
        build_neck([FeatureSpec(8, 16)], strides, 16)
