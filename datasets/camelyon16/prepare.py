"""Turn CAMELYON16's ASAP files into GeoJSON: python datasets/camelyon16/prepare.py CAMELYON16 OUT."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import shapely
import typer

from perf_vit.errors import InputError, PerfVitError
from perf_vit.sources.vector_file import read_features


@dataclass(frozen=True)
class Slide:
    """A slide of the publisher.

    Attributes:
        path: TIFF file.
        annotations: Outlines of its tumour; a slide without tumour has none.
        label: `normal` or `tumor`; None if the annotations tell.
        is_test: Whether it is one of the publisher's test set.
    """

    path: Path
    annotations: Path
    label: str | None
    is_test: bool


def prepare(source: Path, out: Path) -> None:
    """Read SOURCE/{images,annotations}, or SOURCE/{normal,tumor,lesion_annotations} of older archives.

    OUT/labels/SLIDE.geojson holds tumour areas in pixels of level 0. OUT/slides.csv has one training slide a row, named
    as in SOURCE, OUT/test.csv one test slide, of the class that its annotations tell.
    """
    slides = find_slides(source)
    (out / "labels").mkdir(parents=True, exist_ok=True)
    rows = [(slide, write_slide(slide, out)) for slide in slides]
    test = [areas for slide, areas in rows if slide.is_test]
    if test and not any(test):
        raise InputError(f"none of {len(test)} test slides has annotations in {source}/annotations; download them all")
    for name, is_test in (("slides.csv", False), ("test.csv", True)):
        chosen = [(slide, areas) for slide, areas in rows if slide.is_test is is_test]
        if chosen:
            write_table(out / name, source, chosen)
    without = f"; {sum(not areas for areas in test)} of {len(test)} test slides have none and count as normal"
    print(f"{len(rows)} slides, {sum(bool(areas) for _, areas in rows)} with tumour areas{without if test else ''}")


def find_slides(source: Path) -> list[Slide]:
    """Find the slides of either layout."""
    found = []
    for path in sorted(source.glob("images/*.tif")):
        kind = path.stem.split("_")[0]
        label = kind if kind in ("normal", "tumor") else None
        found.append(Slide(path, source / "annotations" / f"{path.stem}.xml", label, kind == "test"))
    found += [
        Slide(path, source / "lesion_annotations" / f"{path.stem}.xml", path.parent.name, is_test=False)
        for path in sorted([*source.glob("normal/*.tif"), *source.glob("tumor/*.tif")])
    ]
    if not found:
        raise InputError(f"expected {source}/images/*.tif, or {source}/normal/*.tif and {source}/tumor/*.tif, got none")
    return found


def write_slide(slide: Slide, out: Path) -> list[shapely.Geometry]:
    """Write a slide's areas as GeoJSON; a normal slide has none."""
    if slide.label == "tumor" and not slide.annotations.is_file():
        raise InputError(f"{slide.path} has no annotations {slide.annotations}; download or unpack them there")
    if slide.label is None and not slide.annotations.parent.is_dir():
        raise InputError(f"annotations tell the class of {slide.path}, and there is no {slide.annotations.parent}")
    areas = list(read_features(str(slide.annotations), None).geometry) if slide.annotations.is_file() else []
    features = [
        {"type": "Feature", "properties": {"class": "tumor"}, "geometry": shapely.geometry.mapping(area)}
        for area in areas
    ]
    content = {"type": "FeatureCollection", "features": features}
    (out / "labels" / f"{slide.path.stem}.geojson").write_text(json.dumps(content))
    return areas


def write_table(path: Path, source: Path, rows: list[tuple[Slide, list[shapely.Geometry]]]) -> None:
    """Write a row for each slide: name, label, path, number of areas and their area in pixels."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide", "label", "path", "num_areas", "area_px"])
        for slide, areas in rows:
            label = slide.label or ("tumor" if areas else "normal")
            area_px = round(sum(area.area for area in areas))
            writer.writerow([slide.path.relative_to(source).as_posix(), label, slide.path, len(areas), area_px])


if __name__ == "__main__":
    try:
        typer.run(prepare)
    except PerfVitError as error:
        raise SystemExit(f"error: {error}") from None
