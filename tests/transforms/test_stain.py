import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perf_vit.errors import ConfigError, InputError
from perf_vit.transforms import StainJitter
from perf_vit.types import GeoImage

# Optical densities of the two stains and of DAB in red, green and blue, as Ruifrok & Johnston measured them.
STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
STAINS /= np.linalg.norm(STAINS, axis=1, keepdims=True)


def stained(concentrations: np.ndarray) -> GeoImage:
    """Pixels with the concentrations [3, H, W]."""
    light = 255 * 10 ** -np.einsum("shw,sc->chw", concentrations, STAINS)
    return GeoImage(np.rint(light).astype(np.uint8), np.ones(light.shape[1:], bool))


def measured(image: GeoImage) -> np.ndarray:
    """Concentrations [3, H, W] of the pixels."""
    densities = -np.log10(image.pixels / 255)
    return np.einsum("chw,cs->shw", densities, np.linalg.inv(STAINS))


def tissue() -> np.ndarray:
    return np.random.default_rng(0).uniform(0.1, 0.3, (3, 40, 40))


@pytest.mark.parametrize("amount", [0.05, 0.2])
def test_each_stain_has_a_factor_and_a_shift_of_its_own(amount) -> None:
    before = tissue()
    jitter = StainJitter(amount)
    drawn = []
    for seed in range(12):
        after = measured(jitter(stained(before), seed))
        for one, other in zip(before, after, strict=True):
            factor, shift = np.polyfit(one.ravel(), other.ravel(), 1)
            assert np.abs(factor * one + shift - other).max() < 0.03
            assert abs(factor - 1) <= amount + 0.02
            assert abs(shift) <= amount / 4 + 0.01
            drawn.append((factor, shift))
    spread = np.std(drawn, axis=0)
    assert spread[0] > amount / 4
    assert spread[1] > amount / 16
    factors = np.array(drawn)[:, 0].reshape(-1, 3)
    assert np.abs(np.corrcoef(factors.T)[~np.eye(3, dtype=bool)]).max() < 0.8


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000))
def test_no_jitter_leaves_any_colour_as_it_is(height, width, seed) -> None:
    pixels = np.random.default_rng(seed).integers(1, 256, (3, height, width)).astype(np.uint8)
    valid = pixels[0] > 30
    out = StainJitter(0.0)(GeoImage(pixels, valid, mpp=0.5), seed)
    assert np.abs(out.pixels.astype(int) - pixels).max() <= 1
    assert out.pixels.dtype == np.uint8
    assert out.valid is valid
    assert out.mpp == 0.5


def test_the_seed_alone_decides_and_the_image_given_is_kept() -> None:
    image = stained(tissue())
    kept = image.pixels.copy()
    first, second = StainJitter(0.2), StainJitter(0.2)
    second(image, 1)
    assert np.array_equal(first(image, 5).pixels, second(image, 5).pixels)
    assert not np.array_equal(first(image, 5).pixels, first(image, 6).pixels)
    assert np.array_equal(image.pixels, kept)


@pytest.mark.parametrize(("num_bands", "dtype"), [(1, "uint8"), (4, "uint8"), (13, "uint16"), (3, "uint16")])
def test_other_bands_and_dtypes_are_refused(num_bands, dtype) -> None:
    image = GeoImage(np.ones((num_bands, 8, 8), dtype), np.ones((8, 8), bool))
    with pytest.raises(InputError, match=f"3 bands of uint8 .* got {num_bands} of {dtype}"):
        StainJitter(0.2)(image, 0)


@pytest.mark.parametrize("amount", [-0.1, 1.5])
def test_amounts_that_make_no_sense_are_refused(amount) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        StainJitter(amount)
