import numpy as np
import pytest

from perf_vit.errors import DataWarning, InputError
from perf_vit.transforms import Normalizer
from perf_vit.types import GeoImage


def _image(num_bands: int = 3) -> GeoImage:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 60000, (num_bands, 40, 50)).astype(np.uint16)
    valid = rng.random((40, 50)) > 0.3
    pixels[:, ~valid] = 65535
    return GeoImage(pixels, valid)


def test_valid_pixels_get_mean_0_and_std_1_and_invalid_ones_0() -> None:
    image = _image()
    out = Normalizer.from_images([image])(image)
    assert out.dtype == np.float32
    assert np.abs(out[:, image.valid].mean(1)).max() < 1e-4
    assert np.abs(out[:, image.valid].std(1) - 1).max() < 1e-4
    assert (out[:, ~image.valid] == 0).all()


def test_nan_outside_the_valid_mask_does_not_spread() -> None:
    pixels = np.ones((2, 4, 4), np.float32)
    pixels[:, 0, 0] = np.nan
    valid = np.ones((4, 4), bool)
    valid[0, 0] = False
    out = Normalizer.from_images([GeoImage(pixels, valid)])(GeoImage(pixels, valid))
    assert np.isfinite(out).all()


@pytest.mark.parametrize("value", [7, 0.1, 1 / 3, 1e-9, 54321.6, -0.3])
@pytest.mark.parametrize("dtype", ["uint8", "int32", "float16", "float32", "float64"])
def test_a_constant_band_has_std_1_and_is_named(dtype: str, value: float) -> None:
    rng = np.random.default_rng(0)
    pixels = np.stack([rng.random((301, 299)) * 100, np.full((301, 299), value)]).astype(dtype)
    image = GeoImage(pixels, np.ones((301, 299), bool))
    with pytest.warns(DataWarning, match=r"^band 2 \(nir\) .*std is taken as 1"):
        normalizer = Normalizer.from_images([image], ["red", "nir"])
    assert normalizer.std[1] == 1
    assert normalizer.std[0] > 20
    assert np.abs(normalizer(image)[1]).max() < 1e-6 * max(1, abs(value))


@pytest.mark.parametrize(
    ("dtype", "mean", "std"), [("float32", 101_325, 0.5), ("float64", 1.7e9, 100), ("int32", 2e9, 3)]
)
def test_small_differences_of_large_values_are_no_constant(dtype: str, mean: float, std: float, recwarn) -> None:
    values = np.random.default_rng(0).normal(mean, std, (1, 200, 200)).astype(dtype)
    image = GeoImage(values, np.ones((200, 200), bool))
    normalizer = Normalizer.from_images([image])
    assert not recwarn.list
    out = normalizer(image)
    expected = (values.astype(np.float64) - values.astype(np.float64).mean()) / values.astype(np.float64).std()
    np.testing.assert_allclose(out, expected, atol=0.05)


def test_statistics_count_the_valid_values_of_each_band() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.normal((10, 200), (2, 30), (50, 60, 2)).transpose(2, 0, 1).astype(np.float32)
    mask = rng.random((2, 50, 60)) > [[[0.6]], [[0.2]]]
    dirty = np.where(mask, pixels, np.float32(-9999))
    image = GeoImage.from_mask(dirty, mask)
    normalizer = Normalizer.from_images([image])
    np.testing.assert_allclose(normalizer.mean, [pixels[band][mask[band]].mean() for band in (0, 1)], rtol=1e-5)
    np.testing.assert_allclose(normalizer.std, [pixels[band][mask[band]].std() for band in (0, 1)], rtol=1e-5)
    out = normalizer(image)
    assert (out[~mask] == 0).all()
    assert np.abs(out[mask]).max() < 6


def test_a_band_without_a_valid_value_is_named() -> None:
    mask = np.ones((2, 4, 4), bool)
    mask[1] = False
    with pytest.raises(InputError, match=r"none in band 2 \(nir\)"):
        Normalizer.from_images([GeoImage.from_mask(np.ones((2, 4, 4)), mask)], ["red", "nir"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_no_nan_reaches_a_network_whatever_a_source_calls_valid(value: float) -> None:
    pixels = np.full((1, 3, 3), 5.0)
    pixels[0, 1, 1] = value
    out = Normalizer((4.0,), (2.0,))(GeoImage(pixels, np.ones((3, 3), bool)))
    assert out[0, 1, 1] == 0
    assert (np.delete(out.ravel(), 4) == 0.5).all()


def test_another_band_count_is_an_error() -> None:
    with pytest.raises(InputError, match="expected 3 bands, got 4"):
        Normalizer.from_images([_image(3)])(_image(4))


def test_no_valid_pixel_is_an_error() -> None:
    with pytest.raises(InputError, match="valid pixels"):
        Normalizer.from_images([GeoImage(np.zeros((1, 4, 4)), np.zeros((4, 4), bool))])


def test_dict_round_trip() -> None:
    normalizer = Normalizer((1.0, 2.0), (3.0, 4.0))
    assert Normalizer.from_dict(normalizer.to_dict()) == normalizer
