"""The object engine: windows in, the scene's objects out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio.features
import shapely
import torch
from scipy import ndimage
from torch import Tensor, nn

from perf_vit.errors import InputError
from perf_vit.finite import check_finite, finite_outputs
from perf_vit.geometry import Objects
from perf_vit.geometry.objects import ObjectKind
from perf_vit.inference.jobs.journal import LineLog
from perf_vit.inference.merge_objects import ObjectStitcher
from perf_vit.inference.prefetch import Reads, Tile, read_ahead, takes_valid, to_device, valid_pixels
from perf_vit.threads import num_processors
from perf_vit.tiling import grid_windows
from perf_vit.types import Detections, GeoImage, Window

__all__ = ["ObjectModel", "WindowLog", "predict_objects", "scene_objects"]

FloatArray = npt.NDArray[np.float32]

ObjectModel = Callable[..., Sequence[Detections]]
"""Tiles [B, C, h, w] float32 to the detections of each, in its pixels.

One that has an argument `valid` is given the valid pixels, bool [B, h, w], or None where all are.
"""


def predict_objects(
    model: ObjectModel,
    source: Reads,
    normalize: Callable[[GeoImage], FloatArray],
    *,
    extent: Window,
    window_size: int,
    overlap: int,
    batch_size: int = 1,
    num_readers: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    score_threshold: float = 0.5,
    iou_threshold: float = 0.5,
    log: WindowLog | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Objects:
    """Run a detector over a scene in overlapping windows and give each object once.

    An overlap larger than the largest object makes sure that some window sees each object whole; `ObjectStitcher`
    says how the windows' objects are joined. Windows without a valid pixel skip the model, and objects whose centre
    is not valid are left out. Memory is linear in objects.

    Args:
        model: tiles to detections; put an `nn.Module` into evaluation mode and onto the device yourself.
        source: where pixels come from.
        normalize: a window's pixels to the model's input, [C, h, w].
        extent: the part of the source to search.
        window_size: side of a window, in pixels.
        overlap: pixels that neighbouring windows share.
        batch_size: windows a forward pass.
        num_readers: threads that read ahead; one per processor by default.
        device: where the tiles go.
        dtype: torch.float32, or torch.bfloat16 / torch.float16 for autocast.
        score_threshold: lowest score of an object.
        iou_threshold: of two objects of a class with a larger IoU, the one with the higher score stays.
        log: Objects of windows that are finished already, which skip the model; those of further ones are added.
        on_progress: called with (windows done, windows in all), for a progress bar.

    Raises:
        InputError: the model's answer is not one `Detections` a tile, or their arrays don't go together.
    """
    stitcher = ObjectStitcher(extent, window_size, overlap, iou_threshold)
    windows = grid_windows(extent, window_size, overlap)
    known = {} if log is None else log.windows()
    for window, objects in known.items():
        if objects is not None:
            stitcher.add(window, objects)
    todo = [window for window in windows if window not in known]
    readers = num_readers or num_processors()
    tiles = read_ahead(todo, source, normalize, num_threads=readers, depth=2 * batch_size + readers)
    done = len(known)
    with closing(tiles):
        for batch, empty in _batches(tiles, batch_size):
            found = []
            with finite_outputs(_scoring_parts(model), _named(source, batch)):
                detected = _forward(model, batch, device, dtype)
            for tile, detections in zip(batch, detected, strict=True):
                objects = scene_objects(detections, tile.window, score_threshold)
                found.append((tile.window, stitcher.add(tile.window, objects, tile.valid)))
            if log is not None:
                log.add(empty, found)
            done += len(batch) + len(empty)
            on_progress(done, len(windows))
    return stitcher.finish()


def _batches(tiles: Iterator[Tile], batch_size: int) -> Iterator[tuple[list[Tile], list[Window]]]:
    """Tiles with a valid pixel, and the windows without one that come before the last of them."""
    batch: list[Tile] = []
    empty: list[Window] = []
    for tile in tiles:
        if tile.pixels is None:
            empty.append(tile.window)
        else:
            batch.append(tile)
        if len(batch) == batch_size:
            yield batch, empty
            batch, empty = [], []
    if batch or empty:
        yield batch, empty


def _scoring_parts(model: ObjectModel) -> list[nn.Module]:
    """Neck and head of one of our detectors; of others, scores and coordinates are looked at only."""
    parts = (getattr(model, name, None) for name in ("neck", "head"))
    return [part for part in parts if isinstance(part, nn.Module)]


def _named(source: Reads, tiles: Sequence[Tile]) -> str:
    first = tiles[0].window if tiles else None
    more = f" and {len(tiles) - 1} more" if len(tiles) > 1 else ""
    return f"{getattr(source, 'path', 'the source')}, {first}{more},"


def _forward(
    model: ObjectModel, tiles: Sequence[Tile], device: str | torch.device, dtype: torch.dtype
) -> Sequence[Detections]:
    if not tiles:
        return []
    pixels = np.stack([tile.pixels for tile in tiles if tile.pixels is not None])
    batch = to_device(torch.from_numpy(pixels), device)
    valid = valid_pixels(tiles) if takes_valid(model) else None
    autocast = torch.autocast(batch.device.type, dtype=dtype, enabled=dtype != torch.float32)
    with torch.inference_mode(), autocast:
        found = model(batch) if valid is None else model(batch, valid=valid.to(device))
    if len(found) != len(tiles) or not all(isinstance(detections, Detections) for detections in found):
        raise InputError(f"expected {len(tiles)} Detections from the model, one a tile, got {type(found).__name__}")
    return found


def scene_objects(detections: Detections, window: Window, score_threshold: float) -> Objects:
    """The detections of a window whose score is at least the threshold, moved to the scene's pixels.

    Objects without area are left out.

    Args:
        detections: of the window's tile.
        window: where the tile lies in the scene.
        score_threshold: lowest score to keep.

    Raises:
        InputError: no or several geometries, shapes that don't go together, or coordinates that are not finite.
    """
    scores = _array(detections.scores).astype(np.float32)
    labels = _array(detections.labels).astype(np.int32)
    kind, given = _only_geometry(detections)
    _check(kind, given, scores, labels, window)
    kept = np.flatnonzero(scores >= score_threshold)
    geometry = _place(kind, given[kept], window)
    solid = _has_area(_kind_of(kind), geometry)
    kept = kept[solid]
    return Objects(_kind_of(kind), geometry[solid], scores[kept], labels[kept])


def _array(values: Any) -> npt.NDArray[Any]:
    if isinstance(values, Tensor):
        # numpy has no bfloat16.
        values = values.float() if values.dtype == torch.bfloat16 else values
        return np.asarray(values.detach().cpu().numpy())
    return np.asarray(values)


def _only_geometry(detections: Detections) -> tuple[str, npt.NDArray[Any]]:
    names = ("boxes_xyxy", "oriented_boxes", "masks", "polygons")
    given = [name for name in names if getattr(detections, name) is not None]
    if len(given) != 1:
        raise InputError(f"expected detections with one of {', '.join(names)}, got {', '.join(given) or 'none'}")
    values = getattr(detections, given[0])
    if given[0] != "polygons":
        return given[0], _array(values)
    polygons = np.empty(len(values), object)
    polygons[:] = list(values)
    return given[0], polygons


def _check(
    kind: str, geometry: npt.NDArray[Any], scores: npt.NDArray[Any], labels: npt.NDArray[Any], window: Window
) -> None:
    num = len(scores)
    expected = {"boxes_xyxy": (num, 4), "oriented_boxes": (num, 5), "masks": (num, *window.shape), "polygons": (num,)}
    if scores.shape != (num,) or labels.shape != (num,) or geometry.shape != expected[kind]:
        raise InputError(
            f"expected scores [n], labels [n] and {kind} {['n', *expected[kind][1:]]} of the same n, got "
            f"{list(scores.shape)}, {list(labels.shape)} and {list(geometry.shape)}"
        )
    place = f"the window at row {window.row}, column {window.col},"
    check_finite(scores, "scores", lambda index: f"object {index} in {place}")
    if kind in {"boxes_xyxy", "oriented_boxes"}:
        check_finite(geometry, kind, lambda index: f"object {index} in {place}")


def _kind_of(name: str) -> ObjectKind:
    if name == "boxes_xyxy":
        return "boxes"
    return "oriented_boxes" if name == "oriented_boxes" else "polygons"


def _place(name: str, geometry: npt.NDArray[Any], window: Window) -> npt.NDArray[Any]:
    if name == "boxes_xyxy":
        return np.add(geometry, (window.col, window.row, window.col, window.row), dtype=np.float64)
    if name == "oriented_boxes":
        return np.add(geometry, (window.col, window.row, 0, 0, 0), dtype=np.float64)
    polygons = _outlines(geometry) if name == "masks" else _repaired(geometry)
    if len(polygons) == 0:
        return polygons
    moved: npt.NDArray[Any] = shapely.transform(polygons, lambda xy: np.add(xy, (window.col, window.row)))
    return moved


def _outlines(masks: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Masks [n, h, w] as polygons along the pixels' edges, [n]."""
    outlines = np.empty(len(masks), object)
    for index, mask in enumerate(masks):
        outlines[index] = _outline(mask.astype(np.uint8))
    return outlines


def _outline(mask: npt.NDArray[np.uint8]) -> Any:
    place = ndimage.find_objects(mask)
    if not place:
        return shapely.Polygon()
    rows, cols = place[0]
    part = mask[rows, cols]
    rings = [shape for shape, _ in rasterio.features.shapes(part, mask=part.astype(bool), connectivity=4)]
    parts = [shapely.Polygon(s["coordinates"][0], s["coordinates"][1:]) for s in rings]
    whole = parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)
    # Parts that meet at a corner make a valid multipolygon; a ring that touches itself there doesn't.
    whole = shapely.make_valid(whole, method="structure", keep_collapsed=False)
    return shapely.transform(whole, lambda xy: np.add(xy, (cols.start, rows.start)))


def _repaired(polygons: npt.NDArray[Any]) -> npt.NDArray[Any]:
    polygons = polygons.copy()
    broken = ~shapely.is_valid(polygons)
    polygons[broken] = shapely.make_valid(polygons[broken], method="structure", keep_collapsed=False)
    return polygons


def _has_area(kind: ObjectKind, geometry: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    if kind == "boxes":
        return np.asarray((geometry[:, 2:] > geometry[:, :2]).all(axis=1))
    if kind == "oriented_boxes":
        return np.asarray((geometry[:, 2:4] > 0).all(axis=1))
    return np.asarray(shapely.area(geometry) > 0)


class WindowLog:
    """Objects of windows in a folder, batch by batch: a batch is there whole or not at all.

    Args:
        folder: Existing folder.
    """

    def __init__(self, folder: Path) -> None:
        self._log = LineLog(folder, "windows")

    def add(self, empty: Iterable[Window], found: Iterable[tuple[Window, Objects]]) -> None:
        """Note the windows of a batch.

        Args:
            empty: Windows without a valid pixel.
            found: Other windows, with their objects in pixels of the scene.
        """
        entries = [{"window": astuple(window)} for window in empty]
        entries += [{"window": astuple(window), **_plain(objects)} for window, objects in found]
        self._log.add({"windows": entries})

    def windows(self) -> dict[Window, Objects | None]:
        """All windows in the folder, with their objects; None without a valid pixel."""
        entries = (entry for batch in self._log.entries() for entry in batch["windows"])
        return {Window(*entry["window"]): _objects(entry) for entry in entries}


def _plain(objects: Objects) -> dict[str, Any]:
    # JSON keeps every float64, and so every float32, to the last bit.
    geometry = shapely.to_wkb(objects.geometry, hex=True) if objects.kind == "polygons" else objects.geometry
    return {
        "kind": objects.kind,
        "geometry": geometry.tolist(),
        "scores": objects.scores.tolist(),
        "labels": objects.labels.tolist(),
    }


def _objects(entry: dict[str, Any]) -> Objects | None:
    if "kind" not in entry:
        return None
    kind: ObjectKind = entry["kind"]
    scores, labels = np.array(entry["scores"], np.float32), np.array(entry["labels"], np.int32)
    return Objects(kind, _geometry(kind, entry["geometry"]), scores, labels)


def _geometry(kind: ObjectKind, values: Sequence[Any]) -> npt.NDArray[Any]:
    if kind == "polygons":
        return np.asarray(shapely.from_wkb(np.array(values, object)), object)
    return np.array(values, np.float64).reshape(-1, 4 if kind == "boxes" else 5)
