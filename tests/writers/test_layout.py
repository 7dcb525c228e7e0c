"""Names of bands and tags in TIFF and OME-TIFF."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest
import rasterio
from nasty_names import NASTY_NAMES
from rasterio.enums import ColorInterp

from perf_vit.sources import open_source
from perf_vit.writers import CogWriter, RasterLayout, holds_layout, write_ome_tiff

NAMES = (*NASTY_NAMES, "a\nb", "a\tb", "\u202eabc")
# XML has no characters for these.
ESCAPED = {"\x1b[31mred": r"\x1b[31mred", "caf\udce9": r"caf\udce9"}


def write(path, names) -> RasterLayout:
    layout = {"height": 32, "width": 32, "num_bands": len(names), "tags": {"classes": "\n".join(names)}}
    with CogWriter(path, RasterLayout(dtype="uint8", band_names=names, **layout)) as writer:
        writer.write(0, np.zeros((len(names), 32, 32), np.uint8))
    return RasterLayout(dtype=np.dtype("uint8"), band_names=names, **layout)


def test_bands_and_tags_hold_names_exactly(tmp_path) -> None:
    layout = write(tmp_path / "map.tif", NAMES)
    assert open_source(tmp_path / "map.tif").band_names == NAMES
    with rasterio.open(tmp_path / "map.tif") as file:
        assert file.tags()["classes"] == "\n".join(NAMES)
    assert holds_layout(tmp_path / "map.tif", layout)


@pytest.mark.parametrize(("name", "shown"), ESCAPED.items())
def test_what_xml_cannot_hold_is_escaped_and_the_file_is_recognised(name, shown, tmp_path) -> None:
    layout = write(tmp_path / "map.tif", (name, "x"))
    assert open_source(tmp_path / "map.tif").band_names == (shown, "x")
    assert holds_layout(tmp_path / "map.tif", layout)


@pytest.mark.parametrize("num_bands", [2, 4, 5])
def test_no_band_of_ours_is_taken_for_a_mask(num_bands, tmp_path) -> None:
    write(tmp_path / "map.tif", ("a", "alpha", "cloud mask", "masked", "valid")[:num_bands])
    with open_source(tmp_path / "map.tif") as source:
        assert source.num_bands == num_bands
        assert source.read(source.extent).valid.all()
    with rasterio.open(tmp_path / "map.tif") as file:
        assert ColorInterp.alpha not in file.colorinterp


def test_an_ome_tiff_holds_names_exactly_in_xml(tmp_path) -> None:
    tifffile = pytest.importorskip("tifffile")
    names = (*NAMES, *ESCAPED)
    write(tmp_path / "map.tif", names)
    out = tmp_path / "<b>&'\".ome.tif"
    write_ome_tiff(out, tmp_path / "map.tif", mpp=1.0, channel_names=names, tags={name: name for name in names})
    root = ET.fromstring(tifffile.TiffFile(out).ome_metadata)
    channels = [each.get("Name") for each in root.iter() if each.tag.endswith("Channel")]
    assert channels == [*NAMES, *ESCAPED.values()]
    pairs = {each.get("K"): each.text for each in root.iter() if each.tag.endswith("}M")}
    assert pairs == {name: name for name in (*NAMES, *ESCAPED.values())}
