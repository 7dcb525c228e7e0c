"""Objects into files that GIS, QuPath and detection tools open."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from affine import Affine

from perf_vit.errors import OutputError
from perf_vit.io._coco import write_coco
from perf_vit.io._gis_tables import write_gis
from perf_vit.io._object_table import ObjectTable
from perf_vit.io._qupath import write_qupath
from perf_vit.io._staging import staged
from perf_vit.io.slide import SlideSource
from perf_vit.types import Source

__all__ = ["VectorFormat", "write_objects"]

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
) -> Path:
    """Write objects of a source, in the format that the name's suffix asks for.

    - `.gpkg`, `.parquet`: a table in the source's CRS.
    - `.geojson`: longitude and latitude (EPSG:4326), which is all that RFC 7946 knows; QuPath's GeoJSON for a source
      without CRS.
    - `.json`: COCO, in pixels of the source. Its category ids are the class indices.
    - `format="qupath"`: QuPath's GeoJSON, in pixels of the slide's level 0.

    The file appears under its name when it is complete, and the same objects give the same bytes with the same
    versions of the libraries.

    Args:
        path: the output; missing parent folders are made.
        geometries: in the source's pixels: shapely polygons [n], boxes_xyxy [n, 4], or oriented boxes [n, 5] as centre
            x, centre y, width, height, angle in radians. `Objects.geometry` is one of these.
        scores: [n], or None.
        labels: class indices, [n].
        class_names: one a class.
        source: the scene or slide of the objects: its CRS, transform, size and name.
        format: instead of the one that the suffix asks for.
        object_type: of QuPath's objects; it draws detections faster, and lets users edit annotations.
        background: index of the class that is background, if one is, for the colours that QuPath's objects get.

    Returns:
        The path of the file.

    Raises:
        OutputError: a suffix without format, a format that needs a CRS the source doesn't have, arrays that don't go
            together, or a place where nothing can be written.
    """
    target = Path(path)
    chosen = format or _format_of(target, source)
    if chosen not in get_args(VectorFormat):
        raise OutputError(f"format must be one of {', '.join(get_args(VectorFormat))}, got {chosen}")
    table = ObjectTable.make(geometries, scores, labels, class_names)
    if chosen in {"gpkg", "geoparquet", "geojson"} and source.crs is None:
        raise OutputError(
            f"{source.path} has no CRS, so its objects can't be placed in {chosen}; write QuPath's .geojson or "
            "COCO's .json"
        )
    with staged(target) as folder:
        made = folder / target.name
        try:
            if chosen == "coco":
                write_coco(made, table, name=Path(source.path).name, height=source.height, width=source.width)
            elif chosen == "qupath":
                write_qupath(made, table, object_type=object_type, scale=_to_level0(source), background=background)
            else:
                write_gis(made, table, chosen, layer=target.stem, crs=source.crs, transform=source.transform)
        except OSError as error:
            raise OutputError(f"can't write {path}: {error.strerror or error}") from error
    return target


def _to_level0(source: Source) -> Affine:
    return Affine.scale(*source.downsample_xy) if isinstance(source, SlideSource) else Affine.identity()


def _format_of(path: Path, source: Source) -> VectorFormat:
    found = _SUFFIXES.get(path.suffix.lower())
    if found is None:
        raise OutputError(
            f"can't tell the format of {path}: expected a name that ends in {', '.join(_SUFFIXES)}; or give format"
        )
    return "qupath" if found == "geojson" and source.crs is None else found
