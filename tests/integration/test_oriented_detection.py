"""Rectangles at any angle: from labelled tiles to the objects of a scene."""

import numpy as np
import pytest
import torch
from oriented_scenes import Picture, as_labels, draw_rectangles

from perf_vit.geometry.oriented_boxes import oriented_iou_matrix
from perf_vit.inference import predict_objects
from perf_vit.metrics import OrientedAveragePrecision
from perf_vit.models import DetectionModelConfig, DetectionSpec, Detector, build_detector
from perf_vit.transforms import Normalizer
from perf_vit.types import ObjectLabels


def small_detector() -> Detector:
    torch.manual_seed(0)
    config = DetectionModelConfig(
        backbone="test_resnet",
        strides=[4, 8],
        channels=32,
        head="oriented_fcos",
        head_kwargs={"num_convs": 1},
    )
    normalizer = Normalizer((0.0,) * 3, (1.0,) * 3)
    return build_detector(config, DetectionSpec(classes=("red", "green"), normalizer=normalizer, tile_px=96))


def fit(model: Detector, batches: list[list[tuple[np.ndarray, ObjectLabels]]]) -> Detector:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=len(batches))
    for batch in batches:
        losses = model.losses([torch.from_numpy(pixels) for pixels, _ in batch], [labels for _, labels in batch])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@pytest.mark.slow
def test_a_detector_learns_four_pictures() -> None:
    rng = np.random.default_rng(0)
    pictures = [draw_rectangles(rng, 96, 96, 4) for _ in range(4)]
    model = fit(small_detector(), [pictures] * 120)
    with torch.no_grad():
        found = model(torch.from_numpy(np.stack([pixels for pixels, _ in pictures])))
    metric = OrientedAveragePrecision(2)
    metric.update(found, [labels for _, labels in pictures])
    scores = metric.compute()
    assert scores["map_50"] > 0.9
    assert scores["map"] > 0.6


def cut_tile(rng: np.random.Generator) -> tuple[np.ndarray, ObjectLabels]:
    """The middle of a picture, whose border cuts rectangles, as that of a window does."""
    pixels, labels = draw_rectangles(rng, 136, 136, 9)
    return pixels[:, 20:116, 20:116], as_labels(labels.oriented_boxes - np.float32([20, 20, 0, 0, 0]), labels.labels)


@pytest.mark.slow
def test_a_scene_larger_than_a_window_gives_each_rectangle_once() -> None:
    rng = np.random.default_rng(1)
    model = fit(small_detector(), [[cut_tile(rng) for _ in range(4)] for _ in range(300)])
    pixels, labels = draw_rectangles(rng, 301, 259, 25)
    source = Picture(pixels)
    objects = predict_objects(
        model,
        source,
        lambda image: image.pixels,
        extent=source.extent,
        window_size=128,
        overlap=48,
        batch_size=3,
    )
    assert objects.kind == "oriented_boxes"
    iou = oriented_iou_matrix(torch.tensor(labels.oriented_boxes), torch.tensor(objects.geometry).float())
    found_as, best = iou.argmax(1), iou.amax(1)
    assert len(objects) == len(labels) == len(found_as.unique())
    assert best.min() > 0.5
    assert np.array_equal(objects.labels[found_as], labels.labels)
