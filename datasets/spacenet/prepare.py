"""Name SpaceNet 2's labels like their images: python datasets/spacenet/prepare.py AOI_2_Vegas_Train OUT."""

import shutil
from pathlib import Path

import typer

from perf_vit.errors import InputError, PerfVitError
from perf_vit.labels.objects import read_object_labels
from perf_vit.sources import find_images


def prepare(source: Path, out: Path, product: str = "RGB-PanSharpen") -> None:
    """Read SOURCE/PRODUCT/*.tif and SOURCE/geojson/buildings, and write OUT/labels/IMAGE.geojson.

    Images stay where they are; PRODUCT is the folder of the bands that are used.
    """
    (out / "labels").mkdir(parents=True, exist_ok=True)
    images = find_images([source / product])
    for image in images:
        labels = source / "geojson" / "buildings" / f"{image.stem.replace(product, 'buildings', 1)}.geojson"
        if not labels.is_file():
            raise InputError(f"{image} has no labels {labels}; unpack all of the area's download")
        shutil.copyfile(labels, out / "labels" / f"{image.stem}.geojson")
    index = read_object_labels(out / "labels", source / product, label_format="polygons", classes=["building"])
    print(f"{len(index)} images, {index.counts['objects']} buildings, {index.counts['images without objects']} without")


if __name__ == "__main__":
    try:
        typer.run(prepare)
    except PerfVitError as error:
        raise SystemExit(f"error: {error}") from None
