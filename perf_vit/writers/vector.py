"""Vector files of objects for GIS, QuPath and detection tools."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from pyproj import Transformer
from pyproj.exceptions import CRSError, ProjError

from perf_vit.errors import OutputError, warn_once
from perf_vit.files import staged
from perf_vit.labels.objects import default_category_ids
from perf_vit.sources import MosaicSource, open_raster
from perf_vit.sources._gdal import crs_name
from perf_vit.sources.base import has_place
from perf_vit.sources.slides import SlideSource
from perf_vit.types import Source
from perf_vit.writers._objects import ObjectTable
from perf_vit.writers.coco import write_coco, write_coco_results
from perf_vit.writers.gis import write_gis, write_qupath

__all__ = ["VectorFormat", "check_vector_output", "write_objects"]

VectorFormat = Literal["gpkg", "geoparquet", "geojson", "coco", "qupath"]

_SUFFIXES: dict[str, VectorFormat] = {
    ".gpkg": "gpkg",
    ".parquet": "geoparquet",
    ".geojson": "geojson",
    ".json": "coco",
}


def write_objects(
    path: str | Path,
    geometries: Any,
    scores: Any,
    labels: Any,
    class_names: Sequence[str],
    *,
    source: Source,
    format: VectorFormat | None = None,  # noqa: A002
    object_type: Literal["detection", "annotation"] = "detection",
    background: int | None = None,
    category_ids: Sequence[int] | None = None,
    image_id: int | None = None,
) -> Path:
    """Write objects of a source, in the format given by the file suffix.

    - `.gpkg`, `.parquet`: table in the source's CRS.
    - `.geojson`: longitude and latitude (EPSG:4326), as RFC 7946 requires; QuPath's GeoJSON for a source without CRS.
    - `.json`: COCO, in source pixels: a data set of one image; with `image_id`, a list of results for
      `pycocotools.coco.COCO.loadRes`.
    - `format="qupath"`: QuPath's GeoJSON, in pixels of the slide's level 0 from the corner of its bounds.

    The file appears when it is complete. It is byte-reproducible with the same versions of the libraries.

    Args:
        path: Output file; missing parent folders are created.
        geometries: Geometries in source pixels: shapely polygons [n], boxes_xyxy [n, 4], or oriented boxes [n, 5]
            (centre x, centre y, width, height, angle in radians), such as `Objects.geometry`.
        scores: Scores, [n], or None.
        labels: Class indices, [n].
        class_names: Name of each class.
        source: Scene or slide of the objects, which gives CRS, transform, size and name.
        format: Format; None for that of the suffix.
        object_type: QuPath object type: detections are drawn faster, annotations can be edited.
        background: Index of the background class, for QuPath's colours; None for none.
        category_ids: COCO id of each class, such as `DetectionSpec.category_ids`; None for 1, 2, 3, ...
        image_id: Id of the source in a COCO file of labels, see `CocoImages`.

    Returns:
        Path of the file.

    Raises:
        OutputError: The suffix has no format, the format needs a CRS that the source lacks, arrays are inconsistent, or
            the file can't be written.
    """
    target = Path(path)
    chosen = check_vector_output(target, source, format=format)
    table = ObjectTable.make(geometries, scores, labels, class_names).with_areas(source)
    with staged(target) as folder:
        made = folder / target.name
        try:
            if chosen == "coco":
                ids = category_ids or default_category_ids(len(table.class_names))
                _write_coco(made, table, ids, source, image_id)
            elif chosen == "qupath":
                frame = source.frame if isinstance(source, SlideSource) else None
                write_qupath(made, table, object_type=object_type, frame=frame, background=background)
            else:
                write_gis(made, table, chosen, layer=target.stem, crs=source.crs, transform=source.transform)
        except OSError as error:
            raise OutputError(f"can't write {path}: {error.strerror or error}") from error
    return target


def _write_coco(
    path: Path, table: ObjectTable, category_ids: Sequence[int], source: Source, image_id: int | None
) -> None:
    _warn_of_other_grid(source)
    if image_id is None:
        name = Path(source.path).name
        frame = source.frame if isinstance(source, SlideSource) else None
        write_coco(path, table, category_ids, name=name, height=source.height, width=source.width, frame=frame)
    else:
        write_coco_results(path, table, category_ids, image_id=image_id)


def _warn_of_other_grid(source: Source) -> None:
    """Warn that pixels of a file that is read on another grid are not those of the file, which COCO names."""
    if not isinstance(source, MosaicSource) or len(source.paths) > 1:
        return
    with open_raster(source.paths[0]) as own:
        if own.size != source.size or own.transform != source.transform:
            warn_once(
                f"COCO of {source.path}",
                f"COCO names {source.path} ({own.height} rows x {own.width} columns), but its objects are in pixels of "
                f"the grid that it was read on ({source.height} x {source.width}); write .gpkg, or read it without "
                "crs, resolution and bounds",
            )


def check_vector_output(path: str | Path, source: Source, *, format: VectorFormat | None = None) -> VectorFormat:  # noqa: A002
    """Return the format of an output file; called before detection, to fail early.

    Args:
        path: Output file.
        source: Source of the objects.
        format: Format; None for that of the suffix.

    Raises:
        OutputError: The suffix has no format, or the format needs a CRS that the source lacks.
    """
    chosen = format or _format_of(Path(path), source)
    if chosen not in get_args(VectorFormat):
        raise OutputError(f"format must be one of {', '.join(get_args(VectorFormat))}, got {chosen}")
    if chosen in {"gpkg", "geoparquet", "geojson"} and not has_place(source):
        lacking = "no CRS" if source.crs is None else "a CRS but no transform"
        raise OutputError(
            f"{source.path} has {lacking}, so its objects can't be placed in {chosen}; write QuPath's .geojson or "
            "COCO's .json"
        )
    if chosen == "geojson" and not _has_longitudes(source):
        raise OutputError(
            f"can't write {path}: GeoJSON holds longitudes and latitudes, and those of {source.path} are not known "
            f"from its CRS ({crs_name(source.crs)}); write .gpkg, .parquet or COCO's .json"
        )
    return chosen


def _has_longitudes(source: Source) -> bool:
    """Return whether source points have longitude and latitude; corners of full-disc imagery lie outside the Earth."""
    assert source.crs is not None
    shares = np.linspace(0, 1, 11)
    x, y = np.transpose([source.transform @ (source.width * a, source.height * b) for a in shares for b in shares])
    try:
        placed = Transformer.from_crs(source.crs.to_wkt(), "EPSG:4326", always_xy=True).transform(x, y)
    except (CRSError, ProjError):
        return False
    return bool(np.isfinite(placed).all(axis=0).any())


def _format_of(path: Path, source: Source) -> VectorFormat:
    found = _SUFFIXES.get(path.suffix.lower())
    if found is None:
        raise OutputError(
            f"can't tell the format of {path}: expected a name that ends in {', '.join(_SUFFIXES)}; or give format"
        )
    return "qupath" if found == "geojson" and not has_place(source) else found
