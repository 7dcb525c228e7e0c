from pathlib import Path

import numpy as np
import pytest
import rasterio
import tifffile
import torch
import zarr
from torch.utils.data import DataLoader

from perf_vit.data import DistillationDataConfig, UnlabelledCrops, build_distillation_datamodule
from perf_vit.data.config import SplitConfig
from perf_vit.errors import InputError
from perf_vit.sources import find_images
from perf_vit.transforms import Normalizer

NORMALIZER = Normalizer((100.0, 120.0, 140.0), (50.0, 60.0, 70.0))


@pytest.fixture
def images(make_scene):
    return [make_scene(dtype="uint8", seed=seed, height=70 + 9 * seed, width=64 + seed) for seed in range(3)]


def _crops(images, **changes) -> UnlabelledCrops:
    options = {"tile_px": 40, "length": 6, "seed": 0, **changes}
    return UnlabelledCrops(images, NORMALIZER, **options)


def test_files_and_folders_are_found_once_and_in_order(tmp_path) -> None:
    (tmp_path / "scenes" / "deep").mkdir(parents=True)
    for name in ("scenes/b.TIF", "scenes/deep/a.svs", "scenes/notes.txt", "photo.jpg", "odd.dat"):
        (tmp_path / name).touch()
    found = find_images([tmp_path / "odd.dat", tmp_path / "scenes", tmp_path / "scenes" / "b.TIF"])
    assert [path.name for path in found] == ["odd.dat", "b.TIF", "a.svs"]


def test_no_images_are_an_error(tmp_path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="got none"):
        find_images([])
    with pytest.raises(InputError, match=r"no image file or folder .*nothing"):
        find_images([tmp_path / "nothing"])
    with pytest.raises(InputError, match=r"no images in .*\.svs"):
        find_images([tmp_path])


def test_a_crop_depends_on_seed_and_index_whatever_the_workers(images) -> None:
    crops = [_crops(images)[i] for i in range(6)]
    workers = list(DataLoader(_crops(images), batch_size=None, num_workers=2))
    assert all(
        torch.equal(a, b) for one, other in zip(crops, workers, strict=True) for a, b in zip(one, other, strict=True)
    )
    assert not torch.equal(crops[0][0], crops[1][0])
    assert not torch.equal(crops[0][0], _crops(images, seed=1)[0][0])


def test_crops_are_standardised_pixels_of_the_images(images) -> None:
    with rasterio.open(images[0]) as dataset:
        whole = dataset.read()
    crop = _crops(images[:1], symmetries=False, tile_px=64)[0][0].numpy()
    assert crop.shape == (3, 64, 64)
    assert crop.dtype == np.float32
    pixels = crop * np.array(NORMALIZER.std)[:, None, None] + np.array(NORMALIZER.mean)[:, None, None]
    # Width 64 leaves one column; its nodata, 0 in the file, is the mean in the crop.
    rows = [row for row in range(7) if np.allclose(pixels[:, 2:, 3:], whole[:, row + 2 : row + 64, 3:], atol=1e-3)]
    assert len(rows) == 1


def test_symmetries_turn_the_same_crop(make_scene) -> None:
    image = make_scene(dtype="uint8", height=48, width=48, nodata=None)
    plain = _crops([image], tile_px=48, symmetries=False)[0][0].numpy()
    eight = [np.rot90(p, turns, axes=(1, 2)) for p in (plain, plain[:, :, ::-1]) for turns in range(4)]
    seen = set()
    turned = _crops([image], tile_px=48)
    for i in range(60):
        seen.add(next(n for n, other in enumerate(eight) if np.array_equal(turned[i][0].numpy(), other)))
    assert seen == set(range(8))


def test_bands_are_chosen_and_missing_ones_named(make_scene) -> None:
    image = make_scene(dtype="uint8", num_bands=4)
    first, turned = (_crops([image], bands=bands, symmetries=False)[0][0] for bands in (None, [3, 2, 1]))
    assert torch.equal(first, _crops([image], bands=[1, 2, 3], symmetries=False)[0][0])
    assert not torch.equal(first, turned)
    with pytest.raises(InputError, match="numbers from 1 to 1"):
        _crops([make_scene(dtype="uint8", num_bands=1)])


def test_crops_of_nodata_are_drawn_anew(make_scene) -> None:
    pixels = np.zeros((3, 64, 300), np.uint8)
    pixels[:, :, 120:] = 90
    crops = _crops([make_scene(pixels=pixels)], length=20)
    assert min((crops[i][0] != 0).float().mean().item() for i in range(20)) >= 0.5
    # The valid pixels are turned with the pixels.
    assert all(torch.equal(crop[0] != 0, valid) for crop, valid in (crops[i] for i in range(20)))
    assert not all(crops[i][1].all() for i in range(20))


def test_images_smaller_than_a_crop_are_named(images, make_scene) -> None:
    small = make_scene(dtype="uint8", height=30, width=200)
    with pytest.raises(InputError, match=r"40 px.*1 of 4.*30 x 200.*smaller crops"):
        _crops([*images, small])


def _write_slide(path: Path, pixels: np.ndarray) -> Path:
    """A slide of one level, [3, H, W]."""
    if path.suffix == ".svs":
        aperio = "Aperio Image Library\r\n|AppMag = 20|MPP = 0.5"
        options = {"photometric": "rgb", "description": aperio, "metadata": None}
        tifffile.imwrite(path, pixels.transpose(1, 2, 0), tile=(64, 64), **options)
        return path
    if path.suffix == ".tif":
        tifffile.imwrite(path, pixels, ome=True, tile=(64, 64), photometric="minisblack", metadata={"axes": "CYX"})
        return path
    group = zarr.open_group(path, mode="w", zarr_format=2)
    group.create_array("0", data=pixels, chunks=(1, 64, 64))
    axes = [{"name": name, "type": "channel" if name == "c" else "space"} for name in "cyx"]
    scale = {"type": "scale", "scale": [1.0, 0.5, 0.5]}
    datasets = [{"path": "0", "coordinateTransformations": [scale]}]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]
    return path


@pytest.mark.parametrize("name", ["a.svs", "a.ome.tif", "a.ome.zarr"])
def test_crops_of_a_slide_are_those_of_a_raster_of_its_level_0(make_scene, tmp_path, name) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 150, 130), dtype=np.uint8)
    _write_slide(tmp_path / name, pixels)
    crops, expected = _crops(find_images([tmp_path])), _crops([make_scene(pixels=pixels, nodata=None)])
    assert all(torch.equal(crops[index][0], expected[index][0]) for index in range(6))
    loaded = list(DataLoader(crops, batch_size=None, num_workers=1))
    assert torch.equal(loaded[0][0], expected[0][0])


def test_a_global_batch_is_the_batch_of_a_distillation(images) -> None:
    split = SplitConfig(image=[str(image) for image in images])
    config = DistillationDataConfig(train=split, val=split, tile_px=32, global_batch_size=3, num_val_tiles=4)
    data = build_distillation_datamodule(config, (0.5,) * 3, (0.2,) * 3, steps_per_epoch=2, seed=0)
    assert [len(tiles) for tiles, _ in data.train_dataloader()] == [3, 3]
    assert [len(tiles) for tiles, _ in data.val_dataloader()] == [3, 1]
