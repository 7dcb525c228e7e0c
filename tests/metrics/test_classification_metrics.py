"""Scores of classes and numbers of whole images."""

import json
import math

import numpy as np
import pytest
import torch

from perf_vit.metrics import ClassificationMetrics, ClassificationScores, RegressionScores


def collect(kind: str, names: tuple, scores: torch.Tensor, targets: torch.Tensor):
    metrics = ClassificationMetrics(names, kind)
    for start in range(0, len(scores), 3):
        metrics.update(scores[start : start + 3], targets[start : start + 3])
    return metrics.summary()


def pairwise_auroc(scores: np.ndarray, truth: np.ndarray) -> float:
    """The share of pairs in order, ties half."""
    above, below = scores[truth == 1][:, None], scores[truth == 0][None]
    return float(((above > below) + 0.5 * (above == below)).mean())


def test_scores_of_one_class_an_image_are_those_counted_by_hand() -> None:
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.dirichlet([1, 1, 1], 40)).float()
    truth = rng.integers(0, 3, 40)
    found = collect("single_label", ("a", "b", "c"), scores, torch.from_numpy(truth))
    predicted = scores.argmax(1).numpy()
    assert found.accuracy == pytest.approx((predicted == truth).mean())
    for index, each in enumerate(found.classes):
        hits = ((predicted == index) & (truth == index)).sum()
        assert each.precision == pytest.approx(hits / (predicted == index).sum())
        assert each.recall == pytest.approx(hits / (truth == index).sum())
        assert each.auroc == pytest.approx(pairwise_auroc(scores[:, index].numpy(), (truth == index).astype(int)))
        assert found.confusion[index] == [int(((truth == index) & (predicted == k)).sum()) for k in range(3)]
    assert found.f1 == pytest.approx(np.mean([each.f1 for each in found.classes]))


def test_a_class_that_never_occurs_counts_in_no_mean() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]])
    found = collect("single_label", ("a", "b", "ghost"), scores, torch.tensor([0, 1]))
    assert found.f1 == 1
    assert math.isnan(found.classes[2].f1)
    assert json.loads(json.dumps(found.to_dict()))["classes"][2]["auroc"] is None


def test_several_classes_an_image_are_scored_each_for_itself() -> None:
    scores = torch.tensor([[0.9, 0.8], [0.2, 0.6], [0.7, 0.1], [0.1, 0.2]])
    truth = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    found = collect("multilabel", ("a", "b"), scores, truth)
    assert isinstance(found, ClassificationScores)
    assert found.confusion is None
    assert found.classes[0].f1 == 1
    assert found.classes[1].precision == 0.5
    assert found.accuracy == pytest.approx(6 / 8)


def test_errors_of_numbers_are_in_their_unit_and_exact_far_from_zero() -> None:
    truth = torch.tensor([[1.0, 1e6], [2.0, 1e6 + 2], [3.0, 1e6 + 4]])
    values = truth + torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]])
    found = collect("regression", ("x", "y"), values, truth)
    assert isinstance(found, RegressionScores)
    assert [each.mae for each in found.targets] == [1, 1]
    assert found.targets[0].r2 == pytest.approx(1 - 1 / (2 / 3))
    assert found.targets[1].r2 == pytest.approx(1 - 1 / (8 / 3))


def test_a_single_image_has_scores() -> None:
    assert collect("single_label", ("a", "b"), torch.tensor([[0.3, 0.7]]), torch.tensor([1])).accuracy == 1
    number = collect("regression", ("x",), torch.tensor([[3.0]]), torch.tensor([[1.0]]))
    assert number.targets[0].rmse == 2
    assert math.isnan(number.r2)


@pytest.mark.parametrize("kind", ["single_label", "multilabel"])
def test_precision_and_recall_of_each_class_are_given_if_asked_for(kind: str) -> None:
    rng = np.random.default_rng(2)
    scores = torch.from_numpy(rng.dirichlet([1, 1, 1], 40)).float()
    labels = rng.integers(0, 2, 40)
    targets = labels if kind == "single_label" else np.stack([labels == 0, labels == 1, np.zeros(40)], 1).astype(int)
    metrics = ClassificationMetrics(("a", "b", "c"), kind)
    metrics.update(scores, torch.from_numpy(targets))
    assert metrics.summary().precision_recall is None
    found = metrics.summary(with_curves=True)
    for index, (each, (precision, recall)) in enumerate(zip(found.classes, found.precision_recall, strict=True)):
        if index == 2:
            assert math.isnan(each.average_precision)
            continue
        order = np.argsort(-scores[:, index].numpy())
        hits = (labels == index)[order]
        at_hits = (np.cumsum(hits) / np.arange(1, 41))[hits]
        assert each.average_precision == pytest.approx(at_hits.mean(), abs=1e-5)
        assert -np.sum(np.diff(recall) * precision[:-1]) == pytest.approx(each.average_precision, abs=1e-5)
    assert "precision_recall" not in found.to_dict()
    assert found.to_dict()["classes"][2]["average_precision"] is None
