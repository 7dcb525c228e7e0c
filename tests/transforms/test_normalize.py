import numpy as np
import pytest

from perf_vit.errors import InputError
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


def test_a_constant_band_maps_to_0() -> None:
    image = GeoImage(np.full((1, 4, 4), 7, np.uint8), np.ones((4, 4), bool))
    assert (Normalizer.from_images([image])(image) == 0).all()


def test_another_band_count_is_an_error() -> None:
    with pytest.raises(InputError, match="expected 3 bands, got 4"):
        Normalizer.from_images([_image(3)])(_image(4))


def test_no_valid_pixel_is_an_error() -> None:
    with pytest.raises(InputError, match="valid pixels"):
        Normalizer.from_images([GeoImage(np.zeros((1, 4, 4)), np.zeros((4, 4), bool))])


def test_dict_round_trip() -> None:
    normalizer = Normalizer((1.0, 2.0), (3.0, 4.0))
    assert Normalizer.from_dict(normalizer.to_dict()) == normalizer
