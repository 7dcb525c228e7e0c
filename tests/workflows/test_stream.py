"""`perf_vit.stream`: tokens of a raster from one forward pass."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
import timm
import torch
from torch import nn

import perf_vit
from perf_vit.errors import CheckpointError, InputError, OptionError, OutputError
from perf_vit.transforms import Normalizer


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "performer_vit_tiny_patch16_224", embed_dim=32, depth=3, num_heads=2, num_classes=0, dynamic_img_size=True
    ).eval()


@pytest.fixture(scope="module")
def raster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("raster") / "scene.tif"
    pixels = np.random.default_rng(0).integers(1, 255, (3, 150, 200), np.uint8)
    pixels[:, :48, :64] = 0
    with rasterio.open(path, "w", width=200, height=150, count=3, dtype="uint8", nodata=0, driver="GTiff") as file:
        file.write(pixels)
    return path


def test_tokens_equal_those_of_the_model(model: nn.Module, raster: Path, tmp_path: Path) -> None:
    spec = perf_vit.InputSpec(normalizer=Normalizer(mean=(120.0, 110.0, 100.0), std=(50.0, 60.0, 70.0)))
    with perf_vit.stream(model, raster, spec=spec, indices=[0], folder=tmp_path / "tokens", progress=False) as found:
        assert len(list((tmp_path / "tokens").glob("*/*.bin"))) == 2
        image = perf_vit.open(raster).read(perf_vit.types.Window(0, 0, 160, 208))
        valid = image.valid.reshape(10, 16, 13, 16).any((1, 3))
        pixels = torch.from_numpy(spec.normalizer(image))[None]
        mask = torch.cat([torch.ones(1, dtype=torch.bool), torch.from_numpy(valid).flatten()])
        with torch.inference_mode():
            expected, (first,) = model.forward_intermediates(pixels, indices=[0], attn_mask=mask[None, None, None])
        assert found.last.layout.num_tokens == valid.sum() == 10 * 13 - 3 * 4
        torch.testing.assert_close(found.last.normed_prefix(), expected[0, :1], rtol=1e-4, atol=1e-4)
        whole = found.last.rows(0, 10)
        grid = expected[0, 1:].mT.view(32, 10, 13) * torch.from_numpy(valid)
        torch.testing.assert_close(whole, grid, rtol=1e-4, atol=1e-4)
        block = found.blocks[0].rows(0, 10, norm=False)
        torch.testing.assert_close(block, first[0] * torch.from_numpy(valid), rtol=1e-4, atol=1e-4)
    assert list((tmp_path / "tokens").iterdir()) == []


def test_blocks_are_those_of_any_iterable(model: nn.Module, raster: Path) -> None:
    found = perf_vit.stream(model, raster, indices=iter([1, 0, 1]), progress=False)
    assert sorted(found.blocks) == [0, 1]
    assert sorted(perf_vit.stream(model, raster, indices=1, progress=False).blocks) == [1]


def test_bfloat16_tokens_take_half_the_space(model: nn.Module, raster: Path) -> None:
    full = perf_vit.stream(model, raster, progress=False).last
    half = perf_vit.stream(model, raster, dtype="bfloat16", progress=False).last
    assert half.store.num_bytes * 2 == full.store.num_bytes
    assert not torch.equal(half.mean(), full.mean())
    torch.testing.assert_close(half.mean(), full.mean(), rtol=0.02, atol=0.02)


def test_wrong_arguments_are_one_line_and_leave_no_file(model: nn.Module, raster: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"dtype must be one of float32, bfloat16, float16, got int8"):
        perf_vit.stream(model, raster, dtype="int8")
    with pytest.raises(OptionError, match=r"indices must be whole numbers, got '1'"):
        perf_vit.stream(model, raster, indices="1")
    for indices in ([3], iter([3]), 3, np.array([3])):
        with pytest.raises(OptionError, match=r"indices must be from 0 to 2, got 3"):
            perf_vit.stream(model, raster, indices=indices)
    with pytest.raises(CheckpointError, match=r"block 0 has softmax attention .*perf_vit\.linearize"):
        perf_vit.stream(timm.create_model("vit_tiny_patch16_224").eval(), raster, folder=tmp_path, progress=False)
    with pytest.raises(CheckpointError, match=r"plain ViT with timm's PatchEmbed, got ResNet"):
        perf_vit.stream(timm.create_model("resnet18").eval(), raster, folder=tmp_path, progress=False)
    with pytest.raises(InputError):
        perf_vit.stream(model, tmp_path / "missing.tif", folder=tmp_path, progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="can't make files in"):
        perf_vit.stream(model, raster, folder=tmp_path / "file", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_is_too_small_is_refused_before_any_work(
    model: nn.Module, raster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("perf_vit.streaming.store.shutil.disk_usage", lambda path: free)
    with pytest.raises(OutputError, match=r"can't write tokens to .*: no space left on device; choose a folder"):
        perf_vit.stream(model, raster, folder=tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []
