"""One frame of a slide: QuPath counts from the corner of the bounds, the file from that of level 0."""

import json
from pathlib import Path

import numpy as np
import pytest
import shapely
from affine import Affine
from bounded import BOUNDS, bounded_slide, with_bounds
from command_line import call
from hypothesis import given
from hypothesis import strategies as st

from perf_vit.errors import InputError
from perf_vit.labels import open_labels
from perf_vit.labels.objects import read_object_labels
from perf_vit.sources import open_source
from perf_vit.sources.describe import describe_source
from perf_vit.sources.slides.frame import SlideFrame, inside_bounds
from perf_vit.types import IGNORE_INDEX, Window
from perf_vit.writers import write_objects

# Tissue in pixels of level 0: left, top, right, bottom.
TISSUE = (160, 120, 320, 240)
CORNER = (BOUNDS["x"], BOUNDS["y"])


@pytest.fixture
def slide(tmp_path: Path, monkeypatch) -> Path:
    with_bounds(monkeypatch, **BOUNDS)
    return bounded_slide(tmp_path / "case.svs", TISSUE)


def drawn(path: Path, box, *, corner=CORNER, **members) -> Path:
    """An annotation of QuPath around a box of level 0."""
    left, top, right, bottom = np.subtract(box, (*corner, *corner)).tolist()
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    properties = {"objectType": "annotation", "classification": {"name": "Tumor", "color": [200, 0, 0]}}
    feature = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": properties,
    }
    path.write_text(json.dumps({"type": "FeatureCollection", **members, "features": [feature]}))
    return path


def pink(shape, box, scale) -> np.ndarray:
    found = np.zeros(shape, bool)
    left, top, right, bottom = (side // scale for side in box)
    found[top:bottom, left:right] = True
    return found


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_annotations_of_qupath_label_the_pixels_that_they_were_drawn_on(slide, tmp_path, scale) -> None:
    source = open_source(slide, mpp=0.5 * scale)
    path = drawn(tmp_path / "a.geojson", TISSUE)
    labels = open_labels(path, source, attribute="classification", classes=["other", "Tumor"])
    assert np.array_equal(labels.read(source.extent) == 1, pink(source.size, TISSUE, scale))


def test_a_file_that_counts_from_level_0_says_so(slide, tmp_path) -> None:
    source = open_source(slide, mpp=0.5)
    path = drawn(tmp_path / "a.geojson", TISSUE, corner=(0, 0), frame="level 0")
    labels = open_labels(path, source, attribute="classification", classes=["other", "Tumor"])
    assert np.array_equal(labels.read(source.extent) == 1, pink(source.size, TISSUE, 1))
    wrong = drawn(tmp_path / "wrong.geojson", TISSUE, frame="micrometres")
    with pytest.raises(InputError, match=r'must be "QuPath" or "level 0", got .micrometres.'):
        open_labels(wrong, source, attribute="classification", classes=["other", "Tumor"])


def test_labels_outside_the_bounds_are_refused_and_the_corner_is_named(slide, tmp_path) -> None:
    path = drawn(tmp_path / "a.geojson", (420, 300, 440, 320), corner=(0, 0))
    with pytest.raises(InputError, match=r"300 x 220 pixels of level 0 from the corner \(96, 64\) of its bounds"):
        open_labels(path, open_source(slide), attribute="classification", classes=["other", "Tumor"])


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_objects_lie_where_qupath_drew_them(slide, tmp_path, scale) -> None:
    (record,) = read_object_labels(
        drawn(tmp_path / "case.geojson", TISSUE),
        slide,
        label_format="polygons",
        classes=["Tumor"],
        attribute="classification",
        open_input=lambda path: open_source(path, mpp=0.5 * scale),
    )
    assert record.boxes_xyxy.tolist() == [[side / scale for side in TISSUE]]


def test_coco_of_the_picture_of_the_bounds_is_placed_in_level_0(slide, tmp_path) -> None:
    left, top, right, bottom = TISSUE
    content = {
        "images": [{"id": 1, "file_name": "case.svs", "height": BOUNDS["height"], "width": BOUNDS["width"]}],
        "categories": [{"id": 1, "name": "Tumor"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 1,
                "bbox": [left - CORNER[0], top - CORNER[1], right - left, bottom - top],
            }
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    (record,) = read_object_labels(tmp_path / "coco.json", slide, label_format="coco")
    assert record.boxes_xyxy.tolist() == [list(TISSUE)]


@pytest.mark.parametrize("options", [{}, {"level": 1}, {"level": 2}, {"mpp": 1.3}, {"mpp": 0.4}])
def test_nothing_is_valid_outside_the_bounds(slide, options) -> None:
    source = open_source(slide, **options)
    valid = source.read(source.extent).valid
    down_x, down_y = source.downsample_xy
    x = (np.arange(source.width) + 0.5) * down_x - CORNER[0]
    y = (np.arange(source.height) + 0.5) * down_y - CORNER[1]
    inside = np.logical_and.outer((y > 0) & (y < BOUNDS["height"]), (x > 0) & (x < BOUNDS["width"]))
    # A resampled pixel counts if half of its weight does: those on the edge may differ.
    edge = np.logical_or.outer(
        np.minimum(np.abs(y), np.abs(y - BOUNDS["height"])) < down_y,
        np.minimum(np.abs(x), np.abs(x - BOUNDS["width"])) < down_x,
    )
    assert np.array_equal(valid[~edge], inside[~edge])
    assert (source.read(source.extent).pixels[:, ~valid] == 255).all()


def test_windows_hold_the_bytes_of_the_whole_slide_at_the_bounds(slide) -> None:
    source = open_source(slide, mpp=1.3)
    whole = source.read(source.extent)
    for window in (Window(20, 30, 33, 41), Window(0, 0, 50, 50), Window(90, 120, 60, 60)):
        part = source.read(window)
        rows, cols = window.intersect(source.extent).slices_in(source.extent)
        inner = (slice(0, rows.stop - rows.start), slice(0, cols.stop - cols.start))
        assert np.array_equal(part.valid[inner], whole.valid[rows, cols])
        assert np.array_equal(part.pixels[:, *inner], whole.pixels[:, rows, cols])


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_outlines_of_tissue_are_in_the_coordinates_of_qupath(slide, tmp_path, scale) -> None:
    source = open_source(slide, mpp=0.5 * scale, tissue=drawn(tmp_path / "tissue.geojson", TISSUE))
    assert np.array_equal(source.read(source.extent).valid, pink(source.size, TISSUE, scale))
    reduced = source.read_reduced(max(source.size) // 2)
    assert abs(reduced.valid.mean() - source.read(source.extent).valid.mean()) < 0.01


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_written_objects_come_back_in_qupath_and_name_their_frame(slide, tmp_path, scale) -> None:
    source = open_source(slide, mpp=0.5 * scale)
    box = np.array(TISSUE) / scale
    path = write_objects(tmp_path / "out.geojson", box[None], [0.9], [0], ["Tumor"], source=source)
    content = json.loads(path.read_text())
    assert (content["frame"], content["frame_unit"]) == ("QuPath", "pixel of level 0")
    assert content["frame_origin_level0_px"] == list(CORNER)
    written = shapely.geometry.shape(content["features"][0]["geometry"]).bounds
    assert written == tuple(np.subtract(TISSUE, (*CORNER, *CORNER)))
    # As labels of the same slide they lie where they were found.
    labels = open_labels(path, source, attribute="classification", classes=["other", "Tumor"])
    assert np.array_equal(labels.read(source.extent) == 1, pink(source.size, TISSUE, scale))
    coco = json.loads(write_objects(tmp_path / "out.json", box[None], [0.9], [0], ["T"], source=source).read_text())
    to_qupath = coco["images"][0]["to_qupath"]
    left, top, *_ = coco["annotations"][0]["bbox"]
    assert np.multiply([left, top], to_qupath["scale_xy"]) + to_qupath["shift_xy"] == pytest.approx(written[:2])


def test_slides_without_bounds_have_one_frame(tmp_path) -> None:
    source = open_source(bounded_slide(tmp_path / "plain.svs", TISSUE), mpp=1.0)
    assert source.frame.to_qupath == source.frame.to_level0 == Affine.scale(2)
    assert source.frame.bounds == Window(0, 0, 400, 480)
    assert source.frame.to_micrometres == Affine.scale(1.0)
    assert source.read(source.extent).valid.all()


def test_bounds_of_all_of_level_0_or_without_numbers_are_none(tmp_path, monkeypatch) -> None:
    path = bounded_slide(tmp_path / "plain.svs", TISSUE)
    for bounds in ({"x": 0, "y": 0, "width": 480, "height": 400}, {"x": 5, "y": 5}, {"x": "?", **BOUNDS, "y": "?"}):
        with monkeypatch.context() as patch:
            with_bounds(patch, **bounds)
            assert open_source(path).frame.bounds == Window(0, 0, 400, 480)


def test_labels_outside_the_bounds_are_unlabelled_where_background_is_ignored(slide, tmp_path) -> None:
    source = open_source(slide, mpp=0.5)
    path = drawn(tmp_path / "a.geojson", TISSUE)
    given = {"attribute": "classification", "classes": ["Tumor", "other"], "background": "ignore"}
    labels = open_labels(path, source, **given).read(source.extent)
    assert set(np.unique(labels[~source.read(source.extent).valid])) == {IGNORE_INDEX}


SIDES = st.integers(1, 5000)


@given(
    x=SIDES, y=SIDES, scale=st.sampled_from([0.5, 1.0, 2.0, 3.7]), mpp=st.floats(0.1, 4), point=st.tuples(SIDES, SIDES)
)
def test_all_coordinates_are_one_place(x, y, scale, mpp, point) -> None:
    frame = SlideFrame(Affine.scale(scale), Window(y, x, 5000, 5000), (mpp, mpp))
    level0, qupath = frame.to_level0 @ point, frame.to_qupath @ point
    assert np.allclose(np.subtract(level0, qupath), (x, y))
    assert np.allclose(frame.to_micrometres @ point, np.multiply(qupath, mpp))
    for name, xy in (("QuPath", qupath), ("level 0", level0)):
        back = frame.in_source(np.array([shapely.Point(xy)]), name)[0]
        assert np.allclose([back.x, back.y], point)


@given(row=st.integers(0, 40), col=st.integers(0, 40), down=st.sampled_from([1.0, 2.0, 4.0, 3.3]))
def test_pixels_are_inside_where_their_centre_is(row, col, down) -> None:
    bounds, window = Window(17, 9, 60, 70), Window(row, col, 8, 11)
    inside = inside_bounds(bounds, (down, down), window)
    expected = [
        [17 <= (row + i + 0.5) * down < 77 and 9 <= (col + j + 0.5) * down < 79 for j in range(11)] for i in range(8)
    ]
    assert np.array_equal(np.ones((8, 11), bool) if inside is None else inside, expected)


def test_info_names_the_bounds(slide, capsys) -> None:
    found = describe_source(open_source(slide))
    assert found.bounds_level0_px == (96, 64, 396, 284)
    assert call(["info", slide]) == 0
    assert "x 96 to 396, y 64 to 284 of level 0, which QuPath shows" in " ".join(capsys.readouterr().out.split())
