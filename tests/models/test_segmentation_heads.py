"""Decoders over plain ViTs and pyramids."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from perf_vit.errors import ConfigError
from perf_vit.models import SegmentationModelConfig, SegmentationSpec, build_segmenter
from perf_vit.models.heads import DPTHead, FullResolutionHead, LinearHead, SegFormerHead, UPerNetHead
from perf_vit.transforms import Normalizer
from perf_vit.types import FeatureSpec

DECODERS = {"upernet": UPerNetHead, "dpt": DPTHead, "segformer": SegFormerHead}
ALL = {"full_resolution": FullResolutionHead, "linear": LinearHead, **DECODERS}
PYRAMID = [FeatureSpec(8, 4), FeatureSpec(12, 8), FeatureSpec(16, 16), FeatureSpec(16, 32)]


def maps_of(specs: list[FeatureSpec], height: int, width: int, batch: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, s.channels, height // s.stride, width // s.stride) for s in specs]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("name", DECODERS)
@settings(deadline=None, max_examples=15)
@given(
    patch=st.sampled_from([4, 7, 8, 14, 16, 28]),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    num_maps=st.integers(1, 4),
)
def test_a_plain_vit_of_any_patch_and_any_odd_size_is_decoded_to_its_pixels(name, patch, rows, columns, num_maps):
    specs = [FeatureSpec(8, patch)] * num_maps
    size = rows * patch, columns * patch
    head = DECODERS[name](specs, 3, 5, channels=8).eval()
    with torch.no_grad():
        assert head(maps_of(specs, *size, batch=2), torch.zeros(2, 3, *size)).shape == (2, 5, *size)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("specs", [[FeatureSpec(8, 16)] * 3, PYRAMID, PYRAMID[1:3]], ids=["vit", "pyramid", "two"])
def test_all_maps_and_parameters_learn_from_a_batch_of_one(name, norm, specs):
    head = DECODERS[name](specs, 3, 2, channels=8, norm=norm)
    maps = maps_of(specs, 96, 160)
    head(maps, torch.zeros(1, 3, 96, 160)).square().mean().backward()
    assert [i for i, each in enumerate(maps) if not each.grad.any()] == []
    assert [key for key, parameter in head.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", DECODERS)
def test_group_norms_make_tiles_independent_of_their_batch(name):
    specs = [FeatureSpec(8, 8)] * 2
    head = DECODERS[name](specs, 3, 2, channels=8, drop_rate=0.0, norm="group").train()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in head.modules())
    maps = maps_of(specs, 40, 24, batch=3)
    with torch.no_grad():
        together = head(maps, torch.zeros(3, 3, 40, 24))
        alone = head([each[1:2] for each in maps], torch.zeros(1, 3, 40, 24))
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_what_a_token_says_shows_where_the_token_lies(name):
    torch.manual_seed(0)
    specs = [FeatureSpec(8, 16)]
    head = DECODERS[name](specs, 3, 2, channels=16).eval()
    (before,) = maps_of(specs, 144, 112)
    after = before.detach().clone()
    after[..., 6, 2] = -after[..., 6, 2] + 3
    image = torch.zeros(1, 3, 144, 112)
    with torch.no_grad():
        change = (head([before], image) - head([after], image)).abs().sum(1)
    # The sum over each token's own square, so that the place of single pixels doesn't matter.
    per_token = F.avg_pool2d(change, 16)[0]
    assert divmod(int(per_token.argmax()), 7) == (6, 2)


class _LargeTensors(TorchDispatchMode):
    """Counts the tensors with storage of their own that have at least so many numbers."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.storages: set[int] = set()
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().nbytes() >= self.numel * out.element_size():
            # Kept alive, or another tensor could get the same address.
            self.kept.append(out)
            self.storages.add(out.untyped_storage().data_ptr())
        return out


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("patch", [16, 14])
def test_many_classes_at_full_resolution_are_held_once_in_training_too(name, patch):
    size, num_classes = 6 * patch, 200
    specs = [FeatureSpec(8, patch)] * 2
    head = ALL[name](specs, 3, num_classes)
    maps = [each.detach() for each in maps_of(specs, size, size, batch=2)]
    # A third of the logits already counts as a copy.
    with _LargeTensors(2 * num_classes * size * size // 3) as large:
        logits = head(maps, torch.zeros(2, 3, size, size))
    assert logits.shape == (2, num_classes, size, size)
    assert len(large.storages) == 1


def _spec(tile_px: int) -> SegmentationSpec:
    return SegmentationSpec(classes=("a", "b", "c"), normalizer=Normalizer((0.0,) * 4, (1.0,) * 4), tile_px=tile_px)


@pytest.mark.parametrize("head", DECODERS)
@pytest.mark.parametrize(
    ("backbone", "out_indices", "kwargs"),
    [
        ("performer_vit_tiny_patch16_224", [0, 1], {"depth": 2, "attn_kwargs": {"num_features": 16}}),
        ("resnet10t", [1, 2, 3, 4], {}),
    ],
)
def test_configs_choose_decoders_for_plain_vits_and_pyramids(head, backbone, out_indices, kwargs):
    config = SegmentationModelConfig(backbone=backbone, out_indices=out_indices, backbone_kwargs=kwargs, head=head)
    config.head_kwargs = {"channels": 16}
    model = build_segmenter(config, _spec(64))
    assert model(torch.randn(2, 4, 64, 96)).shape == (2, 3, 64, 96)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "dpt", "out_indices": [0, 1, 2, 3, 4]}, "expected up to 4 feature maps, got 5"),
        ({"head": "upernet", "head_kwargs": {"norm": "layer"}}, "norm must be batch or group, got layer"),
        ({"head": "segformer", "head_kwargs": {"width": 3}}, "width"),
    ],
)
def test_wrong_options_of_a_head_are_one_line(change, message):
    config = SegmentationModelConfig(
        backbone="performer_vit_tiny_patch16_224", backbone_kwargs={"depth": 5}, out_indices=[4]
    )
    with pytest.raises(ConfigError, match=message) as error:
        build_segmenter(replace(config, **change), _spec(64))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", DECODERS)
def test_maps_in_another_order_than_fine_to_coarse_are_refused(name):
    with pytest.raises(ValueError, match=r"growing strides, got strides \[8, 4\]"):
        DECODERS[name]([FeatureSpec(8, 8), FeatureSpec(8, 4)], 3, 2)
