"""Make DOTA's PNGs readable by windows and check its labels: python datasets/dota/prepare.py DOTA/train OUT/train."""

import shutil
import warnings
from pathlib import Path

import rasterio.shutil
import typer
from rasterio.errors import NotGeoreferencedWarning

from perf_vit.errors import InputError, PerfVitError
from perf_vit.labels.objects import read_object_labels
from perf_vit.sources import find_images
from perf_vit.writers import check_outputs


def prepare(source: Path, out: Path, labels: str = "") -> None:
    """Read SOURCE/images and SOURCE/LABELS, a split of the publisher, and write OUT/images/*.tif and OUT/labelTxt.

    LABELS is by default the only folder labelTxt* that has oriented boxes, or the one inside it. A PNG must be decoded
    from its top for each window; a tiled TIFF of the same pixels need not.
    """
    folder = source / labels if labels else find_labels(source)
    images = find_images([source / "images"])
    tiled = [out / "images" / f"{image.stem}.tif" for image in images]
    check_outputs(tiled, images, overwrite=True)
    (out / "images").mkdir(parents=True, exist_ok=True)
    for image, path in zip(images, tiled, strict=True):
        write_tiled(image, path)
    shutil.copytree(folder, out / "labelTxt", dirs_exist_ok=True)
    index = read_object_labels(out / "labelTxt", out / "images", label_format="dota")
    print(f"{len(index)} images, {index.counts['ignored']} difficult objects, others: {index.class_counts()}")


def find_labels(source: Path) -> Path:
    """Return the only folder of label files of oriented boxes, not those of upright ones (`*_reclabelTxt`)."""
    folders = {file.parent for file in source.glob("labelTxt*/**/*.txt")}
    found = sorted(folder for folder in folders if "rec" not in folder.name and "hbb" not in folder.name)
    if len(found) == 1:
        return found[0]
    if not found:
        raise InputError(f"expected label files in {source}/labelTxt or {source}/labelTxt-v1.0/labelTxt, got none")
    names = ", ".join(folder.relative_to(source).as_posix() for folder in found)
    raise InputError(f"{source} has several folders of labels: {names}; choose one with --labels")


def write_tiled(image: Path, out: Path) -> None:
    """The same pixels as a tiled GeoTIFF, by way of a file beside it, so that a name is a whole file."""
    part = out.with_suffix(".part")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        rasterio.shutil.copy(image, part, driver="GTiff", tiled=True, compress="deflate", predictor=2)
    part.replace(out)


if __name__ == "__main__":
    try:
        typer.run(prepare)
    except PerfVitError as error:
        raise SystemExit(f"error: {error}") from None
