"""Make DOTA's PNGs readable by windows and check its labels: python datasets/dota/prepare.py DOTA/train OUT/train."""

import shutil
import warnings
from pathlib import Path

import rasterio.shutil
import typer
from rasterio.errors import NotGeoreferencedWarning

from perf_vit.errors import PerfVitError
from perf_vit.labels.objects import read_object_labels
from perf_vit.sources import find_images
from perf_vit.writers import check_outputs


def prepare(source: Path, out: Path, labels: str = "labelTxt") -> None:
    """Read SOURCE/images and SOURCE/LABELS, a split of the publisher, and write OUT/images/*.tif and OUT/labelTxt.

    A PNG must be decoded from its top for each window; a tiled TIFF of the same pixels need not.
    """
    images = find_images([source / "images"])
    tiled = [out / "images" / f"{image.stem}.tif" for image in images]
    check_outputs(tiled, images, overwrite=True)
    (out / "images").mkdir(parents=True, exist_ok=True)
    for image, path in zip(images, tiled, strict=True):
        write_tiled(image, path)
    shutil.copytree(source / labels, out / "labelTxt", dirs_exist_ok=True)
    index = read_object_labels(out / "labelTxt", out / "images", label_format="dota")
    print(f"{len(index)} images, {index.counts['ignored']} difficult objects, others: {index.class_counts()}")


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
