"""The largest tile that training fits into memory."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perf_vit.errors import ConfigError
from perf_vit.models import DetectionModelConfig, SegmentationModelConfig
from perf_vit.tasks import SegmentationOptimConfig, TrainerConfig, TrainingSteps, fit_max_tile
from perf_vit.tasks.memory import _peak_in_process, largest_fitting, training_peak

MB = 10**6
VIT = {"backbone": "performer_vit_tiny_patch16_224",
       "backbone_kwargs": {"depth": 2, "embed_dim": 24, "attn_kwargs": {"num_features": 8}}}  # fmt: skip
STEPS = TrainingSteps(
    model=SegmentationModelConfig(**VIT, out_indices=[0, 1], head="linear"),
    trainer=TrainerConfig(accelerator="cpu", ema_decay=0.9),
    num_bands=2,
    classes=("a", "b"),
)


@given(
    base=st.integers(0, 800), per_pixel=st.floats(50, 50_000), multiple=st.sampled_from([8, 14, 16, 32]),
    memory=st.integers(900, 20_000), known=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_the_side_found_fits_and_the_next_one_does_not(base, per_pixel, multiple, memory, known) -> None:
    tried = []

    def measure(side: int) -> int | None:
        assert side % multiple == 0
        tried.append(side)
        peak = base * MB + per_pixel * side**2
        # A CPU tells how much was too much, a GPU does not.
        return int(peak) if known or peak <= memory * MB else None

    smallest = base * MB + per_pixel * multiple**2
    if smallest > memory * MB:
        with pytest.raises(ConfigError, match="choose a smaller model or batch"):
            largest_fitting(measure, memory * MB, multiple, 8192)
        return
    found = largest_fitting(measure, memory * MB, multiple, 8192)
    assert found.peak_bytes <= memory * MB
    assert found.tile_px in tried
    assert len(tried) == len(set(tried)) <= 12
    assert base * MB + per_pixel * (found.tile_px + multiple) ** 2 > memory * MB or found.tile_px + multiple > 8192
    # Never far beyond what memory has been seen to hold.
    assert max(tried) <= max(224, 2 * found.tile_px)


def test_noise_and_growth_above_linear_end_in_a_side_that_was_seen_to_fit() -> None:
    found = largest_fitting(lambda side: int(300 * MB + 9 * side**2.2 + (side * 7919) % (5 * MB)), 900 * MB, 16, 8192)
    assert found.peaks[found.tile_px] == found.peak_bytes <= 900 * MB
    assert found.tile_px > 2000


@pytest.mark.slow
def test_real_steps_are_measured_and_more_memory_takes_a_larger_tile() -> None:
    seen: dict[int, int] = {}
    found = fit_max_tile(STEPS, 10**12, max_tile_px=448, on_measured=seen.__setitem__)
    assert found.tile_px == 448
    assert seen == found.peaks
    assert 100 * MB < seen[224] < seen[448]
    # The input, features and logits of 448 x 448 px alone take more than their share of 224 x 224.
    assert seen[448] - seen[224] > 448**2 * 4 * 4


def test_modules_are_those_of_this_process_and_not_of_the_current_folder(monkeypatch, tmp_path) -> None:
    here = [path for path in sys.path if path]
    monkeypatch.setattr(sys, "path", here)
    monkeypatch.chdir(tmp_path)
    run, seen = subprocess.run, []

    def show_path(command, **options):
        show = "import json, sys; from pathlib import Path; Path(sys.argv[1]).write_text(json.dumps(sys.path))"
        done = run([command[0], "-c", show, command[-1]], **options)
        seen.extend(json.loads(Path(command[-1]).read_text()))
        Path(command[-1]).write_text("1")
        return done

    monkeypatch.setattr(subprocess, "run", show_path)
    assert _peak_in_process(STEPS) == 1
    assert set(here) <= set(seen)
    assert not {"", str(tmp_path)} & set(seen)


def test_what_fails_for_another_reason_says_so() -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr must be a number above 0"):
        fit_max_tile(replace(STEPS, optim=SegmentationOptimConfig(lr=0.0)), 10**9)


def test_classes_that_do_not_exclude_each_other_train_a_step() -> None:
    assert training_peak(replace(STEPS, multilabel=True, tile_px=64)) > 100 * MB


@pytest.mark.parametrize("head", ["mask_rcnn", "oriented_fcos"])
def test_detectors_train_a_step_on_made_up_objects(head: str) -> None:
    options = {"hidden": 16, "proposals_per_tile": 20} if head == "mask_rcnn" else {"num_convs": 1}
    model = DetectionModelConfig(**VIT, out_indices=[1], strides=[8], channels=64, head=head, head_kwargs=options)
    steps = replace(STEPS, model=model, batch_size=2, tile_px=64)
    assert training_peak(steps) > 100 * MB
