"""Pictures of turned rectangles, of two kinds by their colour, none touching another."""

import numpy as np

from perf_vit.geometry.boxes import oriented_box_corners
from perf_vit.types import GeoImage, ObjectLabels, Window


def draw_rectangles(rng: np.random.Generator, height: int, width: int, num: int) -> tuple[np.ndarray, ObjectLabels]:
    """Noise with rectangles 12 to 36 long and 4 to 10 wide: [3, height, width] float32, and their labels."""
    pixels = rng.normal(0, 0.1, (3, height, width)).astype(np.float32)
    taken, margin = np.zeros((height, width), bool), np.array([0, 0, 6, 6, 0])
    boxes: list[np.ndarray] = []
    while len(boxes) < num:
        center = rng.uniform(20, [width - 20, height - 20])
        box = np.array([*center, rng.uniform(12, 36), rng.uniform(4, 10), rng.uniform(-np.pi / 2, np.pi / 2)])
        if not (covered(box + margin, height, width) & taken).any():
            inside = covered(box, height, width)
            taken |= inside
            pixels[len(boxes) % 2, inside] += 1
            boxes.append(box)
    return pixels, as_labels(np.array(boxes, np.float32), np.arange(num) % 2)


def covered(box: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixels whose centre lies in the box, [height, width] bool."""
    y, x = np.mgrid[:height, :width] + 0.5
    dx, dy, cos, sin = x - box[0], y - box[1], np.cos(box[4]), np.sin(box[4])
    return (np.abs(dx * cos + dy * sin) <= box[2] / 2) & (np.abs(dy * cos - dx * sin) <= box[3] / 2)


def as_labels(oriented_boxes: np.ndarray, labels: np.ndarray) -> ObjectLabels:
    corners = oriented_box_corners(oriented_boxes).reshape(-1, 4, 2)
    return ObjectLabels(
        labels=labels.astype(np.int64),
        boxes_xyxy=np.concatenate([corners.min(1), corners.max(1)], 1),
        oriented_boxes=oriented_boxes,
        ignored=np.zeros(len(labels), bool),
    )


class Picture:
    """A source of pixels in memory."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.extent = Window(0, 0, *pixels.shape[1:])

    def read(self, window: Window) -> GeoImage:
        pixels, valid = np.zeros((3, *window.shape), np.float32), np.zeros(window.shape, bool)
        shared = window.intersect(self.extent)
        here, there = shared.slices_in(window), shared.slices_in(self.extent)
        pixels[:, *here], valid[here] = self.pixels[:, *there], True
        return GeoImage(pixels, valid)
