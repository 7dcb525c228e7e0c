"""tools/benchmarks/pixels: the order is causal, and drawing value by value sees what training saw."""

import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[2] / "tools" / "benchmarks" / "pixels"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def make_model(tool, **changes):
    models = tool("pixel_model")
    torch.manual_seed(0)
    model = models.PixelTransformer(models.ModelOptions(dim=16, num_features=8, depth=2, side=5, **changes))
    # Initially all values are as likely.
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


def draw_values(number: int = 2) -> torch.Tensor:
    return torch.randint(256, (number, 75), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mixer", ["performer", "reformer", "softmax", "none"])
@pytest.mark.parametrize("neighbours", [False, True])
@torch.no_grad()
def test_no_value_depends_on_itself_or_later_ones(tool, mixer: str, neighbours: bool) -> None:
    model, values = make_model(tool, mixer=mixer, neighbours=neighbours), draw_values()
    before = model(values)
    for place in (0, 16, 40, 74):
        changed = torch.cat([values[:, :place], 255 - values[:, place:]], dim=1)
        after = model(changed)
        torch.testing.assert_close(after[:, : place + 1], before[:, : place + 1], rtol=1e-5, atol=1e-5)
        assert place == 74 or not torch.allclose(after[:, place + 1], before[:, place + 1])


@pytest.mark.parametrize("kernel", ["softmax+", "relu"])
@torch.no_grad()
def test_drawing_value_by_value_gives_the_logits_of_training_from_states_of_one_size(tool, kernel: str) -> None:
    model, values = make_model(tool, kernel=kernel), draw_values()
    generator = tool("pixel_model").Generator(model, 2)
    stepped, sizes = [], set()
    for place in range(75):
        stepped.append(generator.logits())
        generator.append(values[:, place])
        sizes.add(generator.state_bytes())
    torch.testing.assert_close(torch.stack(stepped, dim=1), model(values), rtol=1e-4, atol=1e-4)
    assert torch.equal(generator.values, values)
    assert len(sizes) == 1


def test_equal_chances_take_eight_bits(tool) -> None:
    bits = tool("pixel_model").bits_per_dim(torch.zeros(2, 75, 256), draw_values())
    assert bits.item() == pytest.approx(8)


def test_simple_models_know_what_they_count(tool) -> None:
    # A ramp from left to right in the red band, chance in green, one value in blue.
    rng = np.random.default_rng(0)
    tiles = np.zeros((40, 16, 16, 3), np.int64)
    tiles[..., 0] = np.arange(16) + rng.integers(0, 200, (40, 1, 1))
    tiles[..., 1] = rng.integers(0, 256, (40, 16, 16))
    flat = torch.from_numpy(tiles.reshape(40, -1))
    bits = tool("pixel_tiles").simple_models(flat[:30], flat[30:], 16)
    assert bits["histogram of the band"] == pytest.approx((math.log2(215) + 8) / 3, abs=0.3)
    assert bits["histogram of the change from the left"] == pytest.approx(8 / 3, abs=0.4)
    assert bits["deflate of these changes"] < bits["histogram of the band"]


def test_tiles_of_training_and_test_share_no_row_and_are_not_empty(tool, tmp_path: Path) -> None:
    from PIL import Image

    image = np.zeros((80, 40, 3), np.uint8)
    image[:, 20:] = np.arange(80, dtype=np.uint8)[:, None, None]
    Image.fromarray(image).save(tmp_path / "a.png")
    source = tool("pixel_tiles").TileSource(tmp_path / "a.png", side=8, shrink=2, min_contrast=1)
    train, test = source.draw("train", 50, seed=0), source.draw("test", 50, seed=0)
    assert train.shape == test.shape == (50, 8 * 8 * 3)
    assert train.max() < 60 <= test.max(dim=1).values.min()
    # Means of two rows, in raster order with the bands of a pixel side by side.
    column = train[0].reshape(8, 8, 3)[:, -1, 0]
    assert torch.equal(column.diff(), torch.full((7,), 2))
    assert (train.reshape(50, -1).float().std(dim=1) > 1).all()
