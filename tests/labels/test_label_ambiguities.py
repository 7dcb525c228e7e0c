"""Labels that could be read in two ways are refused, and outlines become what the head learns."""

import json

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import shapely
from label_cases import write_image, write_mask

from perf_vit.errors import ConfigError, DataWarning, InputError
from perf_vit.geometry.boxes import oriented_box_corners
from perf_vit.labels.objects import read_object_labels
from perf_vit.writers import write_coco_labels

SHIPS = np.array([[20.0, 15, 16, 6, 0.6], [40, 25, 10, 5, -1.2]])
CORNERS = oriented_box_corners(SHIPS)


@pytest.fixture
def images(tmp_path):
    write_image(tmp_path / "images" / "a.png")
    return tmp_path / "images"


def write_labels(folder, label_format: str, outlines=CORNERS):
    """Outlines of ships in a.png, of 40 x 60 px."""
    if label_format == "dota":
        lines = [" ".join(map(str, ring.ravel())) + " ship 0" for ring in outlines]
    else:
        lines = ["0 " + " ".join(map(str, (np.asarray(ring) / [60, 40]).ravel())) for ring in outlines]
    if label_format in ("dota", "yolo"):
        (folder / label_format).mkdir()
        (folder / label_format / "a.txt").write_text("\n".join(lines))
        return folder / label_format
    if label_format == "polygons":
        gpd.GeoDataFrame(geometry=[shapely.Polygon(ring) for ring in outlines]).to_parquet(folder / "a.parquet")
        return folder / "a.parquet"
    annotations = [
        {
            "id": number, "image_id": 1, "category_id": 4, "segmentation": [np.ravel(ring).tolist()],
            "bbox": [*ring.min(0).tolist(), *np.ptp(ring, axis=0).tolist()],
        }
        for number, ring in enumerate(outlines, 1)
    ]  # fmt: skip
    content = {"images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 4, "name": "ship"}]}
    (folder / "a.json").write_text(json.dumps({**content, "annotations": annotations}))
    return folder / "a.json"


@pytest.mark.parametrize("label_format", ["dota", "yolo", "coco", "polygons"])
def test_four_corners_are_oriented_boxes_where_these_are_asked_for(images, tmp_path, label_format) -> None:
    labels = write_labels(tmp_path, label_format)
    read = {"label_format": label_format, "classes": ["ship"]}
    (record,) = read_object_labels(labels, images, oriented=True, **read)
    found = record.oriented_boxes
    assert oriented_box_corners(found)[:, :, 0].min(1) == pytest.approx(CORNERS[:, :, 0].min(1), abs=1e-4)
    np.testing.assert_allclose(found, SHIPS, atol=1e-4)
    (other,) = read_object_labels(labels, images, **read)
    assert (other.masks is None) is (label_format == "dota")
    assert (other.oriented_boxes is None) is (label_format != "dota")
    np.testing.assert_allclose(other.boxes_xyxy, record.boxes_xyxy, atol=1e-4)


def test_outlines_of_more_points_give_the_smallest_box_and_upright_ones_are_counted(images, tmp_path) -> None:
    hexagon = np.array([[5.0, 5], [9, 2], [20, 2], [24, 5], [20, 8], [9, 8]])
    folder = write_labels(tmp_path, "yolo", [hexagon])
    with (folder / "a.txt").open("a") as file:
        file.write("\n0 0.5 0.5 0.1 0.2\n")
    with pytest.warns(DataWarning, match="1 upright boxes without outline, kept as they are"):
        (record,) = read_object_labels(folder, images, label_format="yolo", classes=["ship"], oriented=True)
    np.testing.assert_allclose(record.oriented_boxes[0], [14.5, 5, 19, 6, 0], atol=1e-6)
    assert sorted(record.oriented_boxes[1, 2:4]) == pytest.approx([6, 8])


def test_boxes_alone_are_no_oriented_boxes(images, tmp_path) -> None:
    (tmp_path / "yolo").mkdir()
    (tmp_path / "yolo" / "a.txt").write_text("0 0.5 0.5 0.1 0.2\n")
    (record,) = read_object_labels(tmp_path / "yolo", images, label_format="yolo", classes=["ship"], oriented=True)
    assert record.oriented_boxes is None


def test_polygons_and_instances_of_several_classes_need_a_column(images, tmp_path) -> None:
    labels = write_labels(tmp_path, "polygons")
    with pytest.raises(ConfigError, match="without attribute are of one class, got 2 classes; set attribute"):
        read_object_labels(labels, images, label_format="polygons", classes=["ship", "dock"])
    write_mask(tmp_path / "masks" / "a.png", np.eye(40, 60, dtype=np.uint8))
    with pytest.raises(ConfigError, match="format instances are of one class, got 2 classes"):
        read_object_labels(tmp_path / "masks", images, label_format="instances", classes=["ship", "dock"])


def test_nodata_of_an_instance_mask_is_no_object(images, tmp_path) -> None:
    numbers = np.zeros((40, 60), np.uint8)
    numbers[5:9, 5:9], numbers[20:, 30:] = 3, 255
    (tmp_path / "masks").mkdir()
    profile = {"driver": "GTiff", "height": 40, "width": 60, "count": 1, "dtype": "uint8", "nodata": 255}
    with rasterio.open(tmp_path / "masks" / "a.tif", "w", **profile) as dataset:
        dataset.write(numbers, 1)
    (record,) = read_object_labels(tmp_path / "masks", images, label_format="instances", classes=["cell"])
    assert record.boxes_xyxy.tolist() == [[5, 5, 9, 9]]


@pytest.mark.parametrize("label_format", ["yolo", "voc", "dota", "polygons", "coco"])
def test_an_image_that_is_labelled_twice_is_refused(tmp_path, label_format) -> None:
    write_image(tmp_path / "images" / "sub" / "a.png")
    folder = tmp_path / "labels"
    (folder / "sub").mkdir(parents=True)
    for place in (folder, folder / "sub"):
        if label_format == "voc":
            (place / "a.xml").write_text("<annotation></annotation>")
        elif label_format == "polygons":
            gpd.GeoDataFrame(geometry=[shapely.box(1, 1, 9, 9)]).to_parquet(place / "a.parquet")
        else:
            (place / "a.txt").write_text("0 0.5 0.5 0.1 0.2" if label_format == "yolo" else "1 1 5 1 5 5 1 5 ship 0")
    if label_format == "coco":
        listed = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "sub/a.png"}]
        folder = tmp_path / "l.json"
        folder.write_text(json.dumps({"images": listed, "annotations": [], "categories": [{"id": 1, "name": "a"}]}))
    with pytest.raises(InputError, match=r"a\.png is labelled (2 times|twice), by "):
        read_object_labels(folder, tmp_path / "images", label_format=label_format, classes=["ship"])


def test_polygons_that_lie_on_no_image_are_refused_with_their_place(tmp_path) -> None:
    write_image(tmp_path / "images" / "a.png")
    gpd.GeoDataFrame(geometry=[shapely.box(700, 1, 900, 9)]).to_parquet(tmp_path / "l.parquet")
    with pytest.raises(InputError, match=r"lie on none of 1 images, .*x 700 to 900, y 1 to 9 \(without CRS\)"):
        read_object_labels(tmp_path / "l.parquet", tmp_path / "images", label_format="polygons", classes=["ship"])


def test_category_ids_are_those_of_the_labels_and_survive_writing(images, tmp_path) -> None:
    content = {
        "images": [{"id": 9, "file_name": "a.png"}],
        # As Roboflow exports: a supercategory of the same name.
        "categories": [{"id": 0, "name": "ship"}, {"id": 6, "name": "ship"}, {"id": 3, "name": "dock"}],
        "annotations": [{"id": 1, "image_id": 9, "category_id": 6, "bbox": [2, 2, 8, 8]}],
    }
    (tmp_path / "l.json").write_text(json.dumps(content))
    index = read_object_labels(tmp_path / "l.json", images, label_format="coco", classes=["dock", "ship", "crane"])
    assert index.category_ids == (3, 6, 7)
    write_coco_labels(tmp_path / "again.json", index, images)
    again = read_object_labels(tmp_path / "again.json", images, label_format="coco", classes=["ship", "dock"])
    assert again.category_ids == (6, 3)
    content["categories"][2]["id"] = 6
    (tmp_path / "l.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="lists 2 categories of id 6; give each its own id"):
        read_object_labels(tmp_path / "l.json", images, label_format="coco")


@pytest.mark.parametrize(
    ("image_id", "category_id", "expected"), [("a-1", 4, (4,)), (9, "ship", None), (9.0, 4.0, (4,))]
)
def test_ids_of_coco_files_may_be_text(images, tmp_path, image_id, category_id, expected) -> None:
    content = {
        "images": [{"id": image_id, "file_name": "a.png"}],
        "categories": [{"id": category_id, "name": "ship"}],
        "annotations": [{"id": 1, "image_id": image_id, "category_id": category_id, "bbox": [2, 2, 8, 8]}],
    }
    (tmp_path / "l.json").write_text(json.dumps(content))
    index = read_object_labels(tmp_path / "l.json", images, label_format="coco")
    assert index.category_ids == expected
    assert index.records[0].boxes_xyxy.tolist() == [[2, 2, 10, 10]]
    # Names of classes stand for ids in text where labels are written: these count from 1.
    write_coco_labels(tmp_path / "again.json", index, images)
    assert json.loads((tmp_path / "again.json").read_text())["categories"] == [
        {"id": (expected or (1,))[0], "name": "ship"}
    ]
