"""Registered metrics are computed in validation and lie in metrics.csv beside the built-in ones."""

import csv

import pytest
import torch
from small_runs import fit
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from perf_vit.errors import ConfigError
from perf_vit.metrics import METRICS, RegisteredMetrics, register_metric
from perf_vit.models import SegmentationSpec
from perf_vit.transforms import Normalizer
from perf_vit.types import IGNORE_INDEX


class Counted(Metric):
    """Labelled objects."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predicted, labels) -> None:
        self.count += sum(len(each) for each in labels)

    def compute(self):
        return self.count


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METRICS, "_objects", dict(METRICS))


def last_row(folder) -> dict[str, str]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))[-1]


def test_a_metric_of_segmentation_equals_the_built_in_one_class_by_class(segmentation, tmp_path) -> None:
    @register_metric("segmentation", "jaccard")
    def make(spec):
        return MulticlassJaccardIndex(len(spec.classes), average=None, ignore_index=IGNORE_INDEX)

    fit(segmentation, tmp_path, max_epochs=1)
    row = last_row(tmp_path)
    assert [row["val/jaccard/sea"], row["val/jaccard/ship"]] == [row["val/iou/sea"], row["val/iou/ship"]]
    assert float(row["val/jaccard"]) == pytest.approx(float(row["val/iou"]))


@pytest.mark.parametrize(("kind", "task"), [("scenes", "classification"), ("slides", "slide_classification")])
def test_a_metric_of_whole_images_equals_the_built_in_one(kind, task, tmp_path, request) -> None:
    @register_metric(task, "right")
    def make(spec):
        return MulticlassAccuracy(len(spec.classes), average="micro")

    fit(request.getfixturevalue(kind), tmp_path, max_epochs=1)
    row = last_row(tmp_path)
    assert float(row["val/right"]) == pytest.approx(float(row["val/accuracy"]))


def test_a_metric_of_detection_sees_every_labelled_object(detection, tmp_path) -> None:
    register_metric("detection", "objects")(lambda spec: Counted())
    fit(detection, tmp_path, max_epochs=1)
    data, _, _ = detection(0)
    expected = sum(len(labels) for batch in data.val_dataloader() for labels in batch[1])
    assert float(last_row(tmp_path)["val/objects"]) == expected > 9


def spec() -> SegmentationSpec:
    return SegmentationSpec(classes=("a", "b", "c"), normalizer=Normalizer((0.0,), (1.0,)), tile_px=8)


def test_metrics_belong_to_one_task_and_start_anew_after_a_reset() -> None:
    register_metric("segmentation", "objects")(lambda spec: Counted())
    register_metric("detection", "others")(lambda spec: Counted())
    metrics = RegisteredMetrics("segmentation", spec())
    metrics.update([], [[1, 2], [3]])
    assert metrics.compute() == {"objects": 3}
    metrics.reset()
    metrics.update([], [[1]])
    assert metrics.compute() == {"objects": 1}


def test_a_metric_may_return_a_plain_number() -> None:
    class Halved(Counted):
        def compute(self):
            return float(self.count) / 2

    register_metric("segmentation", "halved")(lambda spec: Halved())
    metrics = RegisteredMetrics("segmentation", spec())
    metrics.update([], [[1, 2, 3]])
    assert metrics.compute() == {"halved": 1.5}


def test_values_that_are_neither_a_number_nor_one_a_class_are_an_error() -> None:
    register_metric("segmentation", "pair")(lambda spec: MulticlassJaccardIndex(2, average=None))
    metrics = RegisteredMetrics("segmentation", spec())
    metrics.update(torch.zeros(1, 2, 2, dtype=torch.long), torch.zeros(1, 2, 2, dtype=torch.long))
    with pytest.raises(ConfigError, match="metric pair must return one number or one a class, 3, got 2"):
        metrics.compute()


@pytest.mark.parametrize("name", ["f1", "iou", "loss"])
def test_built_in_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"metric '{name}' is a built-in one"):
        register_metric("segmentation", name)
