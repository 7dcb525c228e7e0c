"""The map of a whole image in one forward pass."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from small_models import save_segmenter, write_half_empty

import perf_vit
from perf_vit.errors import CheckpointError, NotFiniteError, OptionError
from perf_vit.inference import SegmentationPredictOptions, SegmentationPredictor
from perf_vit.inference.whole import WholeImage
from perf_vit.types import Window


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and a raster of 96 x 160 px whose columns from 70 on are nodata."""
    folder = tmp_path_factory.mktemp("whole")
    write_half_empty(folder / "scene.tif")
    return save_segmenter(folder / "model.ckpt"), folder / "scene.tif"


def predict(files: tuple[Path, Path], out: Path, **options):
    return perf_vit.predict(*files, out, progress=False, **{"whole": True, **options})


def expected(files: tuple[Path, Path]) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the whole scene in one forward pass in memory, and valid pixels."""
    model = perf_vit.load(files[0]).eval()
    source = model.spec.open(files[1])
    image = source.read(Window(0, 0, 96, 160))
    with torch.inference_mode():
        pixels = torch.from_numpy(model.spec.normalizer(image))[None]
        scores = model(pixels, valid=torch.from_numpy(image.valid)[None])[0]
    return scores.softmax(0).numpy(), image.valid


def test_the_map_is_that_of_a_forward_pass_in_memory(files, tmp_path) -> None:
    done = predict(files, tmp_path / "map.tif", kind="probabilities", quicklook=True)
    assert (done.made, done.num_windows, done.num_pixels) == (True, 1, 96 * 160)
    probabilities, valid = expected(files)
    with rasterio.open(tmp_path / "map.tif") as found, rasterio.open(files[1]) as scene:
        np.testing.assert_allclose(found.read()[:, valid], probabilities[:, valid], atol=1e-5)
        assert np.isnan(found.read()[:, ~valid]).all()
        assert (found.crs, found.transform) == (scene.crs, scene.transform)
        assert found.tags()["PERF_VIT_WHOLE"] == "float32"
        assert "PERF_VIT_WINDOW_SIZE" not in found.tags()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.png", "map.tif"]
    assert not predict(files, tmp_path / "map.tif", kind="probabilities").made


@pytest.mark.parametrize("store", ["memory", "bfloat16"])
def test_tokens_may_be_elsewhere(files, tmp_path, store: str) -> None:
    predict(files, tmp_path / "map.tif", store=store, token_folder=tmp_path / "scratch")
    probabilities, valid = expected(files)
    with rasterio.open(tmp_path / "map.tif") as found:
        agree = found.read(1)[valid] == probabilities.argmax(0)[valid]
    assert agree.mean() > (0.999 if store == "memory" else 0.95)
    assert not any((tmp_path / "scratch").glob("*"))


def test_bands_of_any_height_give_the_same_map(files, monkeypatch) -> None:
    predictor = SegmentationPredictor(files[0], SegmentationPredictOptions(whole=True))
    source = predictor.open(files[1])
    probabilities, valid = expected(files)
    whole = WholeImage(predictor.model.eval(), source, source, 2)
    tokens = whole.tokens(None, torch.float32, lambda done, total: None)
    monkeypatch.setattr("perf_vit.inference.whole._STRIP_ROWS", 30)
    whole._part = 3, 4
    strips = list(whole.strips(tokens, (0, 96), lambda done, total: None))
    assert [(strip.window.row, strip.window.height) for strip in strips] == [(0, 30), (30, 18), (48, 30), (78, 18)]
    scores = torch.from_numpy(np.concatenate([strip.scores for strip in strips], axis=1)).softmax(0).numpy()
    np.testing.assert_allclose(scores[:, valid], probabilities[:, valid], atol=1e-5)
    # The rows that are wanted lie in the second band.
    assert [strip.window.row for strip in whole.strips(tokens, (50, 60), lambda done, total: None)] == [48, 78]
    with torch.no_grad():
        predictor.model.head.classifiers[0][2].bias.fill_(torch.inf)
    with pytest.raises(NotFiniteError, match=r"scene\.tif: scores of Window\(.* are not finite"):
        list(whole.strips(tokens, (0, 96), lambda done, total: None))


def test_options_of_windows_are_refused(files, tmp_path) -> None:
    for options, message in (
        ({"window_size": 32}, "window_size is of windows, and `whole` has none"),
        ({"flips": True}, "flips is of windows"),
        ({"precision": "bf16"}, "precision is of windows"),
        ({"device": "cuda"}, "device must be cpu with `whole`, got cuda"),
        ({"store": "int8"}, "store must be one of float32, bfloat16, float16, memory, got int8"),
        ({"store": "memory", "whole": False}, "store is for `whole`; leave it out"),
        ({"engine": "ray"}, "engine ray shares windows"),
    ):
        with pytest.raises(OptionError, match=message):
            predict(files, tmp_path / "map.tif", **options)
    with pytest.raises(CheckpointError, match="must be a plain ViT of perf_vit with a head"):
        perf_vit.predict(torch.nn.Conv2d(3, 2, 1), files[1], tmp_path / "map.tif", whole=True, progress=False)
    assert not list(tmp_path.iterdir())


def test_several_images_give_a_map_each(files, tmp_path) -> None:
    other = tmp_path / "other.tif"
    other.write_bytes(files[1].read_bytes())
    report = perf_vit.predict(files[0], [files[1], other], tmp_path / "maps", whole=True, progress=False)
    assert [each.status for each in report.inputs] == ["done", "done"]
    with rasterio.open(tmp_path / "maps/scene.tif") as first, rasterio.open(tmp_path / "maps/other.tif") as second:
        assert (first.read() == second.read()).all()
