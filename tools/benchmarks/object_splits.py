"""The splits that docs/benchmarks.md scores detectors on.

    python tools/benchmarks/object_splits.py cells BCCD splits/cells
    python tools/benchmarks/object_splits.py nuclei dsb2018 splits/nuclei
    python tools/benchmarks/object_splits.py cars aerial-cars-dataset/minsk splits/cars
    python tools/benchmarks/object_splits.py trees deepforest/data splits/trees

Writes train.txt, val.txt and test.txt, one image name a line; for trees tables of boxes (train.csv, val.csv,
test_east.csv, test_osbs.csv).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated
from xml.etree import ElementTree

import numpy as np
import typer

TEST, VALIDATION = 0.25, 0.15
KINDS_OF_NUCLEI = ("fluo_", "he_")
TRAINED_CROSSING, OTHER_CROSSING = "DJI-00760-*.jpg", "DJI_0762-*.jpg"
NUM_VALIDATION_FRAMES = 3
YELLOWSTONE, FLORIDA = "2019_YELL_2_541000_4977000_image_crop", "OSBS_029"
LAST_COLUMNS = {"train.csv": 700, "val.csv": 900, "test_east.csv": 1249}


def main(
    data: Annotated[str, typer.Argument(help="cells, nuclei, cars or trees.")],
    folder: Annotated[Path, typer.Argument(help="The publisher's folder.")],
    out: Annotated[Path, typer.Argument(help="Folder for the lists.")],
) -> None:
    """Write the lists of one data set."""
    if data not in SPLITTERS:
        raise typer.BadParameter(f"expected one of {', '.join(SPLITTERS)}, got {data}")
    files = SPLITTERS[data](folder)
    if not all(files.values()):
        raise typer.BadParameter(f"expected the images of {data} in {folder}, got none for some lists; see --help")
    out.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (out / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{out / name}: {len(lines) - name.endswith('.csv')}")


def split_cells(folder: Path) -> dict[str, list[str]]:
    return _permuted([sorted(path.name for path in (folder / "JPEGImages").glob("*.jpg"))])


def split_nuclei(folder: Path) -> dict[str, list[str]]:
    """Each kind of stain by itself."""
    return _permuted([sorted(path.name for path in (folder / "images").glob(f"{kind}*")) for kind in KINDS_OF_NUCLEI])


def split_cars(folder: Path) -> dict[str, list[str]]:
    """Train on one crossing and test on another: frames of a crossing look alike."""
    train, test = (sorted(path.name for path in folder.glob(name)) for name in (TRAINED_CROSSING, OTHER_CROSSING))
    return {"train.txt": train[:-NUM_VALIDATION_FRAMES], "val.txt": train[-NUM_VALIDATION_FRAMES:], "test.txt": test}


def split_trees(folder: Path) -> dict[str, list[str]]:
    """Columns of one image, by the centres of boxes, and all of another."""
    boxes = _voc_boxes(folder / f"{YELLOWSTONE}.xml")
    edges = list(itertools.pairwise((0, *LAST_COLUMNS.values())))
    files = {
        name: _table(YELLOWSTONE, [box for box in boxes if left <= (box[0] + box[2]) / 2 < right])
        for name, (left, right) in zip(LAST_COLUMNS, edges, strict=True)
    }
    return files | {"test_osbs.csv": _table(FLORIDA, _voc_boxes(folder / f"{FLORIDA}.xml"))}


def _permuted(groups: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Of each group a permutation of seed 0, cut into test, validation and training."""
    files: dict[str, list[str]] = {"train.txt": [], "val.txt": [], "test.txt": []}
    for names in groups:
        order = [names[place] for place in np.random.default_rng(0).permutation(len(names))]
        first, second = round(TEST * len(order)), round(TEST * len(order)) + round(VALIDATION * len(order))
        for name, part in zip(files, (order[second:], order[first:second], order[:first]), strict=True):
            files[name] += part
    return files


def _voc_boxes(path: Path) -> list[tuple[float, ...]]:
    """xmin, ymin, xmax and ymax of all objects."""
    root = ElementTree.parse(path).getroot()  # the user's own file
    sides = ("xmin", "ymin", "xmax", "ymax")
    return [tuple(float(box.findtext(side, "nan")) for side in sides) for box in root.iter("bndbox")]


def _table(image: str, boxes: Sequence[Sequence[float]]) -> list[str]:
    header = "image_path,xmin,ymin,xmax,ymax,label"
    return [header, *(",".join([f"{image}.png", *(f"{side:g}" for side in box), "Tree"]) for box in boxes)]


SPLITTERS: dict[str, Callable[[Path], dict[str, list[str]]]] = {
    "cells": split_cells,
    "nuclei": split_nuclei,
    "cars": split_cars,
    "trees": split_trees,
}

if __name__ == "__main__":
    typer.run(main)
