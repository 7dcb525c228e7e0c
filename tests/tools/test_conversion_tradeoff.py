"""tools/benchmarks/conversion_tradeoff.py: what is kept against what it costs, in a table, a file and a figure."""

import csv
import importlib
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

FOLDER = Path(__file__).parents[2] / "tools" / "benchmarks"
SIZE = 64


@pytest.fixture
def tradeoff(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("conversion_tradeoff")


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    vit = VisionTransformer(SIZE, 8, embed_dim=24, depth=2, num_heads=2, num_classes=0).eval()
    with torch.no_grad():
        for block in vit.blocks:
            # Attention of fresh weights is nearly even, whatever computes it.
            block.attn.qkv.weight.mul_(30)
    return vit


def _row(tradeoff, patch: float, seconds: float, gflop: float, num_sinks: int = 0):
    return tradeoff.Row(0, num_sinks, 16, patch, patch, patch, patch, seconds, 1.0, gflop, 2.0)


def test_front_holds_what_nothing_beats(tradeoff) -> None:
    slow, fast, between, beaten = (
        _row(tradeoff, *numbers) for numbers in ((0.9, 3.0, 4.0), (0.5, 1.0, 6.0), (0.8, 2.0, 2.0), (0.7, 2.5, 3.0))
    )
    assert tradeoff.front([slow, fast, between, beaten], "relative_time") == [fast, between, slow]
    assert tradeoff.front([slow, fast, between, beaten], "relative_gflop") == [between, slow]
    assert (slow.relative_time, slow.relative_gflop) == (3.0, 2.0)


def test_measured_grid_is_printed_written_and_drawn(tradeoff, model, make_scene, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(tradeoff, "load_vit", lambda *_: model)
    image = make_scene(height=100, width=120, dtype="uint8")
    out = tmp_path / "figures"
    numbers = {"windows": "0,8", "sinks": "0,16", "clusters": "16,32"}
    tradeoff.main([image], Path(), size=SIZE, **numbers, runs=1, out=out)
    assert "plain FAVOR+" in capsys.readouterr().out
    with (out / f"tradeoff_{SIZE}.csv").open(newline="") as file:
        rows = {
            (int(row["window_size"]), int(row["num_sinks"]), int(row["num_clusters"])): row
            for row in csv.DictReader(file)
        }
    assert len(rows) == 2 * 2 * 2
    for (window_size, num_sinks, num_clusters), row in rows.items():
        # A window as large as the grid leaves nothing to estimate.
        assert (float(row["patch"]) > 0.9999) == (window_size == 8)
        assert float(row["worst_patch"]) <= float(row["patch"])
        assert float(row["relative_time"]) > 0
        assert float(row["gflop"]) >= float(rows[window_size, 0, num_clusters]["gflop"])
        assert float(row["gflop"]) >= float(rows[window_size, num_sinks, 16]["gflop"])
    assert float(rows[8, 16, 32]["gflop"]) > float(rows[0, 0, 16]["gflop"])
    with Image.open(out / f"tradeoff_{SIZE}.png") as picture:
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 5


def test_arithmetic_is_that_of_the_products(tradeoff) -> None:
    layer = torch.nn.Linear(24, 48)
    model = torch.nn.Module()
    model.forward_features = layer.forward
    cost = tradeoff.Cost(model, torch.zeros(10, 24))
    assert cost.gflop * 1e9 == pytest.approx(2 * 10 * 24 * 48)


def test_numbers_that_are_none_are_refused(tradeoff) -> None:
    assert tradeoff.numbers_of("16,0,8", "windows") == [0, 8, 16]
    with pytest.raises(typer.BadParameter, match="whole numbers with commas between, got '8;16'"):
        tradeoff.numbers_of("8;16", "windows")
    with pytest.raises(typer.BadParameter, match="6 numbers at most, got 7"):
        tradeoff.numbers_of("1,2,3,4,5,6,7", "sinks")
