"""Small valid label files and lists, all of the images `a.tif` and `b.tif` of 48 x 64 pixels."""

from __future__ import annotations

import json
from pathlib import Path

import geopandas
import numpy as np
import shapely
from fuzzing.images import CRS, TRANSFORM
from pycocotools import mask as coco_mask
from shapely import affinity

__all__ = ["write_labels"]

_BOXES = ((4, 5, 16, 15), (20, 10, 41, 30), (30, 22, 50, 44))
_NAMES = ("ship", "car", "ship")


def write_labels(folder: Path, images: Path) -> None:
    """One sub-folder a kind: geojson, gpkg, parquet, coco, voc, yolo, dota, table, list.

    Args:
        folder: where they go.
        images: folder of `a.tif` and `b.tif`, for lists.
    """
    _write_vectors(folder)
    _write_coco(folder / "coco")
    _write_texts(folder)
    _write_csvs(folder, images)


def _write_vectors(folder: Path) -> None:
    to_crs = (TRANSFORM.a, 0, 0, TRANSFORM.e, TRANSFORM.c, TRANSFORM.f)
    outlines = [affinity.affine_transform(shapely.box(*box), to_crs) for box in _BOXES]
    holed = outlines[2].difference(outlines[2].centroid.buffer(5))
    frame = geopandas.GeoDataFrame(
        {"class": _NAMES, "value": [1, 2, 1]}, geometry=[*outlines[:2], shapely.MultiPolygon([holed])], crs=CRS
    )
    for kind in ("geojson", "gpkg", "parquet"):
        (folder / kind).mkdir(parents=True)
    frame.to_crs("EPSG:4326").to_file(folder / "geojson" / "degrees.geojson", driver="GeoJSON")
    frame.to_file(folder / "geojson" / "metres.geojson", driver="GeoJSON")
    features = [{"type": "Feature", "properties": {"classification": {"name": "ship"}}} for _ in _BOXES]
    for feature, box in zip(features, _BOXES, strict=True):
        feature["geometry"] = json.loads(shapely.to_geojson(shapely.box(*box)))
    qupath = {"type": "FeatureCollection", "features": features}
    (folder / "geojson" / "qupath.geojson").write_text(json.dumps(qupath))
    frame.to_file(folder / "gpkg" / "labels.gpkg", layer="labels", driver="GPKG")
    frame.to_parquet(folder / "parquet" / "labels.parquet")


def _write_coco(folder: Path) -> None:
    folder.mkdir(parents=True)
    bits = np.zeros((48, 64), np.uint8, order="F")
    bits[10:20, 10:30] = 1
    packed = coco_mask.encode(bits)
    runs = [490, 10] + [38, 10] * 19
    segmentations = (
        [[float(x) for x in np.ravel(shapely.box(*_BOXES[0]).exterior.coords)]],
        {"size": [48, 64], "counts": packed["counts"].decode()},
        {"size": [48, 64], "counts": [*runs, 48 * 64 - sum(runs)]},
    )
    annotations = [
        {
            "id": number,
            "image_id": number % 2 + 1,
            "category_id": 1 + (name == "car"),
            "bbox": [left, top, right - left, bottom - top],
            "area": (right - left) * (bottom - top),
            "iscrowd": int(number == 2),
            "segmentation": outline,
        }
        for number, (name, (left, top, right, bottom), outline) in enumerate(
            zip(_NAMES, _BOXES, segmentations, strict=True)
        )
    ]
    images = [{"id": 1, "file_name": "a.tif", "height": 48, "width": 64}, {"id": 2, "file_name": "b.tif"}]
    categories = [{"id": 1, "name": "ship"}, {"id": 2, "name": "car", "supercategory": "vehicle"}]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (folder / "masks.json").write_text(json.dumps(content))
    for annotation in annotations:
        del annotation["segmentation"]
    (folder / "boxes.json").write_text(json.dumps(content))


def _write_texts(folder: Path) -> None:
    for kind in ("voc", "yolo", "dota", "table"):
        (folder / kind).mkdir(parents=True)
    named = list(zip(_NAMES, _BOXES, strict=True))
    objects = "".join(
        f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{box[0] + 1}</xmin><ymin>{box[1] + 1}</ymin>"
        f"<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>\n"
        for name, box in named
    )
    size = "<size><width>64</width><height>48</height><depth>3</depth></size>"
    (folder / "voc" / "a.xml").write_text(f"<annotation><filename>a.tif</filename>{size}\n{objects}</annotation>\n")
    yolo = [
        f"{int(name == 'car')} {(b[0] + b[2]) / 128} {(b[1] + b[3]) / 96} {(b[2] - b[0]) / 64} {(b[3] - b[1]) / 48}"
        for name, b in named
    ]
    (folder / "yolo" / "a.txt").write_text("\n".join(yolo) + "\n")
    dota = [f"{b[0]} {b[1]} {b[2]} {b[1]} {b[2]} {b[3]} {b[0]} {b[3]} {name} 0" for name, b in named]
    (folder / "dota" / "a.txt").write_text("imagesource:made\ngsd:0.5\n" + "\n".join(dota) + "\n")
    rows = [f"a.tif,{','.join(map(str, box))},{name}" for name, box in named]
    (folder / "table" / "objects.csv").write_text(
        "image,xmin,ymin,xmax,ymax,label\n" + "\n".join(rows) + "\nb.tif,,,,,\n"
    )


def _write_csvs(folder: Path, images: Path) -> None:
    for kind in ("list", "classes"):
        (folder / kind).mkdir(parents=True)
    paths = [images / "a.tif", images / "b.tif"]
    (folder / "list" / "inputs.csv").write_text("path,output\n" + "".join(f"{p},{p.stem}_map.tif\n" for p in paths))
    rows = "car/0.tif,car\ncar/1.tif,car\nship/0.tif,ship\nship/1.tif,ship\n"
    (folder / "classes" / "classes.csv").write_text("image,label\n" + rows)
