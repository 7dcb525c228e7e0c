"""Instance masks: one raster per image with a distinct value per object and 0 for background."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import ndimage

from perf_vit.errors import InputError
from perf_vit.labels.image_folder import ImageFolder
from perf_vit.labels.objects.masks import InstanceMasks
from perf_vit.labels.objects.records import LabelOptions, RawImage, RawLabels, RawObject, register_label_format
from perf_vit.sources import MASK_SUFFIXES, open_raster
from perf_vit.sources.files import RASTER_SUFFIXES

__all__ = ["read_instances"]


@register_label_format("instances")
def read_instances(labels: Path, folder: ImageFolder, options: LabelOptions) -> RawLabels:
    """Read a folder of instance masks, each with the name of its image except for the suffix.

    Args:
        labels: Folder, or a mask.
        folder: Images.
        options: Options with the class of all objects.

    Raises:
        ConfigError: There are several classes.
        InputError: A mask has no image, several bands, values that are not integers, or is a JPEG.
    """
    options.require_one_class("labels of the format instances")
    name = options.first_class
    masks = ImageFolder(labels)
    lossy = [mask for mask in masks.paths if mask.suffix.lower() in RASTER_SUFFIXES - MASK_SUFFIXES]
    if lossy:
        raise InputError(
            f"{len(lossy)} of {len(masks.paths)} masks in {labels} are JPEGs, which changes values and makes objects "
            f"of them, the first {lossy[0]}; write masks as PNG or TIFF"
        )
    root = labels if labels.is_dir() else labels.parent
    pairs = [(folder.find(str(mask.relative_to(root).with_suffix("")), str(mask)), mask) for mask in masks.paths]
    return RawLabels([_image(image, mask, name) for image, mask in pairs if folder.wanted(image)], (name,))


def _image(path: Path, mask: Path, name: str) -> RawImage:
    with open_raster(mask) as raster:
        if raster.num_bands != 1 or raster.dtype.kind not in "ui":
            raise InputError(
                f"{mask} must have one band of integers, one value per object, got {raster.num_bands} bands of "
                f"{raster.dtype}"
            )
        image = raster.read(raster.extent)
        # Nodata pixels are background.
        pixels = np.where(image.valid, image.pixels[0], 0).astype(np.int64)
    values, ranks = np.unique(pixels, return_inverse=True)
    places = ndimage.find_objects(np.where(pixels > 0, ranks.reshape(pixels.shape) + 1, 0))
    found = [(int(value), place) for value, place in zip(values, places, strict=False) if value > 0 and place]
    objects = [RawObject(name=name, box=(cols.start, rows.start, cols.stop, rows.stop)) for _, (rows, cols) in found]
    reader = InstanceMasks(str(mask), np.array([value for value, _ in found], np.int64))
    return RawImage(path=str(path), labels=str(mask), objects=objects, size=pixels.shape, masks=reader)
