"""A loss that is no number ends training of every task, and names the samples."""

import math

import pytest
import torch

from perf_vit.errors import NotFiniteError
from perf_vit.tasks import TrainerConfig, build_trainer
from perf_vit.tasks.batch_samples import samples_of


@pytest.fixture(params=["segmentation", "detection", "scenes", "slides"])
def build(request):
    return request.getfixturevalue(request.param)


def fitted(build, folder, **options) -> None:
    data, task, chosen = build(0)
    for name, value in options.items():
        setattr(task, name, value(getattr(task, name)))
    given = {"max_epochs": 2, "accelerator": "cpu", "devices": "1", "num_pictures": 0}
    build_trainer(TrainerConfig(**given), folder, progress=False, **chosen).fit(task, data)


def broken_from(batch: int, step):
    """A step whose loss is NaN from a batch on."""

    def run(given, batch_idx: int):
        loss = step(given, batch_idx)
        return loss * math.nan if batch_idx >= batch else loss

    return run


def test_a_training_loss_that_is_no_number_names_its_batch_and_samples(build, tmp_path) -> None:
    with pytest.raises(NotFiniteError, match=r"^the training loss of batch 3, of .+, is not a finite number") as caught:
        fitted(build, tmp_path, training_step=lambda step: broken_from(2, step))
    data, _, _ = build(0)
    names = samples_of(data.train_dataloader(), 2, 0)
    assert names
    assert all(name in str(caught.value) for name in names)
    assert not list(tmp_path.glob("checkpoints/best*"))


def test_a_validation_loss_that_is_no_number_leaves_no_best_checkpoint(build, tmp_path) -> None:
    _, task, _ = build(0)
    if not hasattr(task, "loss"):
        pytest.skip("detection has no validation loss")

    def broken(log):
        def run(name: str, mean, num: int, **options) -> None:
            log(name, mean * torch.tensor(math.nan) if name == "val/loss" else mean, num, **options)

        return run

    with pytest.raises(NotFiniteError, match=r"^the validation loss of batch 1, of .+, is not a finite number"):
        fitted(build, tmp_path, log_counted=broken)
    assert not list(tmp_path.glob("checkpoints/best*"))


def test_names_of_samples_are_those_of_the_batch(build) -> None:
    data, _, _ = build(0)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(1)
    indices = list(loader.sampler)
    for batch in range(len(indices) // loader.batch_size):
        expected = [loader.dataset.describe(i) for i in indices[batch * loader.batch_size :][: loader.batch_size]]
        assert samples_of(loader, batch, 1) == expected[:3]
