"""The plan of a map of a whole image, compared with a run."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from small_models import save_segmenter

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=[1022, 2044])
def scene(request, tmp_path_factory) -> Path:
    path, side = tmp_path_factory.mktemp("scene") / "scene.tif", request.param
    profile = {"driver": "GTiff", "height": side, "width": side, "count": 3, "dtype": "uint8", "crs": "EPSG:32636"}
    with rasterio.open(path, "w", **profile, transform=Affine(0.5, 0, 500_000, 0, -0.5, 4_000_000)) as file:
        file.write(np.random.default_rng(0).integers(1, 255, (3, side, side)).astype(np.uint8))
    return path


def cost(*arguments: str | Path) -> dict[str, float]:
    command = [sys.executable, ROOT / "tests" / "support" / "whole_cost.py", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system tells no anonymous memory")
@pytest.mark.parametrize("store", ["float32", "memory"])
@pytest.mark.parametrize("head", ["linear", "full_resolution"])
def test_a_plan_is_near_what_a_run_takes(scene, head: str, store: str, tmp_path: Path) -> None:
    """With `--log-cli-level=INFO`, both are shown."""
    backbone = {"embed_dim": 192, "num_heads": 3}
    model = save_segmenter(tmp_path / "m.ckpt", depth=3, out_indices=(0, 2), head=head, tile_px=224, **backbone)
    # A plan in the process of a run would find its memory there already.
    found, planned = (cost(model, scene, tmp_path / "map.tif", store, mode) for mode in ("run", "plan"))
    logging.getLogger(__name__).info("%s %s %s: run %s, plan %s", scene.parent.name, head, store, found, planned)
    assert planned["mib"] == pytest.approx(found["mib"], rel=0.25)
    # Of a piece of the image; a run also writes the tokens and the map.
    assert 0.4 < planned["seconds"] / found["seconds"] < 1.25
