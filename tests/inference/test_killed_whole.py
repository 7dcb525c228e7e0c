"""`perf-vit predict --whole`, killed at random moments, goes on and gives the same bytes."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_models import save_segmenter

ROOT = Path(__file__).parents[2]


def start(checkpoint: Path, scene: Path, out: Path, *options: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [
        sys.executable,
        "-m",
        "perf_vit",
        "predict",
        "--checkpoint",
        checkpoint,
        "--input",
        scene,
        "--output",
        out,
    ]
    return subprocess.Popen(
        [*map(str, command), "--whole", "--no-report", "--no-quicklook", *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait(process: subprocess.Popen) -> None:
    output = process.communicate(timeout=300)
    assert process.returncode == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--store", "bfloat16", "--token-folder", "scratch")])
def test_a_map_that_is_killed_at_random_moments_has_the_same_bytes(make_scene, tmp_path, options, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    scene = make_scene(height=2000, width=1500, num_bands=3)
    checkpoint = save_segmenter(tmp_path / "model.ckpt", depth=6, out_indices=[2, 5], head="full_resolution")
    started = time.monotonic()
    wait(start(checkpoint, scene, tmp_path / "whole.tif", *options))
    duration = time.monotonic() - started
    expected, out = (tmp_path / "whole.tif").read_bytes(), tmp_path / "map.tif"
    rng, kills, blocks = random.Random(0), 0, set()
    patterns = ["map.tif.partial/tokens/block_*.bin", "scratch/*/block_*.bin"]
    for turn in range(12):
        process = start(checkpoint, scene, out, *options)
        # At a random moment after each block in turn has begun; a run that is past it goes on to its end.
        deadline = time.monotonic() + 4 * duration
        found: set[str] = set()
        while process.poll() is None and f"block_{turn % 6}.bin" not in found and time.monotonic() < deadline:
            time.sleep(0.005)
            found = {path.name for pattern in patterns for path in tmp_path.glob(pattern)}
        # Blocks take a few hundredths of the whole.
        time.sleep(rng.uniform(0, 0.01) * duration)
        process.kill()
        process.communicate()
        kills += process.returncode == -9
        blocks |= {path.name for pattern in patterns for path in tmp_path.glob(pattern)}
        if out.exists() and not (tmp_path / "map.tif.partial").exists():
            assert out.read_bytes() == expected
            for path in tmp_path.glob("map.*"):
                path.unlink()
    wait(start(checkpoint, scene, out, *options))
    assert out.read_bytes() == expected
    assert kills >= 6
    assert len(blocks) >= 3
    assert not (tmp_path / "map.tif.partial").exists()
    assert not any((tmp_path / "scratch").glob("*"))
