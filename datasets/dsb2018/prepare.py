"""Join DSB2018's masks of single nuclei: python datasets/dsb2018/prepare.py stage1_train OUT."""

import shutil
from pathlib import Path

import numpy as np
import typer
from PIL import Image

from perf_vit.errors import InputError, PerfVitError
from perf_vit.labels.objects import read_object_labels


def prepare(source: Path, out: Path) -> None:
    """Read SOURCE, the publisher's stage1_train, and write OUT/images/ID.png and OUT/instances/ID.png (uint16)."""
    folders = sorted(path.parent for path in source.glob("*/masks"))
    if not folders:
        raise InputError(f"expected folders ID/images and ID/masks in {source}, got none; unpack stage1_train.zip")
    for name in ("images", "instances"):
        (out / name).mkdir(parents=True, exist_ok=True)
    overlapping = 0
    for folder in folders:
        shutil.copyfile(folder / "images" / f"{folder.name}.png", out / "images" / f"{folder.name}.png")
        instances, shared = join_masks(sorted((folder / "masks").glob("*.png")))
        Image.fromarray(instances).save(out / "instances" / f"{folder.name}.png")
        overlapping += shared
    index = read_object_labels(out / "instances", out / "images", label_format="instances", classes=["nucleus"])
    print(f"{len(index)} images, {index.counts['objects']} nuclei; {overlapping} pixels lay under two masks")


def join_masks(paths: list[Path]) -> tuple[np.ndarray, int]:
    """Masks numbered from 1 on, [H, W] uint16, and the number of pixels under several, which the first one keeps."""
    if not paths:
        raise InputError("expected a PNG for each nucleus in the folder masks, got none")
    joined, shared = None, 0
    for number, path in enumerate(paths, 1):
        # Some masks are stored with colours: a pixel belongs to the nucleus if any band says so.
        mask = np.atleast_3d(np.asarray(Image.open(path).convert("L"))).any(axis=2)
        joined = np.zeros(mask.shape, np.uint16) if joined is None else joined
        shared += int((mask & (joined > 0)).sum())
        joined[mask & (joined == 0)] = number
    return joined, shared


if __name__ == "__main__":
    try:
        typer.run(prepare)
    except PerfVitError as error:
        raise SystemExit(f"error: {error}") from None
