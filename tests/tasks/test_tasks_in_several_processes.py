"""Every task trains and validates in two processes as in one."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from several_processes import MONITORS

SCRIPT = Path(__file__).parents[1] / "support" / "several_processes.py"
DENSE = ("segmentation", "multilabel", "fcos", "oriented_fcos")
POOLED = ("classification", "regression", "slides")


def trained(folder: Path, devices: int, strategy: str, num_val: int, cases: tuple[str, ...]) -> dict:
    folder.mkdir()
    command = [sys.executable, SCRIPT, folder, devices, strategy, num_val, *cases]
    # What waits for another process waits for ever.
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    return {case: json.loads((folder / f"{case}.json").read_text()) for case in cases}


def without_losses(scores: dict) -> dict:
    return {name: value for name, value in scores.items() if "loss" not in name}


def assert_same(one: dict, two: dict, scores: bool = True) -> None:
    assert one.keys() == two.keys()
    for case, expected in one.items():
        assert np.ptp(expected["losses"]) > 0.01
        np.testing.assert_allclose(two[case]["losses"], expected["losses"], rtol=0, atol=1e-5, err_msg=case)
        before = without_losses(expected["before"])
        # Untrained detectors hit nothing.
        assert "fcos" in case or np.nanmax(list(before.values())) > 0
        assert without_losses(two[case]["before"]) == pytest.approx(before, abs=1e-6, nan_ok=True), case
        if scores:
            assert two[case]["scores"] == pytest.approx(expected["scores"], abs=1e-4)
        elif "fcos" not in case:
            after = without_losses(expected["scores"])
            assert without_losses(two[case]["scores"]) == pytest.approx(after, abs=5e-3), case


@pytest.mark.slow
def test_weights_of_every_task_can_be_shared_out_and_each_sample_counts_once(tmp_path) -> None:
    one = trained(tmp_path / "one", 1, "auto", 7, POOLED)
    assert_same(one, trained(tmp_path / "two", 2, "fsdp2", 7, POOLED))


@pytest.mark.parametrize(
    ("strategy", "cases"),
    [
        pytest.param("fsdp2", ("segmentation", "fcos"), id="two tasks", marks=pytest.mark.slow),
        pytest.param("ddp", DENSE, id="ddp", marks=pytest.mark.slow),
        pytest.param("fsdp2", DENSE, id="fsdp2", marks=pytest.mark.slow),
    ],
)
def test_unequal_shares_of_what_is_labelled_count_as_in_one_process(tmp_path, strategy, cases) -> None:
    one = trained(tmp_path / "one", 1, "auto", 7, cases)
    # After training, weights that differ in their last digits may order detections otherwise.
    assert_same(one, trained(tmp_path / "two", 2, strategy, 7, cases), scores=False)


@pytest.mark.slow
def test_slides_are_shared_out_whose_encoder_is_trained(tmp_path) -> None:
    one = trained(tmp_path / "one", 1, "auto", 7, ("through",))
    assert_same(one, trained(tmp_path / "two", 2, "ddp", 7, ("through",)))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_processes_may_outnumber_what_is_validated_on(tmp_path, strategy) -> None:
    cases = ("slides", "segmentation", "fcos")
    found = trained(tmp_path / "two", 2, strategy, 1, cases)
    assert all(np.isfinite(each["scores"][MONITORS.get(case, "val/iou")]) for case, each in found.items())
