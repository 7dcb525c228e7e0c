"""Turn CAMELYON16's ASAP files into GeoJSON: python datasets/camelyon16/prepare.py CAMELYON16/training OUT."""

import csv
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import shapely
import typer

from perf_vit.errors import InputError, PerfVitError

# Groups _0 and _1 are tumour like Tumor; _2 and Exclusion are areas inside that are not.
EXCLUDED = {"_2", "Exclusion"}


def prepare(source: Path, out: Path) -> None:
    """Read SOURCE/{normal,tumor}/*.tif and SOURCE/lesion_annotations/*.xml, and write OUT/labels and OUT/slides.csv.

    OUT/labels/SLIDE.geojson holds tumour areas in pixels of level 0. The table has one slide a row, named as in SOURCE.
    """
    (out / "labels").mkdir(parents=True, exist_ok=True)
    slides = sorted([*source.glob("normal/*.tif"), *source.glob("tumor/*.tif")])
    if not slides:
        raise InputError(f"expected {source}/normal/*.tif and {source}/tumor/*.tif, got none")
    rows = [(slide, write_slide(slide, source, out)) for slide in slides]
    with (out / "slides.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide", "label", "path", "num_areas", "area_px"])
        for slide, areas in rows:
            area_px = round(sum(area.area for area in areas))
            writer.writerow([slide.relative_to(source).as_posix(), slide.parent.name, slide, len(areas), area_px])
    print(f"{len(rows)} slides, {sum(bool(areas) for _, areas in rows)} with tumour areas")


def write_slide(slide: Path, source: Path, out: Path) -> list[shapely.Geometry]:
    """Write a slide's areas as GeoJSON; a normal slide has none."""
    annotations = source / "lesion_annotations" / f"{slide.stem}.xml"
    if slide.parent.name == "tumor" and not annotations.is_file():
        raise InputError(f"{slide} has no annotations {annotations}; unpack lesion_annotations.zip there")
    areas = read_asap(annotations) if annotations.is_file() else []
    features = [
        {"type": "Feature", "properties": {"class": "tumor"}, "geometry": shapely.geometry.mapping(area)}
        for area in areas
    ]
    content = {"type": "FeatureCollection", "features": features}
    (out / "labels" / f"{slide.stem}.geojson").write_text(json.dumps(content))
    return areas


def read_asap(path: Path) -> list[shapely.Geometry]:
    """Tumour areas of an ASAP file, what is excluded cut out, in pixels of level 0."""
    try:
        annotations = list(ET.parse(path).getroot().iter("Annotation"))
    except ET.ParseError as error:
        raise InputError(f"can't read {path} as XML: {error}; it may be damaged") from error
    excluded = [outline(item, path) for item in annotations if item.get("PartOfGroup") in EXCLUDED]
    cut = shapely.union_all(excluded)
    tumors = [outline(item, path) for item in annotations if item.get("PartOfGroup") not in EXCLUDED]
    areas = [shapely.difference(tumor, cut) for tumor in tumors]
    return [area for area in areas if not area.is_empty]


def outline(annotation: ET.Element, path: Path) -> shapely.Geometry:
    """The polygons of an annotation, its corners in their order."""
    corners = sorted(annotation.iter("Coordinate"), key=lambda corner: float(corner.get("Order", 0)))
    xy = [(float(corner.get("X", "nan")), float(corner.get("Y", "nan"))) for corner in corners]
    if len(xy) < 3:
        raise InputError(f"{path} has an annotation {annotation.get('Name')} of {len(xy)} corners; expected 3 or more")
    # Outlines drawn by hand cross themselves.
    return shapely.make_valid(shapely.Polygon(xy), method="structure", keep_collapsed=False)


if __name__ == "__main__":
    try:
        typer.run(prepare)
    except PerfVitError as error:
        raise SystemExit(f"error: {error}") from None
