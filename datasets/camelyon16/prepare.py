"""Turn CAMELYON16's ASAP files into GeoJSON: python datasets/camelyon16/prepare.py CAMELYON16/training OUT."""

import csv
import json
from pathlib import Path

import shapely
import typer

from perf_vit.errors import InputError, PerfVitError
from perf_vit.sources.vector_file import read_features


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
    areas = list(read_features(str(annotations), None).geometry) if annotations.is_file() else []
    features = [
        {"type": "Feature", "properties": {"class": "tumor"}, "geometry": shapely.geometry.mapping(area)}
        for area in areas
    ]
    content = {"type": "FeatureCollection", "features": features}
    (out / "labels" / f"{slide.stem}.geojson").write_text(json.dumps(content))
    return areas


if __name__ == "__main__":
    try:
        typer.run(prepare)
    except PerfVitError as error:
        raise SystemExit(f"error: {error}") from None
