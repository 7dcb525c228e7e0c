"""Files of QuPath and ASAP, in the forms that their versions write, as labels, objects, outlines and descriptions."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from bounded import BOUNDS, bounded_slide, with_bounds
from hypothesis import given, settings
from hypothesis import strategies as st

from perf_vit.errors import DataWarning, InputError
from perf_vit.labels import open_labels
from perf_vit.labels.objects import read_object_labels
from perf_vit.sources import open_source
from perf_vit.sources.describe import describe_vector
from perf_vit.sources.vector_file import read_features
from perf_vit.types import IGNORE_INDEX

TUMOR = {"name": "Tumor", "color": [200, 0, 0]}
AREA = (160, 120, 320, 240)
IGNORED = (200, 150, 240, 200)


def box(left, top, right, bottom):
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    return {"type": "Polygon", "coordinates": [ring]}


def feature(geometry, classification=None, **more):
    properties = {"objectType": "annotation"}
    if classification is not None:
        properties["classification"] = classification
    return {"type": "Feature", "id": "5b1b", "geometry": geometry, "properties": properties, **more}


def collection(*features):
    return {"type": "FeatureCollection", "features": list(features)}


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return bounded_slide(tmp_path / "a.svs", AREA)


def burnt(slide: Path, content, classes=("other", "Tumor"), *, name="a.geojson", **options):
    path = slide.parent / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    source = open_source(slide)
    return open_labels(path, source, attribute="classification", classes=classes, **options).read(source.extent)


def area(*boxes) -> np.ndarray:
    found = np.zeros((400, 480), bool)
    for left, top, right, bottom in boxes:
        found[top:bottom, left:right] = True
    return found


@pytest.mark.parametrize(
    ("classification", "name"),
    [
        (TUMOR, "Tumor"),
        ({"name": "Tumor", "colorRGB": -3670016}, "Tumor"),
        ({"name": "Tumor"}, "Tumor"),
        ({"names": ["Tumor"], "color": [200, 0, 0]}, "Tumor"),
        ({"names": ["Tumor", "Positive"], "color": [200, 0, 0]}, "Tumor: Positive"),
        ({"name": "Tumor: Positive", "colorRGB": -1}, "Tumor: Positive"),
        ("Tumor: Positive", "Tumor: Positive"),
        ('{"name": "Tumor", "color": "[200, 0, 0]"}', "Tumor"),
    ],
)
def test_all_ways_to_write_a_class_name_it(slide, classification, name) -> None:
    labels = burnt(slide, collection(feature(box(*AREA), classification)), ["other", name])
    assert np.array_equal(labels == 1, area(AREA))
    labels = burnt(slide, collection(feature(box(*AREA), classification)), ["other", name], name="b.geojson")
    assert describe_vector(str(slide.parent / "b.geojson"))["values of classification"] == {name: 1}


SECOND = (20, 20, 60, 80)
TWO = [feature(box(*AREA), TUMOR), feature(box(*SECOND), TUMOR)]


@pytest.mark.parametrize(
    "content",
    [
        collection(*TWO),
        TWO,
        [collection(TWO[0]), [TWO[1]]],
        collection(collection(TWO[0]), TWO[1]),
        collection({**TWO[0], "childObjects": [TWO[1]]}),
        collection(feature({"type": "GeometryCollection", "geometries": [box(*AREA), box(*SECOND)]}, TUMOR)),
        collection(
            feature({"type": "MultiPolygon", "coordinates": [each["geometry"]["coordinates"] for each in TWO]}, TUMOR)
        ),
        feature({"type": "MultiPolygon", "coordinates": [each["geometry"]["coordinates"] for each in TWO]}, TUMOR),
        collection(*TWO, {"type": "Feature", "geometry": box(0, 0, 480, 400), "properties": {"objectType": "root"}}),
        collection(feature({**box(*AREA), "isEllipse": True, "plane": {"c": -1, "z": 0, "t": 0}}, TUMOR), TWO[1]),
    ],
    ids=["collection", "list", "lists", "nested", "children", "mixed", "multi", "feature", "root", "ellipse"],
)
def test_all_containers_hold_the_same_areas(slide, content) -> None:
    assert np.array_equal(burnt(slide, content) == 1, area(AREA, SECOND))


def test_a_bare_geometry_and_a_list_of_them_are_areas_of_one_class(slide) -> None:
    source = open_source(slide)
    for content in (box(*AREA), [box(*AREA)]):
        (slide.parent / "a.geojson").write_text(json.dumps(content))
        labels = open_labels(slide.parent / "a.geojson", source, classes=["other", "Tumor"])
        assert np.array_equal(labels.read(source.extent) == 1, area(AREA))


def test_points_lines_and_empty_geometries_are_counted_and_left_out(slide) -> None:
    points = feature({"type": "MultiPoint", "coordinates": [[5, 5], [9, 9]]}, {"name": "Cell"})
    line = feature({"type": "LineString", "coordinates": [[5, 5], [9, 9]]}, TUMOR)
    empty = [feature(None, TUMOR), feature({"type": "Polygon", "coordinates": []}, TUMOR)]
    with pytest.warns(DataWarning) as told:
        labels = burnt(slide, collection(points, *empty, line, TWO[0]))
    assert np.array_equal(labels == 1, area(AREA))
    texts = [str(each.message) for each in told]
    assert any("2 of 5 features" in text and "no usable geometry" in text for text in texts)
    assert any("2 of 3 objects" in text and "points or lines" in text and "number 1" in text for text in texts)
    with pytest.raises(InputError, match="MultiPoint; labels must be polygons"):
        burnt(slide, collection(points), ["other", "Cell"])


def test_areas_to_ignore_are_unlabelled_and_background_elsewhere(slide) -> None:
    for ignored in ({"name": "Ignore*", "color": [180, 180, 180]}, {"names": ["Ignore*", "Fold"]}):
        labels = burnt(slide, collection(TWO[0], feature(box(*IGNORED), ignored)))
        assert np.array_equal(labels == IGNORE_INDEX, area(IGNORED))
        assert np.array_equal(labels == 1, area(AREA) & ~area(IGNORED))
    # Whoever names it as a class means it.
    labels = burnt(slide, collection(TWO[0], feature(box(*IGNORED), {"name": "Ignore*"})), ["Ignore*", "Tumor"])
    assert not (labels == IGNORE_INDEX).any()


def test_classes_that_are_skipped_are_as_if_they_were_not_there(slide) -> None:
    content = collection(TWO[0], feature(box(0, 0, 400, 300), {"name": "Region*"}), feature(box(*IGNORED)))
    with pytest.raises(InputError, match=r"holds Region\*, null.*skip_classes"):
        burnt(slide, content)
    labels = burnt(slide, content, skip_classes=["Region*", None])
    assert np.array_equal(labels == 1, area(AREA))
    assert not (labels == IGNORE_INDEX).any()


def test_a_polygon_wholly_under_another_class_is_counted(slide) -> None:
    inner = feature(box(*IGNORED), {"name": "Stroma"})
    classes = ["other", "Tumor", "Stroma"]
    with pytest.warns(DataWarning, match=r"1 of 2 polygons .* wholly under a later polygon .*; the first is number 1"):
        labels = burnt(slide, collection(inner, TWO[0]), classes)
    assert not (labels == 2).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (burnt(slide, collection(TWO[0], inner), classes) == 2).any()
        # Of the same class, nothing is lost; nor where layers overlap.
        burnt(slide, collection(feature(box(*IGNORED), TUMOR), TWO[0]))
        burnt(slide, collection(inner, TWO[0]), classes[1:], multilabel=True, background="none")


def test_areas_to_ignore_are_ignored_objects_of_each_class(slide) -> None:
    path = slide.parent / "a.geojson"
    path.write_text(json.dumps(collection(TWO[0], feature(box(*IGNORED), {"name": "Ignore*"}))))
    options = {"label_format": "polygons", "attribute": "classification"}
    (record,) = read_object_labels(path, slide, classes=["Tumor", "Stroma"], **options)
    assert record.boxes_xyxy.tolist() == [list(map(float, each)) for each in (AREA, IGNORED, IGNORED)]
    assert (record.labels.tolist(), record.ignored.tolist()) == ([0, 0, 1], [False, True, True])
    assert read_object_labels(path, slide, **options).classes == ("Tumor",)
    (record,) = read_object_labels(path, slide, classes=["Tumor"], skip_classes=["Ignore*"], **options)
    assert record.ignored.tolist() == [False]


def test_areas_to_ignore_are_cut_out_of_tissue(slide) -> None:
    path = slide.parent / "tissue.geojson"
    # The order in the file doesn't matter.
    path.write_text(json.dumps([feature(box(*IGNORED), {"name": "Ignore*"}), feature(box(*AREA))]))
    source = open_source(slide, tissue=path)
    assert np.array_equal(source.read(source.extent).valid, area(AREA) & ~area(IGNORED))


def asap(*annotations, root="ASAP_Annotations") -> str:
    texts = []
    for group, kind, points in annotations:
        corners = "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}" />' for i, (x, y) in points)
        texts.append(
            f'<Annotation Name="A" Type="{kind}" PartOfGroup="{group}" Color="#F4FA58">'
            f"<Coordinates>{corners}</Coordinates></Annotation>"
        )
    return f'<?xml version="1.0"?>\n<{root}><Annotations>{"".join(texts)}</Annotations><AnnotationGroups /></{root}>'


def corners(left, top, right, bottom):
    return list(enumerate([(left, top), (right, top), (right, bottom), (left, bottom)]))


@pytest.mark.parametrize(("group", "hole"), [("Tumor", "Exclusion"), ("_0", "_2"), ("_1", "_2")])
def test_asap_of_camelyon_is_labels_objects_and_tissue(slide, group, hole) -> None:
    # Corners are in no order; the order is in the attribute.
    text = asap((group, "Polygon", corners(*AREA)[::-1]), (hole, "Spline", corners(*IGNORED)))
    labels = burnt(slide, text, name="a.xml")
    expected = area(AREA) & ~area(IGNORED)
    assert np.array_equal(labels == 1, expected)
    assert not (labels == IGNORE_INDEX).any()
    path = slide.parent / "a.xml"
    options = {"label_format": "polygons", "attribute": "classification"}
    for place in (path, slide.parent):
        (record,) = read_object_labels(place, slide, classes=["Tumor"], **options)
        assert record.boxes_xyxy.tolist() == [list(map(float, AREA))]
        assert np.array_equal(record.masks.read(np.array([0]), record.extent)[0], expected)
    source = open_source(slide, tissue=path)
    assert np.array_equal(source.read(source.extent).valid, expected)
    assert describe_vector(str(path))["values of classification"] == {"Tumor": 1}


def test_asap_counts_from_level_0_also_where_qupath_doesnt(tmp_path, monkeypatch) -> None:
    with_bounds(monkeypatch, **BOUNDS)
    slide = bounded_slide(tmp_path / "a.svs", AREA)
    assert np.array_equal(burnt(slide, asap(("Tumor", "Rectangle", corners(*AREA))), name="a.xml") == 1, area(AREA))


def test_dots_of_asap_are_left_out_and_areas_without_group_have_no_class(slide) -> None:
    text = asap(
        ("Tumor", "Dot", [(0, (5, 5))]), ("Tumor", "Polygon", corners(*AREA)), ("None", "Polygon", corners(*SECOND))
    )
    with pytest.warns(DataWarning, match="1 of 3 objects"):
        labels = burnt(slide, text, name="a.xml", ignore_values=[None])
    assert np.array_equal(labels == 1, area(AREA))
    assert np.array_equal(labels == IGNORE_INDEX, area(SECOND))


@pytest.mark.parametrize(
    "text", [asap(("Tumor", "Polygon", corners(*AREA)))[:-40], asap(("Tumor", "Polygon", [(0, ("x", 1))]))]
)
def test_damaged_asap_is_one_clear_line(slide, text) -> None:
    with pytest.raises(InputError, match=r"can't read .*a\.xml as annotations of ASAP"):
        burnt(slide, text, name="a.xml")


def test_xml_of_other_viewers_is_refused_with_what_to_do(slide) -> None:
    text = "<Annotations MicronsPerPixel='0.25'><Annotation Id='1'><Regions /></Annotation></Annotations>"
    with pytest.raises(InputError, match="annotations of ASAP are read, so export GeoJSON"):
        burnt(slide, text, name="a.xml")
    with pytest.raises(InputError, match="annotations of ASAP are read, so export GeoJSON"):
        open_source(slide, tissue=slide.parent / "a.xml")


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)
LEAVES = st.tuples(st.lists(NAMES, min_size=1, max_size=3), st.booleans(), st.integers(0, 300))


@given(tree=st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4), max_leaves=12))
@settings(max_examples=60, deadline=None)
def test_any_nesting_gives_its_features_in_order(tmp_path_factory, tree) -> None:
    expected = []

    def built(node):
        if isinstance(node, list):
            return collection(*map(built, node)) if len(node) % 2 else [built(each) for each in node]
        names, is_list, left = node
        expected.append((": ".join(names), left))
        given = {"names": names} if is_list else {"name": ": ".join(names)}
        return feature(box(left, 0, left + 5, 5), {**given, "color": [1, 2, 3]})

    content = built(tree)
    path = tmp_path_factory.mktemp("nested") / "a.geojson"
    path.write_text(json.dumps(content))
    frame = read_features(str(path), "classification")
    found = [] if frame.empty else zip(frame["classification"], frame.geometry.bounds["minx"], strict=True)
    assert [(name, int(left)) for name, left in found] == expected


KEYS = NAMES | st.sampled_from(["type", "features", "geometry", "properties"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | NAMES | st.sampled_from(["Feature", "FeatureCollection", "Polygon"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
)


@given(content=VALUES)
@settings(max_examples=60, deadline=None)
def test_any_other_json_is_one_error_in_one_line_or_has_no_areas(tmp_path_factory, content) -> None:
    path = tmp_path_factory.mktemp("other") / "a.geojson"
    path.write_text(json.dumps([content]))
    told = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        try:
            found = len(read_features(str(path), None))
        except InputError as error:
            found, told = 0, str(error)
    assert found == 0
    assert "\n" not in told
