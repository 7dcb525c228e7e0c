import pytest
import torch
from torch.nn import functional as F

from perf_vit.tasks import SegmentationLoss
from perf_vit.tasks.losses import soft_dice
from perf_vit.types import IGNORE_INDEX


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 7, 9, generator=generator)
    labels = torch.randint(0, 3, (2, 7, 9), generator=generator)
    labels[:, :3] = IGNORE_INDEX
    return logits, labels


@pytest.mark.parametrize("dice_weight", [0.0, 1.0])
def test_ignored_pixels_change_neither_loss_nor_gradient(dice_weight: float) -> None:
    logits, labels = _batch()
    other = logits.clone()
    other[:, :, :3] = 50 * torch.randn(2, 3, 3, 9)
    losses = []
    for values in (logits, other):
        values.requires_grad_()
        loss = SegmentationLoss(dice_weight)(values, labels)
        loss.backward()
        losses.append(loss)
        assert (values.grad[:, :, :3] == 0).all()
        assert (values.grad[:, :, 3:] != 0).any()
    assert torch.equal(losses[0], losses[1])


def test_cross_entropy_equals_torch_on_the_labelled_pixels() -> None:
    logits, labels = _batch()
    expected = F.cross_entropy(logits[:, :, 3:], labels[:, 3:])
    torch.testing.assert_close(SegmentationLoss()(logits, labels), expected)


def test_nothing_labelled_gives_0_and_a_zero_gradient() -> None:
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = SegmentationLoss(1.0)(logits, torch.full((1, 4, 4), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_dice_is_0_when_sure_and_right_and_1_when_sure_and_wrong() -> None:
    labels = torch.tensor([[[0, 1, 1, IGNORE_INDEX]]])
    right = F.one_hot(labels.clamp(max=1), 2).permute(0, 3, 1, 2) * 40.0
    assert soft_dice(right, labels).item() == pytest.approx(0, abs=1e-5)
    assert soft_dice(-right, labels).item() == pytest.approx(1, abs=1e-5)


def test_class_weights_scale_their_class() -> None:
    logits = torch.zeros(1, 2, 1, 2)
    labels = torch.tensor([[[0, 1]]])
    plain = SegmentationLoss()(logits, labels)
    weighted = SegmentationLoss(class_weights=[1.0, 3.0])(logits, labels)
    torch.testing.assert_close(weighted, 2 * plain)
