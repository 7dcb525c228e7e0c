"""A distillation resumed with other stages follows them from the step it is at."""

from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import timm
import torch
from PIL import Image

import perf_vit
from perf_vit.data import DistillationDataConfig, SplitConfig, build_distillation_datamodule
from perf_vit.tasks import (
    DistillationOptimConfig,
    DistillationTask,
    DistillationTrainerConfig,
    build_distillation_trainer,
)


class Rates(lightning.Callback):
    """Notes rate and crops of each step."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[float, float]] = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.seen[trainer.global_step - 1] = (trainer.optimizers[0].param_groups[0]["lr"], float(batch[0].sum()))


def make_task(**stages) -> DistillationTask:
    torch.manual_seed(0)
    shape = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32}
    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=0, **shape).eval()
    with torch.no_grad():
        teacher.blocks[0].attn.qkv.weight.mul_(8)
    student = perf_vit.linearize(teacher, max_exact_tokens=0, window_size=2, num_sinks=2, num_clusters=8)
    return DistillationTask(teacher, student, DistillationOptimConfig(**stages))


@pytest.fixture
def distil(tmp_path):
    """Train in a folder, six steps an epoch; what was seen, the last checkpoint and the metrics."""
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (48, 48, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    train, val = (SplitConfig(image=str(tmp_path / name)) for name in ("0.png", "1.png"))

    def _distil(folder, *, resume=False, **stages):
        task = make_task(**stages)
        data = build_distillation_datamodule(
            DistillationDataConfig(train=train, val=val, tile_px=32, num_val_tiles=2),
            (0.5,) * 3,
            (0.5,) * 3,
            steps_per_epoch=6,
            seed=0,
        )
        where = DistillationTrainerConfig(val_every_steps=6, accelerator="cpu")
        trainer = build_distillation_trainer(where, task.config, folder, progress=False)
        rates = Rates()
        trainer.callbacks.insert(0, rates)
        last = folder / "checkpoints" / "last.ckpt"
        trainer.fit(task, data, ckpt_path=last if resume else None, weights_only=True)
        return rates.seen, torch.load(last, weights_only=True), (folder / "metrics.csv").read_text()

    return _distil


@pytest.mark.parametrize(
    "block_steps",
    [
        pytest.param(8, id="inside an epoch"),
        pytest.param(12, id="at the end of an epoch", marks=pytest.mark.slow),
    ],
)
def test_a_finished_run_given_another_stage_ends_as_one_that_had_it_from_the_start(
    distil, tmp_path, block_steps
) -> None:
    longer = {"block_steps": block_steps, "token_steps": 9, "token_lr": 1e-3}
    expected, whole, metrics = distil(tmp_path / "whole", **longer)
    before, *_ = distil(tmp_path / "run", block_steps=block_steps)
    after, resumed, resumed_metrics = distil(tmp_path / "run", resume=True, **longer)
    assert {**before, **after} == expected
    assert set(after) == set(range(block_steps, block_steps + 9))
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    column = metrics.splitlines()[0].split(",").index("val/patch_cosine")
    scores, resumed_scores = ([r.split(",")[column] for r in t.splitlines()] for t in (metrics, resumed_metrics))
    # The epoch that the first run ended in has a row of its own until the second completes it.
    assert resumed_scores == scores


def test_a_longer_stage_and_another_rate_are_followed_from_the_step_on(distil, tmp_path) -> None:
    longer = {"block_steps": 20, "block_lr": 3e-4}
    expected, *_ = distil(tmp_path / "whole", **longer)
    distil(tmp_path / "run", block_steps=8)
    after, *_ = distil(tmp_path / "run", resume=True, **longer)
    assert after == {step: seen for step, seen in expected.items() if step >= 8}


def test_a_finished_run_has_nothing_left_to_do(distil, tmp_path) -> None:
    _, kept, metrics = distil(tmp_path / "run", block_steps=8)
    after, resumed, resumed_metrics = distil(tmp_path / "run", resume=True, block_steps=8)
    assert after == {}
    assert resumed["global_step"] == kept["global_step"] == 8
    assert resumed_metrics == metrics


@pytest.mark.parametrize(("minutes", "position"), [(1, 50), (2, 25), (0.25, 200), (None, 10)])
def test_the_clock_of_another_limit_counts_the_time_spent_before(minutes, position) -> None:
    task = make_task(block_steps=100, max_minutes=minutes)
    loop = {
        "epoch_progress": {"current": {"processed": 1, "started": 1}},
        "epoch_loop.batch_progress": {"is_last_batch": True},
    }
    task.on_load_checkpoint({"distillation": {"seconds": 30.0}, "loops": {"fit_loop": loop}})
    task.trainer = SimpleNamespace(global_step=10)
    assert task._position() == position
