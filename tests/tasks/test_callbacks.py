import copy
import io
from pathlib import Path

import lightning
import pytest
import timm
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from timm.models import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from perf_vit.errors import ConfigError
from perf_vit.layers import PerformerMixer, current_draw, redraw_projections
from perf_vit.models import CHECKPOINT_KEY, SegmentationModelConfig, SegmentationSpec, load_segmenter
from perf_vit.tasks import SegmentationOptimConfig, SegmentationTask, TrainerConfig, build_trainer
from perf_vit.tasks.callbacks import HistoryCallback, RedrawProjections
from perf_vit.tasks.optim import WeightAverage
from perf_vit.transforms import Normalizer

TINY = SegmentationModelConfig(
    backbone="performer_vit_tiny_patch16_224",
    backbone_kwargs={"depth": 2, "embed_dim": 32, "num_heads": 2, "attn_kwargs": {"num_features": 8}},
    out_indices=[0, 1],
    head_kwargs={"channels": [8, 8, 8, 8]},
)
SPEC = SegmentationSpec(classes=("land", "water"), normalizer=Normalizer((0.0,) * 3, (1.0,) * 3), tile_px=32)


class Recorder(lightning.Callback):
    """The draw that each training batch, validation batch and validation epoch saw."""

    def __init__(self) -> None:
        self.train: list[int] = []
        self.val: list[int] = []
        self.scores: list[dict[str, float]] = []
        self.projections: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.train.append(current_draw(pl_module))
        self.projections.append(projections(pl_module)[0].clone())

    def on_validation_batch_end(self, trainer, pl_module, *_) -> None:
        self.val.append(current_draw(pl_module))

    def on_train_epoch_end(self, trainer, *_) -> None:
        self.scores.append({name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")})


def projections(model: nn.Module) -> list[torch.Tensor]:
    return [module.projection for module in model.modules() if isinstance(module, PerformerMixer)]


def batches(num_batches: int) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2 * num_batches, 3, 32, 32, generator=generator)
    return DataLoader(TensorDataset(image, (image[:, 0] > 0).long()), batch_size=2)


def new_task() -> SegmentationTask:
    torch.manual_seed(0)
    return SegmentationTask(TINY, SPEC, SegmentationOptimConfig(lr=1e-2))


def new_trainer(*callbacks: lightning.Callback, **kwargs) -> lightning.Trainer:
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [callback for callback in callbacks if callback]
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return lightning.Trainer(
        callbacks=callbacks, enable_checkpointing=checkpoints, num_sanity_val_steps=0, **options, **kwargs
    )


def train(every_n_steps: int, *callbacks: lightning.Callback, ckpt_path: Path | None = None, **kwargs):
    """Three epochs of two batches, then one of validation each."""
    task, recorder = new_task(), Recorder()
    redraw = RedrawProjections(every_n_steps) if every_n_steps else None
    trainer = new_trainer(redraw, recorder, *callbacks, **{"max_epochs": 3, **kwargs})
    trainer.fit(task, batches(2), batches(1), ckpt_path=ckpt_path, weights_only=True)
    return task, recorder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[SegmentationTask, Recorder, Path]:
    """A run that redraws every three steps and keeps a checkpoint an epoch, so after steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("run")
    keep = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    task, recorder = train(3, keep)
    return task, recorder, folder


def equal_states(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_draws_follow_the_optimizer_step_and_validation_keeps_the_last(run) -> None:
    _, recorder, _ = run
    assert recorder.train == [0, 0, 0, 1, 1, 1]
    assert recorder.val == [0, 1, 1]
    changed = [not torch.equal(a, b) for a, b in zip(recorder.projections, recorder.projections[1:], strict=False)]
    assert changed == [False, False, True, False, False]


def test_two_runs_are_equal_bit_for_bit_and_differ_from_one_without_redraws(run) -> None:
    task, recorder, _ = run
    again, recorded = train(3)
    assert equal_states(task, again)
    assert recorded.scores == recorder.scores
    assert not equal_states(task, train(0)[0])


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(run, epoch: int) -> None:
    task, recorder, folder = run
    resumed, recorded = train(3, ckpt_path=folder / f"epoch={epoch}.ckpt")
    assert equal_states(task, resumed)
    assert recorded.train == recorder.train[2 * (epoch + 1) :]
    assert recorded.scores == recorder.scores[epoch + 1 :]


def test_a_run_resumed_without_redraws_keeps_the_draw_of_its_checkpoint(run) -> None:
    _, recorded = train(0, ckpt_path=run[2] / "epoch=1.ckpt")
    assert recorded.train == [1, 1]


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_validating_a_checkpoint_repeats_the_scores_of_its_epoch(run, epoch: int) -> None:
    _, recorder, folder = run
    task = new_task()
    # at global step 0 the schedule alone would say draw 0
    scores = new_trainer(RedrawProjections(3)).validate(
        task, batches(1), folder / f"epoch={epoch}.ckpt", verbose=False, weights_only=True
    )
    assert current_draw(task) == recorder.val[epoch]
    assert scores == [pytest.approx(recorder.scores[epoch], rel=0, abs=0, nan_ok=True)]


def test_load_segmenter_has_the_draw_that_its_weights_were_trained_with(run) -> None:
    task, _, folder = run
    image = next(iter(batches(1)))[0]
    for epoch, draw in enumerate([0, 1, 1]):
        assert current_draw(load_segmenter(folder / f"epoch={epoch}.ckpt")) == draw
    model = load_segmenter(folder / "epoch=2.ckpt")
    with torch.no_grad():
        assert torch.equal(model(image), task.eval()(image))
        redraw_projections(model, 0)
        assert not torch.equal(model(image), task(image))


def test_a_checkpoint_without_a_draw_holds_the_first(run, tmp_path) -> None:
    content = torch.load(run[2] / "epoch=2.ckpt", weights_only=True)
    assert not any("projection" in key for key in content["state_dict"])
    assert content[CHECKPOINT_KEY].pop("draw") == 1
    torch.save(content, tmp_path / "older.ckpt")
    assert current_draw(load_segmenter(tmp_path / "older.ckpt")) == 0


def test_evaluation_and_prediction_never_redraw() -> None:
    task = new_task()
    redraw_projections(task, 7)
    before = [projection.clone() for projection in projections(task)]
    trainer = new_trainer(RedrawProjections(1))
    task.test_step, task.predict_step = task.validation_step, lambda batch, batch_idx: task(batch[0])
    trainer.validate(task, batches(2), verbose=False)
    trainer.test(task, batches(2), verbose=False)
    trainer.predict(task, batches(2))
    assert current_draw(task) == 7
    assert all(map(torch.equal, projections(task), before))


def test_batches_that_accumulate_into_one_step_share_a_draw() -> None:
    task, recorder = new_task(), Recorder()
    trainer = new_trainer(RedrawProjections(1), recorder, max_epochs=1, accumulate_grad_batches=3)
    trainer.fit(task, batches(7))
    # the last window is cut off by the end of the epoch
    assert recorder.train == [0, 0, 0, 1, 1, 1, 2]


def test_processes_agree_without_communication() -> None:
    first, second = new_task(), new_task()
    for task, seed in ((first, 1), (second, 2)):
        torch.manual_seed(seed)
        redraw_projections(task, 5)
    assert all(map(torch.equal, projections(first), projections(second)))
    assert not torch.equal(*projections(first))


def backbone(draw: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("performer_vit_tiny_patch16_224", **sizes, attn_kwargs={"num_features": 8})
    redraw_projections(model, draw)
    return model


def test_gradient_checkpointing_changes_no_gradient_after_a_redraw() -> None:
    plain, checkpointed = backbone(draw=0), backbone(draw=0)
    checkpointed.set_grad_checkpointing(True)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for draw in range(2):
        for model in (plain, checkpointed):
            redraw_projections(model, draw)
            model(x).square().sum().backward()
    for (name, expected), parameter in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=0, atol=0, msg=name)


def test_training_with_gradient_checkpointing_and_redraws_ends_at_the_same_weights(run) -> None:
    checkpointed = new_task()
    vit = next(module for module in checkpointed.modules() if isinstance(module, VisionTransformer))
    vit.set_grad_checkpointing(True)
    new_trainer(RedrawProjections(3), max_epochs=3).fit(checkpointed, batches(2), batches(1))
    assert equal_states(run[0], checkpointed)


def test_an_exported_program_holds_the_draw_of_its_export() -> None:
    model = backbone(draw=3).eval()
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(x)
        file = io.BytesIO()
        torch.export.save(torch.export.export(model, (x,)), file)
        redraw_projections(model, 4)
        file.seek(0)
        exported = torch.export.load(file).module()
        torch.testing.assert_close(exported(x), expected)
        assert not torch.allclose(exported(x), model(x))


def test_a_redraw_between_forward_and_backward_is_an_error_rather_than_a_wrong_gradient() -> None:
    model = backbone(draw=0)
    loss = model(torch.randn(1, 3, 32, 32)).sum()
    redraw_projections(model, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_model_of_mixed_draws_has_no_number() -> None:
    model = backbone(draw=0)
    mixed = copy.deepcopy(model)
    mixed.blocks[1].attn.mixer.redraw(7)
    with pytest.raises(ValueError, match=r"must hold one draw, got 0, 7; call redraw_projections"):
        current_draw(mixed)
    assert current_draw(model) == current_draw(nn.Linear(1, 1)) == 0


def test_the_config_adds_the_callback_and_its_checkpoints_carry_the_draw(tmp_path) -> None:
    trainer = build_trainer(TrainerConfig(max_epochs=1, redraw_every_steps=1), tmp_path, progress=False)
    trainer.fit(new_task(), batches(3), batches(1))
    assert current_draw(load_segmenter(tmp_path / "checkpoints" / "last.ckpt")) == 2
    never = build_trainer(TrainerConfig(), tmp_path, progress=False)
    assert not any(isinstance(callback, RedrawProjections) for callback in never.callbacks)


def test_wrong_intervals_are_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"redraw_every_steps must be 0 or more, got -1; use 0 to never redraw"):
        build_trainer(TrainerConfig(redraw_every_steps=-1), tmp_path)
    with pytest.raises(ValueError, match=r"every_n_steps must be at least 1, got 0; leave the callback out"):
        RedrawProjections(0)


class Validated(lightning.Callback):
    """Draw and projection of each validation batch."""

    def __init__(self) -> None:
        self.values: list[tuple[int, torch.Tensor]] = []

    def on_validation_batch_start(self, trainer, pl_module, *_) -> None:
        self.values.append((current_draw(pl_module), projections(pl_module)[0].clone()))


def test_averaged_weights_are_validated_with_the_last_draw_and_keep_it() -> None:
    seen = Validated()
    task, _ = train(1, WeightAverage(decay=0.5), seen)
    assert [draw for draw, _ in seen.values] == [1, 3, 5]
    expected = new_task()
    for draw, projection in seen.values:
        redraw_projections(expected, draw)
        assert torch.equal(projection, projections(expected)[0])
    assert current_draw(task) == 5
    assert torch.equal(projections(task)[0], projections(expected)[0])


def test_floating_point_weights_are_averaged_as_by_lightning() -> None:
    averaged, (plain, _) = train(0, EMAWeightAveraging(decay=0.5))[0], train(0)
    assert not equal_states(averaged, plain)
    other = train(0, WeightAverage(decay=0.5))[0]
    assert all(map(torch.equal, averaged.parameters(), other.parameters()))


def test_an_average_keeps_indices_and_constants(tmp_path) -> None:
    task = new_task()
    task.model.register_buffer("index", torch.arange(500))
    task.model.register_buffer("constant", torch.full((500,), 0.1), persistent=False)
    trainer = build_trainer(TrainerConfig(max_epochs=1, ema_decay=0.998, num_pictures=0), tmp_path, progress=False)
    trainer.fit(task, batches(3), batches(1))
    # When training ends, the average replaces the weights.
    assert torch.equal(task.model.index, torch.arange(500))
    assert torch.equal(task.model.constant, torch.full((500,), 0.1))
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["model.index"], torch.arange(500))


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """Numbers of rows of the pictures of the history."""
    found: list[int] = []

    def plot(rows, path: Path, *_) -> None:
        found.append(len(rows))
        path.touch()

    monkeypatch.setattr("perf_vit.tasks.callbacks.plot_history", plot)
    return found


@pytest.mark.parametrize(("seconds", "num_rows"), [(0, [1, 2, 3]), (1000, [3])])
def test_the_curve_is_drawn_every_few_seconds_and_at_the_end(drawn, monkeypatch, tmp_path, seconds, num_rows) -> None:
    monkeypatch.setattr("perf_vit.tasks.callbacks._PLOT_SECONDS", seconds)
    train(0, HistoryCallback(tmp_path))
    assert drawn == num_rows
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_curve_of_a_run_that_fails_has_its_last_epoch(drawn, tmp_path, error) -> None:
    class Fail(lightning.Callback):
        def on_train_batch_start(self, trainer, *_) -> None:
            if trainer.current_epoch == 2:
                raise error

    with pytest.raises((error, SystemExit)):
        train(0, HistoryCallback(tmp_path), Fail())
    assert drawn == [2]
