"""Labels that are wrong in some way: each is an error of one line, or a warning with a number and an example."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from label_cases import write_image

from perf_vit.errors import DataWarning, InputError
from perf_vit.labels.objects import read_object_labels
from perf_vit.sources import open_raster

NAN, INF = float("nan"), float("inf")
GOOD = [(8, 8, 20, 18, "car"), (30, 10, 46, 30, "bus")]


@pytest.fixture
def images(tmp_path) -> Path:
    for number in range(2):
        write_image(tmp_path / "images" / f"{number}.png", seed=number)
    return tmp_path / "images"


def write_coco(folder: Path, objects: list) -> Path:
    names = {"car": 1, "bus": 2}
    content = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(len(objects))],
        "categories": [{"id": 1, "name": "car"}, {"id": 2, "name": "bus"}],
        "annotations": [
            {"image_id": i, "category_id": names[n], "bbox": [a, b, c - a, d - b]}
            for i, items in enumerate(objects)
            for a, b, c, d, n in items
        ],
    }
    (folder / "labels.json").write_text(json.dumps(content))
    return folder / "labels.json"


def write_csv(folder: Path, objects: list) -> Path:
    rows = [f"{i}.png,{a},{b},{c},{d},{n}" for i, items in enumerate(objects) for a, b, c, d, n in items]
    (folder / "labels.csv").write_text("\n".join(["image,xmin,ymin,xmax,ymax,label", *rows]))
    return folder / "labels.csv"


def write_texts(folder: Path, suffix: str, texts: list[str]) -> Path:
    (folder / "labels").mkdir()
    for number, text in enumerate(texts):
        (folder / "labels" / f"{number}{suffix}").write_text(text)
    return folder / "labels"


def write_voc(folder: Path, objects: list) -> Path:
    def item(a, b, c, d, n) -> str:
        box = f"<xmin>{a + 1}</xmin><ymin>{b + 1}</ymin><xmax>{c}</xmax><ymax>{d}</ymax>"
        return f"<object><name>{n}</name><bndbox>{box}</bndbox></object>"

    texts = [f"<annotation>{''.join(item(*obj) for obj in items)}</annotation>" for items in objects]
    return write_texts(folder, ".xml", texts)


def write_yolo(folder: Path, objects: list) -> Path:
    def line(a, b, c, d, n) -> str:
        return f"{('car', 'bus').index(n)} {(a + c) / 120} {(b + d) / 80} {(c - a) / 60} {(d - b) / 40}"

    return write_texts(folder, ".txt", ["\n".join(line(*obj) for obj in items) for items in objects])


def write_dota(folder: Path, objects: list) -> Path:
    lines = [[f"{a} {b} {c} {b} {c} {d} {a} {d} {n} 0" for a, b, c, d, n in items] for items in objects]
    return write_texts(folder, ".txt", ["\n".join(each) for each in lines])


def write_polygons(folder: Path, objects: list) -> Path:
    rings = [[[[[a, b], [c, b], [c, d], [a, d], [a, b]]] for a, b, c, d, _ in items] for items in objects]
    return write_texts(
        folder,
        ".geojson",
        [
            features([feature(ring, obj[4]) for ring, obj in zip(each, items, strict=True)])
            for each, items in zip(rings, objects, strict=True)
        ],
    )


def features(items: list) -> str:
    return json.dumps({"type": "FeatureCollection", "features": items})


def feature(rings: list | None, name: str) -> dict:
    geometry = None if rings is None else {"type": "Polygon", "coordinates": rings}
    return {"type": "Feature", "properties": {"kind": name}, "geometry": geometry}


WRITERS = {
    "coco": write_coco,
    "csv": write_csv,
    "dota": write_dota,
    "polygons": write_polygons,
    "voc": write_voc,
    "yolo": write_yolo,
}


def read(labels: Path, images: Path, label_format: str, **options):
    """The index, and all that was said."""
    attribute = "kind" if label_format == "polygons" else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = {"classes": ["car", "bus"], "attribute": attribute, **options}
        index = read_object_labels(labels, images, label_format=label_format, **options)
    assert all(issubclass(each.category, DataWarning) for each in caught), [str(each.message) for each in caught]
    return index, [str(each.message) for each in caught]


@pytest.mark.parametrize("label_format", WRITERS)
@pytest.mark.parametrize(
    ("box", "what"),
    [
        ((70, 50, 80, 60, "car"), "dropped: outside the image"),
        ((50, 30, 75, 50, "car"), "clipped at the image's edge"),
        ((20, 20, 20, 30, "car"), "dropped: no area"),
        ((30, 30, 20, 20, "car"), "dropped: no area"),
        ((NAN, 5, 10, 10, "car"), "dropped: coordinates that are not finite"),
        ((INF, 5, 10, 10, "car"), "dropped: coordinates that are not finite"),
        (GOOD[0], "dropped: duplicates"),
    ],
)
def test_a_bad_object_is_counted_with_what_is_wrong_and_an_example(tmp_path, images, label_format, box, what) -> None:
    labels = WRITERS[label_format](tmp_path, [[*GOOD, box], GOOD])
    index, said = read(labels, images, label_format)
    if label_format in ("dota", "polygons") and box[:4] == (30, 30, 20, 20):
        # Corners in another order are the same object.
        assert index.class_counts() == {"car": 3, "bus": 2}
        assert not said
        return
    assert index.class_counts() == {"car": 3 if what.startswith("clipped") else 2, "bus": 2}
    assert len(said) == 1
    if label_format == "polygons" and "finite" in what:
        # JSON has no such numbers; the reader of vector files takes the geometry for missing.
        assert "1 of 3 features of" in said[0]
        assert "no usable geometry and are left out, the first is number 3" in said[0]
        return
    assert f"1 {what} (first: car" in said[0]
    name = labels.name if labels.is_file() else "0."
    assert name in said[0]


@pytest.mark.parametrize("label_format", WRITERS)
def test_no_objects_at_all_are_no_objects_of_any_kind(tmp_path, images, label_format) -> None:
    labels = WRITERS[label_format](tmp_path, [[], []])
    if label_format == "csv":
        with (
            pytest.raises(InputError, match="expected labelled images, got none"),
            pytest.warns(DataWarning, match="2 of 2 images have no labels"),
        ):
            read_object_labels(labels, images, label_format="csv")
        return
    index, said = read(labels, images, label_format)
    assert [text.split(" in ")[0] for text in said] == ["2 of 2 classes have no objects"]
    for record in index:
        assert len(record) == 0
        assert record.oriented_boxes.shape == (0, 5)
        assert record.masks.read(np.arange(0), record.extent).shape == (0, 40, 60)


@pytest.mark.parametrize("label_format", WRITERS)
@pytest.mark.parametrize("content", [b"\xff\xfe\x80 rubbish\x00" * 9, b"<annotation><obj", b'{"images": ['])
def test_a_broken_file_is_an_error_that_names_it(tmp_path, images, label_format, content) -> None:
    labels = WRITERS[label_format](tmp_path, [GOOD, GOOD])
    file = labels if labels.is_file() else sorted(labels.iterdir())[0]
    file.write_bytes(content)
    with pytest.raises(InputError, match=file.name.replace(".", r"\.")) as error:
        read(labels, images, label_format)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("label_format", WRITERS)
def test_images_without_labels_are_counted(tmp_path, images, label_format) -> None:
    for number in (7, 8):
        write_image(images / f"{number}.png")
    index, said = read(WRITERS[label_format](tmp_path, [GOOD, GOOD]), images, label_format)
    # Without a file, YOLO's way of saying that there is nothing.
    assert len(index) == (4 if label_format == "yolo" else 2)
    assert len(said) == 1
    assert said[0].startswith("2 of 4 images have no ")
    assert said[0].endswith("7.png")


@pytest.mark.parametrize("label_format", WRITERS)
def test_classes_that_nothing_is_of_are_counted(tmp_path, images, label_format) -> None:
    labels = WRITERS[label_format](tmp_path, [GOOD, GOOD])
    _, said = read(labels, images, label_format, classes=["car", "bus", "lorry"])
    assert [text.split(" in ")[0] for text in said] == ["1 of 3 classes have no objects"]
    assert said[0].endswith("the first lorry")


@pytest.mark.parametrize(
    ("segmentation", "what"),
    [
        ([[1, 1, 5, 5]], "1 dropped: no area"),
        ([[1, 1, 5, 5, 9, 9]], "1 dropped: no area"),
        ([[1, 1, NAN, 5, 9, 9]], "1 dropped: coordinates that are not finite"),
    ],
)
def test_one_degenerate_outline_costs_its_object_not_the_masks(tmp_path, images, segmentation, what) -> None:
    labels = write_coco(tmp_path, [GOOD, GOOD])
    content = json.loads(labels.read_text())
    for item in content["annotations"]:
        x, y, w, h = item["bbox"]
        item["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    content["annotations"][0]["segmentation"] = segmentation
    labels.write_text(json.dumps(content))
    index, said = read(labels, images, "coco")
    assert what in said[0]
    assert index.counts["objects"] == 3
    assert all(record.masks is not None for record in index)


def run_lengths(height: int, width: int, columns: int) -> dict:
    """A mask of the first columns of an image, as COCO packs it."""
    counts = [0, height * columns, height * (width - columns)] if columns else [height * width]
    return {"size": [height, width], "counts": counts}


BOW_TIE = [[8, 8, 20, 18, 20, 8, 8, 18]]


@pytest.mark.parametrize(
    ("segmentation", "what", "kept"),
    [
        (run_lengths(40, 60, 0), "1 dropped: no area (first: car at 8 8 20 18", 3),
        ([[8, 8, 20, 8, 20, 18], [9, 9, 12, 12]], "1 without outline parts of fewer than 3 points", 4),
        (BOW_TIE, "1 with a self-intersecting outline, repaired to everything it encloses (first: car", 4),
    ],
)
def test_outlines_that_are_not_what_they_seem_are_counted(tmp_path, images, segmentation, what, kept) -> None:
    labels = write_coco(tmp_path, [GOOD, GOOD])
    content = json.loads(labels.read_text())
    for item in content["annotations"]:
        item["segmentation"] = run_lengths(40, 60, 5)
    content["annotations"][0]["segmentation"] = segmentation
    labels.write_text(json.dumps(content))
    index, said = read(labels, images, "coco")
    assert what in said[0]
    assert index.counts["objects"] == kept
    for record in index:
        assert record.masks.read(np.arange(len(record)), record.extent).any(axis=(1, 2)).all()


def test_a_mask_of_another_size_is_an_error(tmp_path, images) -> None:
    labels = write_coco(tmp_path, [GOOD, GOOD])
    content = json.loads(labels.read_text())
    for item in content["annotations"]:
        item["segmentation"] = run_lengths(20, 30, 5)
    labels.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"holds a mask of 20 x 30 px for .*0\.png, which has 40 x 60; make masks"):
        read(labels, images, "coco")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c["images"].append(c["images"][0] | {"file_name": "1.png"}), "lists 2 images of id 0"),
        (lambda c: c["images"].append(c["images"][0] | {"id": 9}), "lists 2 images of file_name 0.png"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 1, 5, 5, 9]]), "outline of 5 numbers"),
    ],
)
def test_a_coco_file_that_contradicts_itself_is_an_error(tmp_path, images, change, match) -> None:
    labels = write_coco(tmp_path, [GOOD, GOOD])
    content = json.loads(labels.read_text())
    change(content)
    labels.write_text(json.dumps(content))
    with pytest.raises(InputError, match=match):
        read(labels, images, "coco")


def test_polygons_that_reach_no_image_are_counted(tmp_path, images) -> None:
    labels = write_polygons(tmp_path, [[*GOOD, (500, 500, 520, 520, "car")]])
    index, said = read(labels / "0.geojson", images, "polygons")
    assert index.counts["objects"] == 4
    assert "1 of 3 polygons of" in said[0]
    assert "lie on none of the 2 images, the first is number 3" in said[0]


@pytest.mark.parametrize("rings", [None, [[[1, 1], [5, 5]]], [[[1, 1], ["a", 5], [9, 9], [1, 1]]]])
def test_features_without_geometry_are_counted(tmp_path, images, rings) -> None:
    labels = write_polygons(tmp_path, [GOOD, GOOD])
    (labels / "0.geojson").write_text(
        features([feature(rings, "car"), feature([[[1, 1], [5, 1], [5, 5], [1, 1]]], "bus")])
    )
    index, said = read(labels, images, "polygons")
    assert index.class_counts() == {"car": 1, "bus": 2}
    assert "1 of 2 features of" in said[0]
    assert "the first is number 1" in said[0]


def test_a_row_with_too_many_cells_is_an_error(tmp_path, images) -> None:
    labels = write_csv(tmp_path, [GOOD, GOOD])
    labels.write_text(labels.read_text() + "\n1.png,1,2,3,4,car,5")
    with pytest.raises(InputError, match=r"line 6 of .* has more cells than there are columns"):
        read(labels, images, "csv")


def test_a_cut_png_is_an_error_however_it_is_read(images) -> None:
    path = images / "0.png"
    path.write_bytes(path.read_bytes()[:3000])
    with open_raster(path) as raster:
        for act in (lambda: raster.read(raster.extent), lambda: raster.read_reduced(256)):
            with pytest.raises(InputError, match=r"0\.png: .*truncated or damaged"):
                act()
