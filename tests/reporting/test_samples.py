"""Worst and best samples of evaluations."""

import weakref

import numpy as np
import pytest

from perf_vit.plotting import default_colormap
from perf_vit.plotting.panels import ERROR_COLOR
from perf_vit.reporting import Extremes, MapSamples, Sample, read_picture, sample_rows
from perf_vit.reporting.samples import imagery, mean_iou
from perf_vit.sources import open_source
from perf_vit.types import IGNORE_INDEX, Window


def test_extremes_are_the_lowest_and_the_highest() -> None:
    scores = np.random.default_rng(0).permutation(40) / 40
    extremes = Extremes[float](3)
    for score in [*scores, float("nan")]:
        extremes.offer(float(score), float(score))
    assert extremes.worst == [0.0, 1 / 40, 2 / 40]
    assert extremes.best == [39 / 40, 38 / 40, 37 / 40]


def test_of_few_items_none_is_both() -> None:
    extremes = Extremes[str](3)
    for score, name in ((0.5, "b"), (0.1, "a"), (0.9, "c"), (0.7, "d")):
        extremes.offer(score, name)
    assert extremes.worst == ["a", "b"]
    assert extremes.best == ["c", "d"]


def test_the_mean_iou_is_that_of_the_classes_that_occur() -> None:
    truth = np.array([[0, 0, 1, 1], [0, 0, IGNORE_INDEX, 1]])
    predicted = np.array([[0, 0, 0, 1], [0, 0, 2, 1]])
    assert mean_iou(predicted, truth, 3) == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert np.isnan(mean_iou(predicted, np.full_like(truth, IGNORE_INDEX), 3))
    layers = np.stack([truth == 0, truth == 1]).astype(int)
    assert mean_iou(np.stack([predicted == 0, predicted == 1]).astype(int), layers, 2, multilabel=True) < 1


@pytest.mark.parametrize("strips", [[700], [1, 130, 69, 300, 200]])
def test_cells_of_a_map_do_not_depend_on_its_strips(make_scene, strips: list[int]) -> None:
    source = open_source(make_scene(height=720, width=530, dtype="uint8"))
    extent = Window(11, 7, 700, 510)
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, (700, 510)).astype(np.uint8)
    predicted = truth.copy()
    # Wrong in the second cell of the third row.
    predicted[256 + 20 : 256 + 60, 140:180] ^= 1
    truth[:128, :128] = IGNORE_INDEX
    samples = MapSamples(["a", "b"], 0, cell_px=64, overview=True)
    samples.begin(source, extent)
    row = 0
    for height in strips:
        samples.add(predicted[row : row + height], truth[row : row + height])
        row += height
    samples.end()
    worst = samples.worst[0]
    assert "row 267, column 135" in worst.title
    panels = worst.draw()
    assert list(panels) == ["image", "labels", "prediction", "errors"]
    wrong = (predicted != truth)[256:384, 128:256]
    assert ((panels["errors"] == ERROR_COLOR).all(-1) == wrong).all()
    colors = default_colormap(2, 0)
    assert (panels["labels"][~wrong] == panels["prediction"][~wrong]).all()
    assert {tuple(c) for c in panels["labels"].reshape(-1, 3)} == {colors[0][:3], colors[1][:3]}
    seen = source.read(Window(267, 135, 128, 128)).pixels.transpose(1, 2, 0)
    assert (panels["image"] == seen).all()
    size, unit = worst.pixel_size
    assert (size, unit) == (pytest.approx(np.sqrt(2.5 * 3.25), rel=1e-3), "m")
    preview = samples.preview()
    assert preview is not None
    assert preview.size == (700, 510)
    assert [layer["name"] for layer in preview.layers] == ["image", "labels", "prediction", "errors"]


def test_rows_of_a_map_are_not_kept(make_scene) -> None:
    source = open_source(make_scene(height=720, width=530, dtype="uint8"))
    samples = MapSamples(["a", "b"], 0, cell_px=64, overview=True)
    samples.begin(source, source.extent)
    kept = []
    for _ in range(3):
        predicted, truth = np.zeros((240, 530), np.int64), np.ones((240, 530), np.uint8)
        kept += [weakref.ref(predicted), weakref.ref(truth)]
        samples.add(predicted, truth)
    del predicted, truth
    assert [each() for each in kept] == [None] * 6
    samples.end()
    assert samples.preview() is not None


def test_samples_that_cannot_be_read_any_more_are_left_out() -> None:
    from perf_vit.errors import InputError

    def fail() -> dict:
        raise InputError("gone")

    drawn = Sample(title="b", draw=lambda: {"image": np.zeros((4, 4, 3), np.uint8)})
    # Samples of one picture lie side by side, under their titles.
    [row] = sample_rows([Sample(title="a", draw=fail), drawn, drawn])
    assert [figure.caption for figure in row.figures] == ["b", "b"]
    two = Sample(title="c", draw=lambda: dict.fromkeys(("image", "labels"), np.zeros((4, 4, 3), np.uint8)))
    assert [row.title for row in sample_rows([Sample(title="a", draw=fail), two, two])] == ["c", "c"]


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_source_is_drawn_in_blocks_as_in_one(make_scene, dtype: str) -> None:
    source = open_source(make_scene(height=1100, width=1310, dtype=dtype))
    whole = imagery(source)(source.read(source.extent))
    assert (read_picture(source, imagery(source), 4096) == whole).all()
    reduced = read_picture(source, imagery(source), 600)
    assert reduced.shape == (367, 437, 3)
