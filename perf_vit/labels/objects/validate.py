"""What happens to objects on the way from label files to records, counted, with an example of each."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from perf_vit.errors import DataWarning, InputError
from perf_vit.geometry.boxes import box_areas
from perf_vit.labels.objects.masks import OutlineMasks, Rle
from perf_vit.labels.objects.records import ImageRecord, MaskReader, ObjectIndex, RawImage, RawObject
from perf_vit.sources import open_source
from perf_vit.sources.slides import SlideSource
from perf_vit.types import OpenInput, Source

__all__ = ["Tally", "finish_index", "oriented_box_around"]


class Tally:
    """Counts by what happened, with the first example; one warning tells them all.

    Attributes:
        counts: by what happened.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, what: str, image: RawImage, happened: npt.NDArray[np.bool_]) -> None:
        """Count the objects of an image to which it happened, [n]."""
        if happened.any():
            self.note(what, int(happened.sum()), _named(image.objects[int(np.argmax(happened))], image))

    def note(self, what: str, number: int, example: str) -> None:
        """Count something, of which the first example is kept."""
        self.counts[what] += number
        self._examples.setdefault(what, example)

    def warn(self, images: Sequence[RawImage], *, stacklevel: int) -> None:
        """Tell what was noted, in one warning; nothing where there is nothing."""
        notable = [f"{self.counts[what]} {what} (first: {example})" for what, example in self._examples.items()]
        if notable:
            warnings.warn(
                f"labels of {len(images)} images, the first {images[0].labels}: kept {self.counts['objects']} objects; "
                + ", ".join(notable),
                DataWarning,
                stacklevel=stacklevel + 1,
            )


def _named(item: RawObject, image: RawImage) -> str:
    place = item.box if item.box is not None else item.corners
    where = "" if place is None else " at " + " ".join(f"{value:g}" for value in np.ravel(place))
    return f"{item.name or 'no name'}{where} in {image.labels}"


# Label tools round to whole pixels: up to this far past the edge is no clipping worth a count.
_ROUNDING_PX = 1.0

# Corners on a line leave this much of rounding errors, in square pixels.
_FLAT_PX2 = 1e-6


def finish_index(
    images: Sequence[RawImage],
    *,
    classes: Sequence[str],
    skip_classes: Collection[str] = (),
    open_input: OpenInput = open_source,
    oriented: bool = False,
) -> ObjectIndex:
    """Check raw labels against their images and put them in arrays.

    Boxes that reach past the image are clipped. Dropped are objects that lie wholly outside, have no area, have
    coordinates that are no numbers or are there twice. One warning at the end counts all that, with an example of each.

    Args:
        images: as a format's reader gives them.
        classes: names; an object's label is its name's index.
        skip_classes: names of objects to leave out, as if they were background.
        open_input: opens an image by its path. Raw labels are in pixels of a slide's level 0, records in those of the
            size that it is read at.
        oriented: make outlines to the smallest oriented boxes around them.

    Raises:
        InputError: no image, an unknown class name, an image that can't be opened or has another size than its labels.
    """
    if not images:
        raise InputError("expected labelled images, got none; check the paths and the list of names")
    tally = Tally()
    counts = tally.counts
    indices = {name: index for index, name in enumerate(classes)}
    _check_names(images, indices, skip_classes)
    if oriented:
        _orient(images, tally)
    kinds = _kinds(images, tally)
    records = tuple(_record(image, indices, kinds, tally, open_input) for image in images)
    counts["images"] = len(records)
    counts["images without objects"] = sum(len(record) == 0 for record in records)
    counts["objects"] = sum(map(len, records))
    counts["ignored"] = sum(int(record.ignored.sum()) for record in records)
    tally.warn(images, stacklevel=3)
    return ObjectIndex(records, tuple(classes), counts)


def oriented_box_around(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The smallest oriented box around points.

    Args:
        points: x and y, [n, 2], n >= 3.

    Returns:
        Centre x, centre y, width >= height, and angle in [-pi/2, pi/2) from x towards y, [5]; the height is 0 where
        all points lie on a line.
    """
    rectangle = shapely.minimum_rotated_rectangle(shapely.MultiPoint(points))
    corners = shapely.get_coordinates(rectangle)
    center = (corners.max(axis=0) + corners.min(axis=0)) / 2
    if rectangle.geom_type != "Polygon":
        return np.array([*center, 0, 0, 0])
    sides = corners[1:3] - corners[:2]
    lengths = np.hypot(*sides.T)
    along = sides[int(np.argmax(lengths))]
    angle = math.atan2(along[1], along[0])
    angle -= math.pi * math.floor(angle / math.pi + 0.5)
    return np.array([*center, lengths.max(), lengths.min(), angle])


def _check_names(images: Sequence[RawImage], indices: dict[str, int], skip_classes: Collection[str]) -> None:
    for image in images:
        image.objects = (
            [item for item in image.objects if item.name not in skip_classes] if skip_classes else (image.objects)
        )
        unknown = sorted({item.name for item in image.objects} - set(indices))
        if unknown:
            raise InputError(
                f"{image.labels} holds objects of class {', '.join(unknown[:8])}; the classes are "
                f"{', '.join(indices)}: add it to classes or skip_classes"
            )


def _orient(images: Sequence[RawImage], tally: Tally) -> None:
    """Make outlines to corners of oriented boxes; boxes among them stay upright and are counted."""
    if not any(isinstance(item.outline, shapely.Geometry) for image in images for item in image.objects):
        return
    for image in images:
        upright = [item.corners is None and not isinstance(item.outline, shapely.Geometry) for item in image.objects]
        tally.add("upright boxes without outline, taken as they are", image, np.array(upright, bool))
        image.objects = [_with_corners(item) for item in image.objects]


def _with_corners(item: RawObject) -> RawObject:
    points = shapely.get_coordinates(item.outline) if isinstance(item.outline, shapely.Geometry) else np.zeros((0, 2))
    # Outlines without area are dropped as such.
    if len(points) < 3:
        return item
    return replace(item, corners=points, box=None, outline=None)


def _kinds(images: Sequence[RawImage], tally: Tally) -> tuple[bool, bool]:
    """Whether the records have oriented boxes, and whether they have masks: all of them or none."""
    if not any(image.objects for image in images):
        # No objects are no objects of any kind: whatever a head asks for is there.
        return True, True
    oriented = any(item.corners is not None for image in images for item in image.objects)
    bare = [image for image in images if image.masks is None]
    missing = sum(item.outline is None for image in bare for item in image.objects)
    found = sum(item.outline is not None for image in images for item in image.objects)
    if missing and found:
        for image in bare:
            without = np.array([item.outline is None for item in image.objects], bool)
            tally.add("without outline, so no masks are given", image, without)
    return oriented, not missing and (found > 0 or any(image.masks is not None for image in images))


def _record(
    image: RawImage,
    indices: dict[str, int],
    kinds: tuple[bool, bool],
    tally: Tally,
    open_input: OpenInput,
) -> ImageRecord:
    height, width = _measured(image, open_input)
    _drop_unplaced(image, tally)
    _drop_repeated(image, tally)
    boxes = np.array([_box(item) for item in image.objects], np.float64).reshape(-1, 4)
    oriented = _oriented(image.objects, boxes) if kinds[0] else None
    inside = _clipped(image.objects, boxes, height, width)
    kept = _kept(image, boxes, inside, _areas(image.objects, boxes, oriented), tally)
    objects = [image.objects[index] for index in np.flatnonzero(kept)]
    return ImageRecord(
        path=image.path,
        height=height,
        width=width,
        labels=np.array([indices[item.name] for item in objects], np.int64),
        boxes_xyxy=inside[kept],
        ignored=np.array([item.ignored for item in objects], bool),
        oriented_boxes=None if oriented is None else oriented[kept],
        masks=_masks(image, objects) if kinds[1] else None,
    )


def _measured(image: RawImage, open_input: OpenInput) -> tuple[int, int]:
    """The size of an image as it is read; its objects are brought to that."""
    source = open_input(image.path)
    source.close()
    labelled = source.levels[0] if isinstance(source, SlideSource) else source.size
    if image.size is not None and min(image.size) > 0 and image.size != labelled:
        raise InputError(
            f"{image.labels} describes an image of {image.size[0]} x {image.size[1]} px, {image.path} has "
            f"{labelled[0]} x {labelled[1]}{_turned(source)}; use the image that was labelled"
        )
    sizes = {(item.outline.height, item.outline.width) for item in image.objects if isinstance(item.outline, Rle)}
    if sizes - {labelled}:
        height, width = min(sizes - {labelled})
        raise InputError(
            f"{image.labels} holds a mask of {height} x {width} px for {image.path}, which has {labelled[0]} x "
            f"{labelled[1]}; make masks of the size of the image"
        )
    if isinstance(source, SlideSource) and source.downsample_xy != (1, 1):
        if image.masks is not None or any(isinstance(item.outline, Rle) for item in image.objects):
            raise InputError(
                f"{image.labels} holds masks of the pixels of {image.path}, which can't be read at another mpp; give "
                "polygons, or leave data.mpp out"
            )
        image.objects = [_reduced(item, source.downsample_xy) for item in image.objects]
    return source.size


def _turned(source: Source) -> str:
    orientation = getattr(source, "orientation", 1)
    return f" as viewers show it (EXIF orientation {orientation})" if orientation > 1 else ""


def _reduced(item: RawObject, downsample_xy: tuple[float, float]) -> RawObject:
    """An object in pixels of level 0, in larger ones."""
    scale = 1 / np.array(downsample_xy)
    return replace(
        item,
        box=None if item.box is None else (np.asarray(item.box, np.float64) * np.tile(scale, 2)).tolist(),
        corners=None if item.corners is None else item.corners * scale,
        outline=None if item.outline is None else shapely.transform(item.outline, lambda xy: xy * scale),
    )


def _box(item: RawObject) -> Sequence[float] | npt.NDArray[np.float64]:
    if item.box is not None:
        return item.box
    if item.corners is not None:
        return np.concatenate([item.corners.min(axis=0), item.corners.max(axis=0)])
    bounds: Sequence[float] = item.outline.bounds
    # An empty geometry has no bounds; 0 area is what it is.
    return bounds if len(bounds) == 4 and np.isfinite(bounds).all() else (0, 0, 0, 0)


def _clipped(
    objects: Sequence[RawObject], boxes: npt.NDArray[np.float64], height: int, width: int
) -> npt.NDArray[np.float64]:
    """Boxes of what lies inside the image; of outlines, around their part inside, which may be smaller."""
    inside = np.clip(boxes, 0, [width, height, width, height])
    for index in np.flatnonzero((inside != boxes).any(axis=1)).tolist():
        item = objects[index]
        if item.box is None and isinstance(item.outline, shapely.Geometry):
            part = shapely.clip_by_rect(_mended(item.outline), 0, 0, width, height)
            inside[index] = 0 if part.is_empty else part.bounds
    return inside


def _oriented(objects: Sequence[RawObject], boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    upright = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]
    corners = [points if item.corners is None else item.corners for item, points in zip(objects, upright, strict=True)]
    return np.array([oriented_box_around(points) for points in corners], np.float64).reshape(-1, 5)


def _areas(
    objects: Sequence[RawObject], boxes: npt.NDArray[np.float64], oriented: npt.NDArray[np.float64] | None
) -> npt.NDArray[np.float64]:
    """Areas of the objects, 0 where any of their geometries has none."""
    areas = box_areas(boxes)
    if oriented is not None:
        areas = np.where(oriented[:, 2] * oriented[:, 3] > _FLAT_PX2, areas, 0)
    flat = np.array([_is_flat(item.outline) for item in objects], bool)
    return np.where(flat, 0, areas)


def _is_flat(outline: Any) -> bool:
    if isinstance(outline, Rle):
        # Runs inside the object are every other one.
        return not outline.counts[1::2].any()
    return outline is not None and bool(_mended(outline).area <= _FLAT_PX2)


def _drop_unplaced(image: RawImage, tally: Tally) -> None:
    """Drop objects of which a coordinate is no finite number."""
    unplaced = np.array([not np.isfinite(_coordinates(item)).all() for item in image.objects], bool)
    tally.add("dropped: coordinates that are no numbers", image, unplaced)
    _keep(image, ~unplaced)


def _drop_repeated(image: RawImage, tally: Tally) -> None:
    """Drop objects that are there already, with the same class and coordinates."""
    if image.masks is not None:
        # Two objects of an instance raster may have one box.
        return
    seen: set[tuple[str, bool, bytes]] = set()
    repeated = np.zeros(len(image.objects), bool)
    for index, item in enumerate(image.objects):
        key = item.name, item.ignored, _coordinates(item).tobytes()
        repeated[index] = key in seen
        seen.add(key)
    tally.add("dropped: there twice", image, repeated)
    _keep(image, ~repeated)


def _keep(image: RawImage, kept: npt.NDArray[np.bool_]) -> None:
    if not kept.all():
        image.objects = [image.objects[index] for index in np.flatnonzero(kept)]


def _coordinates(item: RawObject) -> npt.NDArray[np.float64]:
    """All numbers that say where an object is."""
    parts = [np.ravel(place) for place in (item.box, item.corners) if place is not None]
    if isinstance(item.outline, Rle):
        parts.append(item.outline.counts)
    elif item.outline is not None:
        parts.append(shapely.get_coordinates(item.outline).ravel())
    return np.concatenate([np.asarray(part, np.float64) for part in parts])


def _kept(
    image: RawImage,
    boxes: npt.NDArray[np.float64],
    inside: npt.NDArray[np.float64],
    areas: npt.NDArray[np.float64],
    tally: Tally,
) -> npt.NDArray[np.bool_]:
    flat = areas <= 0
    outside = ~flat & (box_areas(inside) <= 0)
    clipped = ~flat & ~outside & (np.abs(boxes - inside).max(axis=1, initial=0) > _ROUNDING_PX)
    crossed = ~flat & ~outside & np.array([_crosses_itself(item.outline) for item in image.objects], bool)
    tally.add("dropped: no area", image, flat)
    tally.add("dropped: outside the image", image, outside)
    tally.add("clipped at the image's edge", image, clipped)
    lost = np.array([item.lost_parts > 0 for item in image.objects], bool)
    tally.add("without parts of their outline that have fewer than 3 points", image, lost & ~flat & ~outside)
    tally.add("outlined by lines that cross, of which all that they enclose is kept", image, crossed)
    return np.asarray(~(flat | outside))


def _masks(image: RawImage, objects: Sequence[RawObject]) -> MaskReader:
    if image.masks is None:
        return OutlineMasks([_mended(item.outline) for item in objects])
    # Values of an instance raster are there because a pixel has them: none is ever dropped.
    assert len(objects) == len(image.objects)
    return image.masks


def _crosses_itself(outline: Any) -> bool:
    return isinstance(outline, shapely.Geometry) and not shapely.is_valid(outline)


def _mended(outline: Any) -> Any:
    """A polygon that crosses itself, made valid, so that areas and parts are what they look like."""
    if isinstance(outline, Rle) or not _crosses_itself(outline):
        return outline
    return shapely.make_valid(outline, method="structure", keep_collapsed=False)
