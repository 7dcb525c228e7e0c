"""tools/benchmarks/linear_probe.py: patches are labelled once, probes are fitted to the end, scores compared fairly."""

import csv
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from sklearn.linear_model import LogisticRegression
from timm.models.vision_transformer import VisionTransformer
from torchmetrics.functional.classification import binary_auroc

FOLDER = Path(__file__).parents[2] / "tools" / "benchmarks"
PATCH, SIZE = 14, 56
# The window holds the whole grid, so that nothing is left to the features.
EXACT = {"window_size": SIZE // PATCH}


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    vit = VisionTransformer(SIZE, PATCH, embed_dim=24, depth=3, num_heads=2, num_classes=0).eval()
    with torch.no_grad():
        for block in vit.blocks:
            # Attention of fresh weights is nearly even, whatever computes it.
            block.attn.qkv.weight.mul_(30)
    return vit


@pytest.fixture
def make_city(make_scene):
    """Houses a little brighter than noise, their mask, and nodata at the top and left."""

    def _make(seed: int, height: int = 130, width: int = 160) -> tuple[Path, Path]:
        rng = np.random.default_rng(seed)
        mask = np.zeros((1, height, width), dtype=np.uint8)
        for row, col in rng.integers(20, (height - 40, width - 40), (3, 2)):
            mask[:, row : row + 35, col : col + 35] = 1
        pixels = rng.integers(1, 240, (3, height, width), dtype=np.uint8) + 10 * mask
        pixels[:, :5] = 0
        pixels[:, :, :PATCH] = 0
        return make_scene(pixels=pixels), make_scene(pixels=mask, nodata=None)

    return _make


def test_every_patch_counts_once_and_by_its_valid_pixels(tool, make_scene) -> None:
    probe = tool("linear_probe")
    rng = np.random.default_rng(0)
    pixels = rng.integers(1, 255, (3, 100, 130), dtype=np.uint8)
    pixels[:, :5] = 0
    pixels[:, :, :PATCH] = 0
    mask = np.zeros((1, 100, 130), dtype=np.uint8)
    mask[:, :12, 30:60] = 1
    tiles = list(probe.read_tiles(make_scene(pixels=pixels), make_scene(pixels=mask, nodata=None), SIZE, PATCH))
    assert len(tiles) == 2 * 3
    # Windows begin at rows 0 and 42, columns 0, 56 and 70 of an extent of 98 x 126.
    shares, seen = np.full((7, 9), np.nan), np.zeros((7, 9), dtype=int)
    for tile, (row, col) in zip(tiles, [(r, c) for r in (0, 3) for c in (0, 4, 5)], strict=True):
        counts, share = tile.counts.reshape(4, 4).numpy(), tile.share.reshape(4, 4).numpy()
        seen[row : row + 4, col : col + 4] += counts
        shares[row : row + 4, col : col + 4][counts] = share[counts]
    assert (seen[:, 0] == 0).all()
    assert (seen[:, 1:] == 1).all()
    whole = mask[0, 5:14, 14:126].reshape(9, 8, 14).mean(axis=(0, 2))
    np.testing.assert_allclose(shares[0, 1:], whole, rtol=1e-6)
    assert np.nansum(shares[1:]) == 0


def test_labels_tell_the_tile_of_each_patch(tool, make_city) -> None:
    probe = tool("linear_probe")
    tiles = list(probe.read_tiles(*make_city(0), SIZE, PATCH))
    labels = probe.labels_of(tiles)
    assert labels.tile.bincount(minlength=len(tiles)).tolist() == [int(tile.counts.sum()) for tile in tiles]
    assert 0 < labels.positive.sum() < len(labels.share)
    assert labels.positive.tolist() == (labels.share > 0.5).tolist()


def test_features_are_the_tokens_of_the_patches_that_count(tool, model, make_city) -> None:
    probe = tool("linear_probe")
    tiles = list(probe.read_tiles(*make_city(0), SIZE, PATCH))
    features = probe.features_of(model, tiles, [0, 2])
    assert list(features) == ["0", "2", "all"]
    torch.testing.assert_close(features["all"], torch.cat([features["0"], features["2"]], dim=1))
    images = torch.stack([tool("pretrained_vit").normalize(tile.pixels) for tile in tiles])
    with torch.no_grad():
        last = model.forward_features(images)[:, 1:]
    torch.testing.assert_close(features["2"], last[torch.stack([tile.counts for tile in tiles])])


def test_probe_is_the_minimum_that_scikit_learn_finds(tool) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 6, generator=generator) * torch.arange(1, 7) + 3
    positive = features[:, 0] + torch.randn(400, generator=generator) > 3
    ours = tool("patch_probe").Probe.fit(features, positive.float(), l2=0.05)
    x = ((features - features.mean(dim=0)) / features.std(dim=0)).numpy()
    theirs = LogisticRegression(C=1 / (0.05 * 400), tol=1e-8).fit(x, positive.numpy())
    expected = torch.from_numpy(theirs.decision_function(x)).float()
    torch.testing.assert_close(ours(features), expected, rtol=1e-3, atol=1e-3)


def test_scores_depend_on_the_order_of_logits_alone(tool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, generator=generator)
    positive = logits + torch.randn(500, generator=generator) > 0.5
    scores_of = tool("patch_probe").scores_of
    assert scores_of(logits, positive)[0] == pytest.approx(binary_auroc(logits, positive.long()).item(), abs=1e-6)
    assert scores_of(1000 * logits + 500, positive) == scores_of(logits, positive)


def test_resampled_area_is_that_of_repeated_patches(tool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, group = torch.randn(300, generator=generator), torch.arange(300) // 50
    positive = logits + torch.randn(300, generator=generator) > 0.5
    resamples = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 3, 0, 1, 2, 0], [0, 0, 0, 0, 0, 6]])
    areas = tool("patch_probe").resampled_auc(logits, positive, group, resamples)
    for counts, area in zip(resamples, areas, strict=True):
        times = counts[group]
        repeated = binary_auroc(logits.repeat_interleave(times), positive.repeat_interleave(times).long())
        assert area.item() == pytest.approx(repeated.item(), abs=1e-6)


def test_exact_conversion_changes_no_score_and_plain_one_does(tool, model, make_city, monkeypatch) -> None:
    probe = tool("linear_probe")
    of_names = {"exact": EXACT, "plain": {"mixer": "performer", "num_features": 4}}
    monkeypatch.setattr("pretrained_vit.CONVERSIONS", of_names)
    train, test = (list(probe.read_tiles(*make_city(seed), SIZE, PATCH)) for seed in (0, 1))
    comparison = probe.Comparison(model, train, test, [0, 2], 0.01)
    softmax = comparison.softmax()
    assert [row.blocks for row in softmax] == ["0", "2", "all"]
    # Neither chance nor so easy that nothing could be lost.
    assert all(0.6 < row.auc < 0.999 for row in softmax)
    for row in comparison.converted("exact", 1):
        assert abs(row.difference) < 2e-3
    plain = comparison.converted("plain", 2)
    assert max(abs(row.difference) for row in plain) > 0.02
    assert {(row.probe, row.draw) for row in plain} == {(p, d) for p in ("drop-in", "own") for d in ("0", "1", "mean")}
    for mean in (row for row in plain if row.draw == "mean"):
        drawn = [x for x in plain if (x.probe, x.blocks) == (mean.probe, mean.blocks) and x.draw != "mean"]
        assert mean.auc == pytest.approx(np.mean([x.auc for x in drawn]))
        exact = next(row for row in softmax if row.blocks == mean.blocks)
        assert mean.difference == pytest.approx(mean.auc - exact.auc)
        assert mean.low <= mean.high


def test_command_prints_and_writes_what_it_measured(tool, model, make_city, tmp_path, monkeypatch, capsys) -> None:
    probe = tool("linear_probe")
    monkeypatch.setattr(probe, "load_vit", lambda *_: model)
    for module in ("pretrained_vit", "linear_probe"):
        monkeypatch.setattr(f"{module}.CONVERSIONS", {"exact": EXACT})
    (train, train_labels), (test, test_labels) = make_city(0), make_city(1)
    paths = ([train], [train_labels], [test], [test_labels])
    probe.main(Path(), *paths, size=SIZE, blocks="1", draws=1, out=tmp_path / "probe.csv")
    printed = capsys.readouterr().out
    assert "ROC AUC" in printed
    assert "exact" in printed
    with (tmp_path / "probe.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    # softmax and two probes of one draw and of the mean, for one block and for all.
    assert len(rows) == 2 * (1 + 2 * 2)
    assert rows[0]["attention"] == "softmax"
    assert all(0 <= float(row["auc"]) <= 1 for row in rows)


def test_what_does_not_fit_is_refused(tool, model, make_city) -> None:
    probe = tool("linear_probe")
    image, labels = make_city(0)
    with pytest.raises(typer.BadParameter, match="multiple of 14, got 60; try 56"):
        probe.read_scenes([image], [labels], 60, model)
    with pytest.raises(typer.BadParameter, match="labels for each of 1 images, got 0"):
        probe.read_scenes([image], [], SIZE, model)
    with pytest.raises(typer.BadParameter, match="with less; try a smaller --size"):
        probe.read_scenes([image], [labels], 280, model)
    with pytest.raises(typer.BadParameter, match="--only must be a folder of a converted model, or one of plain FAVOR"):
        probe.main(Path(), [image], [labels], [image], [labels], only=["nothing"])
