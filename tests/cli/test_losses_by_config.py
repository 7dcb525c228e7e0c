"""Losses, class weights and decoders as configs choose them."""

import pytest
import torch
from command_line import call, train_args

from perf_vit.config import load_config
from perf_vit.data import make_ship_scene
from perf_vit.models import load_segmenter
from perf_vit.models.heads import UPerNetHead
from perf_vit.workflows.run_config import SegmentationRun


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return make_ship_scene(tmp_path_factory.mktemp("scene"), seed=0, size_px=128, num_targets=6)


def test_a_mixture_of_losses_with_balanced_weights_trains_a_decoder(scene, tmp_path, capsys) -> None:
    extra = [
        "trainer.max_epochs=1",
        "data.classes=[water_or_land, ship, wreck]",
        "optim.loss={ce: 0, focal: 1, dice: 0.5, lovasz: 0.5}",
        "optim.class_weights=balanced",
        "model.head=upernet",
        "model.head_kwargs={channels: 16}",
        "data.attribute=class",
    ]
    assert call(train_args(scene, tmp_path / "run", *extra)) == 0
    captured = capsys.readouterr()
    assert "balanced class weights" in captured.out
    assert "1 of 3 classes have no pixel in the training labels, so their weight is 1: wreck" in captured.err
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert isinstance(load_segmenter(checkpoint).head, UPerNetHead)
    water, ship, wreck = torch.load(checkpoint, weights_only=True)["hyper_parameters"]["optim"]["class_weights"]
    assert water < 1 < ship
    assert wreck == 1
    # The run's own config asks for the same again.
    assert load_config(tmp_path / "run" / "config.yaml", SegmentationRun).optim.class_weights == "balanced"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.dice_weight=1", "Key 'dice_weight' not in 'optim'"),
        ("optim.loss.dise=1", "Did you mean: 'dice'?"),
        ("optim.loss={ce: 0, dice: 0}", "one of them above 0"),
        ("optim.class_weights=balance", "must be balanced or a list of numbers"),
        ("optim.class_weights=[1]", "got 1 for 2"),
    ],
)
def test_a_loss_that_is_none_is_one_line(scene, tmp_path, capsys, override: str, message: str) -> None:
    assert call(train_args(scene, tmp_path / "run", override)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
