"""Each script on a miniature of the publisher's layout."""

import csv
import json
import runpy
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
from PIL import Image
from preparing import ROOT, load_prepare

from perf_vit.data import read_slide_table
from perf_vit.errors import InputError, OutputError
from perf_vit.labels.image_folder import find_label_pairs
from perf_vit.labels.objects import read_object_labels

NAMES = sorted(path.parent.name for path in ROOT.glob("*/prepare.py"))


def _image(path: Path, height: int = 40, width: int = 60, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(1, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_every_data_set_has_a_card_with_licence_tree_checksums_and_citation(name: str) -> None:
    card = (ROOT / name / "README.md").read_text()
    for heading in ("## Licence", "## Folder tree", "## Checksums", "## Prepare", "## Citation"):
        assert heading in card, heading
    assert f"python datasets/{name}/prepare.py" in card
    assert "https://" in card


def test_every_folder_has_both_files_and_is_no_package() -> None:
    folders = sorted(path for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__")
    assert [folder.name for folder in folders] == NAMES
    assert not list(ROOT.rglob("__init__.py"))


def test_bccd_splits_become_coco_files(tmp_path) -> None:
    root = tmp_path / "BCCD"
    for number in range(3):
        _image(root / "JPEGImages" / f"BloodImage_0000{number}.jpg", seed=number)
        name = "RBC" if number else "Platelets"
        box = "<bndbox><xmin>5</xmin><ymin>6</ymin><xmax>15</xmax><ymax>26</ymax></bndbox>"
        text = f"<annotation><object><name>{name}</name><difficult>0</difficult>{box}</object></annotation>"
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"BloodImage_0000{number}.xml").write_text(text)
    prepare = load_prepare("bccd").prepare
    prepare(root, tmp_path / "without")
    assert [path.name for path in (tmp_path / "without").iterdir()] == ["all.json"]
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for split, numbers in (("train", (0, 1)), ("val", (2,)), ("trainval", (0, 1, 2))):
        lines = "".join(f"BloodImage_0000{number}\n" for number in numbers)
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(lines)
    prepare(root, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train.json", "val.json"]
    index = read_object_labels(tmp_path / "out" / "train.json", root / "JPEGImages", label_format="coco")
    assert index.class_counts() == {"RBC": 1, "WBC": 0, "Platelets": 1}
    assert index.records[0].boxes_xyxy.tolist() == [[4, 5, 15, 26]]


def test_dsb2018_masks_are_joined_and_the_first_keeps_shared_pixels(tmp_path, capsys) -> None:
    folder = tmp_path / "stage1_train" / "00ae65c1c663"
    _image(folder / "images" / "00ae65c1c663.png")
    (folder / "masks").mkdir()
    masks = np.zeros((2, 40, 60), np.uint8)
    masks[0, 3:9, 4:12] = masks[1, 8:20, 10:30] = 255
    Image.fromarray(masks[0]).save(folder / "masks" / "a.png")
    Image.fromarray(masks[1]).convert("RGBA").save(folder / "masks" / "b.png")
    load_prepare("dsb2018").prepare(tmp_path / "stage1_train", tmp_path / "out")
    assert "1 images, 2 nuclei; 2 pixels lay under two masks" in capsys.readouterr().out
    joined = np.asarray(Image.open(tmp_path / "out" / "instances" / "00ae65c1c663.png"))
    assert (joined == np.where(masks[0] > 0, 1, np.where(masks[1] > 0, 2, 0))).all()


def test_xview_boxes_become_coco_and_what_has_no_image_or_name_is_counted(tmp_path, capsys) -> None:
    _image(tmp_path / "xView" / "train_images" / "2355.tif")
    _image(tmp_path / "xView" / "train_images" / "40.tif")
    features = [
        _xview_feature("2355.tif", "10,11,20,31", 73),
        _xview_feature("2355.tif", "50,30,70,45", 18),
        _xview_feature("2355.tif", "1,1,5,5", 75),
        _xview_feature("1395.tif", "1,1,5,5", 73),
    ]
    content = {"type": "FeatureCollection", "features": features}
    (tmp_path / "xView" / "xView_train.geojson").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="kept 2 objects; 1 clipped at the image's edge"):
        load_prepare("xview").prepare(tmp_path / "xView", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "2 images, 2 objects" in printed
    assert "'of type_id 75, which has no name': 1, 'of the missing image 1395.tif': 1" in printed
    index = read_object_labels(
        tmp_path / "out" / "train.json", tmp_path / "xView" / "train_images", label_format="coco"
    )
    assert len(index.classes) == 60
    assert {k: v for k, v in index.class_counts().items() if v} == {"Building": 1, "Small Car": 1}


def _xview_feature(image: str, box: str, type_id: int) -> dict:
    values = {"image_id": image, "bounds_imcoords": box, "type_id": type_id, "cat_id": "1040010028371A00"}
    return {"type": "Feature", "geometry": {"type": "Point", "coordinates": [0, 0]}, "properties": values}


def test_dota_images_that_are_tiffs_are_not_replaced(tmp_path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "P0.tif").write_bytes(b"mine")
    (tmp_path / "labelTxt").mkdir()
    (tmp_path / "labelTxt" / "P0.txt").touch()
    with pytest.raises(OutputError, match=r"P0\.tif would replace the input"):
        load_prepare("dota").prepare(tmp_path, tmp_path)
    assert (tmp_path / "images" / "P0.tif").read_bytes() == b"mine"


def test_dota_images_become_tiled_and_keep_their_pixels_and_labels(tmp_path) -> None:
    source = tmp_path / "train"
    image = _image(source / "images" / "P0001.png", 600, 700)
    (source / "labelTxt").mkdir()
    lines = "imagesource:GoogleEarth\ngsd:0.146343590398\n20 20 60 40 50 60 10 40 small-vehicle 0\n"
    (source / "labelTxt" / "P0001.txt").write_text(lines + "1 1 9 1 9 9 1 9 plane 1\n")
    load_prepare("dota").prepare(source, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rasterio.open(tmp_path / "out" / "images" / "P0001.tif") as raster:
            assert raster.profile["tiled"]
            assert (raster.read().transpose(1, 2, 0) == np.asarray(Image.open(image))).all()
    index = read_object_labels(tmp_path / "out" / "labelTxt", tmp_path / "out" / "images", label_format="dota")
    assert index.counts["ignored"] == 1
    assert index.class_counts() == {"plane": 0, "small-vehicle": 1}
    assert not list((tmp_path / "out").rglob("*.part"))


@pytest.mark.parametrize(
    ("folders", "chosen", "given"),
    [
        (["labelTxt-v1.0/labelTxt", "labelTxt-v1.0/trainset_reclabelTxt"], "labelTxt-v1.0/labelTxt", ""),
        (["labelTxt-v1.5/DOTA-v1.5_train", "labelTxt-v1.5/DOTA-v1.5_train_hbb"], "labelTxt-v1.5/DOTA-v1.5_train", ""),
        (["labelTxt-v1.0/labelTxt", "labelTxt-v1.5/DOTA-v1.5_train"], "labelTxt-v1.5/DOTA-v1.5_train", None),
    ],
)
def test_dota_labels_of_todays_archives_are_found(tmp_path, folders, chosen, given) -> None:
    source, prepare = tmp_path / "train", load_prepare("dota").prepare
    _image(source / "images" / "P0001.png")
    for folder in folders:
        (source / folder).mkdir(parents=True)
        name = "ship" if folder == chosen else "plane"
        (source / folder / "P0001.txt").write_text(f"gsd:0.1\n20 20 30 20 30 30 20 30 {name} 0\n")
    if given is None:
        with pytest.raises(InputError, match=r"several folders of labels: .*choose one with --labels"):
            prepare(source, tmp_path / "out")
    prepare(source, tmp_path / "out", labels=chosen if given is None else given)
    index = read_object_labels(tmp_path / "out" / "labelTxt", tmp_path / "out" / "images", label_format="dota")
    assert index.class_counts() == {"ship": 1}


def test_dota_without_labels_is_refused_before_anything_is_written(tmp_path) -> None:
    _image(tmp_path / "images" / "P0.png")
    with pytest.raises(InputError, match=r"expected label files in .*labelTxt-v1\.0/labelTxt, got none"):
        load_prepare("dota").prepare(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shiprsimagenet_gives_boxes_and_oriented_boxes(tmp_path) -> None:
    root = tmp_path / "ShipRSImageNet"
    categories = [{"id": 1, "name": "Other Ship"}, {"id": 2, "name": "Dock"}]
    for split in ("train", "val"):
        _image(root / "VOC_Format" / "JPEGImages" / f"{split}.bmp")
        annotation = {"id": 1, "image_id": 5, "category_id": 1, "bbox": [10, 8, 30, 20], "iscrowd": 0}
        corners = [10, 18, 30, 8, 40, 18, 20, 28]
        # Some files lack COCO's outer list.
        annotation["segmentation"] = corners if split == "val" else [corners]
        content = {"images": [{"id": 5, "file_name": f"{split}.bmp", "height": 40, "width": 60}]}
        content |= {"annotations": [annotation], "categories": categories}
        (root / "COCO_Format").mkdir(exist_ok=True)
        (root / "COCO_Format" / f"ShipRSImageNet_bbox_{split}_level_1.json").write_text(json.dumps(content))
    load_prepare("shiprsimagenet").prepare(root, tmp_path / "out", level=1)
    images = root / "VOC_Format" / "JPEGImages"
    index = read_object_labels(tmp_path / "out" / "train.json", images, label_format="coco", names=["train"])
    assert index.class_counts() == {"Other Ship": 1, "Dock": 0}
    oriented = read_object_labels(tmp_path / "out" / "val_labelTxt", images, label_format="dota", names=["val"])
    assert oriented.classes == ("Other-Ship",)
    assert oriented.records[0].oriented_boxes[0, :2] == pytest.approx([25, 18], abs=1.5)


@pytest.mark.parametrize(
    ("product", "image_name", "labels_name"),
    [
        (
            "PS-RGB",
            "PS-RGB/SN2_buildings_train_AOI_2_Vegas_PS-RGB_img{}.tif",
            "geojson_buildings/SN2_buildings_train_AOI_2_Vegas_geojson_buildings_img{}.geojson",
        ),
        (
            "RGB-PanSharpen",
            "RGB-PanSharpen/RGB-PanSharpen_AOI_2_Vegas_img{}.tif",
            "geojson/buildings/buildings_AOI_2_Vegas_img{}.geojson",
        ),
    ],
)
def test_spacenet_labels_get_their_images_names(tmp_path, make_scene, capsys, product, image_name, labels_name) -> None:
    source = tmp_path / "AOI_2_Vegas"
    scene = make_scene(height=65, width=65)
    with rasterio.open(scene) as raster:
        corners = np.array([raster.transform @ p for p in ((10, 10), (30, 10), (30, 20), (10, 20))])
    outline = shapely.geometry.mapping(shapely.Polygon(corners))
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32637"}}
    for number, features in ((1, [{"type": "Feature", "properties": {}, "geometry": outline}]), (25, [])):
        image = source / image_name.format(number)
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(scene.read_bytes())
        labels = source / labels_name.format(number)
        labels.parent.mkdir(parents=True, exist_ok=True)
        labels.write_text(json.dumps({"type": "FeatureCollection", "crs": crs, "features": features}))
    prepare = load_prepare("spacenet").prepare
    prepare(source, tmp_path / "out")
    assert "2 images, 1 buildings, 1 without" in capsys.readouterr().out
    pairs = find_label_pairs(source / product, tmp_path / "out" / "labels")
    assert [image.stem for image, _ in pairs] == [labels.stem for _, labels in pairs]
    assert len(pairs) == 2
    labels.unlink()
    with pytest.raises(InputError, match=r"has no labels .*img25"):
        prepare(source, tmp_path / "out")


def test_camelyon16_areas_lose_what_is_excluded_and_normal_slides_have_none(tmp_path) -> None:
    source = tmp_path / "CAMELYON16" / "training"
    for name in ("normal/normal_001.tif", "tumor/tumor_001.tif"):
        _image(source / name, 300, 400)
    (source / "lesion_annotations").mkdir()
    outlines = {"Tumor": (20, 30, 120, 130), "_0": (200, 200, 220, 210), "_2": (50, 60, 70, 80)}
    text = "".join(_asap(group, shapely.box(*box)) for group, box in outlines.items())
    (source / "lesion_annotations" / "tumor_001.xml").write_text(
        f'<?xml version="1.0"?><ASAP_Annotations><Annotations>{text}</Annotations></ASAP_Annotations>'
    )
    load_prepare("camelyon16").prepare(source, tmp_path / "out")
    with (tmp_path / "out" / "slides.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["slide"], r["label"], r["num_areas"], r["area_px"]) for r in rows] == [
        ("normal/normal_001.tif", "normal", "0", "0"),
        ("tumor/tumor_001.tif", "tumor", "2", str(100 * 100 - 20 * 20 + 20 * 10)),
    ]
    slides = read_slide_table(tmp_path / "out" / "slides.csv", source)
    assert slides.paths == (str(source / "normal" / "normal_001.tif"), str(source / "tumor" / "tumor_001.tif"))
    assert [slides.classes[label] for label in slides.labels] == ["normal", "tumor"]
    index = read_object_labels(
        tmp_path / "out" / "labels", source, label_format="polygons", attribute="class", classes=["tumor"]
    )
    record = next(record for record in index if len(record))
    assert record.boxes_xyxy.tolist() == [[20, 30, 120, 130], [200, 200, 220, 210]]
    masks = record.masks.read(np.arange(2), record.extent)
    assert masks.sum(axis=(1, 2)).tolist() == [100 * 100 - 20 * 20, 200]
    assert not masks[0, 60:80, 50:70].any()


def _asap(group: str, polygon: shapely.Polygon) -> str:
    xy = list(polygon.exterior.coords)[:-1]
    corners = "".join(f'<Coordinate Order="{i}" X="{x}" Y="{y}" />' for i, (x, y) in enumerate(xy))
    kind = f'Name="Annotation 0" Type="Polygon" PartOfGroup="{group}" Color="#F4FA58"'
    return f"<Annotation {kind}><Coordinates>{corners}</Coordinates></Annotation>"


def test_camelyon16_of_the_bucket_has_a_table_of_test_slides(tmp_path) -> None:
    source = tmp_path / "CAMELYON16"
    for name in ("normal_001", "tumor_001", "test_001", "test_002"):
        _image(source / "images" / f"{name}.tif", 300, 400)
    (source / "annotations").mkdir()
    text = _asap("Tumor", shapely.box(20, 30, 120, 130))
    for name in ("tumor_001", "test_002"):
        (source / "annotations" / f"{name}.xml").write_text(
            f'<?xml version="1.0"?><ASAP_Annotations><Annotations>{text}</Annotations></ASAP_Annotations>'
        )
    load_prepare("camelyon16").prepare(source, tmp_path / "out")
    tables = {}
    for part in ("slides", "test"):
        table = read_slide_table(tmp_path / "out" / f"{part}.csv", source)
        names = [Path(path).stem for path in table.paths]
        tables[part] = dict(zip(names, [table.classes[label] for label in table.labels], strict=True))
    assert tables == {
        "slides": {"normal_001": "normal", "tumor_001": "tumor"},
        "test": {"test_001": "normal", "test_002": "tumor"},
    }
    assert len(list((tmp_path / "out" / "labels").iterdir())) == 4


def test_a_tumor_slide_without_annotations_is_an_error(tmp_path) -> None:
    _image(tmp_path / "training" / "tumor" / "tumor_001.tif")
    with pytest.raises(InputError, match=r"has no annotations .*download or unpack them there"):
        load_prepare("camelyon16").prepare(tmp_path / "training", tmp_path / "out")


def test_fair_tiles_are_stitched_where_web_mercator_puts_them(tmp_path, capsys) -> None:
    zoom, x, y = 21, 1_238_470, 1_046_543
    source = tmp_path / "1"
    tiles = {(0, 0): 10, (1, 0): 20, (1, 1): 30}
    for (right, down), value in tiles.items():
        source.mkdir(exist_ok=True)
        pixels = np.full((256, 256, 3), value, np.uint8)
        Image.fromarray(pixels).save(source / f"OAM-{x + right}-{y + down}-{zoom}.png")
    lon = [(x + 1 + share) / 2**zoom * 360 - 180 for share in (0.25, 0.75)]
    lat = [np.degrees(np.arctan(np.sinh(np.pi * (1 - 2 * (y + share) / 2**zoom)))) for share in (0.5, 1.0)]
    outline = shapely.geometry.mapping(shapely.box(lon[0], lat[1], lon[1], lat[0]))
    features = [{"type": "Feature", "properties": {"osm_id": None}, "geometry": outline}]
    (source / "labels.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    load_prepare("fair_buildings").prepare(source, tmp_path / "out")
    assert "1: 3 tiles, (512, 512) px, 1 buildings" in capsys.readouterr().out
    with rasterio.open(tmp_path / "out" / "images" / "1.tif") as raster:
        pixels = raster.read()
        assert raster.crs.to_epsg() == 3857
    for (right, down), value in tiles.items():
        part = pixels[:, 256 * down : 256 * down + 256, 256 * right : 256 * right + 256]
        assert (part[:3] == value).all()
        assert (part[3] == 255).all()
    assert (pixels[3, 256:, :256] == 0).all()
    index = read_object_labels(tmp_path / "out" / "labels", tmp_path / "out" / "images", label_format="polygons")
    assert index.records[0].boxes_xyxy[0] == pytest.approx([320, 128, 448, 256], abs=0.1)


def test_a_script_says_what_is_wrong_in_one_line(tmp_path, monkeypatch) -> None:
    script = str(ROOT / "dsb2018" / "prepare.py")
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"^error: expected folders ID/images and ID/masks in [^\n]*$"):
        runpy.run_path(script, run_name="__main__")
