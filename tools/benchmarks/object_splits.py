"""The splits that docs/benchmarks.md scores detectors on.

    python tools/benchmarks/object_splits.py cells BCCD splits/cells
    python tools/benchmarks/object_splits.py nuclei dsb2018 splits/nuclei
    python tools/benchmarks/object_splits.py cars aerial-cars-dataset/minsk splits/cars
    python tools/benchmarks/object_splits.py trees deepforest/data splits/trees

Writes train.txt, val.txt and test.txt, one image name a line; for trees parts of two images (train, val, test_east and
test_osbs, each a PNG and a CSV of its boxes), since trees of another part would be background without a box.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import typer
from PIL import Image

TEST, VALIDATION = 0.25, 0.15
KINDS_OF_NUCLEI = ("fluo_", "he_")
TRAINED_CROSSING, OTHER_CROSSING = "DJI-00760-*.jpg", "DJI_0762-*.jpg"
NUM_VALIDATION_FRAMES = 3
YELLOWSTONE, FLORIDA = "2019_YELL_2_541000_4977000_image_crop", "OSBS_029"
LAST_COLUMNS = {"train": 700, "val": 900, "test_east": 1249}


def main(
    data: Annotated[str, typer.Argument(help="cells, nuclei, cars or trees.")],
    folder: Annotated[Path, typer.Argument(help="The publisher's folder.")],
    out: Annotated[Path, typer.Argument(help="Folder for the lists.")],
) -> None:
    """Write the lists of one data set."""
    if data not in ("cells", "nuclei", "cars", "trees"):
        raise typer.BadParameter(f"expected cells, nuclei, cars or trees, got {data}")
    if data == "trees":
        split_trees(folder, out)
        return
    files = {"cells": split_cells, "nuclei": split_nuclei, "cars": split_cars}[data](folder)
    if not all(files.values()):
        raise typer.BadParameter(f"expected the images of {data} in {folder}, got none for some lists; see --help")
    out.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (out / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{out / name}: {len(lines)}")


def split_cells(folder: Path) -> dict[str, list[str]]:
    return _permuted([sorted(path.name for path in (folder / "JPEGImages").glob("*.jpg"))])


def split_nuclei(folder: Path) -> dict[str, list[str]]:
    """Each kind of stain by itself."""
    return _permuted([sorted(path.name for path in (folder / "images").glob(f"{kind}*")) for kind in KINDS_OF_NUCLEI])


def split_cars(folder: Path) -> dict[str, list[str]]:
    """Train on one crossing and test on another: frames of a crossing look alike."""
    train, test = (sorted(path.name for path in folder.glob(name)) for name in (TRAINED_CROSSING, OTHER_CROSSING))
    return {"train.txt": train[:-NUM_VALIDATION_FRAMES], "val.txt": train[-NUM_VALIDATION_FRAMES:], "test.txt": test}


def split_trees(folder: Path, out: Path) -> None:
    """Columns of one image, with the boxes whose centres they hold, and all of another."""
    names = [f"{name}{ending}" for name in (YELLOWSTONE, FLORIDA) for ending in (".png", ".xml")]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise typer.BadParameter(f"expected {missing[0]} in {folder}, got none; see --help")
    out.mkdir(parents=True, exist_ok=True)
    image, boxes = Image.open(folder / f"{YELLOWSTONE}.png"), _voc_boxes(folder / f"{YELLOWSTONE}.xml")
    centers = boxes[:, [0, 2]].mean(axis=1)
    for name, (left, right) in zip(LAST_COLUMNS, itertools.pairwise((0, *LAST_COLUMNS.values())), strict=True):
        own = boxes[(centers >= left) & (centers < right)] - [left, 0, left, 0]
        _write_boxes(out / name, image.crop((left, 0, right, image.height)), own)
    _write_boxes(out / "test_osbs", Image.open(folder / f"{FLORIDA}.png"), _voc_boxes(folder / f"{FLORIDA}.xml"))


def _permuted(groups: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """Of each group a permutation of seed 0, cut into test, validation and training."""
    files: dict[str, list[str]] = {"train.txt": [], "val.txt": [], "test.txt": []}
    for names in groups:
        order = [names[place] for place in np.random.default_rng(0).permutation(len(names))]
        first, second = round(TEST * len(order)), round(TEST * len(order)) + round(VALIDATION * len(order))
        for name, part in zip(files, (order[second:], order[first:second], order[:first]), strict=True):
            files[name] += part
    return files


def _voc_boxes(path: Path) -> npt.NDArray[np.float64]:
    """xmin, ymin, xmax and ymax of all objects, [n, 4]."""
    root = ElementTree.parse(path).getroot()
    sides = ("xmin", "ymin", "xmax", "ymax")
    return np.array([[float(box.findtext(side, "nan")) for side in sides] for box in root.iter("bndbox")])


def _write_boxes(path: Path, image: Image.Image, boxes: npt.NDArray[np.float64]) -> None:
    """An image and the table of its boxes."""
    image.convert("RGB").save(path.with_suffix(".png"))
    rows = [",".join([f"{path.name}.png", *(f"{side:g}" for side in box), "Tree"]) for box in boxes]
    table = "\n".join(["image_path,xmin,ymin,xmax,ymax,label", *rows])
    path.with_suffix(".csv").write_text(table + "\n", encoding="utf-8")
    print(f"{path.with_suffix('.csv')}: {len(boxes)}")


if __name__ == "__main__":
    typer.run(main)
