import hashlib
import resource
from pathlib import Path

import numpy as np
import openslide
import pytest
from synthetic_slide import make_slide

from perf_vit.sources import open_source
from perf_vit.types import Window


@pytest.mark.parametrize("name", ["slide.svs", "slide.tif"])
def test_openslide_opens_it_with_its_pixel_size(tmp_path: Path, name: str) -> None:
    path = make_slide(tmp_path / name, 1500, 1111, mpp=0.25, tile_px=128)
    with openslide.OpenSlide(path) as slide:
        assert slide.level_dimensions == ((1111, 1500), (556, 750), (278, 375), (139, 188), (70, 94))
        assert slide.properties["openslide.vendor"] == ("aperio" if name.endswith("svs") else "generic-tiff")
    assert open_source(path, mpp=1.0).size == (375, 278)


def test_levels_are_means_of_the_finest(tmp_path: Path) -> None:
    path = make_slide(tmp_path / "slide.svs", 1024, 768, tile_px=128, tissue_share=0.5)
    full = open_source(path)
    pixels = full.read(full.extent).pixels.astype(float)
    for level in (1, 2, 3):
        source, side = open_source(path, level=level), 1 << level
        means = pixels.reshape(3, 1024 // side, side, 768 // side, side).mean((2, 4))
        assert np.abs(source.read(source.extent).pixels - means).max() <= 0.5


def test_a_seed_decides_every_byte(tmp_path: Path) -> None:
    paths = [make_slide(tmp_path / f"{k}.svs", 600, 500, seed=seed) for k, seed in enumerate((3, 3, 4))]
    sums = [hashlib.sha256(path.read_bytes()).digest() for path in paths]
    assert sums[0] == sums[1] != sums[2]


def test_its_tissue_is_found(tmp_path: Path) -> None:
    path = make_slide(tmp_path / "slide.svs", 6000, 8000, tissue_share=0.3)
    source = open_source(path, mpp=8.0, tissue="otsu")
    image = source.read(source.extent)
    glass = (image.pixels == np.array([242, 241, 244])[:, None, None]).all(0)
    assert 0.25 < image.valid.mean() < 0.35
    # Within the closing of the mask.
    assert np.mean(image.valid == glass) < 0.02


@pytest.mark.slow
def test_gigapixels_are_made_and_read_in_little_memory(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = make_slide(tmp_path / "slide.svs", 60_000, 60_000)
    source = open_source(path, mpp=1.3, tissue="otsu")
    for row in range(0, source.height, 8000):
        assert source.read(Window(row, row, 1024, 1024)).pixels.shape == (3, 1024, 1024)
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert path.stat().st_size < 300e6
    assert grown_mib < 1000
