import re

import numpy as np
import pytest
from PIL import Image

from perf_vit.errors import InputError, OutputError
from perf_vit.plotting import colorize, default_colormap, rgb_from, save_png
from perf_vit.reporting.outputs import write_map_report
from perf_vit.sources import open_source
from perf_vit.types import IGNORE_INDEX, GeoImage
from perf_vit.writers import CogWriter, RasterLayout, write_map_quicklook


@pytest.mark.parametrize("num_bands", [1, 2, 3, 7])
def test_a_stretch_uses_the_whole_range_and_shows_invalid_pixels_white(num_bands: int) -> None:
    pixels = np.random.default_rng(0).normal(5000, 300, (num_bands, 60, 60)).astype(np.float32)
    valid = np.ones((60, 60), bool)
    valid[:5] = False
    pixels[:, :5] = np.nan
    rgb = rgb_from(GeoImage(pixels, valid))
    assert rgb.shape == (60, 60, 3)
    assert (rgb[:5] == 255).all()
    assert rgb[5:].min() == 0
    assert np.ptp(rgb[5:]) == 255


def test_three_bands_of_8_bits_are_shown_as_they_are() -> None:
    pixels = np.random.default_rng(0).integers(60, 90, (4, 8, 9)).astype(np.uint8)
    image = GeoImage(pixels, np.ones((8, 9), bool))
    assert (rgb_from(image, [3, 2, 1]) == pixels[[2, 1, 0]].transpose(1, 2, 0)).all()
    assert np.ptp(rgb_from(image, [1])) == 255


def test_colours_are_distinct_and_ignored_is_transparent() -> None:
    table = default_colormap(40)
    assert len({table[i] for i in range(40)}) == 40
    assert table[IGNORE_INDEX][3] == 0
    labels = np.array([[0, 1, IGNORE_INDEX]], np.uint8)
    assert colorize(labels, table).tolist() == [[list(table[0]), list(table[1]), [0, 0, 0, 0]]]
    assert colorize(labels, {1: (9, 8, 7)}).tolist() == [[[0, 0, 0, 0], [9, 8, 7, 255], [0, 0, 0, 0]]]


@pytest.mark.parametrize(("height", "width"), [(70, 90), (1500, 40), (30, 2100)])
def test_a_quicklook_shows_scene_and_map(make_scene, tmp_path, height: int, width: int) -> None:
    source = open_source(make_scene(height=height, width=width))
    layout = {"height": height, "width": width, "num_bands": 1, "dtype": "uint8", "nodata": 255}
    with CogWriter(tmp_path / "map.tif", RasterLayout(crs=source.crs, transform=source.transform, **layout)) as writer:
        writer.write(0, np.random.default_rng(0).integers(0, 2, (1, height, width)).astype(np.uint8))
    write_map_quicklook(source, tmp_path / "map.tif", tmp_path / "map.png", ["a", "b"])
    picture = np.asarray(Image.open(tmp_path / "map.png"))[..., :3]
    colors = {tuple(color) for color in picture.reshape(-1, 3)}
    assert {color[:3] for color in (default_colormap(2)[0], default_colormap(2)[1])} <= colors
    assert max(picture.shape) < 4000
    with pytest.raises(OutputError, match="can't write"):
        write_map_quicklook(source, tmp_path / "map.tif", tmp_path / "map.png" / "map.png", ["a", "b"])


def test_every_class_has_a_colour_of_its_own() -> None:
    assert len(set(default_colormap(255).values())) == 256
    assert len(set(default_colormap(255, 254).values())) == 256


@pytest.mark.parametrize("background", [None, 0, 2])
def test_only_a_class_named_as_background_is_grey(make_scene, tmp_path, background) -> None:
    colors, plain = default_colormap(4, background), default_colormap(4)
    grey = [index for index in range(4) if len(set(colors[index][:3])) == 1]
    assert grey == ([] if background is None else [background])
    others = [index for index in range(4) if index != background]
    assert [colors[index] for index in others] == [plain[index] for index in range(len(others))]
    source = open_source(make_scene(height=40, width=40))
    layout = {"height": 40, "width": 40, "num_bands": 1, "dtype": "uint8", "nodata": 255}
    with CogWriter(tmp_path / "map.tif", RasterLayout(crs=source.crs, transform=source.transform, **layout)) as writer:
        writer.write(0, np.zeros((1, 40, 40), np.uint8))
    write_map_quicklook(source, tmp_path / "map.tif", tmp_path / "map.png", list("abcd"), background=background)
    picture = np.asarray(Image.open(tmp_path / "map.png"))
    assert (picture == colors[0][:3]).all(-1).mean() > 0.25


def test_a_quicklook_of_probabilities_shows_the_likeliest_class(make_scene, tmp_path) -> None:
    source = open_source(make_scene(height=40, width=40))
    scores = np.full((2, 40, 40), 0.1, np.float32)
    scores[1] = 0.9
    scores[:, :10] = np.nan
    layout = {"height": 40, "width": 40, "num_bands": 2, "dtype": "float32", "nodata": float("nan")}
    with CogWriter(tmp_path / "p.tif", RasterLayout(crs=source.crs, transform=source.transform, **layout)) as writer:
        writer.write(0, scores)
    write_map_quicklook(source, tmp_path / "p.tif", tmp_path / "p.png", ["sea", "ship"])
    picture = np.asarray(Image.open(tmp_path / "p.png"))
    share = (picture == default_colormap(2)[1][:3]).all(-1).mean()
    assert share > 0.25


@pytest.mark.parametrize(("dtype", "low", "high", "nodata"), [("uint8", 0, 1, 255), ("uint8", 100, 150, 255),
                                                               ("float32", 0.3, 0.6, float("nan"))])  # fmt: skip
def test_a_quicklook_of_several_labels_shows_where_none_is_true(make_scene, tmp_path, dtype, low, high, nodata) -> None:
    source = open_source(make_scene(height=40, width=40))
    scores = np.full((2, 40, 40), low, dtype)
    scores[1, 10:30] = high
    scores[:, 30:] = nodata
    scale = 1 / 254 if high > 1 else 1.0
    layout = {"height": 40, "width": 40, "num_bands": 2, "dtype": dtype, "nodata": nodata, "scale": scale}
    with CogWriter(tmp_path / "p.tif", RasterLayout(crs=source.crs, transform=source.transform, **layout)) as writer:
        writer.write(0, scores)
    write_map_quicklook(source, tmp_path / "p.tif", tmp_path / "p.png", ["wet", "built"], multilabel=True, scale=scale)
    picture = np.asarray(Image.open(tmp_path / "p.png"))
    colors = default_colormap(3, background=0)
    none, wet, built = ((picture == colors[index][:3]).all(-1).mean() for index in range(3))
    assert built == pytest.approx(2 * none, rel=0.1)
    # A patch of the legend.
    assert 0 < wet < none / 10


@pytest.mark.parametrize(("multilabel", "colors"), [(False, [3, 16]), (True, [4, 17])])
def test_pictures_of_more_classes_than_colours(make_scene, tmp_path, multilabel: bool, colors: list[int]) -> None:
    source = open_source(make_scene(height=40, width=40))
    scores = np.zeros((300, 40, 40), np.float32)
    scores[3, :10] = 0.8
    # Of colours of 255, it has that of class 16: the first may be a background. Around 256, it would be class 14.
    scores[270, 10:] = 0.9
    probabilities = make_scene(pixels=scores, nodata=None)
    names = [f"class {number}" for number in range(300)]
    write_map_quicklook(source, probabilities, tmp_path / "p.png", names, multilabel=multilabel)
    picture = np.asarray(Image.open(tmp_path / "p.png"))[:512]
    table = default_colormap(301, 0 if multilabel else None)
    shares = [(picture == table[index][:3]).all(-1).mean() for index in colors]
    assert shares[1] == pytest.approx(3 * shares[0], rel=0.1)
    assert shares[0] > 0.05
    write_map_report(
        tmp_path / "p.html", source, probabilities, names, multilabel=multilabel, settings={"window_size": 64}
    )
    areas = dict(re.findall(r"class (\d+)<.{0,60}?>(\d\.\d{3})<", (tmp_path / "p.html").read_text(), re.DOTALL))
    assert (areas["3"], areas["270"], areas["14"]) == ("0.250", "0.750", "0.000")


@pytest.mark.parametrize("bands", [[1, 2], [4], [0, 1, 2]])
def test_a_picture_of_other_bands_is_refused(bands: list[int]) -> None:
    with pytest.raises(InputError, match="one or three of the bands 1 to 3"):
        rgb_from(GeoImage(np.ones((3, 4, 4)), np.ones((4, 4), bool)), bands)


def test_a_picture_without_valid_or_differing_pixels_is_still_one() -> None:
    image = GeoImage(np.full((3, 4, 4), 7, np.uint16), np.zeros((4, 4), bool))
    assert (rgb_from(image) == 255).all()
    image.valid[:] = True
    assert np.ptp(rgb_from(image)) == 0


def test_a_picture_is_saved_with_its_transparency(tmp_path) -> None:
    painted = colorize(np.array([[0, IGNORE_INDEX]], np.uint8), default_colormap(1))
    save_png(tmp_path / "new" / "labels.png", painted)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "labels.png")), painted)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["labels.png"]
