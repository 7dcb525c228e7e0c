"""Windows of slides that are read in each pass, and their augmentation."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from perf_vit.data import (
    AugmentConfig,
    EmbeddingStore,
    SlideClassificationDataConfig,
    SlideClassificationDataModule,
    SlideClassificationSplitConfig,
    SlideTargets,
)
from perf_vit.data.slide_windows import SlideWindows, WindowBags, collate_windows
from perf_vit.errors import DamagedDataError, DataWarning
from perf_vit.models import SlideClassificationSpec
from perf_vit.transforms import Normalizer
from perf_vit.types import Window

WINDOWS = [Window(row, col, 16, 16) for row in range(0, 40, 16) for col in range(0, 50, 16)]
NORMALIZER = Normalizer((128.0,) * 3, (64.0,) * 3)
AUGMENTS = {
    "flips": AugmentConfig(),
    "colours": AugmentConfig(flips=False, gain=0.3, offset=0.3),
    "stain": AugmentConfig(flips=False, stain=0.5),
    "zoom": AugmentConfig(flips=False, scale=(0.5, 1.5)),
}


@pytest.fixture(scope="module")
def slide(tmp_path_factory) -> Path:
    """Noise of 40 x 50 px, of which windows of 16 px reach past the edge."""
    path = tmp_path_factory.mktemp("slides") / "slide.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def windows_of(slide: Path, **options) -> SlideWindows:
    spec = SlideClassificationSpec(classes=("a", "b"), normalizer=NORMALIZER, tile_px=16)
    rectangles = np.array([[each.row, each.col, each.height, each.width] for each in WINDOWS], np.int64)
    return SlideWindows(str(slide), rectangles, spec, **options)


def read(slide: SlideWindows, batch_size: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(slide.batches(batch_size))
    valid = [torch.ones(len(p), *p.shape[-2:], dtype=torch.bool) if v is None else v for p, v in batches]
    return torch.cat([pixels for pixels, _ in batches]), torch.cat(valid)


def test_windows_are_those_of_the_slide_in_order(slide) -> None:
    pixels, valid = read(windows_of(slide))
    image = np.asarray(Image.open(slide)).transpose(2, 0, 1).astype(np.float32)
    assert len(pixels) == 12
    assert pixels[5].numpy() == pytest.approx((image[:, 16:32, 16:32] - 128) / 64, abs=1e-6)
    assert valid[5].all()
    # The last window has 8 rows and 2 columns inside.
    assert int(valid[11].sum()) == 16
    assert (pixels[11][:, ~valid[11]] == 0).all()


@pytest.mark.parametrize("augment", [None, AugmentConfig(flips=False, stain=0.5)])
def test_pixels_of_a_damaged_tile_are_an_error_or_invalid(tmp_path, augment: AugmentConfig | None) -> None:
    path = tmp_path / "slide.tif"
    pixels = np.random.default_rng(0).integers(1, 255, (128, 128, 3), np.uint8)
    tifffile.imwrite(path, pixels, tile=(64, 64), compression="zlib", photometric="rgb")
    with tifffile.TiffFile(path) as file:
        place, size = file.pages[0].dataoffsets[3], file.pages[0].databytecounts[3]
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes(size))
    spec = SlideClassificationSpec(classes=("a", "b"), normalizer=NORMALIZER, tile_px=128)
    rectangles = np.array([[0, 0, 128, 128], [64, 64, 128, 128]])
    with pytest.raises(DamagedDataError, match=r"slide\.tif"):
        list(SlideWindows(str(path), rectangles, spec, augment=augment).batches(2))
    with pytest.warns(DataWarning, match=r"damaged pixels of .*slide\.tif count as invalid: can't read") as warned:
        found, valid = read(SlideWindows(str(path), rectangles, spec, augment=augment, salvages=True))
    assert len(warned) == 1
    expected = np.ones((2, 128, 128), bool)
    expected[0, 64:, 64:] = expected[1] = False
    assert np.array_equal(valid, expected)
    assert (found.movedim(1, -1)[~valid] == 0).all()
    if augment is None:
        values = (pixels.transpose(2, 0, 1).astype(np.float32) - 128) / 64
        assert found[0][:, valid[0]].numpy() == pytest.approx(values[:, expected[0]], abs=1e-6)


@pytest.mark.parametrize("kind", AUGMENTS)
def test_random_changes_repeat_in_each_pass_and_for_any_batches(slide, kind) -> None:
    plain, _ = read(windows_of(slide))
    augmented = windows_of(slide, augment=AUGMENTS[kind], seed=3)
    first, valid = read(augmented)
    again, valid_again = read(pickle.loads(pickle.dumps(augmented)), batch_size=7)
    assert torch.equal(first, again)
    assert torch.equal(valid, valid_again)
    assert not torch.equal(first, plain)
    assert not torch.equal(first, read(windows_of(slide, augment=AUGMENTS[kind], seed=4))[0])
    assert (first[11][:, ~valid[11]] == 0).all()


def test_a_zoom_shows_more_or_less_of_the_slide_around_a_window(tmp_path) -> None:
    # Values grow by a pixel along the rows.
    path = tmp_path / "ramp.png"
    Image.fromarray(np.repeat(np.arange(64, dtype=np.uint8)[:, None], 64, 1)[..., None].repeat(3, 2)).save(path)
    for scale, steps in (((0.5, 0.5), 2.0), ((2.0, 2.0), 0.5)):
        zoomed, valid = read(windows_of(path, augment=AugmentConfig(flips=False, scale=scale)))
        rows = zoomed[5][0].mean(dim=1) * 64 + 128
        assert valid[5].all()
        assert float((rows[12] - rows[4]) / 8) == pytest.approx(steps, rel=0.05)
        # The centre stays.
        assert float(rows[7:9].mean()) == pytest.approx(23.5, abs=1)


def test_windows_are_changed_differently(slide) -> None:
    plain, _ = read(windows_of(slide))
    changed, _ = read(windows_of(slide, augment=AUGMENTS["flips"], seed=0))
    kinds = set()
    for before, after in zip(plain, changed, strict=True):
        turned = [before.rot90(number, (1, 2)) for number in range(4)]
        symmetries = torch.stack([*turned, *(each.flip(2) for each in turned)])
        kinds.add(int((symmetries == after).flatten(1).all(1).nonzero()[0]))
    assert len(kinds) > 2


def test_bags_of_windows_draw_windows_and_seeds_by_index(slide, tmp_path) -> None:
    store = EmbeddingStore(tmp_path, "windows", {})
    store.write(str(slide), np.zeros((12, 0), np.float32), WINDOWS)
    slides = SlideTargets((str(slide),), np.array([1]), ("a", "b"))
    spec = windows_of(slide).spec
    bags = WindowBags(slides, store, spec, max_windows=5, seed=0, augment=AugmentConfig())
    (first, label), (other, _) = bags[0], bags[1]
    assert (len(first), int(label)) == (5, 1)
    assert not np.array_equal(first.rectangles, other.rectangles)
    assert first.seed != other.seed
    again, _ = bags[0]
    assert np.array_equal(first.rectangles, again.rectangles)
    assert first.seed == again.seed
    whole, _ = WindowBags(slides, store, spec)[0]
    assert len(whole) == 12
    assert whole.augment is None
    found, labels = collate_windows([bags[0], bags[1]])
    assert ([each.path for each in found], labels.tolist()) == ([str(slide)] * 2, [1, 1])
    for on_error in ("stop", "skip"):
        config = SlideClassificationDataConfig(train=SlideClassificationSplitConfig(labels="a.csv"), on_error=on_error)
        data = SlideClassificationDataModule.of(config, slides, slides, store, 0, spec)
        assert [bags[0][0].salvages for bags in (data.train, data.val)] == [on_error == "skip"] * 2
