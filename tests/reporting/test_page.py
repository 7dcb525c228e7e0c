"""Pages of reports: they need no other file, and no name breaks them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from pages import Parsed, parsed
from PIL import Image

from perf_vit.plotting import default_colormap
from perf_vit.reporting import Page, Preview, Row, Settings, TextTable, figure_of, picture_layer, shape_layer
from perf_vit.reporting.page import picture_uri
from perf_vit.workflows.progress import new_table

NASTY = "<script>alert(1)</script> & \"a\" '\x1b[31m' 漢"


def picture(height: int = 40, width: int = 60, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, channels)).astype(np.uint8)


def write(tmp_path: Path, *blocks, **options) -> Parsed:
    page = Page(title=NASTY, subtitle=NASTY, numbers={NASTY: NASTY})
    page.add(NASTY, *blocks, **options)
    return parsed(page.write(tmp_path / "page.html"))


def test_names_are_text_and_nothing_is_fetched(tmp_path) -> None:
    table = new_table(NASTY, (NASTY, "IoU"))
    table.add_row(NASTY, "0.500")
    shapes = shape_layer(NASTY, [("#ff0000", [0, 0, 5, 5])])
    found = write(
        tmp_path,
        Row(figures=[figure_of(picture(), NASTY, note=NASTY)], title=NASTY),
        TextTable.of_rich(table, {NASTY: "#123456"}),
        Settings.of_values(NASTY, {NASTY: [NASTY, float("nan")]}),
        Preview(size=(40, 60), layers=[picture_layer(NASTY, picture()), shapes]),
        text=NASTY,
        legend=[(NASTY, "#123456")],
    )
    # That of the viewer, and no other.
    assert found.num_scripts == 1
    assert "alert(1)" in found.text
    assert found.links == []
    assert all(uri.startswith("data:image/") for uri in found.images)
    assert "default-src 'none'" in found.policy


def test_a_page_without_pictures_has_no_script(tmp_path) -> None:
    found = write(tmp_path, TextTable(columns=["class", "IoU"], rows=[["a", "0.250"], ["b", "-"], ["c", "1,234"]]))
    assert found.num_scripts == 0
    # The bar of a score, and of no other number.
    assert found.shares == ["25.0%"]


def test_sections_without_blocks_are_left_out() -> None:
    page = Page(title="a")
    page.add("empty", None)
    assert page.sections == []


def test_drawings_keep_their_pixels_and_imagery_is_small() -> None:
    colors = np.array(list(default_colormap(9).values()), np.uint8)
    drawn = colors[np.random.default_rng(0).integers(0, 10, (64, 48))]
    for given in (drawn, np.ascontiguousarray(drawn[..., :3])):
        uri = picture_uri(given, lossy=False)
        assert uri.startswith("data:image/png;base64,")
        assert np.array_equal(np.asarray(decoded(uri).convert("RGBA"))[..., : given.shape[-1]], given)
    assert picture_uri(picture()).startswith("data:image/webp;base64,")
    # More than 256 colours.
    many = picture(64, 64, 4)
    assert np.array_equal(np.asarray(decoded(picture_uri(many))), many)


def decoded(uri: str) -> Image.Image:
    import base64
    import io

    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


@pytest.mark.parametrize(
    ("width", "pixel_size", "percent", "text"),
    [
        (400, (0.5, "m"), 25.0, "50 m"),
        (1000, (30.0, "m"), 100 * 5000 / 30_000, "5 km"),
        (300, (0.25, "µm"), 100 * 10 / 75, "10 µm"),
        (7, (1.0, "px"), 100 / 7, "1 px"),
    ],
)
def test_scale_bars_have_round_lengths(width, pixel_size, percent, text) -> None:
    figure = figure_of(picture(8, width), "a", pixel_size=pixel_size)
    assert figure.scale is not None
    assert figure.scale[0] == pytest.approx(percent)
    assert figure.scale[1] == text


def test_the_tiles_of_a_preview_make_the_picture() -> None:
    drawn = np.zeros((700, 1300, 4), np.uint8)
    drawn[100:, 900:] = (1, 2, 3, 255)
    layer = picture_layer("map", drawn)
    assert [level["width"] for level in layer["levels"]] == [325, 650, 1300]
    finest = layer["levels"][-1]
    assert (finest["rows"], finest["cols"], len(finest["tiles"])) == (2, 3, 6)
    tiles = [np.asarray(decoded(uri).convert("RGBA")) for uri in finest["tiles"]]
    rows = [np.concatenate(tiles[start : start + 3], axis=1) for start in (0, 3)]
    assert np.array_equal(np.concatenate(rows), drawn)


def test_a_preview_is_bounded() -> None:
    layer = picture_layer("image", picture(1500, 1500), max_bytes=400_000)
    sizes = [sum(map(len, level["tiles"])) for level in layer["levels"]]
    assert sum(sizes) <= 400_000
    assert [level["width"] for level in layer["levels"]] == [375, 750][: len(sizes)]


def test_a_preview_is_json_of_the_page() -> None:
    preview = Preview(size=(4, 6), layers=[shape_layer("</script>", [("#fff", [0.123, 1])])], pixel_size=(0.5, "µm"))
    assert "</" not in preview.json
    content = json.loads(preview.json)
    assert (content["width"], content["height"], content["unit_per_px"], content["unit"]) == (6, 4, 0.5, "µm")
    assert content["layers"][0]["name"] == "</script>"
    assert content["layers"][0]["shapes"] == [["#fff", [0.1, 1.0]]]


def test_the_viewer_needs_no_network() -> None:
    folder = Path(__file__).parents[2] / "perf_vit" / "reporting" / "templates"
    for path in folder.iterdir():
        assert not re.search(r"https?:|@import|fetch\(|XMLHttpRequest|src=\"(?!\{\{)", path.read_text()), path
