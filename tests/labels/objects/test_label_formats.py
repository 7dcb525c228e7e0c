import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import shapely
from label_cases import write_image, write_mask

from perf_vit.errors import ConfigError, InputError
from perf_vit.labels.objects import read_object_labels
from perf_vit.types import Window


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        write_image(tmp_path / "images" / f"{name}.png")
    return tmp_path / "images"


def _coco(path: Path, annotations: list, **changes) -> Path:
    content = {
        "images": [{"id": 7, "file_name": "a.png", "height": 40, "width": 60}, {"id": 8, "file_name": "b.png"}],
        "categories": [{"id": 3, "name": "ship"}, {"id": 9, "name": "dock"}],
        "annotations": [{"id": i, "image_id": 7, "category_id": 3, **item} for i, item in enumerate(annotations)],
    }
    path.write_text(json.dumps({**content, **changes}))
    return path


def _voc(path: Path, objects: str, size: str = "<width>60</width><height>40</height>") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"<annotation><filename>other.jpg</filename><size>{size}</size>{objects}</annotation>")
    return path


def _voc_object(name: str, *box: float, difficult: int = 0) -> str:
    sides = "".join(f"<{s}>{v}</{s}>" for s, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{sides}</bndbox></object>"


def _only(index, at: int = 0):
    return index.records[at]


def test_coco_boxes_crowds_and_images_without_objects(tmp_path, images) -> None:
    labels = _coco(tmp_path / "c.json", [{"bbox": [1.5, 2, 10, 4]}, {"bbox": [0, 0, 5, 5], "iscrowd": 1}])
    index = read_object_labels(labels, images, label_format="coco")
    assert index.classes == ("ship", "dock")
    assert _only(index).boxes_xyxy.tolist() == [[1.5, 2, 11.5, 6], [0, 0, 5, 5]]
    assert _only(index).ignored.tolist() == [False, True]
    assert len(_only(index, 1)) == 0
    assert index.counts["images without objects"] == 1
    assert index.class_counts() == {"ship": 1, "dock": 0}


def test_coco_polygons_and_run_lengths_give_masks(tmp_path, images) -> None:
    runs = [40 * 10 + 4, 3, 37, 3, 40 * 60 - 40 * 11 - 4 - 3 - 3 + 0 - 0]
    runs[-1] = 40 * 60 - sum(runs[:-1])
    labels = _coco(
        tmp_path / "c.json",
        [
            {"bbox": [20, 10, 6, 4], "segmentation": [[20, 10, 26, 10, 26, 14, 20, 14]]},
            {"segmentation": {"size": [40, 60], "counts": runs}},
        ],
    )
    record = _only(read_object_labels(labels, images, label_format="coco"))
    masks = record.masks.read(np.arange(2), record.extent)
    assert masks.sum(axis=(1, 2)).tolist() == [24, 6]
    assert masks[0, 10:14, 20:26].all()
    assert masks[1, 4:7, 10:12].all()
    assert record.boxes_xyxy[1].tolist() == [10, 4, 12, 7]


def test_compressed_run_lengths_equal_the_plain_ones(tmp_path, images) -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((40, 60)) < 0.05
    mask[3:20, 30:50] = True
    runs = _runs(mask)
    segmentations = [{"size": [40, 60], "counts": counts} for counts in (runs, _packed(runs))]
    for segmentation in segmentations:
        labels = _coco(tmp_path / "c.json", [{"segmentation": segmentation}])
        record = _only(read_object_labels(labels, images, label_format="coco"))
        assert (record.masks.read(np.arange(1), record.extent) == mask).all()


def _runs(mask: np.ndarray) -> list[int]:
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    starts = np.concatenate([[0], edges, [flat.size]])
    runs = np.diff(starts).tolist()
    return [0, *runs] if flat[0] else runs


def _packed(runs: list[int]) -> str:
    """The published encoding, written from its description: differences to the last but one, five bits a character."""
    text = ""
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            group = value & 31
            value >>= 5
            more = value != (-1 if group & 16 else 0)
            text += chr(48 + (group | 32 if more else group))
    return text


@pytest.mark.parametrize(
    ("annotations", "changes", "message"),
    [
        ([{"bbox": [0, 0, 5, 5], "category_id": 4}], {}, r"category 4; the categories are 3 \(ship\), 9 \(dock\)"),
        ([{"bbox": [0, 0, 5, 5], "image_id": 99}], {}, "doesn't list, such as 99"),
        ([{}], {}, "without bbox and segmentation"),
        ([{"segmentation": {"size": [4, 4], "counts": [3, 3]}}], {}, "runs sum to 6"),
        ([], {"images": [{"id": 7, "file_name": "gone.png"}]}, "names the image gone.png, which is not among the 2"),
        ([], {"images": [{"id": 7, "file_name": "a.png", "height": 4, "width": 6}]}, "describes an image of 4 x 6 px"),
    ],
)
def test_coco_that_does_not_fit_is_an_error(tmp_path, images, annotations, changes, message) -> None:
    labels = _coco(tmp_path / "c.json", annotations, **changes)
    with pytest.raises(InputError, match=message):
        read_object_labels(labels, images, label_format="coco")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"images": [], "annot'])
def test_a_damaged_coco_file_is_an_error(tmp_path, images, content) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(InputError, match=r"c\.json"):
        read_object_labels(tmp_path / "c.json", images, label_format="coco")


def test_voc_counts_pixels_from_one_and_ignores_difficult_objects(tmp_path, images) -> None:
    _voc(tmp_path / "xml" / "a.xml", _voc_object("ship", 1, 1, 60, 40) + _voc_object("ship", 5, 6, 5, 6, difficult=1))
    _voc(tmp_path / "xml" / "b.xml", "", size="<width>0</width><height>0</height>")
    index = read_object_labels(tmp_path / "xml", images, label_format="voc")
    assert _only(index).boxes_xyxy.tolist() == [[0, 0, 60, 40], [4, 5, 5, 6]]
    assert _only(index).ignored.tolist() == [False, True]
    assert len(_only(index, 1)) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "as XML"),
        ("<html/>", "expected <annotation>, got <html>"),
        ("<annotation><object><name>x</name></object></annotation>", "number in <bndbox/xmin>, got None"),
    ],
)
def test_a_damaged_voc_file_is_an_error(tmp_path, images, content, message) -> None:
    (tmp_path / "xml").mkdir()
    (tmp_path / "xml" / "a.xml").write_text(content)
    with pytest.raises(InputError, match=message):
        read_object_labels(tmp_path / "xml", images, label_format="voc")


def test_yolo_boxes_outlines_empty_and_missing_files(tmp_path, images) -> None:
    write_image(images / "c.png")
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "a.txt").write_text("1 0.5 0.5 0.5 0.25\n")
    (labels / "b.txt").write_text("")
    (tmp_path / "data.yaml").write_text("names:\n  0: ship\n  1: dock\n")
    index = read_object_labels(labels, images, label_format="yolo")
    assert index.classes == ("ship", "dock")
    assert [len(record) for record in index] == [1, 0, 0]
    assert _only(index).boxes_xyxy.tolist() == [[15, 15, 45, 25]]
    (labels / "a.txt").write_text("0 0.1 0.1 0.5 0.1 0.5 0.5\n")
    record = _only(read_object_labels(labels, images, label_format="yolo"))
    assert record.boxes_xyxy[0] == pytest.approx([6, 4, 30, 20])
    assert record.masks.read(np.arange(1), record.extent).sum() == pytest.approx(24 * 16 / 2, rel=0.1)


def test_yolo_files_named_like_lists_are_labels_of_the_images_of_that_name(tmp_path, images) -> None:
    write_image(images / "train.png")
    labels = tmp_path / "labels"
    labels.mkdir()
    for name in ("a", "b", "train"):
        (labels / f"{name}.txt").write_text("0 0.5 0.5 0.5 0.25\n")
    (labels / "test.txt").write_text("images/a.png\n")
    (labels / "README.txt").write_text("made by hand\n")
    index = read_object_labels(labels, images, label_format="yolo", classes=["ship"])
    assert {Path(record.path).name: len(record) for record in index} == {"a.png": 1, "b.png": 1, "train.png": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 .5 .5 .1 .1", r"line 1 of .*a.txt has class 2; the classes are 0 \(ship\)"),
        ("ship .5 .5 .1 .1", "must hold numbers, got 'ship"),
        ("0 .5 .5", "got 2 numbers"),
    ],
)
def test_a_wrong_yolo_line_is_an_error_that_names_it(tmp_path, images, line, message) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text(line)
    with pytest.raises(InputError, match=message):
        read_object_labels(tmp_path / "labels", images, label_format="yolo", classes=["ship"])


def test_dota_corners_become_the_smallest_oriented_box(tmp_path, images) -> None:
    (tmp_path / "labelTxt").mkdir()
    angle = math.radians(-30)
    along, across = np.array([math.cos(angle), math.sin(angle)]), np.array([-math.sin(angle), math.cos(angle)])
    corners = [np.array([30, 20]) + a * along * 10 + b * across * 4 for a, b in ((1, 1), (-1, 1), (-1, -1), (1, -1))]
    words = " ".join(f"{value:.6f}" for value in np.ravel(corners))
    text = f"imagesource:GoogleEarth\ngsd:0.146\n{words} ship 0\n10 10 20 10 20 30 10 30 dock 1\n"
    (tmp_path / "labelTxt" / "a.txt").write_text(text)
    (tmp_path / "labelTxt" / "b.txt").write_text("imagesource:GoogleEarth\ngsd:null\n")
    index = read_object_labels(tmp_path / "labelTxt", images, label_format="dota", classes=["ship", "dock"])
    record = _only(index)
    assert record.oriented_boxes[0] == pytest.approx([30, 20, 20, 8, angle], abs=1e-4)
    assert record.oriented_boxes[1, :4] == pytest.approx([15, 20, 20, 10])
    assert record.oriented_boxes[1, 4] == pytest.approx(-math.pi / 2)
    assert record.ignored.tolist() == [False, True]
    assert _only(index, 1).oriented_boxes.shape == (0, 5)


@pytest.mark.parametrize("line", ["1 2 3 4 ship 0", "a 2 3 4 5 6 7 8 ship 0", "1 2 3 4 5 6 7 8 small vehicle 0"])
def test_a_wrong_dota_line_is_an_error(tmp_path, images, line) -> None:
    (tmp_path / "labelTxt").mkdir()
    (tmp_path / "labelTxt" / "a.txt").write_text(line)
    with pytest.raises(InputError, match=r"line 1 of .*a\.txt must"):
        read_object_labels(tmp_path / "labelTxt", images, label_format="dota")


def test_instance_masks_keep_values_with_gaps(tmp_path, images) -> None:
    mask = np.zeros((40, 60), np.uint16)
    mask[3:7, 5:9] = 2
    mask[20:40, 50:60] = 65_535
    write_mask(tmp_path / "masks" / "a.png", mask)
    write_mask(tmp_path / "masks" / "b.png", np.zeros((40, 60), np.uint16))
    index = read_object_labels(tmp_path / "masks", images, label_format="instances", classes=["nucleus"])
    record = _only(index)
    assert record.boxes_xyxy.tolist() == [[5, 3, 9, 7], [50, 20, 60, 40]]
    window = Window(2, 4, 30, 50)
    masks = record.masks.read(np.arange(2), window)
    assert (masks[0] == (mask == 2)[2:32, 4:54]).all()
    assert (masks[1] == (mask == 65_535)[2:32, 4:54]).all()
    assert len(_only(index, 1).masks.read_crops(np.zeros(0, np.int64), window)) == 0


def test_a_mask_of_jpeg_is_an_error(tmp_path, images) -> None:
    write_mask(tmp_path / "masks" / "a.jpg", np.zeros((40, 60), np.uint8))
    with pytest.raises(InputError, match=r"1 of 1 masks in .* are JPEGs, which changes values .*; write masks as PNG"):
        read_object_labels(tmp_path / "masks", images, label_format="instances")


def test_a_mask_of_colours_is_an_error(tmp_path, images) -> None:
    write_image(tmp_path / "masks" / "a.png")
    with pytest.raises(InputError, match="one band of integers, one value per object, got 3 bands"):
        read_object_labels(tmp_path / "masks", images, label_format="instances")


def test_csv_rows_become_boxes_and_empty_sides_an_image_without_objects(tmp_path, images) -> None:
    (tmp_path / "t.csv").write_text("image_path,xmin,ymin,xmax,ymax,label\na.png,1,2,3,4,tree\nb.png,,,,,\n")
    index = read_object_labels(tmp_path / "t.csv", images, label_format="csv")
    assert _only(index).boxes_xyxy.tolist() == [[1, 2, 3, 4]]
    assert [len(record) for record in index] == [1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have the columns image, xmin, ymin, xmax, ymax and label, got none"),
        ("image,xmin,label\n", "got image, xmin, label"),
        (
            "image,xmin,ymin,xmax,ymax,label\na.png,1,2,x,4,tree\n",
            "line 2 of .* numbers as coordinates, got 1, 2, x, 4",
        ),
        ("image,xmin,ymin,xmax,ymax,label\nno.png,1,2,3,4,tree\n", "line 2 of .* names the image no.png"),
        ("image,xmin,ymin,xmax,ymax,label\n", "expected labelled images, got none"),
    ],
)
def test_a_wrong_csv_is_an_error(tmp_path, images, text, message) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_object_labels(tmp_path / "t.csv", images, label_format="csv")


def test_polygons_on_a_raster_are_placed_by_crs(tmp_path, make_scene) -> None:
    gpd = pytest.importorskip("geopandas")
    scene = make_scene(height=70, width=90)
    import rasterio

    with rasterio.open(scene) as dataset:
        transform, crs = dataset.transform, dataset.crs
    inside = shapely.transform(shapely.box(10, 20, 30, 40), lambda xy: np.array([transform @ tuple(p) for p in xy]))
    outside = shapely.transform(shapely.box(500, 20, 530, 40), lambda xy: np.array([transform @ tuple(p) for p in xy]))
    frame = gpd.GeoDataFrame({"kind": ["house", "barn"]}, geometry=[inside, outside], crs=crs).to_crs(4326)
    frame.to_file(tmp_path / "b.geojson")
    index = read_object_labels(tmp_path / "b.geojson", scene, label_format="polygons", attribute="kind")
    record = _only(index)
    assert record.boxes_xyxy[0] == pytest.approx([10, 20, 30, 40], abs=0.02)
    assert index.class_counts() == {"house": 1}
    assert record.masks.read(np.arange(1), record.extent)[0, 20:40, 10:30].all()


def test_class_numbers_of_polygons_stay_whole_where_others_are_null(tmp_path, images) -> None:
    square = shapely.geometry.mapping(shapely.box(5, 6, 15, 26))
    kinds = [1, 2.5, None]
    features = [{"type": "Feature", "properties": {"kind": kind}, "geometry": square} for kind in kinds]
    (tmp_path / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    index = read_object_labels(tmp_path / "a.geojson", images / "a.png", label_format="polygons", attribute="kind")
    assert index.class_counts() == {"1": 1, "2.5": 1, "null": 1}


def test_polygons_on_a_plain_image_are_pixels(tmp_path, images) -> None:
    square = shapely.geometry.mapping(shapely.box(5, 6, 15, 26))
    features = [{"type": "Feature", "properties": {}, "geometry": square}]
    (tmp_path / "geo").mkdir()
    (tmp_path / "geo" / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    (tmp_path / "geo" / "b.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": []}))
    index = read_object_labels(tmp_path / "geo", images, label_format="polygons", classes=["cell"])
    assert _only(index).boxes_xyxy.tolist() == [[5, 6, 15, 26]]
    assert len(_only(index, 1)) == 0


def test_bad_boxes_are_clipped_or_dropped_and_counted_in_one_warning(tmp_path, images) -> None:
    rows = ["a.png,-10,2,30,40,x", "a.png,100,2,130,20,x", "a.png,5,5,5,9,x", "a.png,9,9,5,5,x", "a.png,1,1,60.8,9,x"]
    (tmp_path / "t.csv").write_text("image,xmin,ymin,xmax,ymax,label\n" + "\n".join(rows))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        index = read_object_labels(tmp_path / "t.csv", images, label_format="csv", names=["a"])
    assert _only(index).boxes_xyxy.tolist() == [[0, 2, 30, 40], [1, 1, 60, 9]]
    (warning,) = caught
    table = tmp_path / "t.csv"
    assert str(warning.message) == (
        f"labels of 1 images, the first {table}: kept 2 objects; 2 dropped: no area (first: x at 5 5 5 9 in {table}), "
        f"1 dropped: outside the image (first: x at 100 2 130 20 in {table}), 1 clipped at the image's edge (first: "
        f"x at -10 2 30 40 in {table})"
    )
    assert Path(warning.filename).name == Path(__file__).name


def test_an_outline_past_the_edge_has_the_box_of_its_part_inside(tmp_path, images) -> None:
    # Triangles whose bounds reach farther into the image than they do, and one whose bounds alone reach into it.
    rings = [[-10, 0, 10, 0, -10, 20]], [[-10, 30, 5, 45, -10, 60]]
    labels = _coco(tmp_path / "c.json", [{"segmentation": ring} for ring in rings])
    with pytest.warns(UserWarning, match=r"kept 1 objects; 1 dropped: outside the image .*, 1 clipped"):
        record = _only(read_object_labels(labels, images, label_format="coco"))
    assert record.boxes_xyxy.tolist() == [[0, 0, 10, 10]]


def test_degenerate_outlines_and_corners_on_a_line_are_dropped_and_counted(tmp_path, images) -> None:
    flat = {"bbox": [0, 0, 9, 9], "segmentation": [[0, 0, 9, 9, 3, 3]]}
    good = {"segmentation": [[20, 10, 26, 10, 26, 14]]}
    with pytest.warns(UserWarning, match="kept 1 objects; 1 dropped: no area"):
        read_object_labels(_coco(tmp_path / "c.json", [flat, good]), images, label_format="coco")
    (tmp_path / "l").mkdir()
    (tmp_path / "l" / "a.txt").write_text("0 0 10 10 20 20 30 30 ship 0")
    with pytest.warns(UserWarning, match="kept 0 objects; 1 dropped: no area"):
        read_object_labels(tmp_path / "l", images, label_format="dota", names=["a"])


def test_an_outline_between_pixel_centres_still_has_a_mask(tmp_path, images) -> None:
    outlines = [
        {"segmentation": [[10.6, 5.6, 11.4, 5.6, 11.4, 6.4, 10.6, 6.4]]},
        {"segmentation": [[1, 1, 9, 1, 9, 5]]},
    ]
    record = _only(read_object_labels(_coco(tmp_path / "c.json", outlines), images, label_format="coco"))
    masks = record.masks.read(np.arange(2), record.extent)
    assert masks[0].sum() == 4
    assert masks[0, 5:7, 10:12].all()


def test_images_without_a_label_file_are_left_out_with_a_warning(tmp_path, images) -> None:
    _voc(tmp_path / "xml" / "a.xml", _voc_object("ship", 1, 1, 6, 4))
    with pytest.warns(UserWarning, match=r"1 of 2 images have no labels .* left out, the first .*b\.png"):
        index = read_object_labels(tmp_path / "xml", images, label_format="voc")
    assert len(index) == 1


def test_a_label_file_without_image_is_an_error(tmp_path, images) -> None:
    _voc(tmp_path / "xml" / "z.xml", "")
    with pytest.raises(InputError, match=r"z\.xml names the image z, which is not among the 2"):
        read_object_labels(tmp_path / "xml", images, label_format="voc")


def test_unknown_classes_are_named_with_the_known_ones_and_may_be_skipped(tmp_path, images) -> None:
    _voc(tmp_path / "xml" / "a.xml", _voc_object("ship", 1, 1, 6, 4) + _voc_object("crane", 1, 1, 6, 4))
    options = {"label_format": "voc", "names": ["a.png"]}
    with pytest.raises(InputError, match="class crane; the classes are ship, dock: add it to classes or skip_classes"):
        read_object_labels(tmp_path / "xml", images, classes=["ship", "dock"], **options)
    index = read_object_labels(tmp_path / "xml", images, classes=["ship"], skip_classes=["crane"], **options)
    assert index.class_counts() == {"ship": 1}


def test_a_list_of_names_chooses_images_and_wrong_names_are_errors(tmp_path, images) -> None:
    labels = _coco(tmp_path / "c.json", [{"bbox": [1, 2, 10, 4]}])
    index = read_object_labels(labels, images, label_format="coco", names=["b"])
    assert [Path(record.path).name for record in index] == ["b.png"]
    with pytest.raises(InputError, match="the list of names names the image x"):
        read_object_labels(labels, images, label_format="coco", names=["x"])


def test_a_name_that_fits_two_images_needs_its_folder(tmp_path, images) -> None:
    write_image(images / "more" / "a.png")
    (tmp_path / "t.csv").write_text("image,xmin,ymin,xmax,ymax,label\na.jpg,1,2,3,4,tree\n")
    with pytest.raises(InputError, match=r"names the image a\.jpg"):
        read_object_labels(tmp_path / "t.csv", images, label_format="csv")
    (tmp_path / "t.csv").write_text("image,xmin,ymin,xmax,ymax,label\nmore/a.png,1,2,3,4,tree\n")
    index = read_object_labels(tmp_path / "t.csv", images, label_format="csv", names=["more/a"])
    assert Path(index.records[0].path) == images / "more" / "a.png"


def test_unknown_formats_and_missing_labels_are_errors(tmp_path, images) -> None:
    with pytest.raises(ConfigError, match="one of coco, csv, dota, instances, polygons, voc, yolo, got 'kitti'"):
        read_object_labels(tmp_path, images, label_format="kitti")
    with pytest.raises(InputError, match="no labels at"):
        read_object_labels(tmp_path / "none", images, label_format="voc")
    with pytest.raises(InputError, match="are a single file, got the folder"):
        read_object_labels(tmp_path, images, label_format="coco")
