"""Losses and scores where several classes may be true at a pixel."""

import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perf_vit.metrics import class_scores, segmentation_metrics
from perf_vit.tasks import LossConfig
from perf_vit.tasks.segmentation import MultilabelLoss
from perf_vit.types import IGNORE_INDEX

TERMS = [field.name for field in fields(LossConfig)]


def only(name: str) -> LossConfig:
    return LossConfig(**{"ce": 0.0, name: 1.0})


def _batch(num_classes: int = 3, height: int = 5, width: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, num_classes, height, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 2, logits.shape, generator=generator)
    # A pixel may be labelled for one class and not for another.
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = IGNORE_INDEX
    labels[0, 0, 0, 0] = 1
    return logits, labels


def naive(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    """The definition, class by class over the labelled pixels."""
    keep = labels != IGNORE_INDEX
    right = torch.where(labels == 1, logits.sigmoid(), 1 - logits.sigmoid())[keep]
    if name == "ce":
        return -right.log().mean()
    if name == "focal":
        return (-((1 - right) ** 2) * right.log()).mean()
    by_class = []
    for k in range(logits.shape[1]):
        score, true = logits[:, k][keep[:, k]], labels[:, k][keep[:, k]].to(logits)
        if name == "dice":
            p = score.sigmoid()
            if true.any():
                by_class.append(1 - 2 * (p * true).sum() / (p.square().sum() + true.sum()))
            continue
        errors, order = (1 - score * (2 * true - 1)).sort(descending=True)
        true = true[order]
        loss, before = logits.new_zeros(()), 0.0
        for i in range(len(errors)):
            wrong = torch.arange(len(true)) <= i
            predicted = torch.where(wrong, 1 - true, true)
            jaccard = 1 - (true * predicted).sum() / (true + predicted).clamp(max=1).sum()
            loss, before = loss + errors[i].clamp(min=0) * (jaccard - before), jaccard
        by_class.append(loss)
    return torch.stack(by_class).mean()


@pytest.mark.parametrize("name", TERMS)
@settings(deadline=None, max_examples=10)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 7), st.integers(0, 99))
def test_each_term_equals_its_definition_in_value_and_gradient(name, num_classes, height, width, seed) -> None:
    logits, labels = _batch(num_classes, height, width, seed)
    values, gradients = [], []
    for loss_of in (MultilabelLoss(only(name)), lambda *given: naive(name, *given)):
        leaf = logits.clone().requires_grad_()
        loss = loss_of(leaf, labels)
        loss.backward()
        values.append(loss.double())
        gradients.append(leaf.grad)
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TERMS)
def test_ignored_labels_change_neither_loss_nor_gradient(name: str) -> None:
    logits, labels = _batch()
    ignored = labels == IGNORE_INDEX
    other = torch.where(ignored, 50 * torch.randn_like(logits), logits)
    losses = []
    for values in (logits, other):
        values.requires_grad_()
        loss = MultilabelLoss(only(name), [1.0, 2.0, 0.5])(values, labels)
        loss.backward()
        losses.append(loss)
        assert (values.grad[ignored] == 0).all()
        assert (values.grad[~ignored] != 0).any()
    assert torch.equal(losses[0], losses[1])


def test_nothing_labelled_gives_0_and_a_zero_gradient() -> None:
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = MultilabelLoss(LossConfig(ce=1, dice=1, focal=1, lovasz=1))(logits, torch.full((1, 2, 4, 4), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_class_weights_scale_their_class() -> None:
    logits, labels = torch.zeros(1, 2, 1, 2), torch.tensor([[[[0, 1]], [[1, 0]]]])
    torch.testing.assert_close(MultilabelLoss(None, [1.0, 3.0])(logits, labels), 2 * MultilabelLoss()(logits, labels))


@pytest.mark.parametrize("num_classes", [1, 3])
def test_scores_equal_a_count_by_hand_in_parts_too(num_classes: int) -> None:
    _, labels = _batch(num_classes)
    predicted = torch.randint(0, 2, labels.shape, generator=torch.Generator().manual_seed(1))
    metrics = segmentation_metrics(num_classes, multilabel=True)
    for rows in (slice(0, 1), slice(1, 5)):
        metrics.update(predicted[..., rows, :], labels[..., rows, :])
    for k, scores in enumerate(class_scores(metrics, "abc"[:num_classes])):
        p, t = predicted[:, k], labels[:, k]
        hits, false, missed = ((p == 1) & (t == 1)).sum(), ((p == 1) & (t == 0)).sum(), ((p == 0) & (t == 1)).sum()
        assert scores.num_pixels == int((t == 1).sum())
        assert scores.iou == pytest.approx(float(hits / (hits + false + missed)))
        assert scores.f1 == pytest.approx(float(2 * hits / (2 * hits + false + missed)))
        assert scores.precision == pytest.approx(float(hits / (hits + false)))
        assert scores.recall == pytest.approx(float(hits / (hits + missed)))


def test_a_class_that_is_nowhere_has_no_scores() -> None:
    metrics = segmentation_metrics(2, multilabel=True)
    labels = torch.tensor([[[[1, 0]], [[0, IGNORE_INDEX]]]])
    metrics.update(torch.tensor([[[[1, 0]], [[0, 1]]]]), labels)
    found, absent = class_scores(metrics, "ab")
    assert found.iou == 1
    assert math.isnan(absent.iou)
    metrics.reset()
    metrics.update(torch.zeros_like(labels), labels)
    assert class_scores(metrics, "ab")[0].iou == 0
