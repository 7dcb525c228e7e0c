"""Polygons in GeoJSON, GeoPackage or shapefiles, on rasters or in pixels of images without CRS."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from perf_vit.data.labels.image_folder import ImageFolder
from perf_vit.data.labels.records import RawImage, RawLabels, RawObject
from perf_vit.errors import DataWarning, InputError
from perf_vit.io import PolygonFile, files_below, is_vector_name, open_source, split_layer

__all__ = ["read_polygons"]


def read_polygons(labels: Path, folder: ImageFolder, attribute: str | None, name: str) -> RawLabels:
    """Read polygons as objects with outlines.

    One file labels every image that it overlaps; images that it doesn't reach have no objects. In a folder, each file
    has its image's name but for the ending. On an image without CRS, coordinates are its pixels.

    Args:
        labels: a vector file, or a folder of them.
        folder: the images.
        attribute: column that holds class names; None gives every object the class `name`.
        name: class of objects without attribute.

    Raises:
        InputError: a file that can't be read, without CRS where the image has one, or without image.
    """
    if Path(split_layer(str(labels))[0]).is_file():
        shared = PolygonFile(labels, attribute=attribute)
        used: set[int] = set()
        images = [_image(image, shared, name, used) for image in folder.paths if folder.wanted(image)]
        if images and len(shared) and not used:
            raise InputError(
                f"the polygons of {labels} lie on none of {len(images)} images, the first {images[0].path}: they cover "
                f"{shared.described_place()}; check their CRS or choose other images"
            )
        _warn_of_unused(shared, used, len(images))
        return RawLabels(images)
    pairs = _pairs(labels, folder)
    return RawLabels([_image(image, PolygonFile(file, attribute=attribute), name) for image, file in pairs])


def _pairs(labels: Path, folder: ImageFolder) -> list[tuple[Path, Path]]:
    files = files_below(labels, is_vector_name)
    if not files:
        raise InputError(f"no label files in {labels}; expected .geojson, .gpkg, .shp, .parquet or the like")
    pairs = [(folder.find(str(file.relative_to(labels).with_suffix("")), str(file)), file) for file in files]
    return [(image, file) for image, file in pairs if folder.wanted(image)]


def _warn_of_unused(file: PolygonFile, used: set[int], num_images: int) -> None:
    if len(used) < len(file):
        first = next(index for index in range(len(file)) if index not in used)
        warnings.warn(
            f"{len(file) - len(used)} of {len(file)} polygons of {file.path} lie on none of the {num_images} images, "
            f"the first is number {file.numbers[first]}",
            DataWarning,
            stacklevel=5,
        )


def _image(path: Path, file: PolygonFile, name: str, used: set[int] | None = None) -> RawImage:
    source = open_source(path)
    polygons = file.in_pixels_of(source)
    source.close()
    near = range(len(polygons)) if used is None else _meeting(polygons, source.size)
    if used is not None:
        used.update(near)
    names = [name if file.values is None else _name(file.values[index]) for index in near]
    objects = [RawObject(name=n, outline=polygons[index]) for n, index in zip(names, near, strict=True)]
    return RawImage(path=str(path), labels=file.path, objects=objects)


def _name(value: Any) -> str:
    return "null" if value is None or value != value else str(value)


def _meeting(polygons: Any, size: tuple[int, int]) -> list[int]:
    """Polygons that belong to this image; one file may hold those of many."""
    left, top, right, bottom = shapely.bounds(polygons).reshape(-1, 4).T
    meets = (left < size[1]) & (right > 0) & (top < size[0]) & (bottom > 0)
    found: list[int] = np.flatnonzero(meets).tolist()
    return found
