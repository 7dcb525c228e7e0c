"""Every task trains and validates in two processes as in one."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parent / "several_processes.py"
POOLED = ("classification", "regression", "slides")


def trained(folder: Path, devices: int, strategy: str, num_val: int, cases: tuple[str, ...]) -> dict:
    folder.mkdir()
    command = [sys.executable, SCRIPT, folder, devices, strategy, num_val, *cases]
    # What waits for another process waits for ever.
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    return {case: json.loads((folder / f"{case}.json").read_text()) for case in cases}


def assert_same(one: dict, two: dict) -> None:
    for case, expected in one.items():
        assert np.ptp(expected["losses"]) > 0.01
        np.testing.assert_allclose(two[case]["losses"], expected["losses"], rtol=0, atol=1e-5, err_msg=case)
        assert two[case]["scores"] == pytest.approx(expected["scores"], abs=1e-4)


def test_weights_of_every_task_can_be_shared_out(tmp_path) -> None:
    one = trained(tmp_path / "one", 1, "auto", 4, POOLED)
    assert_same(one, trained(tmp_path / "two", 2, "fsdp2", 4, POOLED))
