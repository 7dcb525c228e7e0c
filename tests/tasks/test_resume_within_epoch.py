"""A run that is killed between two epochs' ends goes on with the samples that were left, to the same weights."""

from functools import partial

import pytest
from small_runs import assert_equal, fit

from perf_vit.data.base import EpochDataModule, EpochLoader
from perf_vit.errors import ConfigError
from perf_vit.tasks import TrainerConfig, build_trainer


@pytest.fixture(scope="module")
def uninterrupted(segmentation, detection, scenes, slides, tmp_path_factory):
    """Batches and last checkpoint of whole runs; workers make no difference."""
    builds = {"segmentation": segmentation, "detection": detection, "scenes": scenes, "slides": slides}
    return {name: fit(build, tmp_path_factory.mktemp(name)) for name, build in builds.items()}


@pytest.mark.parametrize(
    ("task", "num_workers"),
    [
        *((task, 0) for task in ("segmentation", "detection", "scenes", "slides")),
        ("segmentation", 2),
        *(pytest.param(task, 2, marks=pytest.mark.slow) for task in ("detection", "scenes", "slides")),
    ],
)
def test_a_run_killed_inside_an_epoch_ends_in_the_same_weights(
    task, num_workers, uninterrupted, tmp_path, request
) -> None:
    build = request.getfixturevalue(task)
    seen, whole = uninterrupted[task]
    assert len(set(seen)) == 10
    # Five batches an epoch: checkpoints at steps 2, 4, 5 (end of the epoch), 6, 8.
    before, kept = fit(build, tmp_path / "killed", num_workers=num_workers, kill_at=8)
    assert before == seen[:8]
    assert kept["global_step"] == 8
    after, resumed = fit(build, tmp_path / "killed", num_workers=num_workers, resume=True)
    assert after == seen[8:]
    for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
        assert_equal(whole[part], resumed[part], part)
    rows, expected = (content["callbacks"]["HistoryCallback"]["rows"] for content in (resumed, whole))
    assert_equal(rows, expected)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"sampler": "balanced"}, marks=pytest.mark.slow),
        pytest.param({"sampler": "grid", "tile_px": 64, "batch_size": 1}, marks=pytest.mark.slow),
        {"sampler": "grid", "batch_size": 3},
    ],
)
def test_every_sampler_of_maps_goes_on_where_it_was(segmentation, options, tmp_path) -> None:
    build = partial(segmentation, **options)
    seen, whole = fit(build, tmp_path / "whole")
    # Killed inside the second epoch, which has tiles and an order of its own.
    kill_at = len(seen) // 2 + 3
    before, _ = fit(build, tmp_path / "killed", kill_at=kill_at)
    assert before == seen[:kill_at]
    after, resumed = fit(build, tmp_path / "killed", resume=True)
    assert after == seen[-len(after) :]
    assert len(after) < len(seen) // 2
    assert_equal(whole["state_dict"], resumed["state_dict"])


@pytest.mark.parametrize(
    ("kill_at", "gone_on_from"), [(3, 2), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((5, 5), (7, 6)))]
)
def test_samples_after_the_last_checkpoint_are_seen_again(
    segmentation, uninterrupted, kill_at, gone_on_from, tmp_path
) -> None:
    seen, whole = uninterrupted["segmentation"]
    fit(segmentation, tmp_path / "killed", kill_at=kill_at)
    after, resumed = fit(segmentation, tmp_path / "killed", resume=True)
    assert after == seen[gone_on_from:]
    assert_equal(whole["state_dict"], resumed["state_dict"])


def test_batches_of_one_step_are_not_torn_apart(segmentation, tmp_path) -> None:
    options = {"accumulate_batches": 2}
    seen, whole = fit(segmentation, tmp_path / "whole", **options)
    # Steps end after batches 2, 4, 5 | 7, 9, 10: the fourth is at batch 7, and batch 8 belongs to the fifth.
    _, kept = fit(segmentation, tmp_path / "killed", kill_at=8, **options)
    assert kept["global_step"] == 4
    after, resumed = fit(segmentation, tmp_path / "killed", resume=True, **options)
    assert after == seen[7:]
    assert_equal(whole["state_dict"], resumed["state_dict"])


def test_the_end_of_an_epoch_is_resumed_with_its_samples_under_workers(segmentation, uninterrupted, tmp_path) -> None:
    seen, whole = uninterrupted["segmentation"]
    fit(segmentation, tmp_path / "killed", num_workers=2, kill_at=5)
    # Killed before the first batch of the second epoch.
    after, resumed = fit(segmentation, tmp_path / "killed", num_workers=2, resume=True)
    assert after == seen[5:]
    assert_equal(whole["state_dict"], resumed["state_dict"])


def test_a_data_module_goes_on_where_its_state_says() -> None:
    options = {"batch_size": 3, "num_workers": 0}
    first, second = EpochDataModule(), EpochDataModule()
    batches = iter(first.train_loader(EpochLoader(range(7), **options)))
    assert next(batches).tolist() == [0, 1, 2]
    second.load_state_dict(first.state_dict())
    loader = second.train_loader(EpochLoader(range(7), **options))
    assert [batch.tolist() for batch in loader] == [[3, 4, 5]]
    assert second.state_dict() == {"num_batches": 0}
    assert [batch.tolist() for batch in loader] == [[0, 1, 2], [3, 4, 5]]
    # Where a checkpoint is read after the loader was made.
    second.load_state_dict(first.state_dict())
    assert [batch.tolist() for batch in loader] == [[3, 4, 5]]


def test_checkpoints_at_negative_steps_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="checkpoint_every_steps must be 0 or more"):
        build_trainer(TrainerConfig(checkpoint_every_steps=-1), tmp_path)


def test_a_run_resumed_within_its_last_epoch_is_validated_at_its_end(segmentation, tmp_path) -> None:
    options = {"max_epochs": 1, "val_every_epochs": 9}
    fit(segmentation, tmp_path, kill_at=3, **options)
    best = tmp_path / "checkpoints" / "best.ckpt"
    assert not best.exists()
    _, last = fit(segmentation, tmp_path, resume=True, **options)
    assert best.exists()
    assert "val/iou" in last["callbacks"]["HistoryCallback"]["rows"][-1]
