"""Overviews cover the ground of the raster, whatever its size and however its rows are cut."""

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.enums import Resampling

from perf_vit.writers.pyramid import half_average, half_nearest


def _shares(length: int) -> np.ndarray:
    """How much of each of `length` pixels each pixel of the overview covers, [ceil(length / 2), length]."""
    half = -(-length // 2)
    edges = np.arange(half + 1) * length / half
    pixels = np.arange(length)
    return np.clip(np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels), 0, None)


def _average(pixels: np.ndarray, nodata: float | None) -> np.ndarray:
    valid = np.ones(pixels.shape) if nodata is None else ~(np.isnan(pixels) | (pixels == nodata)) * 1.0
    weights = [_shares(length) for length in pixels.shape[1:]]
    total, share = (
        np.einsum("ih,chw,jw->cij", weights[0], each, weights[1]) for each in (np.where(valid, pixels, 0.0), valid)
    )
    found = share > 1e-5
    mean = total / np.where(found, share, 1)
    return np.where(found, mean, np.nan if nodata is None else nodata)


def _in_parts(half, pixels: np.ndarray, step: int, *nodata) -> np.ndarray:
    shape = pixels.shape[1:]
    parts = [
        half(pixels[:, row : row + step], pixels[:, row - 1 : row] if row else None, row, shape, *nodata)
        for row in range(0, shape[0], step)
    ]
    return np.concatenate(parts, axis=1)


sizes = st.integers(1, 13)


@settings(max_examples=60, deadline=None)
@given(height=sizes, width=sizes, step=st.sampled_from([2, 4, 16]), nodata=st.sampled_from([None, 7, np.nan]))
@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32", "float64"])
def test_averages_are_those_of_the_covered_ground(dtype: str, height: int, width: int, step: int, nodata) -> None:
    rng = np.random.default_rng(height * 100 + width)
    pixels = rng.integers(0, 9, (2, height, width)).astype(dtype)
    if nodata is not None and np.isnan(nodata):
        if pixels.dtype.kind != "f":
            nodata = 8
        else:
            pixels[pixels > 6] = np.nan
    expected = _average(pixels, nodata)
    found = _in_parts(half_average, pixels, step, nodata)
    assert found.dtype == pixels.dtype
    assert found.shape == expected.shape
    if pixels.dtype.kind == "f":
        assert np.allclose(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
        return
    # Sums of half a pixel may round either way, and no average is taken for a missing pixel.
    near, instead = (np.abs(each - expected) <= 0.5 + 1e-4 for each in (found, found - 1.0))
    assert np.all(near | (instead & (found - 1.0 == nodata)))
    if nodata is not None:
        assert not np.any((found == nodata) & np.isfinite(expected) & (np.abs(expected - nodata) > 1e-6))


@settings(max_examples=60, deadline=None)
@given(height=sizes, width=sizes, step=st.sampled_from([2, 4, 16]))
def test_nearest_pixels_lie_in_the_covered_ground_and_do_not_depend_on_the_parts(height, width, step) -> None:
    pixels = np.arange(height * width, dtype=np.int32).reshape(1, height, width)
    found = _in_parts(half_nearest, pixels, step)
    assert np.array_equal(found, half_nearest(pixels, None, 0, (height, width)))
    for axis, indices in ((0, found[0, :, 0] // width), (1, found[0, 0] % width)):
        length = pixels.shape[1 + axis]
        half = -(-length // 2)
        left = np.arange(half) * length / half
        assert np.all(np.abs(indices - left) <= 0.5 + 1e-9)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (63, 97), (64, 97), (63, 96)])
@pytest.mark.parametrize("nodata", [None, 3])
@pytest.mark.parametrize("method", ["average", "nearest"])
def test_overviews_are_those_of_gdal(tmp_path, height: int, width: int, nodata, method: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 9, (1, height, width)).astype(np.uint8)
    options = {"height": height, "width": width, "count": 1, "dtype": "uint8", "nodata": nodata, "crs": "EPSG:32637"}
    place = rasterio.Affine(1, 0, 1, 0, -1, 1)
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", transform=place, **options) as file:
        file.write(pixels)
    with rasterio.open(tmp_path / "a.tif", "r+") as file:
        file.build_overviews([2], Resampling[method])
    with rasterio.open(tmp_path / "a.tif", overview_level=0) as file:
        expected = file.read()
    if method == "average":
        found = half_average(pixels, None, 0, (height, width), nodata)
        # GDAL rounds some of its weights; stepping over the value of missing pixels makes 2 of a difference of 1.
        assert np.mean(found != expected) < 0.01
        assert np.all(np.abs(found.astype(int) - expected) <= (1 if nodata is None else 2))
    else:
        assert np.array_equal(half_nearest(pixels, None, 0, (height, width)), expected)
