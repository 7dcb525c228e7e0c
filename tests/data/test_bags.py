"""Windows of tissue, kept features, and bags."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from perf_vit.data import EmbeddingStore, SlideTargets, tissue_windows
from perf_vit.data.bags import SlideBags, collate_bags
from perf_vit.data.splits import HoldOutConfig, split_items
from perf_vit.errors import DataWarning, InputError
from perf_vit.models.tiles import _shares
from perf_vit.sources import find_images
from perf_vit.tiling import grid_windows
from perf_vit.types import GeoImage, Window


class MaskedSource:
    """A source of which only the valid mask matters, given at full resolution."""

    path = "masked"

    def __init__(self, valid: np.ndarray) -> None:
        self.valid = valid
        self.height, self.width = self.size = valid.shape
        self.extent = Window(0, 0, *valid.shape)

    def read_reduced(self, max_size_px: int) -> GeoImage:
        return GeoImage(np.zeros((1, *self.size)), self.valid)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 17), st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_shares_at_full_resolution_are_those_of_each_windows_pixels(height, width, tile_px, seed) -> None:
    valid = np.random.default_rng(seed).random((height, width)) < 0.4
    windows = grid_windows(Window(0, 0, height, width), tile_px, overlap=0)
    shares = _shares(valid, windows, height, width)
    padded = np.zeros((height + tile_px, width + tile_px), bool)
    padded[:height, :width] = valid
    expected = [padded[w.row : w.row_stop, w.col : w.col_stop].mean() for w in windows]
    assert shares == pytest.approx(expected)


def test_windows_with_enough_tissue_are_taken_in_order() -> None:
    valid = np.zeros((30, 50), bool)
    valid[:10, 10:20] = True
    valid[20:, 40:45] = True
    assert tissue_windows(MaskedSource(valid), 10, 0.5) == [Window(0, 10, 10, 10), Window(20, 40, 10, 10)]
    assert tissue_windows(MaskedSource(valid), 10, 0.6) == [Window(0, 10, 10, 10)]


def test_no_tissue_is_an_error_that_tells_the_most_there_is() -> None:
    valid = np.zeros((20, 20), bool)
    with pytest.raises(InputError, match="no window of 10 px in masked has 0% of tissue, the most is 0%"):
        tissue_windows(MaskedSource(valid), 10, 0.0)
    valid[:5, :10] = True
    with pytest.raises(InputError, match=r"the most is 50%; look at perf_vit\.open\('masked'\)\.plot\(\), lower"):
        tissue_windows(MaskedSource(valid), 10, 0.9)


@pytest.fixture
def slides(tmp_path) -> SlideTargets:
    paths = [tmp_path / f"{number}.svs" for number in range(3)]
    for path in paths:
        path.write_bytes(b"slide")
    return SlideTargets(tuple(map(str, paths)), np.array([1, 0, 1]), ("a", "b"))


@pytest.fixture
def store(slides, tmp_path) -> EmbeddingStore:
    store = EmbeddingStore(tmp_path / "features", "abc", {"tile_px": 8})
    for number, path in enumerate(slides.paths):
        features = np.full((2 + number, 4), number, np.float32)
        features[:, 0] = np.arange(2 + number)
        store.write(path, features, [Window(row, 0, 8, 8) for row in range(2 + number)])
    return store


def test_features_come_back_as_they_were_written(slides, store) -> None:
    found = store.read(slides.paths[1])
    assert found.features.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1], [2, 1, 1, 1]]
    assert found.windows == (Window(0, 0, 8, 8), Window(1, 0, 8, 8), Window(2, 0, 8, 8))


def test_the_picture_of_a_slide_lies_next_to_its_features_and_is_no_image_for_a_search(slides, store) -> None:
    outline = np.random.default_rng(0).integers(0, 255, (9, 7, 3)).astype(np.uint8)
    store.write(slides.paths[0], np.zeros((1, 4), np.float32), [Window(0, 0, 8, 8)], outline)
    pictures = list(store.folder.glob("*.png"))
    assert pictures == [store.path(slides.paths[0]).with_suffix(".png")]
    assert np.array_equal(np.asarray(Image.open(pictures[0])), outline)
    with pytest.warns(DataWarning, match="1 of 4 images found are outputs of perf_vit"):
        assert list(map(str, find_images([store.folder.parent]))) == list(slides.paths)


def test_features_are_of_one_encoder_one_set_of_windows_and_one_state_of_the_slide(slides, store) -> None:
    slide = slides.paths[0]
    assert store.has(slide)
    assert not EmbeddingStore(store.folder, "abd", {"tile_px": 8}).has(slide)
    assert not EmbeddingStore(store.folder, "abc", {"tile_px": 9}).has(slide)
    os.utime(slide, ns=(1, 1))
    assert not store.has(slide)
    with pytest.raises(InputError, match="are not in"):
        store.read(slide)


def test_slides_of_one_name_size_and_time_have_features_of_their_own(slides, store, tmp_path) -> None:
    given = Path(slides.paths[0])
    for folder, content in (("other", b"sl1de"), ("copy", given.read_bytes())):
        path = tmp_path / folder / given.name
        path.parent.mkdir()
        path.write_bytes(content)
        os.utime(path, ns=(given.stat().st_atime_ns, given.stat().st_mtime_ns))
        assert store.has(str(path)) is (folder == "copy")


def test_a_failed_write_leaves_nothing(slides, tmp_path, monkeypatch) -> None:
    store = EmbeddingStore(tmp_path / "features", "abc", {})

    def fail(*args, **kwargs) -> None:
        args[0].write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(ValueError, match="No space left"):
        store.write(slides.paths[0], np.zeros((1, 2), np.float32), [Window(0, 0, 8, 8)])
    assert not store.folder.exists()


def test_bags_of_other_sizes_are_padded_and_masked(slides, store) -> None:
    bags = SlideBags(slides, store)
    features, mask, labels = collate_bags([bags[index] for index in range(3)])
    assert features.shape == (3, 4, 4)
    assert mask.sum(1).tolist() == [2, 3, 4]
    assert not features[~mask].any()
    assert labels.tolist() == [1, 0, 1]


def test_training_bags_come_once_a_round_and_draw_other_windows(slides, store) -> None:
    bags = SlideBags(slides, store, max_windows=2, seed=0)
    rounds = [[bags[3 * turn + i][0] for i in range(3)] for turn in range(8)]
    assert all(sorted(int(bag[0, 1]) for bag in turn) == [0, 1, 2] for turn in rounds)
    drawn = {tuple(bag[:, 0].tolist()) for turn in rounds for bag in turn if bag[0, 1] == 2}
    assert len(drawn) > 2
    assert all(len(set(windows)) == 2 for windows in drawn)
    assert torch.equal(bags[5][0], SlideBags(slides, store, max_windows=2, seed=0)[5][0])


def test_validation_slides_are_of_every_class_with_two_slides(tmp_path: Path) -> None:
    labels = np.array([0] * 20 + [1] * 2 + [2])
    for seed in range(5):
        chosen = labels[split_items(len(labels), HoldOutConfig(), seed, "slides", labels=labels)[1]]
        assert np.bincount(chosen, minlength=3).tolist() == [4, 1, 0]
