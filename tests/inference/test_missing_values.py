"""In prediction, a network sees the mean in place of values that are missing in some bands, whatever is read."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import rasterio.shutil
import torch
from torch import Tensor

from perf_vit.data import image_tile, standardized
from perf_vit.inference import StripMaker, embed_windows, predict_objects, predict_strips
from perf_vit.sources import open_source
from perf_vit.tiling import grid_windows
from perf_vit.transforms import Normalizer
from perf_vit.types import Detections, Source

# Valid values become 1 in both bands.
NORMALIZER = Normalizer((500.0, 1000.0), (500.0, 1000.0))


def pixels_with_holes(value: float, dtype: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    pixels = np.empty((2, 100, 120), dtype)
    pixels[0], pixels[1] = 1000, 2000
    for band in (0, 1, slice(None)):
        for _ in range(15):
            row, col = rng.integers(0, 90, 2)
            pixels[band, row : row + 9, col : col + 9] = value
    return pixels


def raster(path) -> Source:
    return open_source(path)


def vrt(path) -> Source:
    rasterio.shutil.copy(path, path.with_suffix(".vrt"), driver="VRT")
    return open_source(path.with_suffix(".vrt"))


def mosaic(path) -> Source:
    return open_source([path, path])


def warped(path) -> Source:
    return open_source(path, crs="EPSG:32638")


def resampled(path) -> Source:
    return open_source(path, resolution=(3.1, 2.9), resampling="cubic")


See = Callable[[Tensor, Tensor | None], None]


def maps(source: Source, see: See) -> None:
    def model(tiles: Tensor, valid: Tensor | None = None) -> Tensor:
        see(tiles, valid)
        return tiles[:, :1]

    maker = StripMaker(extent=source.extent, num_channels=1, window_size=64, overlap=8)
    list(predict_strips(model, source, NORMALIZER, maker, flips=True))


def objects(source: Source, see: See) -> None:
    def model(tiles: Tensor, valid: Tensor | None = None) -> list[Detections]:
        see(tiles, valid)
        nothing = torch.zeros(0)
        return [Detections(scores=nothing, labels=nothing.long(), boxes_xyxy=torch.zeros(0, 4)) for _ in tiles]

    normalize = partial(standardized, normalizer=NORMALIZER)
    predict_objects(model, source, normalize, extent=source.extent, window_size=64, overlap=8)


def embeddings(source: Source, see: See) -> None:
    def encode(tiles: Tensor, valid: Tensor | None = None) -> Tensor:
        see(tiles, valid)
        return tiles.mean((2, 3))

    embed_windows(encode, source, NORMALIZER, grid_windows(source.extent, 64, 0))


def whole_images(source: Source, see: See) -> None:
    pixels, valid = image_tile(source, NORMALIZER, 32, None)
    see(torch.from_numpy(pixels)[None], torch.from_numpy(valid)[None])


@pytest.mark.parametrize(("value", "dtype"), [(-9999, "int16"), (-9999, "float32"), (np.nan, "float32")])
@pytest.mark.parametrize("task", [maps, objects, embeddings, whole_images])
@pytest.mark.parametrize("read", [raster, vrt, mosaic, warped, resampled])
def test_a_missing_value_is_the_mean_and_no_nan_reaches_a_network(make_scene, read, task, value, dtype) -> None:
    seen: list[np.ndarray] = []
    source = read(make_scene(pixels=pixels_with_holes(value, dtype), nodata=value))

    def see(tiles: Tensor, valid: Tensor | None) -> None:
        assert valid is not None
        assert torch.equal(valid, (tiles != 0).any(1))
        seen.append(tiles.numpy().copy())

    task(source, see)
    values = np.concatenate([tiles.ravel() for tiles in seen])
    assert np.isfinite(values).all()
    # One for data and nothing between it and the mean.
    np.testing.assert_allclose(values[values != 0], 1, rtol=1e-5)
    assert 0 < (values == 0).mean() < 0.8


@pytest.mark.parametrize("task", [maps, objects, embeddings])
def test_windows_of_valid_pixels_are_given_without_a_mask(make_scene, task) -> None:
    seen: list[Tensor | None] = []
    pixels = np.ones((2, 64, 128), np.uint16)
    task(open_source(make_scene(pixels=pixels, nodata=None)), lambda tiles, valid: seen.append(valid))
    assert seen
    assert all(valid is None for valid in seen)


def test_a_model_without_an_argument_for_valid_pixels_gets_tiles_alone(make_scene) -> None:
    source = open_source(make_scene(pixels=pixels_with_holes(0, "uint16"), nodata=0))
    maker = StripMaker(extent=source.extent, num_channels=2, window_size=64, overlap=8)
    strips = predict_strips(torch.nn.Identity(), source, NORMALIZER, maker, flips=True)
    scores = np.concatenate([strip.scores for strip in strips], 1)
    np.testing.assert_array_equal(scores, NORMALIZER(source.read(source.extent)))
