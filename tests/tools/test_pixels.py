"""tools/benchmarks/pixels: the order is causal, and drawing value by value sees what training saw."""

import importlib
import importlib.util
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
    # Blocks begin by passing their tokens on, and all values nearly as likely.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
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


class Colours:
    """Tiles of one colour out of 64."""

    def draw(self, part: str, number: int, seed: tuple[int, int]) -> torch.Tensor:
        colours = np.random.default_rng(seed).integers(0, 4, (number, 1, 3)) * 64
        return torch.from_numpy(np.repeat(colours, 16, axis=1).reshape(number, -1))


def learn_colours(tool, steps: int, **changes) -> float:
    models, training = tool("pixel_model"), tool("pixel_training")
    torch.manual_seed(0)
    model = models.PixelTransformer(models.ModelOptions(dim=32, num_features=16, depth=2, side=4, **changes))
    test = Colours().draw("test", 16, (1, 0))
    budget = training.Budget(steps=steps, num_tests=1)
    (last,) = training.train_model(model, Colours(), test, budget, batch_size=16, lr=1e-2, seed=0)
    return last["test"]


# The first pixel of a tile takes 3 x 2 bits; the other values follow from it.
LEAST = 3 * 2 / 48


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["softmax+", "relu"])
def test_attention_recalls_a_colour_that_tokens_are_not_given(tool, kernel: str) -> None:
    bits = learn_colours(tool, 120, mixer="performer", kernel=kernel, neighbours=False)
    assert 0.9 * LEAST < bits < 3 * LEAST
    assert learn_colours(tool, 120, mixer="none", neighbours=False) > 1.8


def test_tokens_copy_the_value_to_the_left_without_attention(tool) -> None:
    assert 0.9 * LEAST < learn_colours(tool, 60, mixer="none", neighbours=True) < 2 * LEAST


@pytest.mark.parametrize("mixer", ["performer", "reformer", "softmax", "none"])
@torch.no_grad()
def test_blocks_pass_tokens_on_unchanged_before_training(tool, mixer: str) -> None:
    models = tool("pixel_model")
    model = models.PixelTransformer(models.ModelOptions(mixer=mixer, dim=16, num_features=8, depth=2, side=5))
    x = torch.randn(2, 75, 16)
    assert all(torch.equal(block(x, is_causal=True), x) for block in model.blocks)
    assert models.bits_per_dim(model(draw_values()), draw_values()).item() == pytest.approx(8, abs=0.1)


def test_tests_lie_at_equal_shares_of_steps_or_of_seconds(tool) -> None:
    models, training = tool("pixel_model"), tool("pixel_training")
    model = models.PixelTransformer(models.ModelOptions(mixer="none", dim=16, depth=1, side=4))
    test = Colours().draw("test", 2, (1, 0))
    budget = training.Budget(steps=10, num_tests=4)
    points = list(training.train_model(model, Colours(), test, budget, batch_size=1, lr=1e-3, seed=0))
    assert [point["step"] for point in points] == [3, 5, 8, 10]
    budget = training.Budget(steps=1, cpu_s=0.2, num_tests=2)
    points = list(training.train_model(model, Colours(), test, budget, batch_size=1, lr=1e-3, seed=0))
    assert 0.1 <= points[0]["cpu_s"] < 0.2 <= points[1]["cpu_s"]


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


@pytest.fixture
def app(tool, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    spec = importlib.util.spec_from_file_location("pixels_main", FOLDER / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.app


def test_a_run_is_trained_drawn_and_reported(app, tmp_path: Path) -> None:
    from PIL import Image
    from typer.testing import CliRunner

    pixels = np.random.default_rng(0).integers(0, 256, (64, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    size = ["--side", "8", "--depth", "1", "--steps", "2", "--num-tests", "2", "--num-tiles", "2"]
    runs, image = tmp_path / "runs", str(tmp_path / "a.png")
    for line in (
        ["train", image, "--out", str(runs), *size],
        ["sample", str(runs / "performer_softmax+_1_8.pt"), image, str(tmp_path / "b.png"), "--number", "3"],
        ["report", str(runs), "--picture", str(tmp_path / "c.png")],
    ):
        result = CliRunner().invoke(app, line)
        assert result.exit_code == 0, result.output
    # Three rows of three tiles of 8 px, enlarged three times, with gaps.
    assert Image.open(tmp_path / "b.png").size == (3 * 28, 3 * 28)
    assert "performer_softmax+_1_8 | 192 |" in result.output
    assert (tmp_path / "c.png").stat().st_size > 10_000


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
