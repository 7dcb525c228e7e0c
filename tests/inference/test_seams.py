"""The number of pixels on which overlapping windows disagree equals a naive count, and every map carries it."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from command_line import call
from hypothesis import given, settings
from hypothesis import strategies as st
from stub_segmenter import StubSegmenter

from perf_vit.errors import OptionError
from perf_vit.inference import MapInput, SegmentationPredictOptions, SegmentationPredictor, StripMaker
from perf_vit.inference.dense import Tile
from perf_vit.inference.dense_output import class_output
from perf_vit.inference.seams import SeamCount, decide_classes, largest_score
from perf_vit.sources import open_source
from perf_vit.sources.describe import SEAM_TAG
from perf_vit.tiling import grid_windows
from perf_vit.types import Window


def _naive(extent: Window, windows, scores, valid, decided) -> SeamCount:
    """Compare all decisions of all windows about each pixel."""
    shared = differing = 0
    for row in range(extent.height):
        for col in range(extent.width):
            found = [
                tuple(decided(each[:, row - window.row, col - window.col]))
                for window, each in zip(windows, scores, strict=True)
                if each is not None and window.row <= row < window.row_stop and window.col <= col < window.col_stop
            ]
            if valid[row, col] and len(found) > 1:
                shared += 1
                differing += len(set(found)) > 1
    return SeamCount(shared, differing)


def _counted(extent: Window, size: int, overlap: int, scores, valid, rows=(None, None), **rule) -> dict[int, SeamCount]:
    """Counts of strips by their first row."""
    maker = StripMaker(
        extent=extent,
        num_channels=next((len(each) for each in scores.values() if each is not None), 1),
        window_size=size,
        overlap=overlap,
        start_row=rows[0],
        stop_row=rows[1],
        decide=partial(decide_classes, **rule),
    )
    padded = np.pad(valid, ((0, size), (0, size)))
    found = {}
    for window in maker.windows:
        own = padded[window.row : window.row_stop, window.col : window.col_stop]
        for strip in maker.add(Tile(window, own, None), scores[window]):
            found[strip.window.row] = strip.seams
    return found


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    size=st.integers(1, 16),
    share=st.floats(0, 0.95),
    num_classes=st.sampled_from([1, 2, 3, 9]),
    multilabel=st.booleans(),
    seed=st.integers(0, 99),
)
def test_counts_equal_a_naive_comparison_of_all_windows(
    height, width, size, share, num_classes, multilabel, seed
) -> None:
    rng = np.random.default_rng(seed)
    extent, overlap = Window(0, 0, height, width), min(size - 1, int(size * share))
    windows = grid_windows(extent, size, overlap)
    # Few values: windows often agree, and scores are often equal.
    scores = {window: rng.integers(-1, 2, (num_classes, size, size)).astype(np.float32) for window in windows}
    valid = rng.random((height, width)) < 0.8
    for window in windows[1::3]:
        # A window without a valid pixel isn't given to the model.
        valid[window.row : window.row_stop, window.col : window.col_stop] &= seed % 2 == 0
        scores[window] = scores[window] if seed % 2 == 0 else None
    counts = _counted(extent, size, overlap, scores, valid, multilabel=multilabel)

    def decided(pixel: np.ndarray) -> np.ndarray:
        return pixel > 0 if multilabel else np.array([pixel.argmax()])

    overlapping = any(a.intersect(b) is not None for i, a in enumerate(windows) for b in windows[:i])
    if not overlapping:
        assert set(counts.values()) == {None}
        return
    expected = _naive(extent, windows, [scores[window] for window in windows], valid, decided)
    assert sum(counts.values(), SeamCount()) == expected


def test_strips_of_a_part_have_the_counts_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    extent = Window(0, 0, 700, 90)
    scores = {window: rng.standard_normal((3, 64, 64)).astype(np.float32) for window in grid_windows(extent, 64, 16)}
    valid = rng.random((700, 90)) < 0.9
    whole = _counted(extent, 64, 16, scores, valid, multilabel=False)
    for row in (100, 336):
        part = _counted(extent, 64, 16, scores, valid, rows=(row, 500), multilabel=False)
        assert part
        assert all(whole[start] == count for start, count in part.items())


@pytest.mark.parametrize("num_classes", [1, 2, 3, 256, 300])
def test_the_largest_score_is_the_first_of_the_largest(num_classes) -> None:
    scores = np.random.default_rng(0).integers(0, 5, (num_classes, 7, 9)).astype(np.float32)
    assert np.array_equal(largest_score(scores), scores.argmax(0))


@pytest.mark.parametrize("threshold", [0.2, 0.8])
def test_true_classes_are_those_above_the_threshold_of_the_map(threshold) -> None:
    scores = np.random.default_rng(0).standard_normal((11, 5, 6)).astype(np.float32)
    decided = decide_classes(scores, multilabel=True, score_threshold=threshold)
    bits = np.unpackbits(decided, axis=0, bitorder="little")
    true = np.concatenate([bits[8 * (index // 8) :][index % 8][None] for index in range(11)])
    assert np.array_equal(true, 1 / (1 + np.exp(-scores)) > threshold)


class Shifting(StubSegmenter):
    """Favours the first class at the right of a window."""

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        scores = super().forward(tiles)
        return torch.cat([scores[:, :1] + torch.linspace(-5, 5, tiles.shape[-1]), scores[:, 1:]], dim=1)


def _tag(path: Path) -> str | None:
    with rasterio.open(path) as map_file:
        return map_file.tags().get(SEAM_TAG)


@pytest.fixture
def scene(make_scene) -> Path:
    return make_scene(height=200, width=130, num_bands=3)


def _predict(scene: Path, out: Path, model=None, **options):
    options = SegmentationPredictOptions(**{"device": "cpu", "overlap": 16, **options})
    return SegmentationPredictor(Shifting() if model is None else model, options).run(scene, out)


def test_a_map_of_any_kind_has_the_share_of_a_naive_count(scene, tmp_path) -> None:
    model = Shifting()
    with open_source(scene) as source:
        windows = grid_windows(source.extent, 64, 16)
        images = [source.read(window) for window in windows]
        valid = source.read(source.extent).valid
        scores = [model(torch.from_numpy(model.spec.normalizer(image))[None])[0].numpy() for image in images]
        expected = _naive(source.extent, windows, scores, valid, lambda pixel: [pixel.argmax()])
    assert 0 < expected.share < 1
    found = _predict(scene, tmp_path / "classes.tif")
    assert found.seam_disagreement == round(expected.share, 6)
    assert _tag(tmp_path / "classes.tif") == f"{expected.share:.6f}"
    _predict(scene, tmp_path / "probabilities.tif", kind="probabilities")
    assert _tag(tmp_path / "probabilities.tif") == f"{expected.share:.6f}"
    again = _predict(scene, tmp_path / "classes.tif")
    assert (again.made, again.seam_disagreement) == (False, found.seam_disagreement)


def test_maps_of_windows_that_do_not_overlap_have_no_share(make_scene, tmp_path) -> None:
    assert _predict(make_scene(height=128, width=64), tmp_path / "tiles.tif", overlap=0).seam_disagreement is None
    assert _predict(make_scene(height=50, width=64), tmp_path / "one.tif").seam_disagreement is None
    assert [_tag(tmp_path / name) for name in ("tiles.tif", "one.tif")] == [None, None]
    # The last windows are shifted back into the scene.
    assert _predict(make_scene(height=130, width=64), tmp_path / "shifted.tif", overlap=0).seam_disagreement is not None


def test_an_interrupted_map_has_the_share_of_an_uninterrupted_one(make_scene, tmp_path) -> None:
    scene = make_scene(height=700, width=130, num_bands=3)
    expected = _predict(scene, tmp_path / "whole.tif").seam_disagreement
    for num_windows in (20, 12):
        with pytest.raises(RuntimeError, match="interrupted"):
            _predict(scene, tmp_path / "map.tif", Shifting(fail_after=num_windows))
    assert list(tmp_path.glob("map.tif.partial/seams_*.jsonl"))
    assert _predict(scene, tmp_path / "map.tif").seam_disagreement == expected
    assert (tmp_path / "map.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()


def test_counts_that_were_lost_give_no_share(make_scene, tmp_path) -> None:
    scene = make_scene(height=700, width=130, num_bands=3)
    with pytest.raises(RuntimeError, match="interrupted"):
        _predict(scene, tmp_path / "map.tif", Shifting(fail_after=20))
    for log in tmp_path.glob("map.tif.partial/seams_*.jsonl"):
        log.unlink()
    assert _predict(scene, tmp_path / "map.tif").seam_disagreement is None
    assert _tag(tmp_path / "map.tif") is None


def test_reports_and_info_show_the_share(scene, tmp_path, capsys) -> None:
    options = SegmentationPredictOptions(device="cpu", overlap=16, report=True)
    predictor = SegmentationPredictor(Shifting(), options)
    (report,) = predictor.each(predictor, [MapInput(str(scene), tmp_path / "map.tif")])
    share = float(_tag(tmp_path / "map.tif"))
    assert report.to_dict()["seam_disagreement"] == report.seam_disagreement == share
    page = (tmp_path / "map.html").read_text(encoding="utf-8")
    assert "seam_disagreement" in page
    assert f"{share:.4f}" in page
    assert call(["info", tmp_path / "map.tif"]) == 0
    assert f"{share:.4f} of the pixels under several windows" in " ".join(capsys.readouterr().out.split())
    assert call(["info", tmp_path / "map.tif", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seam_disagreement"] == share


def test_a_map_of_classes_has_no_class_whose_index_is_nodata() -> None:
    assert class_output("classes", ["x"] * 255).nodata == 255
    assert len(class_output("probabilities", ["x"] * 300).band_names) == 300
    with pytest.raises(
        OptionError, match=r"^kind must be probabilities for more than 255 classes.* got classes and 256"
    ):
        class_output("classes", ["x"] * 256)
