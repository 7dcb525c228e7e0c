"""Scenes that every test may make."""

import os
import shutil
import sys
from pathlib import Path

# One thread a process: the suite runs in as many processes as there are cores, and small operations on two threads of
# a busy machine take many times longer than on one.
os.environ["OMP_NUM_THREADS"] = "1"
# Bytecode is kept, also where the environment asks for none: without it each process compiles the package, and rewrites
# the assertions of all tests.
os.environ["PYTHONDONTWRITEBYTECODE"] = ""
# What several test files share is imported by its name: `from command_line import call`.
sys.path.insert(0, str(Path(__file__).parent / "support"))

import torch

if not torch.cuda.is_available():
    # Triton kernels run in their interpreter, if the variable is there before the first import of triton, as by timm.
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import rasterio
from affine import Affine

from perf_vit import errors

sys.dont_write_bytecode = False
torch.set_num_threads(1)

CRS = "EPSG:32637"
TRANSFORM = Affine(2.5, 0, 401_000.125, 0, -3.25, 4_510_000.5)


@pytest.fixture(autouse=True)
def _warnings_of_this_test(monkeypatch):
    """What is told once a process is told once a test."""
    monkeypatch.setattr(errors, "_warned", set())


@pytest.fixture(autouse=True, scope="session")
def _no_disk_is_waited_for():
    """Leave out what outlives a crash of the machine, which no test causes; tests of it replace `os.fsync`, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _curves_are_drawn_once(tmp_path_factory):
    """Draw one loss curve a task and process, and copy it: drawing takes as long as a small training."""
    # Not imported here: tests of attention need no trainer.
    callbacks = sys.modules.get("perf_vit.tasks.callbacks")
    if callbacks is None:
        yield
        return
    plot, drawn = callbacks.plot_history, {}

    def _plot(rows, path, curves=callbacks.SEGMENTATION_CURVES, format="png"):
        if format == "png" and curves not in drawn:
            drawn[curves] = tmp_path_factory.mktemp("curves") / "loss_curve.png"
            plot(rows, drawn[curves], curves)
        if format == "png":
            shutil.copyfile(drawn[curves], path)
        else:
            plot(rows, path, curves, format)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "plot_history", _plot)
        yield


@pytest.fixture
def make_scene(tmp_path: Path):
    """Write a seeded GeoTIFF with a real CRS, non-square pixels and a nodata border; further calls, further files."""
    made = []

    def _make(
        *,
        height: int = 70,
        width: int = 90,
        num_bands: int = 3,
        dtype: str = "uint16",
        nodata: float | None = 0,
        seed: int = 0,
        pixels: np.ndarray | None = None,
        **profile,
    ) -> Path:
        rng = np.random.default_rng(seed)
        if pixels is None:
            high = {"uint8": 255, "float32": 1e6}.get(dtype, 30_000)
            pixels = (rng.random((num_bands, height, width)) * (high - 1) + 1).astype(dtype)
            if nodata is not None:
                pixels[:, :2, :] = nodata
                pixels[:, :, :3] = nodata
        path = tmp_path / f"scene_{len(made)}.tif"
        made.append(path)
        options = {"driver": "GTiff", "crs": CRS, "transform": TRANSFORM, "nodata": nodata, **profile}
        count, height, width = pixels.shape
        with rasterio.open(
            path, "w", count=count, height=height, width=width, dtype=pixels.dtype, **options
        ) as dataset:
            dataset.write(pixels)
        return path

    return _make
