import hashlib
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import openslide
import pytest
import rasterio
import tifffile

from perf_vit.errors import InputError, OutputError
from perf_vit.sources import open_source
from perf_vit.writers import CogWriter, RasterLayout, write_ome_tiff

NAMESPACE = "{http://www.openmicroscopy.org/Schemas/OME/2016-06}"
COLORS = {value: (20 * value, 255 - 20 * value, 7 * value, 255) for value in range(5)}


@pytest.fixture(scope="module")
def maps(tmp_path_factory) -> dict[str, Path]:
    """A class map with a colour table and probabilities, 1301 x 1107 pixels with overviews."""
    folder = tmp_path_factory.mktemp("maps")
    size = {"height": 1301, "width": 1107, "crs": None, "transform": None}
    y, x = np.mgrid[:1301, :1107]
    classes = ((y // 37 + x // 53) % 5).astype(np.uint8)[None]
    probabilities = np.stack([np.sin(y / 90) ** 2, np.cos(x / 70) ** 2]).astype(np.float32)
    with CogWriter(folder / "classes.tif", RasterLayout(num_bands=1, dtype="uint8", colormap=COLORS, **size)) as writer:
        writer.write(0, classes)
    names = ["tumour", "stroma µ"]
    with CogWriter(
        folder / "probs.tif", RasterLayout(num_bands=2, dtype="float32", band_names=names, **size)
    ) as writer:
        writer.write(0, probabilities)
    return {name: folder / f"{name}.tif" for name in ("classes", "probs")}


def pixels_of(path: Path, level: int) -> np.ndarray:
    overview = {} if level == 0 else {"overview_level": level - 1}
    with rasterio.open(path, **overview) as dataset:
        return dataset.read()


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("name", ["classes", "probs"])
def test_levels_are_the_maps_own(maps, tmp_path: Path, name: str) -> None:
    out = tmp_path / "map.ome.tif"
    write_ome_tiff(out, maps[name], mpp=2.0)
    with tifffile.TiffFile(out) as tiff:
        assert tiff.is_ome
        assert len(tiff.series) == 1
        levels = [level.asarray() for level in tiff.series[0].levels]
        assert all(page.aspage().is_tiled and page.aspage().compression == 8 for page in tiff.pages)
    assert len(levels) == 3
    for k, level in enumerate(levels):
        expected = pixels_of(maps[name], k)
        assert np.array_equal(level.reshape(expected.shape), expected)


@pytest.mark.parametrize(("name", "names"), [("classes", ("band_1",)), ("probs", ("tumour", "stroma µ"))])
def test_it_is_read_back_as_a_slide(maps, tmp_path: Path, name: str, names: tuple[str, ...]) -> None:
    out = tmp_path / "map.ome.tif"
    write_ome_tiff(out, maps[name], mpp=(2.0, 3.0))
    source = open_source(out)
    assert source.band_names == names
    assert source.slide_mpp == (2.0, 3.0)
    assert np.array_equal(source.read(source.extent).pixels, open_source(maps[name]).read(source.extent).pixels)


def test_openslide_shows_a_class_map_in_its_colours(maps, tmp_path: Path) -> None:
    out = tmp_path / "map.ome.tif"
    write_ome_tiff(out, maps["classes"], mpp=2.0)
    with openslide.OpenSlide(out) as slide:
        shown = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))[..., :3]
    table = np.array([COLORS[value][:3] for value in range(5)], np.uint8)
    classes = open_source(maps["classes"]).read(open_source(maps["classes"]).extent).pixels[0]
    assert np.array_equal(shown, table[classes])


def test_metadata_follow_ome_2016_06(maps, tmp_path: Path) -> None:
    out = tmp_path / "map.ome.tif"
    write_ome_tiff(
        out, maps["probs"], mpp=(0.5, 0.25), name="map µ", description="a & b < c", tags={"model": "hct µ", "mpp": "2"}
    )
    with tifffile.TiffFile(out) as tiff:
        root = ET.fromstring(tiff.ome_metadata)
    pixels = root.find(f"{NAMESPACE}Image/{NAMESPACE}Pixels")
    assert root.tag == f"{NAMESPACE}OME"
    wanted = {"SizeX": "1107", "SizeY": "1301", "SizeC": "2", "SizeZ": "1", "SizeT": "1", "Type": "float"}
    wanted |= {"PhysicalSizeX": "0.5", "PhysicalSizeY": "0.25", "PhysicalSizeXUnit": "µm", "DimensionOrder": "XYCZT"}
    assert wanted.items() <= pixels.attrib.items()
    assert [channel.get("Name") for channel in pixels.findall(f"{NAMESPACE}Channel")] == ["tumour", "stroma µ"]
    assert [(data.get("IFD"), data.get("FirstC")) for data in pixels.findall(f"{NAMESPACE}TiffData")] == [
        ("0", "0"),
        ("1", "1"),
    ]
    assert root.find(f"{NAMESPACE}Image").get("Name") == "map µ"
    assert root.find(f"{NAMESPACE}Image/{NAMESPACE}Description").text == "a & b < c"
    assert {entry.get("K"): entry.text for entry in root.iter(f"{NAMESPACE}M")} == {"model": "hct µ", "mpp": "2"}
    # The order that the schema asks for.
    assert [child.tag.rsplit("}")[-1] for child in root] == ["Image", "StructuredAnnotations"]
    assert [child.tag.rsplit("}")[-1] for child in root[0]] == ["Description", "Pixels", "AnnotationRef"]


def test_the_same_map_gives_the_same_bytes(maps, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_ome_tiff(tmp_path / f"{name}.ome.tif", maps["probs"], mpp=1.0, tags={"a": "b"})
    first, second = (hashlib.sha256((tmp_path / f"{name}.ome.tif").read_bytes()).digest() for name in ("one", "two"))
    assert first == second


def test_a_colour_table_can_be_given(maps, tmp_path: Path) -> None:
    out = tmp_path / "map.ome.tif"
    write_ome_tiff(out, maps["classes"], mpp=2.0, colormap={1: (255, 0, 9)}, channel_names=["class"])
    with tifffile.TiffFile(out) as tiff:
        assert tiff.pages[0].colormap[:, 1].tolist() == [65535, 0, 9 * 257]
    assert open_source(out).band_names == ("class",)
    with pytest.raises(OutputError, match="one band of uint8"):
        write_ome_tiff(out, maps["probs"], mpp=2.0, colormap={1: (255, 0, 9)})


def test_failures_leave_nothing_and_keep_an_earlier_output(maps, tmp_path: Path) -> None:
    out = tmp_path / "map.ome.tif"
    out.write_bytes(b"earlier")
    with pytest.raises(OutputError, match="channel_names must name the 2 bands"):
        write_ome_tiff(out, maps["probs"], mpp=2.0, channel_names=["one"])
    with pytest.raises(OutputError, match=r"mpp of .* above 0"):
        write_ome_tiff(out, maps["probs"], mpp=0.0)
    with pytest.raises(InputError, match="no such file"):
        write_ome_tiff(out, tmp_path / "none.tif", mpp=1.0)
    damaged = tmp_path / "damaged.tif"
    content = maps["probs"].read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"can't read .*damaged\.tif"):
        write_ome_tiff(out, damaged, mpp=1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.tif", "map.ome.tif"]
    assert out.read_bytes() == b"earlier"
