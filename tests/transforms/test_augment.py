import numpy as np
import pytest

from perf_vit.transforms import Augmentation

FULL = {"flips": True, "gain": 0.2, "offset": 0.2}


def _sample(num_bands: int, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    labels = np.zeros((size, size), np.uint8)
    labels[6:30, 11:50] = 1
    image = np.repeat(labels[None].astype(np.float32), num_bands, axis=0)
    return image, labels


@pytest.mark.parametrize("num_bands", [1, 3, 7, 13])
def test_image_and_labels_move_together_for_any_band_count(num_bands: int) -> None:
    image, labels = _sample(num_bands)
    augment = Augmentation(flips=True)
    moved = 0
    for seed in range(20):
        out, out_labels, _ = augment(image, labels, seed)
        assert out.shape == image.shape
        assert out.dtype == np.float32
        assert np.array_equal(out > 0.5, np.repeat(out_labels[None] == 1, num_bands, axis=0))
        moved += int((out_labels != labels).any())
    assert moved > 10


@pytest.mark.parametrize("num_layers", [1, 3, 6])
def test_layers_of_labels_move_together(num_layers: int) -> None:
    image, labels = _sample(3)
    layers = np.stack([(labels == 1) & (np.arange(64) < 64 - 5 * k) for k in range(num_layers)]).astype(np.uint8)
    augment = Augmentation(flips=True)
    for seed in range(5):
        out, out_layers, _ = augment(image, layers, seed)
        assert out_layers.shape == layers.shape
        for layer, moved in zip(layers, out_layers, strict=True):
            expected, alone, _ = augment(image, layer, seed)
            np.testing.assert_array_equal(moved, alone)
            np.testing.assert_array_equal(out, expected)


def test_the_seed_alone_decides_the_sample() -> None:
    image, labels = _sample(7)
    first, second = Augmentation(**FULL), Augmentation(**FULL)
    second(image, labels, seed=1)
    for seed in (5, 6):
        a, b = first(image, labels, seed), second(image, labels, seed)
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not np.array_equal(first(image, labels, 5)[0], first(image, labels, 6)[0])


def test_gain_and_offset_leave_labels_alone_and_stay_within_bounds() -> None:
    _, labels = _sample(7)
    image = np.full((7, 64, 64), 2.0, np.float32)
    augment = Augmentation(flips=False, gain=0.1, offset=0.3)
    out = np.stack([augment(image, labels, seed)[0] for seed in range(50)])
    assert np.array_equal(augment(image, labels, 3)[1], labels)
    assert np.abs(out - 2).max() <= 2 * 0.1 + 0.3 + 1e-5
    assert out.std() > 0.05


def test_shuffling_reorders_whole_bands_and_nothing_else() -> None:
    image, labels = _sample(3)
    image *= np.array([1, 2, 3], np.float32)[:, None, None]
    augment = Augmentation(flips=False, shuffle=0.5)
    orders = []
    for seed in range(60):
        out, out_labels, _ = augment(image, labels, seed)
        np.testing.assert_array_equal(out_labels, labels)
        orders.append(tuple(int(band.max()) for band in out))
        np.testing.assert_array_equal(out, image[[each - 1 for each in orders[-1]]])
    assert len(set(orders)) == 6
    # Half of the samples stay as they are, and a sixth of the others.
    assert 0.4 < np.mean([order == (1, 2, 3) for order in orders]) < 0.8


@pytest.mark.parametrize("num_bands", [1, 2, 3])
def test_a_mask_does_not_change_what_a_seed_decides(num_bands: int) -> None:
    augmentation = Augmentation(gain=0.2, offset=0.2, shuffle=0.5)
    rng = np.random.default_rng(0)
    image = rng.normal(size=(num_bands, 16, 16)).astype(np.float32) + 5
    labels = rng.integers(0, 3, (16, 16)).astype(np.uint8)
    mask = rng.random((num_bands, 16, 16)) < 0.7
    for seed in range(10):
        whole, moved, _ = augmentation(image, labels, seed)
        masked, moved_too, _ = augmentation(np.where(mask, image, np.float32(0)), labels, seed, mask)
        assert np.array_equal(moved, moved_too)
        held = masked != 0
        assert held.sum() == mask.sum()
        assert np.array_equal(masked[held], whole[held])
