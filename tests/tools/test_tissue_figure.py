"""tools/tissue_figure.py: the picture of docs/slides.md is made of generated slides."""

import importlib
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]


def test_the_picture_of_the_docs_is_made_again(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    importlib.import_module("tissue_figure").main(tmp_path / "tissue.jpg")
    with Image.open(tmp_path / "tissue.jpg") as made, Image.open(ROOT / "docs" / "images" / "tissue.jpg") as shown:
        assert made.size == shown.size
        # Versions of JPEG libraries and of fonts differ.
        difference = np.abs(np.asarray(made).astype(int) - np.asarray(shown))
    assert difference.mean() < 2
    assert (tmp_path / "tissue.jpg").stat().st_size < 150_000
