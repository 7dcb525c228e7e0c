"""Check BCCD's boxes and write them as COCO's JSON, one file a split: python datasets/bccd/prepare.py BCCD OUT."""

from pathlib import Path

import typer

from perf_vit.errors import PerfVitError
from perf_vit.labels.objects import read_object_labels
from perf_vit.writers import write_coco_labels

CLASSES = ("RBC", "WBC", "Platelets")


def prepare(source: Path, out: Path) -> None:
    """Read SOURCE, the publisher's folder BCCD, and write OUT/{train,val,test}.json, or OUT/all.json without splits."""
    out.mkdir(parents=True, exist_ok=True)
    images = source / "JPEGImages"
    lists = sorted((source / "ImageSets" / "Main").glob("*.txt"))
    splits = {path.stem: path.read_text().split() for path in lists if path.stem in ("train", "val", "test")}
    for name, names in (splits or {"all": None}).items():
        index = read_object_labels(source / "Annotations", images, label_format="voc", classes=CLASSES, names=names)
        write_coco_labels(out / f"{name}.json", index, images)
        print(f"{name}: {len(index)} images, {index.class_counts()}")


if __name__ == "__main__":
    try:
        typer.run(prepare)
    except PerfVitError as error:
        raise SystemExit(f"error: {error}") from None
