"""Check ShipRSImageNet and write boxes and oriented boxes: python datasets/shiprsimagenet/prepare.py ROOT OUT."""

import json
from collections import defaultdict
from pathlib import Path

import typer

from perf_vit.errors import PerfVitError
from perf_vit.labels.objects import read_object_labels
from perf_vit.writers import write_coco_labels


def prepare(source: Path, out: Path, level: int = 0) -> None:
    """Read SOURCE/COCO_Format and write OUT/{train,val}.json and OUT/{train,val}_labelTxt.

    The latter holds the outlines of four corners, for oriented boxes. LEVEL is the depth of the publisher's class
    tree, from 0 (ship or dock) to 3 (50 types).
    """
    images = source / "VOC_Format" / "JPEGImages"
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        labels = source / "COCO_Format" / f"ShipRSImageNet_bbox_{split}_level_{level}.json"
        index = read_object_labels(labels, images, label_format="coco")
        write_coco_labels(out / f"{split}.json", index, images)
        num_oriented = write_corners(labels, out / f"{split}_labelTxt")
        print(f"{split}: {len(index)} images, {num_oriented} oriented boxes, {index.class_counts()}")


def write_corners(labels: Path, folder: Path) -> int:
    """Write a labelTxt file an image, spaces in class names as hyphens, and return the number of objects."""
    content = json.loads(labels.read_bytes())
    names = {item["id"]: item["name"].replace(" ", "-") for item in content["categories"]}
    lines = defaultdict(list)
    for annotation in content["annotations"]:
        corners = four_corners(annotation.get("segmentation"))
        if corners is not None:
            ring = " ".join(f"{value:g}" for value in corners)
            name, crowd = names[annotation["category_id"]], annotation.get("iscrowd", 0)
            lines[annotation["image_id"]].append(f"{ring} {name} {crowd}\n")
    folder.mkdir(exist_ok=True)
    for image in content["images"]:
        (folder / Path(image["file_name"]).with_suffix(".txt").name).write_text("".join(lines[image["id"]]))
    return sum(map(len, lines.values()))


def four_corners(outline: object) -> list[float] | None:
    """Return x and y of the corners of an outline, a list of eight numbers or COCO's list of one such list."""
    if isinstance(outline, list) and len(outline) == 1:
        outline = outline[0]
    is_ring = isinstance(outline, list) and len(outline) == 8 and all(isinstance(one, int | float) for one in outline)
    return outline if is_ring else None


if __name__ == "__main__":
    try:
        typer.run(prepare)
    except PerfVitError as error:
        raise SystemExit(f"error: {error}") from None
