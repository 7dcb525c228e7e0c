"""Name SpaceNet 2's labels like their images: python datasets/spacenet/prepare.py AOI_2_Vegas OUT."""

import shutil
from pathlib import Path

import typer

from perf_vit.errors import InputError, PerfVitError
from perf_vit.labels.objects import read_object_labels
from perf_vit.sources import find_images

# Folders of images and labels in the bucket, and in older archives.
_LAYOUTS = (("PS-RGB", Path("geojson_buildings")), ("RGB-PanSharpen", Path("geojson", "buildings")))


def prepare(source: Path, out: Path, product: str = "") -> None:
    """Read SOURCE/PRODUCT/*.tif and the outlines beside, and write OUT/labels/IMAGE.geojson.

    Images stay where they are; PRODUCT is the folder of the bands that are used, by default PS-RGB or RGB-PanSharpen.
    """
    default, folder = find_layout(source)
    product = product or default
    images = find_images([source / product])
    (out / "labels").mkdir(parents=True, exist_ok=True)
    for image in images:
        # Names say what a file holds: its folder's name, without the folders above.
        labels = source / folder / f"{image.stem.replace(product, folder.name, 1)}.geojson"
        if not labels.is_file():
            raise InputError(f"{image} has no labels {labels}; unpack all of the area's download")
        shutil.copyfile(labels, out / "labels" / f"{image.stem}.geojson")
    index = read_object_labels(out / "labels", source / product, label_format="polygons", classes=["building"])
    print(f"{len(index)} images, {index.counts['objects']} buildings, {index.counts['images without objects']} without")


def find_layout(source: Path) -> tuple[str, Path]:
    """Return the folder of RGB images and that of outlines."""
    for product, folder in _LAYOUTS:
        if (source / folder).is_dir():
            return product, folder
    expected = " or ".join(str(source / folder) for _, folder in _LAYOUTS)
    raise InputError(f"expected outlines of buildings in {expected}, got no such folder; give the folder of one area")


if __name__ == "__main__":
    try:
        typer.run(prepare)
    except PerfVitError as error:
        raise SystemExit(f"error: {error}") from None
