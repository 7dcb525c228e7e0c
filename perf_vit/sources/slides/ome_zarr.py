"""OME-Zarr slides of version 0.4 and 0.5."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from perf_vit.errors import parsing
from perf_vit.sources._gdal import check_exists, check_name
from perf_vit.sources.files import register_source
from perf_vit.sources.slides.arrays import ArrayReader, OpenArrays
from perf_vit.sources.slides.main_image import StoredImage, choose_image
from perf_vit.sources.slides.ome_xml import micrometres, parse_ome_xml
from perf_vit.sources.slides.openslide import import_slide_library

__all__ = ["is_multiscale", "open_ome_zarr"]


@register_source(".ome.zarr")
def open_ome_zarr(path: str) -> ArrayReader:
    """Open the main image of an OME-Zarr folder of version 0.4 or 0.5; label and macro images are never read.

    Raises:
        InputError: The folder can't be opened, or isn't a single image.
    """
    return ArrayReader(path, _open_zarr, "ome-zarr")


def is_multiscale(path: str) -> bool:
    """Return whether a folder is an OME-Zarr image."""
    folder = Path(path)
    return any(
        b'"multiscales"' in (place / name).read_bytes()
        for place in (folder, folder / "0")
        for name in (".zattrs", "zarr.json")
        if (place / name).is_file()
    )


def _open_zarr(path: str) -> OpenArrays:
    zarr = import_slide_library("zarr", path)
    check_name(path)
    check_exists(path)
    with parsing(path, "an OME-Zarr image of version 0.4 or 0.5"):
        group = zarr.open_group(path, mode="r")
        image = group if _metadata(group).get("multiscales") else _main_image(path, group)
        metadata = _metadata(image)
        scales = metadata["multiscales"][0]
        arrays = [image[entry["path"]] for entry in scales["datasets"]]
        axes = _axes(scales)
        names = tuple(str(channel.get("label", "")) for channel in metadata.get("omero", {}).get("channels", []))
        return OpenArrays(arrays, axes, _scale_yx(scales), names, lambda: None)


def _main_image(path: str, group: Any) -> Any:
    """Return the slide among the numbered images that converters of files with several images write."""
    numbers = sorted((name for name, _ in group.groups() if name.isdigit()), key=int)
    images = [image for image in (group[name] for name in numbers) if _metadata(image).get("multiscales")]
    if not images:
        raise ValueError("it has no multiscales")
    listed = Path(path, "OME", "METADATA.ome.xml")
    names = [image.name for image in parse_ome_xml(listed.read_text(encoding="utf-8"))] if listed.is_file() else []
    stored = [_stored(image, name) for image, name in zip_longest(images, names[: len(images)])]
    return images[choose_image(path, stored)]


def _stored(image: Any, name: str | None) -> StoredImage:
    scales = _metadata(image)["multiscales"][0]
    sizes = dict(zip(_axes(scales), image[scales["datasets"][0]["path"]].shape, strict=True))
    return StoredImage(name or str(scales.get("name", "")), (sizes.get("Y", 1), sizes.get("X", 1)))


def _axes(scales: Mapping[str, Any]) -> str:
    return "".join(str(axis["name"])[0].upper() for axis in scales["axes"])


def _metadata(group: Any) -> dict[str, Any]:
    attributes = dict(group.attrs)
    found: dict[str, Any] = attributes.get("ome", attributes)
    return found


def _scale_yx(scales: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the micrometres per pixel of the first level, from its scale and the common one."""
    factors = np.ones(len(scales["axes"]))
    for entry in (
        *scales["datasets"][0].get("coordinateTransformations", ()),
        *scales.get("coordinateTransformations", ()),
    ):
        if entry["type"] == "scale":
            factors = factors * np.asarray(entry["scale"], float)
    sizes = {
        axis["name"]: micrometres(float(factor), axis.get("unit"))
        for axis, factor in zip(scales["axes"], factors, strict=True)
    }
    y, x = sizes["y"], sizes["x"]
    return None if y is None or x is None else (y, x)
