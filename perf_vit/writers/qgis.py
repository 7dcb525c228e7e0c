"""Files that QGIS and GDAL read next to a map: names and colours of its classes."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path

from perf_vit.files import write_text
from perf_vit.plotting.colors import Color
from perf_vit.text import xml_text

__all__ = ["is_own_style", "write_category_names", "write_qgis_style"]

# Areas are drawn over imagery, so they let it through.
_FILL_ALPHA = 90

_ROOT = {"version": "3.22.0", "styleCategories": "Symbology", "hasScaleBasedVisibilityFlag": "0"}


def write_category_names(path: Path, classes: Sequence[str]) -> None:
    """Write the names of the values of a class map, as GDAL's metadata.

    Args:
        path: Output file; see `perf_vit.writers.category_names_path`.
        classes: Names, in the order of the class indices.

    Raises:
        OutputError: The file can't be written.
    """
    root = ET.Element("PAMDataset")
    names = ET.SubElement(ET.SubElement(root, "PAMRasterBand", band="1"), "CategoryNames")
    for name in classes:
        ET.SubElement(names, "Category").text = xml_text(name)
    _write(path, root)


def write_qgis_style(path: Path, classes: Sequence[str], colors: Mapping[int, Color]) -> None:
    """Write a QGIS style, which QGIS applies to the raster and the vector layer of the same name.

    The raster has a colour and a label for each class index; polygons have the colour of their column `class`.

    Args:
        path: Output file, .qml.
        classes: Class names, in the order of the class indices.
        colors: Colour of each class.

    Raises:
        OutputError: The file can't be written.
    """
    root = ET.Element("qgis", _ROOT)
    names = [xml_text(name) for name in classes]
    _add_raster(root, names, colors)
    _add_vector(root, names, colors)
    _write(path, root)


def is_own_style(path: Path) -> bool:
    """Return whether a file is a style of `write_qgis_style`; QGIS begins those that it saves with a DOCTYPE."""
    begin = ET.tostring(ET.Element("qgis", _ROOT)).removesuffix(b" />") + b">"
    try:
        with path.open("rb") as file:
            return file.read(len(begin)) == begin
    except OSError:
        return False


def _add_raster(root: ET.Element, names: Sequence[str], colors: Mapping[int, Color]) -> None:
    options = {"type": "paletted", "band": "1", "opacity": "1", "alphaBand": "-1", "nodataColor": ""}
    renderer = ET.SubElement(ET.SubElement(root, "pipe"), "rasterrenderer", options)
    palette = ET.SubElement(renderer, "colorPalette")
    for index, name in enumerate(names):
        color = "#{:02x}{:02x}{:02x}".format(*colors[index][:3])
        ET.SubElement(palette, "paletteEntry", value=str(index), label=name, color=color, alpha="255")


def _add_vector(root: ET.Element, names: Sequence[str], colors: Mapping[int, Color]) -> None:
    renderer = ET.SubElement(
        root, "renderer-v2", type="categorizedSymbol", attr="class", forceraster="0", enableorderby="0"
    )
    categories, symbols = ET.SubElement(renderer, "categories"), ET.SubElement(renderer, "symbols")
    for index, name in enumerate(names):
        ET.SubElement(categories, "category", value=name, label=name, symbol=str(index), render="true", type="string")
        red, green, blue = colors[index][:3]
        symbol = ET.SubElement(symbols, "symbol", type="fill", name=str(index), alpha="1", clip_to_extent="1")
        fill = ET.SubElement(symbol, "layer", {"class": "SimpleFill", "pass": "0", "enabled": "1", "locked": "0"})
        given = {
            "color": f"{red},{green},{blue},{_FILL_ALPHA}",
            "outline_color": f"{red},{green},{blue},255",
            "outline_style": "solid",
            "outline_width": "0.4",
            "outline_width_unit": "MM",
            "style": "solid",
        }
        listed = ET.SubElement(fill, "Option", type="Map")
        for key, value in given.items():
            ET.SubElement(listed, "Option", type="QString", name=key, value=value)


def _write(path: Path, root: ET.Element) -> None:
    ET.indent(root)
    write_text(path, ET.tostring(root, encoding="unicode") + "\n")
