"""tools/stops.py: how far calls go through the package before the network runs."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def stops(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    return importlib.import_module("stops")


def test_a_prediction_passes_six_frames_and_35_modules_before_the_network(stops, tmp_path) -> None:
    found = stops.predict_stops(tmp_path)
    assert found.frames[0] == "workflows/predict.py:predict"
    assert len(found.frames) <= 6, found.frames
    assert len(found.modules_before) <= 35, sorted(found.modules_before)
    assert len(found.modules) <= 52, sorted(found.modules)


def test_a_training_passes_six_frames_before_the_network(stops, tmp_path) -> None:
    found = stops.train_stops(tmp_path)
    assert found.frames[0] == "workflows/train.py:train"
    assert len(found.frames) <= 6, found.frames
    # The way includes the data with their labels, the network that is built, the optimiser and the trainer.
    assert len(found.modules_before) <= 55, sorted(found.modules_before)
    assert len(found.modules) <= 65, sorted(found.modules)
