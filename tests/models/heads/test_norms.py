"""Norms of segmentation heads."""

import pytest
import torch
from torch import Tensor, nn

from perf_vit.models.heads.norms import GroupNorm, apply_norm


def values_and_gradients(norm: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = norm(x)
    return [out, *torch.autograd.grad((out * out.sin()).sum(), [x, *norm.parameters()])]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_statistics_of_large_maps_have_the_digits_of_float32(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4, 200, 300, dtype=torch.float64) + 1.0
    norm = GroupNorm(2, 4).double()
    expected = values_and_gradients(norm, x)
    norm = norm.float()
    found = values_and_gradients(norm, x.float().contiguous(memory_format=layout))
    assert found[0].is_contiguous(memory_format=layout)
    off, *of_gradients = (
        float((ours - exact).norm() / exact.norm()) for ours, exact in zip(found, expected, strict=True)
    )
    assert off < 5e-7
    # PyTorch's own of channels-last maps are off by 2e-4.
    assert max(of_gradients) < 1e-5


def test_batch_norms_become_group_norms() -> None:
    module = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Sequential(nn.BatchNorm2d(6)))
    apply_norm(module, "batch")
    assert isinstance(module[1][0], nn.BatchNorm2d)
    apply_norm(module, "group")
    assert isinstance(module[1][0], GroupNorm)
    assert (module[1][0].num_groups, module[1][0].num_channels) == (1, 6)
    with pytest.raises(ValueError, match="norm must be batch or group, got layer"):
        apply_norm(module, "layer")
