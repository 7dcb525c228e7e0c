import numpy as np
import pytest
from nasty_names import NASTY_NAMES, UNSEEN_NAMES
from PIL import Image, ImageFont

from perf_vit.plotting import label_font, label_text
from perf_vit.sources import open_source
from perf_vit.writers import CogWriter, RasterLayout, write_map_quicklook


@pytest.mark.parametrize("name", ["$x_1$", "[bold]", "ä", "дорога", "μ", "طريق"])
def test_names_in_letters_of_the_font_stay_as_they_are(name) -> None:
    assert label_text(name) == name


@pytest.mark.parametrize(
    ("name", "shown"), [("漢字", r"\u6f22\u5b57"), ("a🌳", r"a\U0001f333"), ("a\nb", r"a\nb"), ("\udce9", r"\udce9")]
)
def test_letters_that_the_font_lacks_are_escaped(name, shown) -> None:
    assert label_text(name) == shown


def test_long_names_are_cut() -> None:
    assert label_text("ab" * 100) == "ab" * 19 + "a…"


def test_the_font_is_one_of_outlines() -> None:
    assert isinstance(label_font(16), ImageFont.FreeTypeFont)


def test_a_legend_tells_all_names_apart(make_scene, tmp_path) -> None:
    source = open_source(make_scene(height=40, width=40))
    layout = {"height": 40, "width": 40, "num_bands": 1, "dtype": "uint8", "nodata": 255}
    with CogWriter(tmp_path / "map.tif", RasterLayout(**layout)) as writer:
        writer.write(0, np.zeros((1, 40, 40), np.uint8))
    pictures = set()
    names = [*NASTY_NAMES, *UNSEEN_NAMES, "山", "caf\udce9"]
    for name in names:
        write_map_quicklook(source, tmp_path / "map.tif", tmp_path / "map.png", [name])
        pictures.add(np.asarray(Image.open(tmp_path / "map.png")).tobytes())
    # A blank at the end is not seen, all else is.
    assert len(pictures) == len(names)
