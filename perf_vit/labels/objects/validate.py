"""Validation of raw labels: repairs and dropped objects are counted and reported."""

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
from affine import Affine

from perf_vit.errors import DataWarning, InputError
from perf_vit.geometry.boxes import box_areas
from perf_vit.labels.objects.masks import OutlineMasks, Rle
from perf_vit.labels.objects.records import ImageRecord, MaskReader, ObjectIndex, RawImage, RawObject
from perf_vit.sources import open_source
from perf_vit.sources._qupath import is_ignored_class
from perf_vit.sources.slides import SlideSource
from perf_vit.types import OpenInput, Source

__all__ = ["Tally", "oriented_box_around", "validate_labels"]


class Tally:
    """Counts of events with a first example each, reported in one warning.

    Attributes:
        counts: Number of occurrences by event.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, what: str, image: RawImage, happened: npt.NDArray[np.bool_]) -> None:
        """Count the objects of an image that an event happened to, [n]."""
        if happened.any():
            self.note(what, int(happened.sum()), _named(image.objects[int(np.argmax(happened))], image))

    def note(self, what: str, number: int, example: str) -> None:
        """Count an event and keep its first example."""
        self.counts[what] += number
        self._examples.setdefault(what, example)

    def warn(self, images: Sequence[RawImage], *, stacklevel: int) -> None:
        """Report all noted events in one warning, if there are any."""
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


# Label tools round to whole pixels, so smaller overhangs aren't counted as clipped.
_ROUNDING_PX = 1.0

# Rounding error of the area of collinear corners, in square pixels.
_FLAT_PX2 = 1e-6


def validate_labels(
    images: Sequence[RawImage],
    *,
    classes: Sequence[str],
    skip_classes: Collection[str] = (),
    open_input: OpenInput = open_source,
    oriented: bool = False,
) -> ObjectIndex:
    """Validate raw labels against their images and convert them to arrays.

    Boxes that exceed the image are clipped. Objects are dropped if they lie outside of it, have no area, have
    coordinates that are not finite, or are duplicates. A single warning reports the counts with an example each.

    Args:
        images: Images as read from a label format.
        classes: Class names; an object's label is the index of its name.
        skip_classes: Names of objects to leave out, as if they were background.
        open_input: Function that opens an image by path. Raw labels are in pixels of a slide's level 0, records in
            pixels of the resolution it is read at.
        oriented: Whether to convert outlines to the smallest oriented boxes around them.

    Raises:
        InputError: There is no image, a class name is unknown, or an image can't be opened or has another size than its
            labels.
    """
    if not images:
        raise InputError("expected labelled images, got none; check the paths and the list of names")
    tally = Tally()
    counts = tally.counts
    indices = {name: index for index, name in enumerate(classes)}
    _check_names(images, indices, skip_classes)
    _ignore_for_all(images, classes)
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
    """Compute the smallest oriented box around points.

    Args:
        points: Points (x, y), [n, 2], n >= 3.

    Returns:
        Centre x, centre y, width >= height, and angle in [-pi/2, pi/2) from x towards y, [5]; the height is 0 if all
        points are collinear.
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
        unknown = sorted({item.name for item in image.objects if not is_ignored_class(item.name)} - set(indices))
        if unknown:
            raise InputError(
                f"{image.labels} holds objects of class {', '.join(unknown[:8])}; the classes are "
                f"{', '.join(indices)}: add it to classes or skip_classes"
            )


def _ignore_for_all(images: Sequence[RawImage], classes: Sequence[str]) -> None:
    """Replace areas of QuPath's class `Ignore*` by ignored objects of each class."""
    for image in images:
        areas = [item for item in image.objects if is_ignored_class(item.name) and item.name not in classes]
        if areas:
            kept = [item for item in image.objects if item.name in classes]
            image.objects = kept + [replace(item, name=name, ignored=True) for item in areas for name in classes]


def _orient(images: Sequence[RawImage], tally: Tally) -> None:
    """Convert outlines to corners of oriented boxes; upright boxes are kept and counted."""
    if not any(isinstance(item.outline, shapely.Geometry) for image in images for item in image.objects):
        return
    for image in images:
        upright = [item.corners is None and not isinstance(item.outline, shapely.Geometry) for item in image.objects]
        tally.add("upright boxes without outline, kept as they are", image, np.array(upright, bool))
        image.objects = [_with_corners(item) for item in image.objects]


def _with_corners(item: RawObject) -> RawObject:
    points = shapely.get_coordinates(item.outline) if isinstance(item.outline, shapely.Geometry) else np.zeros((0, 2))
    # Outlines without area are dropped later.
    if len(points) < 3:
        return item
    return replace(item, corners=points, box=None, outline=None)


def _kinds(images: Sequence[RawImage], tally: Tally) -> tuple[bool, bool]:
    """Return whether the records have oriented boxes and whether they have masks (all of them or none)."""
    if not any(image.objects for image in images):
        # Without objects, any kind of geometry that a head requires is present.
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
    """Return the size of an image as read; its objects are scaled to it."""
    source = open_input(image.path)
    source.close()
    masks = {(item.outline.height, item.outline.width) for item in image.objects if isinstance(item.outline, Rle)}
    if not isinstance(source, SlideSource):
        _check_size(image, masks, source, source.size)
        return source.size
    if masks or image.masks is not None:
        return _masked_size(image, masks, source)
    _place_in_level0(image, source)
    _check_size(image, masks, source, source.levels[0])
    if not source.frame.to_level0.is_identity:
        image.objects = [_placed(item, source.frame.to_level0) for item in image.objects]
    return source.size


def _masked_size(image: RawImage, masks: set[tuple[int, int]], source: SlideSource) -> tuple[int, int]:
    """Return the size of the part of a slide that masks label: all of level 0, or its bounds, as QuPath exports it."""
    bounds = source.frame.bounds.shape
    labelled = bounds if bounds in (image.size, *masks) else source.levels[0]
    _check_size(image, masks, source, labelled)
    if not source.whole.frame.to_level0.is_identity:
        raise InputError(
            f"{image.labels} holds masks of the pixels of {image.path}, which can't be read at another mpp; give "
            "polygons, or leave data.mpp out"
        )
    return labelled


def _check_size(image: RawImage, masks: set[tuple[int, int]], source: Source, labelled: tuple[int, int]) -> None:
    """Check that labels are of an image of the size that they label.

    Raises:
        InputError: The size that they state, or that of their masks, is another.
    """
    if image.size is not None and min(image.size) > 0 and image.size != labelled:
        raise InputError(
            f"{image.labels} describes an image of {image.size[0]} x {image.size[1]} px, {image.path} has "
            f"{labelled[0]} x {labelled[1]}{_turned(source)}; use the image that was labelled"
        )
    if masks - {labelled}:
        height, width = min(masks - {labelled})
        raise InputError(
            f"{image.labels} holds a mask of {height} x {width} px for {image.path}, which has {labelled[0]} x "
            f"{labelled[1]}; make masks of the size of the image"
        )


def _place_in_level0(image: RawImage, source: SlideSource) -> None:
    """Move objects of a picture of a slide's bounds, which QuPath exports, to level 0."""
    bounds, level0 = source.frame.bounds, source.levels[0]
    if image.size == bounds.shape and bounds.shape != level0:
        image.objects = [_placed(item, Affine.translation(-bounds.col, -bounds.row)) for item in image.objects]
        image.size = level0


def _turned(source: Source) -> str:
    orientation = getattr(source, "orientation", 1)
    return f" as viewers show it (EXIF orientation {orientation})" if orientation > 1 else ""


def _placed(item: RawObject, place: Affine) -> RawObject:
    """Return an object in pixels of a slide, given the transform from these to the object's coordinates."""
    scale, shift = 1 / np.array([place.a, place.e]), np.array([place.c, place.f])
    box = None if item.box is None else ((np.reshape(item.box, (2, 2)) - shift) * scale).ravel().tolist()
    return replace(
        item,
        box=box,
        corners=None if item.corners is None else (item.corners - shift) * scale,
        outline=None if item.outline is None else shapely.transform(item.outline, lambda xy: (xy - shift) * scale),
    )


def _box(item: RawObject) -> Sequence[float] | npt.NDArray[np.float64]:
    if item.box is not None:
        return item.box
    if item.corners is not None:
        return np.concatenate([item.corners.min(axis=0), item.corners.max(axis=0)])
    bounds: Sequence[float] = item.outline.bounds
    # Empty geometries have no bounds and no area.
    return bounds if len(bounds) == 4 and np.isfinite(bounds).all() else (0, 0, 0, 0)


def _clipped(
    objects: Sequence[RawObject], boxes: npt.NDArray[np.float64], height: int, width: int
) -> npt.NDArray[np.float64]:
    """Return boxes clipped to the image; for outlines, around the part inside, which may be smaller."""
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
    """Return the areas of the objects, 0 if any of their geometries has none."""
    areas = box_areas(boxes)
    if oriented is not None:
        areas = np.where(oriented[:, 2] * oriented[:, 3] > _FLAT_PX2, areas, 0)
    flat = np.array([_is_flat(item.outline) for item in objects], bool)
    return np.where(flat, 0, areas)


def _is_flat(outline: Any) -> bool:
    if isinstance(outline, Rle):
        # Every second run is inside the object.
        return not outline.counts[1::2].any()
    return outline is not None and bool(_mended(outline).area <= _FLAT_PX2)


def _drop_unplaced(image: RawImage, tally: Tally) -> None:
    """Drop objects with coordinates that are not finite."""
    unplaced = np.array([not np.isfinite(_coordinates(item)).all() for item in image.objects], bool)
    tally.add("dropped: coordinates that are not finite", image, unplaced)
    _keep(image, ~unplaced)


def _drop_repeated(image: RawImage, tally: Tally) -> None:
    """Drop duplicates, i.e. objects with the class and coordinates of an earlier one."""
    if image.masks is not None:
        # Two objects of an instance raster may have the same box.
        return
    seen: set[tuple[str, bool, bytes]] = set()
    repeated = np.zeros(len(image.objects), bool)
    for index, item in enumerate(image.objects):
        key = item.name, item.ignored, _coordinates(item).tobytes()
        repeated[index] = key in seen
        seen.add(key)
    tally.add("dropped: duplicates", image, repeated)
    _keep(image, ~repeated)


def _keep(image: RawImage, kept: npt.NDArray[np.bool_]) -> None:
    if not kept.all():
        image.objects = [image.objects[index] for index in np.flatnonzero(kept)]


def _coordinates(item: RawObject) -> npt.NDArray[np.float64]:
    """Return all coordinates of an object."""
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
    tally.add("without outline parts of fewer than 3 points", image, lost & ~flat & ~outside)
    tally.add("with a self-intersecting outline, repaired to everything it encloses", image, crossed)
    return np.asarray(~(flat | outside))


def _masks(image: RawImage, objects: Sequence[RawObject]) -> MaskReader:
    if image.masks is None:
        return OutlineMasks([_mended(item.outline) for item in objects])
    # Each value of an instance raster has pixels, so no object is ever dropped.
    assert len(objects) == len(image.objects)
    return image.masks


def _crosses_itself(outline: Any) -> bool:
    return isinstance(outline, shapely.Geometry) and not shapely.is_valid(outline)


def _mended(outline: Any) -> Any:
    """Repair a self-intersecting polygon to everything it encloses."""
    if isinstance(outline, Rle) or not _crosses_itself(outline):
        return outline
    return shapely.make_valid(outline, method="structure", keep_collapsed=False)
