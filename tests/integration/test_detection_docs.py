"""The Python block of docs/detection.md, run as a reader would."""

import re

import numpy as np
import torch
from doc_examples import examples

from perf_vit.types import ObjectLabels


def test_the_example_of_detection_trains_and_finds() -> None:
    (block,) = examples("detection.md", "In Python")
    # What the page leaves to the reader: images of 4 bands and their labels.
    boxes = np.array([[10, 10, 40, 30]], np.float32)
    label = ObjectLabels(labels=np.zeros(1, np.int64), boxes_xyxy=boxes, ignored=np.zeros(1, bool))
    names = {"images": [torch.randn(4, 64, 96)], "labels": [label]}
    exec(re.sub(r"500, 700", "100, 140", block), names)
    assert all(loss.isfinite() for loss in names["losses"].values())
    assert len(names["found"]) == 2
