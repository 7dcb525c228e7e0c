"""Small runs that a test may kill and resume."""

import contextlib
from dataclasses import replace

import torch
from lightning import Callback

from perf_vit.tasks import TrainerConfig, build_trainer


class KilledError(RuntimeError):
    pass


class Watch(Callback):
    """Notes a sum of each batch and each step's rates, and kills the run at a step."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.kill_at = kill_at
        self.seen: list[float] = []
        self.rates: dict[int, list[tuple[float, float]]] = {}

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if self.kill_at is not None and len(self.seen) == self.kill_at:
            raise KilledError
        groups = trainer.optimizers[0].param_groups
        self.rates[trainer.global_step] = [(group["lr"], group["weight_decay"]) for group in groups]
        self.seen.append(float(torch.stack([image.double().sum() for image in batch[0]]).sum()))


def fit(build, folder, **options):
    """Batches that a run saw, and its last checkpoint; see `watched_fit`."""
    watch, last = watched_fit(build, folder, **options)
    return watch.seen, last


def watched_fit(
    build,
    folder,
    *,
    num_workers: int = 0,
    kill_at: int | None = None,
    resume: bool = False,
    optim: dict | None = None,
    **options,
):
    """What was watched of a run, and its last checkpoint; `options` are the trainer's."""
    torch.manual_seed(1 if resume else 0)
    data, task, chosen = build(num_workers)
    task.optim = replace(task.optim, **(optim or {}))
    given = {"max_epochs": 2, "ema_decay": 0.6, "checkpoint_every_steps": 2, **options}
    trainer = build_trainer(
        TrainerConfig(accelerator="cpu", devices="1", **given), folder, progress=False, seed=3, **chosen
    )
    watch = Watch(kill_at)
    trainer.callbacks.insert(0, watch)
    last = folder / "checkpoints" / "last.ckpt"
    with contextlib.suppress(KilledError):
        trainer.fit(task, data, ckpt_path=last if resume else None, weights_only=True)
    return watch, torch.load(last, weights_only=True)


def assert_equal(first, second, place="") -> None:
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), place
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), place
        for key in first:
            assert_equal(first[key], second[key], f"{place}.{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), place
        for number, pair in enumerate(zip(first, second, strict=True)):
            assert_equal(*pair, f"{place}.{number}")
    else:
        assert first == second, place
