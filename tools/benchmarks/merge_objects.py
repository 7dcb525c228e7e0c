"""Time and peak memory of joining 100,000 objects of overlapping windows.

    python tools/benchmarks/merge_objects.py [--num 100000] [--seed 0]

Each case runs in its own process. The peak is that of the whole process (VmHWM of Linux), beside what it was when the
libraries were loaded and when the objects to join were there, too.

- spread: objects all over a scene, those in the overlaps seen by two to four windows.
- crowded: a hundred places, each with a thousand slightly shifted copies of one object.
- heap: all objects are shifted copies of a single one.
- tangle: long thin objects at random angles in a small part of the scene; bounds meet often, outlines match seldom.

    python tools/benchmarks/merge_objects.py --suppression

times the suppression alone, of the boxes of one of three classes, where the intersection is at least .3 of the smaller
box. With SAHI (`pip install sahi`), its numpy backend is timed in turns with it, and must keep the same boxes.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import time

import numpy as np
import shapely

from perf_vit.geometry import Objects
from perf_vit.geometry.boxes import oriented_box_corners
from perf_vit.geometry.nms import Overlaps, greedy_nms
from perf_vit.inference import ObjectStitcher
from perf_vit.tiling import grid_windows
from perf_vit.types import Window

KINDS = ("boxes", "oriented_boxes", "polygons")
CASES = ("spread", "crowded", "heap", "tangle")
SIZE, WINDOW, OVERLAP = 40_000, 1_024, 128
RUNS = 7
# Of intersection over the smaller area.
SMALLER = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=100_000, help="objects that the windows give")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", nargs=2, metavar=("CASE", "KIND"), help="run one case in this process")
    parser.add_argument("--suppression", action="store_true", help="time the suppression of boxes alone")
    args = parser.parse_args()
    if args.one:
        print(measure(*args.one, args.num, args.seed))
        return
    if args.suppression:
        compare_suppression(args.num // 3, args.seed)
        return
    print(
        "| case | objects | in | out | merge, s | CPU, s | peak RSS, MB | before, MB | libraries alone, MB |",
        flush=True,
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for case in CASES:
        for kind in KINDS:
            command = [sys.executable, __file__, "--num", str(args.num), "--seed", str(args.seed), "--one", case, kind]
            subprocess.run(command, check=True)


def measure(case: str, kind: str, num: int, seed: int) -> str:
    libraries = peak_mb()
    rng = np.random.default_rng(seed)
    boxes = CENTERED[case](rng, num)
    parts = windows_of(boxes)
    extent = Window(0, 0, SIZE, SIZE)
    scores, labels = rng.random(len(boxes)).astype(np.float32), rng.integers(0, 3, len(boxes)).astype(np.int32)
    if case == "heap":
        labels[:] = 0
    valid = np.ones((WINDOW, WINDOW), bool)
    geometry = np.concatenate([as_kind(boxes[i : i + 1_000], kind) for i in range(0, len(boxes), 1_000)])
    before = peak_mb()
    start, start_cpu = time.perf_counter(), time.process_time()
    stitcher = ObjectStitcher(extent, WINDOW, OVERLAP, 0.5)
    for window, rows in parts:
        stitcher.add(window, Objects(kind, geometry[rows], scores[rows], labels[rows]), valid)
    found = stitcher.finish()
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    num_in = sum(len(rows) for _, rows in parts)
    memory = f"{peak_mb():.0f} | {before:.0f} | {libraries:.0f}"
    return f"| {case} | {kind} | {num_in:,} | {len(found):,} | {seconds:.1f} | {cpu:.1f} | {memory} |"


def compare_suppression(num: int, seed: int) -> None:
    suppressors = {"perf_vit": suppress}
    try:
        from sahi.postprocess.backends import set_postprocess_backend
        from sahi.postprocess.combine import nms
    except ImportError:
        pass
    else:
        set_postprocess_backend("numpy")
        suppressors["SAHI"] = lambda boxes, scores: np.array(
            nms(np.column_stack([boxes, scores, np.zeros(len(scores))]), "IOS", SMALLER)
        )
    print("| case | boxes | remain |", " | ".join(f"{name}, CPU s" for name in suppressors), "|")
    print("|---|---|---|" + "---|" * len(suppressors))
    for case in CASES:
        rng = np.random.default_rng(seed)
        boxes = as_kind(CENTERED[case](rng, 2 * num), "boxes")
        boxes = boxes[np.sort(rng.permutation(len(boxes))[:num])]
        scores = rng.random(len(boxes))
        seconds, kept = in_turns(suppressors, boxes, scores)
        print(f"| {case} | {len(boxes):,} | {kept:,} |", " | ".join(f"{each:.3f}" for each in seconds), "|", flush=True)


def in_turns(suppressors: dict, boxes: np.ndarray, scores: np.ndarray) -> tuple[list[float], int]:
    """Median CPU seconds of each, and the number of boxes that all keep."""
    seconds, kept = {name: [] for name in suppressors}, {}
    # A collection that falls into one of the calls takes several times as long as the call.
    gc.disable()
    for _ in range(RUNS):
        for name, function in suppressors.items():
            start = time.process_time()
            kept[name] = np.sort(function(boxes, scores)).tolist()
            seconds[name].append(time.process_time() - start)
    assert all(each == kept["perf_vit"] for each in kept.values()), "they keep different boxes"
    return [statistics.median(each) for each in seconds.values()], len(kept["perf_vit"])


def suppress(boxes: np.ndarray, scores: np.ndarray) -> np.ndarray:
    order = np.argsort(-scores, kind="stable")
    overlaps = Overlaps("boxes", boxes[order])
    areas = overlaps.areas
    by = greedy_nms(overlaps, lambda shared, a, b: shared >= SMALLER * np.minimum(areas[a], areas[b]))
    return order[by < 0]


def spread(rng: np.random.Generator, num: int) -> np.ndarray:
    # Windows see about (WINDOW / (WINDOW - OVERLAP)) ** 2 = 1.3 times as many.
    return oriented(rng, rng.uniform(60, SIZE - 60, (int(num / 1.3), 2)), 30, 18)


def crowded(rng: np.random.Generator, num: int) -> np.ndarray:
    # In the middle of windows, so that the shifted copies are all there.
    stride = WINDOW - OVERLAP
    places = rng.integers(0, 40, (100, 2)) * stride + WINDOW / 2
    centers = np.repeat(places, num // 100, axis=0) + rng.normal(0, 4, (num // 100 * 100, 2))
    return oriented(rng, centers, 60, 36, angle=0.4)


def heap(rng: np.random.Generator, num: int) -> np.ndarray:
    return oriented(rng, WINDOW / 2 + rng.normal(0, 4, (num, 2)), 60, 36, angle=0.4)


def tangle(rng: np.random.Generator, num: int) -> np.ndarray:
    return oriented(rng, rng.uniform(100, 9_000, (int(num / 1.3), 2)), 110, 6)


CENTERED = {"spread": spread, "crowded": crowded, "heap": heap, "tangle": tangle}


def oriented(rng: np.random.Generator, centers: np.ndarray, width: float, height: float, angle=None) -> np.ndarray:
    num = len(centers)
    sides = np.array([width, height]) * rng.uniform(0.8, 1.2, (num, 1))
    angles = rng.uniform(-np.pi / 2, np.pi / 2, num) if angle is None else np.full(num, angle)
    return np.concatenate([centers, sides, angles[:, None]], axis=1)


def as_kind(oriented_boxes: np.ndarray, kind: str) -> np.ndarray:
    if kind == "oriented_boxes":
        return oriented_boxes
    corners = oriented_box_corners(oriented_boxes)
    if kind == "boxes":
        return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    # Ellipses of 32 corners.
    turns = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    center = corners.mean(axis=1)[:, None]
    axes = [(corners[:, i] - corners[:, j])[:, None] / 2 for i, j in ((0, 1), (0, 3))]
    return shapely.polygons(center + axes[0] * np.cos(turns)[:, None] + axes[1] * np.sin(turns)[:, None])


def windows_of(oriented_boxes: np.ndarray) -> list[tuple[Window, np.ndarray]]:
    """Windows with the objects whose bounds lie wholly in them."""
    corners = oriented_box_corners(oriented_boxes)
    low, high = corners.min(axis=1), corners.max(axis=1)
    order = np.argsort(low[:, 1], kind="stable")
    tops = low[order, 1]
    found = []
    for window in grid_windows(Window(0, 0, SIZE, SIZE), WINDOW, OVERLAP):
        rows = order[np.searchsorted(tops, window.row) : np.searchsorted(tops, window.row_stop)]
        inside = (low[rows, 0] >= window.col) & (high[rows] <= (window.col_stop, window.row_stop)).all(axis=1)
        if inside.any():
            found.append((window, rows[inside]))
    return found


def peak_mb() -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    main()
