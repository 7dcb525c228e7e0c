import math
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segmentation_models_pytorch.losses._functional import softmax_focal_loss_with_logits
from torch import Tensor
from torch.nn import functional as F

from perf_vit.errors import ConfigError
from perf_vit.tasks import LossConfig, SegmentationLoss, balanced_weights
from perf_vit.tasks.optim import ClassificationOptimConfig, check_class_weights, check_classification_loss
from perf_vit.tasks.segmentation import soft_dice
from perf_vit.types import IGNORE_INDEX

TERMS = [field.name for field in fields(LossConfig)]


def only(name: str, weight: float = 1.0) -> LossConfig:
    return LossConfig(**{"ce": 0.0, name: weight})


def _batch(num_classes: int = 3, height: int = 7, width: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, num_classes, height, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, num_classes, (2, height, width), generator=generator)
    labels[:, : (height + 1) // 2] = IGNORE_INDEX
    # A little of the rest, too.
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = IGNORE_INDEX
    return logits, labels


def naive(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    """The definition, pixel by pixel and class by class."""
    keep = labels != IGNORE_INDEX
    probs, truth = logits.softmax(1).movedim(1, -1)[keep], labels[keep]
    right = probs[torch.arange(len(truth)), truth]
    if name == "ce":
        return -right.log().mean()
    if name == "focal":
        return (-((1 - right) ** 2) * right.log()).mean()
    by_class = []
    for index in truth.unique().tolist():
        true = (truth == index).to(probs)
        if name == "dice":
            p = probs[:, index]
            by_class.append(1 - 2 * (p * true).sum() / (p.square().sum() + true.sum()))
            continue
        # Lovasz: the Jaccard losses of growing sets of the worst errors, each weighted by the drop to the next error.
        errors, order = (true - probs[:, index]).abs().sort(descending=True)
        true = true[order]
        loss = probs.new_zeros(())
        for i in range(len(errors)):
            wrong = torch.zeros_like(true)
            wrong[: i + 1] = 1
            predicted = (true - wrong).abs()
            jaccard = (true * predicted).sum() / (true + predicted).clamp(max=1).sum()
            following = errors[i + 1] if i + 1 < len(errors) else 0.0
            loss = loss + (errors[i] - following) * (1 - jaccard)
        by_class.append(loss)
    return torch.stack(by_class).mean()


@pytest.mark.parametrize("name", TERMS)
@settings(deadline=None, max_examples=10)
@given(st.integers(2, 5), st.integers(2, 7), st.integers(1, 9), st.integers(0, 99))
def test_each_term_equals_its_definition_in_value_and_gradient(name, num_classes, height, width, seed) -> None:
    logits, labels = _batch(num_classes, height, width, seed)
    labels[0, -1, -1] = 0
    gradients, values = [], []
    for loss_of in (SegmentationLoss(only(name)), lambda *given: naive(name, *given)):
        leaf = logits.clone().requires_grad_()
        loss = loss_of(leaf, labels)
        loss.backward()
        values.append(loss.double())
        gradients.append(leaf.grad)
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_the_focal_loss_is_the_librarys_softmax_variant() -> None:
    logits, labels = _batch()
    keep = labels != IGNORE_INDEX
    expected = softmax_focal_loss_with_logits(logits.movedim(1, -1)[keep], labels[keep])
    torch.testing.assert_close(SegmentationLoss(only("focal"))(logits, labels).double(), expected, rtol=1e-5, atol=0)


def test_a_mixture_is_the_weighted_sum_of_its_terms() -> None:
    logits, labels = _batch()
    weights = {"ce": 0.5, "dice": 2.0, "focal": 1.5, "lovasz": 0.25}
    expected = sum(weight * SegmentationLoss(only(name))(logits, labels) for name, weight in weights.items())
    torch.testing.assert_close(SegmentationLoss(LossConfig(**weights))(logits, labels), expected)


@pytest.mark.parametrize("name", TERMS)
def test_ignored_pixels_change_neither_loss_nor_gradient(name: str) -> None:
    logits, labels = _batch()
    ignored = (labels == IGNORE_INDEX)[:, None].expand_as(logits)
    other = torch.where(ignored, 50 * torch.randn_like(logits), logits)
    losses = []
    for values in (logits, other):
        values.requires_grad_()
        loss = SegmentationLoss(only(name), [1.0, 2.0, 0.5])(values, labels)
        loss.backward()
        losses.append(loss)
        assert (values.grad[ignored] == 0).all()
        assert (values.grad[~ignored] != 0).any()
    assert torch.equal(losses[0], losses[1])


def test_nothing_labelled_gives_0_and_a_zero_gradient() -> None:
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = SegmentationLoss(LossConfig(ce=1, dice=1, focal=1, lovasz=1))(logits, torch.full((1, 4, 4), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_dice_is_0_when_sure_and_right_and_1_when_sure_and_wrong() -> None:
    labels = torch.tensor([[[0, 1, 1, IGNORE_INDEX]]])
    right = F.one_hot(labels.clamp(max=1), 2).permute(0, 3, 1, 2) * 40.0
    assert soft_dice(right, labels).item() == pytest.approx(0, abs=1e-5)
    assert soft_dice(-right, labels).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["ce", "focal"])
def test_class_weights_scale_their_class(name: str) -> None:
    logits = torch.zeros(1, 2, 1, 2)
    labels = torch.tensor([[[0, 1]]])
    plain = SegmentationLoss(only(name))(logits, labels)
    weighted = SegmentationLoss(only(name), [1.0, 3.0])(logits, labels)
    torch.testing.assert_close(weighted, 2 * plain)


def test_balanced_weights_give_each_class_that_occurs_the_same_share() -> None:
    pixels = [90, 9, 0, 1]
    weights = balanced_weights(pixels)
    shares = [weight * count for weight, count in zip(weights, pixels, strict=True)]
    assert shares == pytest.approx([100 / 3, 100 / 3, 0, 100 / 3])
    assert weights[2] == 1
    assert balanced_weights([0, 0]) == [1, 1]


@pytest.mark.parametrize("terms", [{"ce": 0.0}, {"dice": -1.0}, {"focal": math.nan}])
def test_weights_of_terms_that_make_no_loss_are_refused(terms: dict) -> None:
    with pytest.raises(ConfigError, match="at least 0, one of them above 0"):
        SegmentationLoss(LossConfig(**terms))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "one weight a class, got 1 for 2"),
        ("balance", "must be numbers of at least 0, one of them above 0, got balance; leave it out"),
        ([1.0, -1.0], "at least 0"),
        ([1.0, "x"], "at least 0"),
        ([1.0, math.nan], "at least 0"),
        ([0.0, 0.0], "one of them above 0"),
    ],
)
def test_class_weights_that_are_none_are_one_line(weights, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_class_weights(weights, 2)
    with pytest.raises(ConfigError, match=message):
        check_classification_loss(ClassificationOptimConfig(class_weights=weights), 2)
