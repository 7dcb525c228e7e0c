"""A baseline without any learning of shape: a random forest on each pixel's bands and local statistics.

    python tools/benchmarks/random_forest.py --train TRAIN.tif TRAIN_LABELS --test TEST.tif TEST_LABELS \
        --classes background building

Reads the same pixels and labels as `perf-vit train` and `perf-vit evaluate`, prints the same table. Needs the `dev`
extra (scikit-learn).
"""

import argparse
import time

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, uniform_filter
from sklearn.ensemble import RandomForestClassifier

from perf_vit.data import region_window
from perf_vit.labels import open_labels
from perf_vit.metrics import class_scores, segmentation_metrics
from perf_vit.sources import open_source
from perf_vit.types import IGNORE_INDEX, Window
from perf_vit.workflows.progress import console, score_table

# Pixels around a strip that its filters look at: the largest filter's reach.
HALO_PX = 64


def features(pixels: np.ndarray) -> np.ndarray:
    """[C, H, W] -> [F, H, W]: each band, its mean and standard deviation over 5, 17 and 49 px, its gradient."""
    pixels = pixels.astype(np.float32)
    maps = [pixels]
    for size in (5, 17, 49):
        mean = uniform_filter(pixels, (0, size, size))
        maps += [mean, np.sqrt(np.maximum(uniform_filter(pixels**2, (0, size, size)) - mean**2, 0))]
    smooth = gaussian_filter(pixels, (0, 2, 2))
    maps.append(np.hypot(*np.gradient(smooth, axis=(1, 2))))
    return np.concatenate(maps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", nargs=2, required=True, metavar=("IMAGE", "LABELS"))
    parser.add_argument("--test", nargs=2, required=True, metavar=("IMAGE", "LABELS"))
    parser.add_argument("--train-region", nargs=4, type=int, metavar=("ROW", "COL", "HEIGHT", "WIDTH"))
    parser.add_argument("--test-region", nargs=4, type=int, metavar=("ROW", "COL", "HEIGHT", "WIDTH"))
    parser.add_argument("--classes", nargs="+", required=True)
    parser.add_argument("--values", nargs="+", type=int)
    parser.add_argument("--num-pixels", type=int, default=200_000, help="training pixels, drawn at random")
    parser.add_argument("--num-trees", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    start = time.perf_counter()
    source = open_source(args.train[0])
    labels = open_labels(args.train[1], source, classes=args.classes, values=args.values)
    region = region_window(args.train_region, source, "--train-region")
    image = source.read(region)
    truth = np.where(image.valid, labels.read(region), IGNORE_INDEX)
    candidates = np.flatnonzero(truth.ravel() != IGNORE_INDEX)
    rng = np.random.default_rng(args.seed)
    chosen = rng.choice(candidates, min(args.num_pixels, len(candidates)), replace=False)
    x = features(image.pixels).reshape(-1, truth.size)[:, chosen].T
    forest = RandomForestClassifier(args.num_trees, min_samples_leaf=5, n_jobs=-1, random_state=args.seed)
    forest.fit(x, truth.ravel()[chosen])
    trained = time.perf_counter()

    source = open_source(args.test[0])
    labels = open_labels(args.test[1], source, classes=args.classes, values=args.values)
    region = region_window(args.test_region, source, "--test-region")
    metrics = segmentation_metrics(len(args.classes))
    for row in range(region.row, region.row_stop, 256):
        strip = Window(row, region.col, min(256, region.row_stop - row), region.width)
        wide = Window(row - HALO_PX, region.col - HALO_PX, strip.height + 2 * HALO_PX, strip.width + 2 * HALO_PX)
        rows, cols = strip.slices_in(wide)
        maps = features(source.read(wide).pixels)[:, rows, cols]
        predicted = forest.predict(maps.reshape(len(maps), -1).T).reshape(strip.shape)
        expected = np.where(source.read(strip).valid, labels.read(strip), IGNORE_INDEX)
        metrics.update(torch.from_numpy(predicted.astype(np.int64)), torch.from_numpy(expected.astype(np.int64)))
    console.print(score_table(class_scores(metrics, args.classes), title="random forest"))
    now = time.perf_counter()
    console.print(f"training {trained - start:.0f} s, prediction {now - trained:.0f} s, {len(chosen):,} pixels")


if __name__ == "__main__":
    main()
