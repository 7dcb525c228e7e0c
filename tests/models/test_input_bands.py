"""Input that differs from the training images is told of; ordinary differences between scenes are not."""

import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import rasterio

from perf_vit.errors import DataWarning
from perf_vit.models import InputBands, InputCheck
from perf_vit.sources import RasterSource, open_source
from perf_vit.types import GeoImage

NAMES = ("blue", "green", "red", "nir")
REFLECTANCE = np.array([600, 900, 1100, 3000.0])


def scene(seed: int, *, tint: float = 0.5, height: int = 150, width: int = 130) -> np.ndarray:
    """A scene of reflectances in 1/10,000, each with its own light and land cover."""
    rng = np.random.default_rng(seed)
    level = REFLECTANCE * np.exp(rng.normal(0, tint, 4))
    texture = np.exp(rng.normal(0, rng.uniform(0.05, 0.6), (height, width, 4)))
    return np.clip(level * texture, 1, 15_000).transpose(2, 0, 1)


def trained(dtype: str = "uint16", factor: float = 1.0) -> InputBands:
    images = [scene(seed) * factor for seed in range(8)]
    return InputBands.measure([GeoImage(each.astype(dtype), np.ones(each.shape[1:], bool)) for each in images], NAMES)


@pytest.fixture
def write(make_scene):
    def _write(pixels: np.ndarray, names=NAMES, **options):
        path = make_scene(pixels=pixels, nodata=None, photometric="minisblack", **options)
        with rasterio.open(path, "r+") as dataset:
            dataset.descriptions = names
        return path

    return _write


def said(check: InputCheck, *sources) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for source in sources:
            check(source)
    return [str(each.message) for each in caught if each.category is DataWarning]


@pytest.mark.parametrize("seed", range(100, 130))
def test_another_scene_of_the_same_sensor_is_nothing_to_tell_of(write, seed) -> None:
    assert said(InputCheck(trained()), open_source(write(scene(seed, tint=0.7).astype(np.uint16)))) == []


def test_water_snow_and_shadow_are_nothing_to_tell_of(write) -> None:
    rng = np.random.default_rng(0)
    for level in ([500, 350, 200, 90], [8000, 8200, 8100, 7900], [150, 160, 170, 500]):
        pixels = rng.normal(np.array(level), 15, (90, 80, 4)).transpose(2, 0, 1).astype(np.uint16)
        assert said(InputCheck(trained()), open_source(write(pixels))) == []


@pytest.mark.parametrize("dtype", ["float32", "int16", "float64", "int32"])
def test_another_dtype_of_the_same_values_is_harmless(write, dtype) -> None:
    assert said(InputCheck(trained()), open_source(write(scene(100).astype(dtype)))) == []


@pytest.mark.parametrize(
    ("convert", "numbers"),
    [
        (
            lambda pixels: (pixels / 10_000).astype(np.float32),
            r"0\.\d+ to 0\.\d+, in training \d+.* \(pixels of float32",
        ),
        (
            lambda pixels: np.clip(pixels / 40, 0, 255).astype(np.uint8),
            r"in training .* \(pixels of uint8, in training",
        ),
        (lambda pixels: (pixels * 100).astype(np.uint32), "of 4 bands have another range"),
        (lambda pixels: (10 * np.log10(pixels / 10_000)).astype(np.float32), "of 4 bands have another range"),
    ],
    ids=["0 to 1", "8 bits", "other units", "decibel"],
)
def test_values_of_another_range_are_told_with_numbers(write, convert, numbers) -> None:
    path = write(convert(scene(100)))
    (message,) = said(InputCheck(trained()), open_source(path))
    assert message.startswith(f"{path} is not like the images that the model was trained on")
    assert re.search(numbers, message)
    assert "2nd to 98th percentile" in message


def test_a_model_of_values_up_to_1_is_not_for_thousands(write) -> None:
    assert len(said(InputCheck(trained("float32", 1e-4)), open_source(write(scene(100).astype(np.uint16))))) == 1


def test_one_band_far_from_its_range_is_named(write) -> None:
    kelvin = replace(trained(), low=(600, 900, 1100, 275.0), high=(2000, 2500, 3000, 305.0))
    pixels = scene(100)
    pixels[3] = np.random.default_rng(0).normal(15, 5, pixels.shape[1:])
    (message,) = said(InputCheck(kelvin), open_source(write(pixels.astype(np.float32))))
    assert "values of 1 of 4 bands have another range, such as band 4 (nir)" in message


@pytest.mark.parametrize(
    ("names", "how"),
    [
        (("blue", "green", "nir", "red"), "in another order: blue, green, nir, red, in training blue, green, red, nir"),
        (("VV", "VH", "angle", "slope"), "others: VV, VH, angle, slope, in training"),
        (("Blue", "GREEN", "red ", "NIR"), None),
        ((None, None, None, None), None),
        (("Band 1", "Band 2", "Band 3", "Band 4"), None),
    ],
)
def test_names_of_bands_that_differ_are_told(write, names, how) -> None:
    found = said(InputCheck(trained()), open_source(write(scene(100).astype(np.uint16), names)))
    assert [how in each for each in found] == ([] if how is None else [True])


def test_a_run_is_told_once_and_reads_each_input_once_at_most(write, monkeypatch) -> None:
    reads = []
    read = RasterSource.read
    monkeypatch.setattr(RasterSource, "read", lambda self, window: reads.append(window) or read(self, window))
    fine, wrong = (write(each.astype(np.float32)) for each in (scene(100), scene(101) / 10_000))
    check = InputCheck(trained())
    assert len(said(check, open_source(fine), open_source(wrong), open_source(wrong))) == 1
    assert len(reads) == 2
    reads.clear()
    large = open_source(write(np.ones((4, 1500, 1400), np.uint8)))
    assert len(said(InputCheck(trained()), large)) == 1
    # No more pixels than a reduced read gives.
    assert sum(window.height * window.width for window in reads) < 512**2


def test_missing_values_and_empty_images_say_nothing(write) -> None:
    pixels = scene(100).astype(np.float32)
    pixels[:, :140] = np.nan
    assert said(InputCheck(trained()), open_source(write(pixels))) == []
    assert said(InputCheck(trained()), open_source(write(np.full((4, 30, 30), np.nan, np.float32)))) == []
    assert said(InputCheck(trained()), open_source(write(np.zeros((4, 30, 30), np.uint16)))) == []
    assert said(InputCheck(None), open_source(write(scene(1).astype(np.uint16), ("a", "b", "c", "d")))) == []


def test_dict_round_trip() -> None:
    bands = trained()
    assert InputBands.from_dict(bands.to_dict()) == bands
