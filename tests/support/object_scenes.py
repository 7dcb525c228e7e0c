"""Scenes of known objects, and a detector that sees exactly what lies in its window."""

import numpy as np
import shapely
import torch

from perf_vit.geometry.boxes import oriented_box_corners, paired_intersections
from perf_vit.inference import predict_objects
from perf_vit.types import Detections, GeoImage, Window


class Places:
    """A source whose two bands hold each pixel's row and column, so that a model knows which window it sees."""

    def __init__(self, height: int, width: int, valid: np.ndarray | None = None) -> None:
        self.extent = Window(0, 0, height, width)
        self.valid = np.ones((height, width), bool) if valid is None else valid
        self.reads: list[Window] = []

    def read(self, window: Window) -> GeoImage:
        self.reads.append(window)
        rows, cols = np.mgrid[window.row : window.row_stop, window.col : window.col_stop]
        valid = np.zeros(window.shape, bool)
        shared = window.intersect(self.extent)
        valid[shared.slices_in(window)] = self.valid[shared.slices_in(self.extent)]
        return GeoImage(np.stack([rows, cols]), valid)


def as_float(image: GeoImage) -> np.ndarray:
    return image.pixels.astype(np.float32)


def random_boxes(rng: np.random.Generator, num: int, height: int, width: int, largest: float) -> np.ndarray:
    """Up to `num` boxes inside the scene, of which none covers more than a third of another."""
    kept = np.zeros((0, 4))
    for _ in range(num):
        sides = rng.uniform(2, largest, 2).clip(max=(width, height))
        corner = rng.uniform(0, 1, 2) * (np.array([width, height]) - sides)
        box = np.concatenate([corner, corner + sides])
        smaller = np.minimum((kept[:, 2:] - kept[:, :2]).prod(1), sides.prod())
        if (paired_intersections(kept, box) <= 0.3 * smaller).all():
            kept = np.concatenate([kept, box[None]])
    return kept


def oriented_in(boxes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An oriented box inside each upright one, whose diagonal is at most the shorter side."""
    side = (boxes[:, 2:] - boxes[:, :2]).min(axis=1)
    ratio = rng.uniform(0.3, 1, len(boxes))
    length = side / np.hypot(1, ratio)
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    angle = rng.uniform(-np.pi / 2, np.pi / 2, len(boxes))
    return np.concatenate([center, np.stack([length, length * ratio, angle], 1)], axis=1)


def as_oriented(polygon) -> np.ndarray:
    """The smallest oriented box around a polygon."""
    corners = np.array(shapely.minimum_rotated_rectangle(polygon).exterior.coords)[:4]
    sides = corners[1:3] - corners[:2]
    lengths = np.hypot(*sides.T)
    along = sides[lengths.argmax()]
    angle = (np.arctan2(along[1], along[0]) + np.pi / 2) % np.pi - np.pi / 2
    return np.array([*corners.mean(axis=0), lengths.max(), lengths.min(), angle])


class Perfect:
    """Finds the visible part of every object of the scene; call it with tiles of `Places`."""

    def __init__(self, kind: str, objects: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> None:
        self.kind, self.objects, self.labels, self.scores = kind, objects, labels, scores
        self.num_tiles = 0

    def __call__(self, tiles: torch.Tensor) -> list[Detections]:
        self.num_tiles += len(tiles)
        return [self._see(int(tile[0, 0, 0]), int(tile[1, 0, 0]), tile.shape[-1]) for tile in tiles]

    def _see(self, row: int, col: int, size: int) -> Detections:
        seen, kept = getattr(self, f"_{self.kind}")(np.array([col, row]), size)
        name = "boxes_xyxy" if self.kind == "boxes" else self.kind
        return Detections(scores=self.scores[kept], labels=self.labels[kept], **{name: seen})

    def _boxes(self, origin: np.ndarray, size: int):
        clipped = (self.objects - np.tile(origin, 2)).clip(0, size)
        kept = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
        return torch.from_numpy(clipped[kept]), np.flatnonzero(kept)

    def _oriented_boxes(self, origin: np.ndarray, size: int):
        window, seen, kept = shapely.box(0, 0, size, size), [], []
        for index, box in enumerate(self.objects):
            moved = box - [*origin, 0, 0, 0]
            whole = shapely.Polygon(oriented_box_corners(moved))
            part = shapely.intersection(whole, window)
            if part.area > 1e-6:
                seen.append(moved if window.contains(whole) else as_oriented(part))
                kept.append(index)
        return np.array(seen).reshape(-1, 5), np.array(kept, int)

    def _masks(self, origin: np.ndarray, size: int):
        x, y = origin[:, None, None] + np.stack(np.meshgrid(np.arange(size), np.arange(size))) + 0.5
        low, high = self.objects[:, :2], self.objects[:, 2:]
        center, radius = (low + high) / 2, (high - low) / 2
        dx, dy = (x - center[:, 0, None, None]), (y - center[:, 1, None, None])
        masks = (dx / radius[:, 0, None, None]) ** 2 + (dy / radius[:, 1, None, None]) ** 2 <= 1
        kept = np.flatnonzero(masks.any(axis=(1, 2)))
        return torch.from_numpy(masks[kept]), kept


def search(model, source: Places, *, window_size: int, overlap: int, extent: Window | None = None, **options):
    return predict_objects(
        model,
        source,
        as_float,
        extent=extent or source.extent,
        window_size=window_size,
        overlap=overlap,
        **options,
    )
