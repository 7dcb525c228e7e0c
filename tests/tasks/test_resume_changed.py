"""A run resumed with another config follows that one from the step it is at, and keeps what it has learnt."""

import csv

import pytest
import torch
from small_runs import fit, watched_fit

SCHEDULES = {
    "cosine": {},
    "constant": {},
    "multistep": {"decay_milestones": [1, 2], "decay_rate": 0.5},
    "poly": {"decay_rate": 0.7},
    "rsqrt": {},
    "step": {"decay_epochs": 1, "decay_rate": 0.5},
    "tanh": {},
    "wsd": {},
}
CHANGED = {"lr": 0.02, "weight_decay": 0.3, "warmup_fraction": 0.15, "schedule": "step",
           "schedule_kwargs": SCHEDULES["step"]}  # fmt: skip


def assert_follows(build, folder, *, kill_at, optim) -> None:
    """A run of two epochs, killed or finished, and resumed to four has the rates of one of four from there on."""
    watch_of_whole, whole = watched_fit(build, folder / "whole", optim=optim, max_epochs=4)
    _, kept = fit(build, folder / "run", kill_at=kill_at)
    watch, resumed = watched_fit(build, folder / "run", resume=True, optim=optim, max_epochs=4)
    step = kept["global_step"]
    assert set(watch.rates) == set(range(step, 20))
    assert watch.rates == {each: rates for each, rates in watch_of_whole.rates.items() if each >= step}
    assert watch_of_whole.rates[step][-1][0] > 0
    states, expected = (content["optimizer_states"][0]["state"] for content in (resumed, whole))
    assert states.keys() == expected.keys()
    assert {float(state["step"]) for state in states.values()} == {20.0}
    assert torch.equal(resumed["averaging_state"]["n_averaged"], whole["averaging_state"]["n_averaged"])


@pytest.mark.parametrize(
    ("task", "kill_at"),
    [
        pytest.param("segmentation", 8, id="segmentation-killed"),
        pytest.param("slides", None, id="slides-finished"),
        *(
            pytest.param(task, kill_at, id=f"{task}-{'killed' if kill_at else 'finished'}", marks=pytest.mark.slow)
            for task in ("segmentation", "detection", "scenes", "slides")
            for kill_at in (8, None)
            if (task, kill_at) not in {("segmentation", 8), ("slides", None)}
        ),
    ],
)
def test_more_epochs_other_rates_and_another_schedule(task, kill_at, tmp_path, request) -> None:
    layers = {} if task == "slides" else {"layer_decay": 0.5, "backbone_lr_scale": 0.7}
    assert_follows(request.getfixturevalue(task), tmp_path, kill_at=kill_at, optim={**CHANGED, **layers})


@pytest.mark.parametrize(
    "schedule",
    [pytest.param(name, marks=() if name == "multistep" else pytest.mark.slow) for name in SCHEDULES],
)
def test_every_schedule_goes_on_where_the_longer_run_would_be(slides, schedule, tmp_path) -> None:
    assert_follows(slides, tmp_path, kill_at=None, optim={"schedule": schedule, "schedule_kwargs": SCHEDULES[schedule]})


def test_momenta_are_those_of_the_checkpoint(slides, tmp_path) -> None:
    _, kept = fit(slides, tmp_path)
    # Of a step of no length only momenta decay; a single step of a large rate leaves most of them.
    _, resumed = fit(slides, tmp_path, resume=True, kill_at=3, max_epochs=3, checkpoint_every_steps=1, optim=CHANGED)
    before, after = (content["optimizer_states"][0]["state"] for content in (kept, resumed))
    assert {float(state["step"]) for state in after.values()} == {13.0}
    for key, state in before.items():
        if state["exp_avg_sq"].any():
            # Each step keeps .999 of the squares.
            assert (after[key]["exp_avg_sq"] >= 0.999**3 * state["exp_avg_sq"] * (1 - 1e-5)).all()


@pytest.mark.parametrize(("patience", "num_epochs"), [(1, 2), pytest.param(3, 4, marks=pytest.mark.slow), (0, 6)])
def test_early_stopping_has_the_patience_of_the_new_config(slides, tmp_path, patience, num_epochs) -> None:
    # At such a rate no validation is better than the first.
    options = {"optim": {"lr": 1e-12}, "ema_decay": 0.0, "max_epochs": 6}
    fit(slides, tmp_path, early_stop_epochs=1, **options)
    assert num_rows(tmp_path) == 2
    fit(slides, tmp_path, resume=True, early_stop_epochs=patience, **options)
    assert num_rows(tmp_path) == num_epochs


def num_rows(folder) -> int:
    return len(list(csv.DictReader((folder / "metrics.csv").open())))


def test_a_run_whose_folder_was_moved_keeps_its_best_checkpoint(slides, tmp_path) -> None:
    fit(slides, tmp_path / "run", ema_decay=0.0, optim={"lr": 0.01})
    best = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    (tmp_path / "run").rename(tmp_path / "moved")
    # Weights that a far too high rate spoils are no better.
    options = {"max_epochs": 3, "ema_decay": 0.0, "optim": {"lr": 100.0, "schedule": "constant"}}
    _, last = fit(slides, tmp_path / "moved", resume=True, **options)
    kept = torch.load(tmp_path / "moved" / "checkpoints" / "best.ckpt", weights_only=True)
    assert kept["global_step"] == best["global_step"]
    callbacks = [state for name, state in last["callbacks"].items() if name.startswith("FolderCheckpoint")]
    assert {state["dirpath"] for state in callbacks} == {str((tmp_path / "moved" / "checkpoints").resolve())}
    assert not (tmp_path / "run").exists()
