"""Pixel size of a slide: what the file states, what fills in for it, what replaces it, in both readers."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from slides import levels_of, noise, write_pyramid, write_tiff

import perf_vit.errors
from perf_vit.errors import DataWarning, InputError
from perf_vit.sources import open_source

KINDS = ["svs", "ome"]


@pytest.fixture(autouse=True)
def _all_warnings(monkeypatch) -> None:
    monkeypatch.setattr(perf_vit.errors, "_warned", set())


def write(folder: Path, kind: str, mpp: float | None) -> Path:
    """A slide that states a pixel size, in a format of each reader."""
    if kind == "svs":
        return write_pyramid(folder / "a.svs", levels_of(200, 160, 2), aperio_mpp=mpp, magnification=None)
    return write_tiff(folder / "a.ome.tif", [noise(200, 160)], "YXS", size=None if mpp is None else (mpp, mpp))


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_file_states_wins(tmp_path, kind, recwarn) -> None:
    path = write(tmp_path, kind, 0.5)
    assert open_source(path).mpp == 0.5
    assert not [each for each in recwarn if each.category is DataWarning]
    with pytest.warns(DataWarning, match=r"states 0\.5 .* instead of slide_mpp=0\.25; slide_mpp_override replaces"):
        source = open_source(path, slide_mpp=0.25, mpp=1.0)
    assert (source.slide_mpp, source.size) == ((0.5, 0.5), (100, 80))


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_agrees_with_the_file_is_not_warned_about(tmp_path, kind, recwarn) -> None:
    assert open_source(write(tmp_path, kind, 0.4990), slide_mpp=0.5).mpp == pytest.approx(0.4990)
    assert not [each for each in recwarn if each.category is DataWarning]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stated", [None, 0.5, 353.0])
def test_an_override_replaces_what_the_file_states(tmp_path, kind, stated) -> None:
    path = write(tmp_path, kind, stated)
    source = open_source(path, slide_mpp=0.4, slide_mpp_override=(0.25, 0.5), mpp=1.0)
    assert (source.slide_mpp, source.size) == ((0.25, 0.5), (100, 40))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stated", [0.0004, 0.049, 20.1, 353.0])
def test_an_implausible_size_is_unknown(tmp_path, kind, stated) -> None:
    path = write(tmp_path, kind, stated)
    with pytest.warns(DataWarning, match=r"which isn't the 0\.05 to 20 of a microscope, .* give slide_mpp"):
        assert open_source(path).mpp is None
    with pytest.raises(InputError, match=r"isn't the 0\.05 to 20 .* can't be read at mpp=1; .* slide_mpp=0\.25"):
        open_source(path, mpp=1.0)
    assert open_source(path, mpp=1.0, slide_mpp=0.5).size == (100, 80)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stated", [0.05, 20.0])
def test_the_bounds_are_plausible(tmp_path, kind, stated) -> None:
    assert open_source(write(tmp_path, kind, stated)).mpp == pytest.approx(stated)


@pytest.mark.parametrize("dpi", [72, 96, 150, 300, 600, 1200])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_resolutions_of_print_are_no_pixel_size(tmp_path, dpi, dtype) -> None:
    path = tmp_path / "a.tif"
    place = {"resolution": (dpi, dpi), "resolutionunit": "INCH", "metadata": None}
    tifffile.imwrite(path, noise(128, 128, 3, dtype), tile=(64, 64), photometric="rgb", **place)
    with pytest.raises(InputError, match=r"isn't the 0\.05 to 20"):
        open_source(path, mpp=0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [0.0, -1.0, 0.04, 20.5, float("nan"), float("inf"), (0.5, 90.0), "x40", (0.5,)])
@pytest.mark.parametrize("option", ["slide_mpp", "slide_mpp_override"])
def test_a_given_size_must_be_plausible(tmp_path, kind, given, option) -> None:
    with pytest.raises(InputError, match=rf"{option} of .* must be a number.* with 0\.05 to 20 .*, got "):
        open_source(write(tmp_path, kind, 0.5), **{option: given})


def with_objective(folder: Path, kind: str, power: float, mpp: float | None = None) -> Path:
    if kind == "svs":
        return write_pyramid(folder / "a.svs", levels_of(200, 160, 2), aperio_mpp=mpp, magnification=power)
    path = write(folder, "ome", mpp)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        objective = f'<Instrument ID="Instrument:0"><Objective ID="Objective:0" NominalMagnification="{power}"/>'
        xml = tiff.pages[0].description.replace("<Image ", f"{objective}</Instrument><Image ", 1)
        xml = xml.replace("<Pixels ", '<ObjectiveSettings ID="Objective:0"/><Pixels ', 1)
        tiff.pages[0].tags["ImageDescription"].overwrite(xml.encode())
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("power", "mpp"), [(40, 0.25), (20, 0.5), (2.5, 4.0)])
def test_objective_power_helps_when_told_so(tmp_path, kind, power, mpp) -> None:
    path = with_objective(tmp_path, kind, power)
    assert open_source(path).mpp is None
    with pytest.raises(InputError, match=rf'slide_mpp="objective" for {mpp:g} from its {power:g}x objective'):
        open_source(path, mpp=8.0)
    assert open_source(path, slide_mpp="objective").mpp == mpp


@pytest.mark.parametrize("kind", KINDS)
def test_objective_power_does_not_replace_what_the_file_states(tmp_path, kind, recwarn) -> None:
    path = with_objective(tmp_path, kind, 40, 0.5)
    assert open_source(path, slide_mpp="objective").mpp == 0.5
    assert not [each for each in recwarn if each.category is DataWarning]


@pytest.mark.parametrize("kind", KINDS)
def test_without_an_objective_the_error_says_so(tmp_path, kind) -> None:
    path = write(tmp_path, kind, None)
    assert open_source(path, slide_mpp="objective").mpp is None
    with pytest.raises(InputError, match="doesn't state how large its pixels are, and no objective power, so it can't"):
        open_source(path, mpp=1.0, slide_mpp="objective")


def test_pixels_read_with_an_override_are_those_of_its_level(tmp_path) -> None:
    path = write(tmp_path, "svs", 0.5)
    source = open_source(path, mpp=0.5, slide_mpp_override=0.25)
    assert np.array_equal(source.read(source.extent).pixels, levels_of(200, 160, 2)[1].transpose(2, 0, 1))
