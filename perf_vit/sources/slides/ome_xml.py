"""OME-XML metadata of OME-TIFF, parsed and written."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from perf_vit.text import xml_text

__all__ = ["OmeImage", "make_ome_xml", "micrometres", "parse_ome_tags", "parse_ome_xml"]

_NAMESPACE = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
_SCHEMA = f"{_NAMESPACE} {_NAMESPACE}/ome.xsd"
_MICROMETRES = {
    "µm": 1.0,
    "μm": 1.0,
    "um": 1.0,
    "micron": 1.0,
    "micrometer": 1.0,
    "micrometre": 1.0,
    "nm": 1e-3,
    "nanometer": 1e-3,
    "angstrom": 1e-4,
    "Å": 1e-4,
    "mm": 1e3,
    "millimeter": 1e3,
    "cm": 1e4,
    "centimeter": 1e4,
    "m": 1e6,
    "meter": 1e6,
    "inch": 25_400.0,
    "in": 25_400.0,
}
_TYPES = {"float32": "float", "float64": "double"}


@dataclass(frozen=True, slots=True)
class OmeImage:
    """Metadata of an image.

    Attributes:
        name: Name of the image.
        size_yx: Number of rows and columns; (0, 0) if unknown.
        mpp_yx: Micrometres per pixel; None if unknown.
        channel_names: Channel names; empty for channels without name.
        objective_power: Nominal magnification of the objective; None if unknown.
    """

    name: str = ""
    size_yx: tuple[int, int] = (0, 0)
    mpp_yx: tuple[float, float] | None = None
    channel_names: tuple[str, ...] = ()
    objective_power: float | None = None


def micrometres(value: float, unit: str | None) -> float | None:
    """Convert a length to micrometres; None if the unit isn't a length."""
    factor = _MICROMETRES.get(unit or "")
    return value * factor if factor is not None and value > 0 else None


def parse_ome_xml(text: str) -> tuple[OmeImage, ...]:
    """Parse the images of OME-XML; none if it isn't well-formed."""
    try:
        root = ET.fromstring(text)
    except ET.ParseError:
        return ()
    powers = {
        element.get("ID", ""): _number(element.get("NominalMagnification"))
        for element in root.iter()
        if _local(element) == "Objective"
    }
    images = (element for element in root.iter() if _local(element) == "Image")
    return tuple(_image(image, pixels, powers) for image in images for pixels in image if _local(pixels) == "Pixels")


def _image(image: ET.Element, pixels: ET.Element, powers: Mapping[str, float | None]) -> OmeImage:
    y, x = (_physical_size(pixels, axis) for axis in "YX")
    height, width = (_number(pixels.get(f"Size{axis}")) or 0 for axis in "YX")
    settings = [element.get("ID", "") for element in image if _local(element) == "ObjectiveSettings"]
    # Without a reference, the only objective is that of the image.
    objective = settings[0] if settings else next(iter(powers), "") if len(powers) == 1 else ""
    return OmeImage(
        name=image.get("Name", ""),
        size_yx=(int(height), int(width)),
        mpp_yx=None if y is None or x is None else (y, x),
        channel_names=tuple(element.get("Name", "") for element in pixels if _local(element) == "Channel"),
        objective_power=powers.get(objective),
    )


def parse_ome_tags(text: str) -> dict[str, str]:
    """Parse the key-value pairs written by `make_ome_xml`; none if the XML isn't well-formed."""
    try:
        found = [element for element in ET.fromstring(text).iter() if _local(element) == "M"]
    except ET.ParseError:
        return {}
    return {element.get("K", ""): element.text or "" for element in found}


def make_ome_xml(
    *,
    name: str,
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
    mpp_xy: tuple[float, float],
    channel_names: Sequence[str],
    description: str | None,
    tags: Mapping[str, str],
) -> str:
    """Build OME-XML 2016-06 of one image whose channels are pages in order; reproducible.

    Args:
        name: Name of the image.
        shape: Number of channels, rows and columns.
        dtype: Data type of the pixels.
        mpp_xy: Micrometres per pixel.
        channel_names: Name of each channel.
        description: Free text.
        tags: Key-value pairs, stored as a map annotation.
    """
    ET.register_namespace("", _NAMESPACE)
    ET.register_namespace("xsi", "http://www.w3.org/2001/XMLSchema-instance")
    root = ET.Element(_tag("OME"), {"{http://www.w3.org/2001/XMLSchema-instance}schemaLocation": _SCHEMA})
    image = ET.SubElement(root, _tag("Image"), ID="Image:0", Name=xml_text(name))
    if description is not None:
        ET.SubElement(image, _tag("Description")).text = xml_text(description)
    _add_pixels(image, shape, dtype, mpp_xy, channel_names)
    if tags:
        ET.SubElement(image, _tag("AnnotationRef"), ID="Annotation:0")
        annotations = ET.SubElement(root, _tag("StructuredAnnotations"))
        value = ET.SubElement(ET.SubElement(annotations, _tag("MapAnnotation"), ID="Annotation:0"), _tag("Value"))
        for key, text in tags.items():
            ET.SubElement(value, _tag("M"), K=xml_text(key)).text = xml_text(text)
    body = ET.tostring(root, encoding="unicode")
    # TIFF descriptions are ASCII, so other characters become character references.
    return '<?xml version="1.0" encoding="UTF-8"?>' + body.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _add_pixels(
    image: ET.Element,
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
    mpp_xy: tuple[float, float],
    channel_names: Sequence[str],
) -> None:
    num_channels, height, width = shape
    sizes = {"SizeX": width, "SizeY": height, "SizeC": num_channels, "SizeZ": 1, "SizeT": 1}
    pixels = ET.SubElement(
        image,
        _tag("Pixels"),
        {
            "ID": "Pixels:0",
            "DimensionOrder": "XYCZT",
            "Type": _TYPES.get(dtype.name, dtype.name),
            **{key: str(value) for key, value in sizes.items()},
            **{f"PhysicalSize{axis}": repr(float(mpp)) for axis, mpp in zip("XY", mpp_xy, strict=True)},
            "PhysicalSizeXUnit": "µm",
            "PhysicalSizeYUnit": "µm",
        },
    )
    for index, name in enumerate(channel_names):
        ET.SubElement(pixels, _tag("Channel"), ID=f"Channel:0:{index}", Name=xml_text(name), SamplesPerPixel="1")
    for index in range(num_channels):
        ET.SubElement(pixels, _tag("TiffData"), IFD=str(index), FirstC=str(index), PlaneCount="1")


def _physical_size(pixels: ET.Element, axis: str) -> float | None:
    value = _number(pixels.get(f"PhysicalSize{axis}"))
    return None if value is None else micrometres(value, pixels.get(f"PhysicalSize{axis}Unit", "µm"))


def _number(text: str | None) -> float | None:
    """Return a finite number above 0; None for other text."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 < value < math.inf else None


def _tag(name: str) -> str:
    return f"{{{_NAMESPACE}}}{name}"


def _local(element: ET.Element) -> str:
    return str(element.tag).rsplit("}", 1)[-1]
