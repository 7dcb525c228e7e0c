"""Polygons of a vector file as objects."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from perf_vit.errors import DataWarning, InputError
from perf_vit.labels._placement import local_transform, span, transform_geometries
from perf_vit.labels.image_folder import ImageFolder, vector_files_below
from perf_vit.labels.objects.records import LabelOptions, RawImage, RawLabels, RawObject, register_label_format
from perf_vit.labels.vector import to_pixels
from perf_vit.sources import open_source, split_layer
from perf_vit.sources._gdal import check_exists, crs_name
from perf_vit.sources.slides import SlideSource
from perf_vit.sources.vector_file import read_features, slide_frame
from perf_vit.text import number_text
from perf_vit.types import Source

__all__ = ["PolygonFile", "read_polygons"]


class PolygonFile:
    """Polygons of a vector file, which can be placed on several sources.

    Args:
        path: GeoJSON, GeoPackage, shapefile, GeoParquet, ... in any CRS; with several layers `FILE|layername=LAYER`.
        attribute: Column to read.

    Attributes:
        path: Path as given.
        numbers: Feature numbers of the polygons in the file, from 1, [n].
        values: Attribute of each polygon, [n]; None without attribute.

    Raises:
        InputError: The file can't be read, or contains lines or points.
    """

    def __init__(self, path: str | Path, *, attribute: str | None = None) -> None:
        self.path = os.fspath(path)
        check_exists(split_layer(self.path)[0])
        frame = read_features(self.path, attribute)
        other = sorted(set(frame.geom_type) - {"Polygon", "MultiPolygon"})
        if other:
            raise InputError(
                f"{self.path} holds {', '.join(other)}; objects must be polygons (buffer lines and points first)"
            )
        self._geometry, self._frame = frame.geometry, slide_frame(frame)
        self.numbers = np.asarray(frame.index.to_numpy() + 1, np.int64)
        self.values: npt.NDArray[Any] | None = None
        if attribute is not None:
            self.values = frame[attribute].to_numpy() if len(frame) else np.zeros(0, object)
        # Images of a data set mostly share their CRS, so transform once per CRS.
        self._placed: dict[str, npt.NDArray[Any]] = {}

    def __len__(self) -> int:
        return len(self._geometry)

    def described_extent(self) -> str:
        """Format the bounds of all polygons in the file's coordinates, and its CRS, as text."""
        crs = "without CRS" if self._geometry.crs is None else crs_name(self._geometry.crs)
        return f"{span(tuple(self._geometry.total_bounds))} ({crs})"

    def in_pixels_of(self, source: Source) -> npt.NDArray[Any]:
        """Return polygons and multipolygons in pixels of a source, [n], including those outside of it.

        On a source without CRS, coordinates are those of its world file if the polygons lie on it there, else pixels,
        whatever CRS the file has; on a slide they are in the frame of the file. A polygon outside of the domain of the
        source's CRS becomes empty.

        Raises:
            InputError: The source has a CRS, but the file has none.
        """
        if isinstance(source, SlideSource):
            return source.frame.in_source(shapely.force_2d(self._geometry.to_numpy()), self._frame)
        if source.crs is None:
            geometries: npt.NDArray[Any] = shapely.force_2d(self._geometry.to_numpy())
            place = local_transform(source, self.path, tuple(self._geometry.total_bounds))
            return geometries if place.is_identity else to_pixels(geometries, place)
        return to_pixels(self._in_crs(source), source.transform)

    def _in_crs(self, source: Source) -> npt.NDArray[Any]:
        if self._geometry.crs is None and len(self):
            raise InputError(
                f"{self.path} has no CRS and {source.path} has {crs_name(source.crs)}; assign one to {self.path}"
            )
        key = str(source.crs.to_wkt())  # type: ignore[union-attr]
        if key not in self._placed:
            self._placed[key] = (
                transform_geometries(self._geometry, self.path, source) if len(self) else np.zeros(0, object)
            )
        return self._placed[key]


@register_label_format("polygons")
def read_polygons(labels: Path, folder: ImageFolder, options: LabelOptions) -> RawLabels:
    """Read polygons as objects with outlines.

    A single file labels all images that it overlaps; other images have no objects. In a folder, each file has the name
    of its image except for the suffix. On images without CRS, coordinates are pixels.

    Args:
        labels: Vector file, or folder of them.
        folder: Images.
        options: Options with the column of class names; without it, all objects have the single class.

    Raises:
        ConfigError: There are several classes but no attribute.
        InputError: A file can't be read, has no CRS although the image has one, or has no image.
    """
    attribute, name = options.attribute, options.first_class
    if attribute is None:
        hint = "; set attribute to the column of class names"
        options.require_one_class("labels of the format polygons without attribute", hint)
    if Path(split_layer(str(labels))[0]).is_file():
        shared = PolygonFile(labels, attribute=attribute)
        used: set[int] = set()
        images = [_image(image, shared, name, used) for image in folder.paths if folder.wanted(image)]
        if images and len(shared) and not used:
            raise InputError(
                f"the polygons of {labels} lie on none of {len(images)} images, the first {images[0].path}: they cover "
                f"{shared.described_extent()}; check their CRS or choose other images"
            )
        _warn_of_unused(shared, used, len(images))
        return RawLabels(images)
    pairs = _pairs(labels, folder)
    return RawLabels([_image(image, PolygonFile(file, attribute=attribute), name) for image, file in pairs])


def _pairs(labels: Path, folder: ImageFolder) -> list[tuple[Path, Path]]:
    files = vector_files_below(labels)
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
    if value is None or value != value:
        return "null"
    # With a null in the column, whole numbers are read as 1.0.
    return number_text(float(value)) if isinstance(value, float | np.floating) else str(value)


def _meeting(polygons: Any, size: tuple[int, int]) -> list[int]:
    """Return the polygons that overlap the image; a file may hold those of many images."""
    left, top, right, bottom = shapely.bounds(polygons).reshape(-1, 4).T
    meets = (left < size[1]) & (right > 0) & (top < size[0]) & (bottom > 0)
    found: list[int] = np.flatnonzero(meets).tolist()
    return found
