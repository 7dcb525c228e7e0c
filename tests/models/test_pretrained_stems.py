"""Pretrained weights of three channels in models of other numbers of channels, through timm's own loading."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import perf_vit  # noqa: F401  (registers the models)

STEMS = {
    "performer_vit_tiny_patch16_224": {"depth": 2},
    "clustered_vit_tiny_patch8_224": {"depth": 2},
    "performer_vit_rope_small_patch16_224": {"depth": 2},
    "hct_base": {},
}


def build(name: str, model_seed: int, **kwargs) -> nn.Module:
    torch.manual_seed(model_seed)
    size = {} if name == "hct_base" else {"img_size": 64}
    return timm.create_model(name, **{"num_classes": 7, **size, **STEMS[name], **kwargs}).eval()


def adapted(weight: torch.Tensor, in_chans: int) -> torch.Tensor:
    """One channel gets the sum of the three, more get them in turn, scaled so that their sum stays as large."""
    if in_chans == 1:
        return weight.sum(dim=1, keepdim=True)
    return torch.stack([weight[:, index % 3] for index in range(in_chans)], dim=1) * (3 / in_chans)


@pytest.mark.parametrize("in_chans", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("name", STEMS)
@torch.no_grad()
def test_the_stem_is_adapted_and_all_else_is_loaded(name: str, in_chans: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    pretrained = build(name, model_seed=5)
    save_file(pretrained.state_dict(), path)
    overlay = {"file": str(path), "num_classes": 7}
    model = build(name, 0, in_chans=in_chans, pretrained=True, pretrained_cfg_overlay=overlay)
    first = f"{model.default_cfg['first_conv']}.weight"
    theirs, ours = pretrained.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    expected = theirs[first] if in_chans == 3 else adapted(theirs[first], in_chans)
    torch.testing.assert_close(ours[first], expected)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if key != first)
    grey = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    if in_chans % 3 == 0 or in_chans == 1:
        out = model(grey.expand(-1, in_chans, -1, -1))
        torch.testing.assert_close(out, pretrained(grey.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    else:
        assert model(grey.expand(-1, in_chans, -1, -1)).isfinite().all()
