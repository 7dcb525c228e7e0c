"""A loss that is no number ends training of every task, and names the samples."""

import math
from types import SimpleNamespace

import pytest
import torch
from small_runs import fit

from perf_vit.errors import NotFiniteError
from perf_vit.tasks import TrainerConfig, build_trainer
from perf_vit.tasks.finite_loss import FiniteLoss, samples_of


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


@pytest.fixture
def seldom(monkeypatch):
    """Looks at the losses as on GPUs."""
    monkeypatch.setattr(FiniteLoss, "num_between", lambda callback, trainer: 20)


def test_a_checkpoint_between_two_looks_is_of_a_finite_model(seldom, segmentation, tmp_path) -> None:
    def build(num_workers: int):
        data, task, chosen = segmentation(num_workers)
        task.training_step = broken_from(2, task.training_step)
        return data, task, chosen

    with pytest.raises(NotFiniteError, match=r"^the training loss of batch 3, of .+, is not a finite number"):
        fit(build, tmp_path)
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    assert all(value.isfinite().all() for value in last["state_dict"].values())


def test_weights_that_are_no_numbers_are_not_saved_however_finite_their_losses(segmentation, tmp_path) -> None:
    def build(num_workers: int):
        data, task, chosen = segmentation(num_workers)

        def spoil(optimizer) -> None:
            if task.trainer.global_step == 3:
                next(task.parameters()).grad.fill_(math.inf)

        task.on_before_optimizer_step = spoil
        return data, task, chosen

    with pytest.raises(NotFiniteError, match=r"^the weights after step 4 are not finite numbers"):
        fit(build, tmp_path, gradient_clip=0.0)
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


def processes(reduced) -> SimpleNamespace:
    """Trainer of one of two processes; `reduced` maps the name of a reduction to its result."""
    strategy = SimpleNamespace(
        root_device=torch.device("cpu"), reduce=lambda value, reduce_op: torch.tensor(reduced[reduce_op](int(value)))
    )
    names = {"training": True, "train_dataloader": None, "current_epoch": 0, "global_step": 7}
    return SimpleNamespace(world_size=2, strategy=strategy, **names)


def test_a_loss_of_another_process_stops_the_checkpoint_of_the_first() -> None:
    model = torch.nn.Linear(1, 1)
    fine = processes({"min": lambda value: value, "max": lambda value: value})
    FiniteLoss().on_save_checkpoint(fine, model, {})
    bad = processes({"min": lambda value: min(value, 4), "max": lambda value: value})
    with pytest.raises(NotFiniteError, match=r"^the training loss of batch 5, of samples of another process, is not"):
        FiniteLoss().on_save_checkpoint(bad, model, {})
    sharded = processes({"min": lambda value: value, "max": lambda value: 1})
    with pytest.raises(NotFiniteError, match=r"^the weights after step 7 are not finite"):
        FiniteLoss().on_save_checkpoint(sharded, model, {})


def test_each_batch_is_looked_at_on_a_cpu_only() -> None:
    def trainer(device: str, world_size: int) -> SimpleNamespace:
        return SimpleNamespace(world_size=world_size, strategy=SimpleNamespace(root_device=torch.device(device)))

    assert [FiniteLoss().num_between(trainer(*each)) for each in (("cpu", 1), ("cuda", 1), ("cpu", 2))] == [1, 20, 20]
