"""First configs from the user's files: what they hold, and that the printed commands run."""

import itertools
import json
import shlex
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import shapely
import yaml
from affine import Affine
from command_line import call
from PIL import Image
from synthetic_slide import make_slide

import perf_vit
from perf_vit.data import ClassificationDataConfig, ClassificationSplitConfig, read_image_targets, segmentation
from perf_vit.errors import InputError, OptionError, OutputError
from perf_vit.sources import open_input
from perf_vit.workflows.first_config import FirstConfig, scene
from perf_vit.workflows.registry import TASKS
from perf_vit.workflows.train import read_run

CRS, PLACE = "EPSG:32637", Affine(0.5, 0, 401_000, 0, -0.5, 4_510_000)
SIDE = 160
WHERE = ["trainer.accelerator=cpu", "trainer.report=false"]
FEW = ["trainer.max_epochs=1", "data.tile_px=64", "data.tiles_per_epoch=4", *WHERE]
SMALL_VIT = "model.backbone_kwargs={depth: 1, embed_dim: 32, num_heads: 2, attn_kwargs: {num_features: 8}}"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_scene(path: str, *, num_bands: int = 3, dtype: str = "uint8", seed: int = 0) -> None:
    pixels = np.random.default_rng(seed).integers(1, 200, (num_bands, SIDE, SIDE)).astype(dtype)
    options = {"driver": "GTiff", "crs": CRS, "transform": PLACE, "height": SIDE, "width": SIDE}
    with rasterio.open(path, "w", count=num_bands, dtype=dtype, **options) as file:
        file.write(pixels)


def write_mask(path: str, values: np.ndarray) -> None:
    with rasterio.open(
        path, "w", driver="GTiff", crs=CRS, transform=PLACE, height=SIDE, width=SIDE, count=1, dtype="uint8"
    ) as file:
        file.write(values.astype("uint8"), 1)


def write_polygons(path: str, columns: dict[str, list], side_px: int = 20) -> None:
    num = len(next(iter(columns.values())))
    lefts = [(10 + 37 * index % 120, 12 + 53 * index % 120) for index in range(num)]
    boxes = [shapely.box(*(PLACE @ (x, y + side_px)), *(PLACE @ (x + side_px, y))) for x, y in lefts]
    gpd.GeoDataFrame(columns, geometry=boxes, crs=CRS).to_file(path)


def config_of(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def run_commands(made: FirstConfig, *overrides: str) -> None:
    train, evaluate, predict = (shlex.split(command) for command in made.commands)
    assert [command[:2] for command in (train, evaluate, predict)] == [
        ["perf-vit", "train"],
        ["perf-vit", "evaluate"],
        ["perf-vit", "predict"],
    ]
    assert call([*train[1:], *overrides]) == 0
    assert call([*evaluate[1:], "--device", "cpu"]) == 0
    assert call([*predict[1:], "--device", "cpu"]) == 0
    assert Path(predict[predict.index("--output") + 1]).exists()
    assert Path(evaluate[evaluate.index("--json") + 1]).is_file()


def test_a_scene_with_polygons_of_one_class() -> None:
    write_scene("town.tif")
    write_polygons("town_buildings.geojson", {"osm_id": [1, 2, 3, 4]})
    made = perf_vit.init("segmentation", "town.tif", "town_buildings.geojson", out="town.yaml", progress=False)
    data = config_of(made.path)["data"]
    assert (data["classes"], data["background"]) == (["background", "building"], "background")
    assert data["bands"] == [1, 2, 3]
    assert data["mean"] == pytest.approx([100, 100, 100], abs=5)
    assert data["tile_px"] % 16 == 0
    assert 64 <= data["tile_px"] <= SIDE
    train, val = data["train"]["region"], data["val"]["region"]
    assert train[2] * train[3] + val[2] * val[3] == SIDE * SIDE
    text = made.path.read_text()
    assert "3 bands of uint8" in text
    assert "0.5 metre a pixel, EPSG:32637" in text
    assert "4 polygons of one class; other columns: osm_id" in text
    # Every key has a comment above it.
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    bare = [line for above, line in itertools.pairwise(lines) if ": " in line and not above.startswith("#")]
    assert [line for line in bare if not line.startswith("#")] == []
    run_commands(made, *FEW, SMALL_VIT)


def test_classes_of_a_column_and_a_rare_one() -> None:
    write_scene("field.tif", num_bands=4, dtype="uint16")
    write_polygons("crops.gpkg", {"id": list(range(9)), "crop": ["wheat"] * 8 + ["maize"]}, side_px=25)
    made = perf_vit.init("segmentation", "field.tif", "crops.gpkg", attribute="crop", out="c.yaml", progress=False)
    data = config_of(made.path)["data"]
    assert data["attribute"] == "crop"
    assert data["classes"] == ["wheat", "maize"]
    # Polygons of several classes are samples; what lies outside may be anything.
    assert data["background"] == "ignore"
    found = perf_vit.init("segmentation", "field.tif", "crops.gpkg", out="d.yaml", progress=False)
    assert config_of(found.path)["data"]["attribute"] == "crop"
    assert "column crop: wheat 8, maize 1" in found.path.read_text()


def test_columns_that_name_no_classes_are_passed_over() -> None:
    write_scene("field.tif")
    columns = {
        "class": [1.5, 2.5, 1.5, 2.5],
        "type": ["a", "b", "a", "b"],
        "kind": [["x"], ["y"], ["x"], ["y"]],
        "date": np.array(["2024-01-01", "2024-01-02"] * 2, "datetime64[ms]"),
    }
    frame = gpd.GeoDataFrame(
        {name: columns[name] for name in ("class", "type", "date")},
        geometry=[shapely.box(*(PLACE @ (x, 60)), *(PLACE @ (x + 20, 20))) for x in (5, 40, 75, 110)],
        crs=CRS,
    )
    frame.to_file("fields.gpkg")
    made = perf_vit.init("segmentation", "field.tif", "fields.gpkg", out="f.yaml", progress=False)
    assert config_of(made.path)["data"]["attribute"] == "type"
    for column in ("class", "date"):
        with pytest.raises(InputError, match=f"the column {column} must hold text or whole numbers"):
            perf_vit.init("segmentation", "field.tif", "fields.gpkg", attribute=column, out="g.yaml", progress=False)
    content = json.loads(frame[["geometry"]].to_json())
    for feature, kind in zip(content["features"], columns["kind"], strict=True):
        feature["properties"] = {"kind": kind}
    content["crs"] = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32637"}}
    Path("lists.geojson").write_text(json.dumps(content))
    made = perf_vit.init("segmentation", "field.tif", "lists.geojson", out="h.yaml", progress=False)
    assert "attribute" not in config_of(made.path)["data"]


def test_values_of_a_mask_and_a_balanced_sampler() -> None:
    write_scene("scene.tif", num_bands=7)
    values = np.full((SIDE, SIDE), 3)
    values[:8, :] = 1
    values[:, -3:] = 255
    values[100:104, 20:24] = 7
    write_mask("cover.tif", values)
    made = perf_vit.init("segmentation", "scene.tif", "cover.tif", out="scene.yaml", run="elsewhere", progress=False)
    config = config_of(made.path)
    assert config["out"] == "elsewhere"
    assert config["data"]["classes"] == ["class_1", "class_3", "class_7"]
    assert config["data"]["values"] == [1, 3, 7]
    assert config["data"]["ignore_values"] == [255]
    assert config["data"]["sampler"] == "balanced"
    assert len(config["data"]["std"]) == 7
    assert read_run(made.path).data.sampler == "balanced"


def test_a_folder_of_images_with_masks_is_split_by_image() -> None:
    for folder in ("images", "masks"):
        Path(folder).mkdir()
    for number in range(4):
        write_scene(f"images/{number}.tif", seed=number)
        write_mask(f"masks/{number}.tif", np.arange(SIDE) % 2 * np.ones((SIDE, 1)) * 255)
    made = perf_vit.init("segmentation", "images", "masks", out="f.yaml", progress=False)
    data = config_of(made.path)["data"]
    assert data["val"]["image"] == ["images/3.tif"]
    assert data["train"]["image"] == [f"images/{number}.tif" for number in range(3)]
    assert (data["classes"], data["values"]) == (["background", "foreground"], [0, 255])
    run_commands(made, *FEW, SMALL_VIT)


def test_a_slide_with_annotations() -> None:
    make_slide(Path("slide.svs"), 640, 600, mpp=0.5, tile_px=64, tissue_share=0.9, seed=0)
    features = [
        {"type": "Feature", "geometry": shapely.geometry.mapping(shapely.box(x, 0, x + 200, 640)),
         "properties": {"classification": {"name": name}}}
        for x, name in ((0, "Tumor"), (250, "Stroma"), (400, "Tumor"))
    ]  # fmt: skip
    Path("slide.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    made = perf_vit.init("segmentation", "slide.svs", "slide.geojson", out="s.yaml", progress=False)
    data = config_of(made.path)["data"]
    assert (data["mpp"], data["tissue"]) == (0.5, "auto")
    assert (data["attribute"], data["classes"]) == ("classification", ["Tumor", "Stroma"])
    assert made.commands[2].endswith("--output runs/s/map.ome.tif")


def write_images(folder: str, num: int, size: tuple[int, int] = (96, 128)) -> None:
    Path(folder).mkdir(parents=True)
    for number in range(num):
        pixels = np.random.default_rng(number).integers(0, 255, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(f"{folder}/{number}.png")


def test_a_coco_file() -> None:
    write_images("photos", 6)
    images = [{"id": n, "file_name": f"{n}.png", "width": 128, "height": 96} for n in range(6)]
    boxes = [(n, 1 if n else 2, [5 + n, 8, 24, 18]) for n in range(6)] + [(n, 1, [60, 40, 20, 30]) for n in range(6)]
    annotations = [
        {"id": k, "image_id": n, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": 0}
        for k, (n, c, b) in enumerate(boxes)
    ]
    categories = [{"id": 1, "name": "cell"}, {"id": 2, "name": "platelet"}]
    Path("coco.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    made = perf_vit.init("detection", "photos", "coco.json", out="cells.yaml", progress=False)
    data = config_of(made.path)["data"]
    assert data["train"]["label_format"] == "coco"
    assert data["classes"] == ["cell", "platelet"]
    # 11 to 1.
    assert data["sampler"] == "balanced"
    names = [Path(f"cells_{part}.txt").read_text().splitlines() for part in ("train", "val")]
    assert sorted(names[0] + names[1]) == [f"{n}.png" for n in range(6)]
    assert len(names[1]) == 1
    assert [path.name for path in made.files] == ["cells_train.txt", "cells_val.txt"]
    run_commands(
        made, *FEW, "model.backbone=test_resnet", "model.strides=[8]", "model.channels=64", "data.batch_size=2"
    )


def test_a_voc_folder_and_one_of_yolo() -> None:
    write_images("photos", 3)
    for number in range(3):
        box = f"<bndbox><xmin>{5 + number}</xmin><ymin>8</ymin><xmax>40</xmax><ymax>50</ymax></bndbox>"
        Path("xml").mkdir(exist_ok=True)
        Path(f"xml/{number}.xml").write_text(
            f"<annotation><filename>{number}.png</filename><object><name>tree</name>{box}</object></annotation>"
        )
    made = perf_vit.init("detection", "photos", "xml", out="trees.yaml", progress=False)
    data = config_of(made.path)["data"]
    assert (data["train"]["label_format"], data["classes"], data["sampler"]) == ("voc", ["tree"], "objects")
    Path("yolo").mkdir()
    for number in range(3):
        Path(f"yolo/{number}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    Path("yolo/classes.txt").write_text("car\n")
    made = perf_vit.init("detection", "photos", "yolo", out="cars.yaml", progress=False)
    assert config_of(made.path)["data"]["train"]["label_format"] == "yolo"


def test_images_in_folders_by_class() -> None:
    write_images("scenes/forest", 8)
    write_images("scenes/town", 4)
    made = perf_vit.init("classification", "scenes", out="scenes.yaml", progress=False)
    data = config_of(made.path)["data"]
    assert data["classes"] == ["forest", "town"]
    rows = Path("scenes_val.csv").read_text().splitlines()
    assert rows[0] == "image,label"
    assert sorted(row.split(",")[1] for row in rows[1:]) == ["forest", "forest", "town"]
    run_commands(made, *WHERE, "trainer.max_epochs=1", "data.batch_size=4")


def test_numbers_of_images() -> None:
    write_images("plots", 8)
    rows = [f"{n}.png,plot{n},{n * 1.5},{10 - n}" for n in range(8)]
    Path("biomass.csv").write_text("\n".join(["image,name,biomass,height", *rows]))
    made = perf_vit.init("regression", "plots", "biomass.csv", out="b.yaml", progress=False)
    assert config_of(made.path)["data"]["targets"] == ["biomass", "height"]
    assert len(Path("b_val.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("task", "size", "tile"),
    [
        ("regression", (300, 280), {"tile_px": 224, "resize": True}),
        ("regression", (96, 128), {"tile_px": 224, "resize": True}),
        ("regression", (200, 190), {"tile_px": 224, "resize": False}),
        ("classification", (200, 190), {"tile_px": 224, "resize": False}),
        ("classification", (28, 28), {"tile_px": 64, "resize": False}),
    ],
)
def test_the_first_batch_of_a_few_images_is_there_whatever_their_size(task: str, size, tile) -> None:
    write_images("photos", 5, size)
    # A grey photo among colour ones.
    Image.open("photos/4.png").convert("L").save("photos/4.png")
    rows = [f"{n}.png,{n},{'ab'[n % 2]}" for n in range(5)]
    Path("t.csv").write_text("\n".join(["image,age,label", *rows]))
    made = perf_vit.init(task, "photos", "t.csv", out="t.yaml", progress=False)
    data = config_of(made.path)["data"]
    assert {key: data[key] for key in tile} == tile
    module = TASKS[task].build_data(read_run(made.path))
    tiles, targets, _ = next(iter(module.train_dataloader()))
    assert len(tiles) == len(targets) == data["batch_size"] == len(module.train)
    assert len(module.val) == 5 - len(targets)


def test_a_large_image_among_small_ones_is_found() -> None:
    write_images("plots", 66, (16, 16))
    Image.new("RGB", (400, 300), (9, 9, 9)).save("plots/33.png")
    Path("t.csv").write_text("\n".join(["image,age", *(f"{n}.png,{n}" for n in range(66))]))
    made = perf_vit.init("regression", "plots", "t.csv", out="t.yaml", progress=False)
    assert config_of(made.path)["data"]["resize"] is True


@pytest.mark.parametrize("task", ["classification", "detection"])
def test_several_folders_whose_images_have_the_same_names(task: str, recwarn) -> None:
    given = {}
    for folder in ("a", "b"):
        for name in ("forest", "town"):
            write_images(f"{folder}/{name}", 3, (64, 64))
    Image.new("RGB", (64, 64), (250, 250, 250)).save("b/town/1.png")
    if task == "detection":
        paths = sorted(map(str, Path().rglob("*.png")))
        rows = ["image,xmin,ymin,xmax,ymax,label", *(f"{path},10,10,40,40,tree" for path in paths)]
        Path("boxes.csv").write_text("\n".join(rows))
        given = {"labels": "boxes.csv"}
    made = perf_vit.init(task, ["a", "b"], out="c.yaml", progress=False, **given)
    module = TASKS[task].build_data(read_run(made.path))
    found = [images.sources for images in (module.train.images, module.val.images)]
    train, val = ({one.path for one in sources} for sources in found)
    assert len(train | val) == 12
    assert not train & val
    assert "--input . " in made.commands[1]
    if task == "detection":
        # The statistics are those of the training images alone.
        found = TASKS[task].build_data(read_run(made.path, {"data.mean": None, "data.std": None})).normalizer
        assert config_of(made.path)["data"]["mean"] == pytest.approx(found.mean, rel=1e-3)
    assert [str(warning.message) for warning in recwarn if "is also in data.train" in str(warning.message)] == []


@pytest.mark.parametrize("folders", [("../a", "../b"), ("../a", "../work/../b")])
def test_the_printed_evaluation_finds_the_images_of_folders_above(folders, tmp_path, monkeypatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for folder in "ab":
        for name in ("forest", "town"):
            write_images(f"../{folder}/{name}", 2, (64, 64))
    made = perf_vit.init("classification", list(folders), out="c.yaml", progress=False)
    evaluate = shlex.split(made.commands[1])
    given = {each: evaluate[evaluate.index(f"--{each}") + 1] for each in ("input", "labels")}
    split = ClassificationSplitConfig(image=given["input"], labels=given["labels"])
    found = read_image_targets(ClassificationDataConfig(train=split), split)
    listed = Path("c_val.csv").read_text().splitlines()[1:]
    assert len(listed) == 2
    assert {Path(path).resolve() for path in found.paths} == {Path(row.split(",")[0]).resolve() for row in listed}


@pytest.mark.parametrize(
    ("num_bands", "bands", "fact"),
    [
        ([7, 5, 7], [1, 2, 3, 4, 5], "5 in 1, 7 in 2 of them); all have the first 5"),
        ([3, 1, 3], None, "1 in 1, 3 in 2 of them); grey images are read as three equal bands"),
        ([3, 3, 3], [1, 2, 3], None),
    ],
)
def test_bands_are_those_of_several_images(num_bands, bands, fact) -> None:
    Path("scenes").mkdir()
    for number, each in enumerate(num_bands):
        write_scene(f"scenes/s{number}.tif", num_bands=each, seed=number)
    rows = ["image,xmin,ymin,xmax,ymax,label", *(f"s{number}.tif,10,10,40,40,ship" for number in range(3))]
    Path("boxes.csv").write_text("\n".join(rows))
    made = perf_vit.init("detection", "scenes", "boxes.csv", out="d.yaml", progress=False)
    assert config_of(made.path)["data"].get("bands") == bands
    assert [line for line in made.facts if line.startswith("bands")] == [] if fact is None else fact in str(made.facts)


@pytest.mark.parametrize("num_bands", [[3, 1, 3, 5], [1, 5]])
def test_one_grey_image_does_not_take_the_bands_of_all_others(num_bands) -> None:
    Path("scenes").mkdir()
    for number, each in enumerate(num_bands):
        write_scene(f"scenes/s{number}.tif", num_bands=each, seed=number)
    rows = ["image,xmin,ymin,xmax,ymax,label", *(f"s{number}.tif,10,10,40,40,ship" for number in range(len(num_bands)))]
    Path("boxes.csv").write_text("\n".join(rows))
    grey, five = num_bands.index(1), num_bands.index(5)
    with pytest.raises(InputError, match=rf"1 in 1 \(.*s{grey}\.tif\).* 5 in 1 \(.*s{five}\.tif\), expected one"):
        perf_vit.init("detection", "scenes", "boxes.csv", out="d.yaml", progress=False)
    assert not Path("d.yaml").exists()


def test_classes_that_the_windows_drawn_lack_are_looked_for(monkeypatch) -> None:
    monkeypatch.setattr(scene, "_MOST_WINDOWS", 1)
    write_images("images", 8, (64, 64))
    Path("masks").mkdir()
    masks = np.full((8, 64, 64), 255, np.uint8)
    masks[1, :32], masks[4, 7, :20] = 1, 2
    masks[6:, :9], masks[6:, 9:20] = 1, 2
    for number, mask in enumerate(masks):
        Image.fromarray(mask).save(f"masks/{number}.png")
    made = perf_vit.init("segmentation", "images", "masks", out="a.yaml", progress=False)
    assert "labelled pixels of the training part, estimated:" in made.facts
    data = config_of(made.path)["data"]
    assert (data["classes"], data["sampler"]) == (["class_1", "class_2"], "balanced")
    for number in range(6):
        Image.fromarray(np.full((64, 64), 255, np.uint8)).save(f"masks/{number}.png")
    for most in (1, 100):
        monkeypatch.setattr(scene, "_MOST_WINDOWS", most)
        with pytest.raises(InputError, match=r"6 images to train on, the first .*0\.png, have no pixel that is valid"):
            perf_vit.init("segmentation", "images", "masks", out="b.yaml", progress=False)


def test_images_are_opened_once_and_large_data_is_sampled(monkeypatch, capsys) -> None:
    opened: list[str] = []
    monkeypatch.setattr(
        segmentation, "open_input", lambda image, options: opened.append(str(image)) or open_input(image, options)
    )
    write_images("images", 5, (64, 64))
    Path("masks").mkdir()
    for number in range(5):
        Image.fromarray(np.pad(np.ones((20, 64), np.uint8), ((0, 44), (0, 0)))).save(f"masks/{number}.png")
    made = perf_vit.init("segmentation", "images", "masks", out="a.yaml")
    assert len(opened) == len(set(opened)) == 5
    assert "labelled pixels of the training part:" in made.facts
    assert "opening the images" in capsys.readouterr().err
    monkeypatch.setattr(scene, "_MOST_WINDOWS", 2)
    made = perf_vit.init("segmentation", "images", "masks", out="b.yaml", progress=False)
    assert "labelled pixels of 2 of 4 windows of the training part, drawn at random:" in made.facts
    assert config_of(made.path)["data"]["sampler"] == "random"


def test_slides_with_classes() -> None:
    Path("slides").mkdir()
    for number in range(4):
        make_slide(Path(f"slides/s{number}.svs"), 320, 300, mpp=0.5, tile_px=64, tissue_share=0.6, seed=number)
    # Names may lack their suffix.
    rows = [f"s{number},{'ab'[number % 2]}" for number in range(4)]
    Path("slides.csv").write_text("\n".join(["slide,label", *rows]))
    made = perf_vit.init("slide_classification", "slides", "slides.csv", out="t.yaml", progress=False)
    config = config_of(made.path)
    assert config["data"]["classes"] == ["a", "b"]
    assert config["model"]["pretrained"] is True


def test_lists_of_the_user_are_never_replaced() -> None:
    write_images("scenes/forest", 4)
    write_images("scenes/town", 4)
    Path("s_train.csv").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"s_train\.csv"):
            perf_vit.init("classification", "scenes", out="s.yaml", overwrite=overwrite, progress=False)
    assert Path("s_train.csv").read_text() == "mine"
    Path("s_train.csv").unlink()
    perf_vit.init("classification", "scenes", out="s.yaml", progress=False)
    perf_vit.init("classification", "scenes", out="s.yaml", overwrite=True, progress=False)
    with pytest.raises(OutputError):
        perf_vit.init("classification", "scenes", val_image="scenes", val_labels="s_val.csv", out="s_val.csv",
                      overwrite=True, progress=False)  # fmt: skip


def test_a_table_that_is_not_text_is_one_line() -> None:
    write_images("plots", 3)
    Path("t.csv").write_bytes(b"image,label\n0.png,b\xe9ton\n"[:8] + b"\xff\xfe\n")
    with pytest.raises(InputError, match=r"can't read t\.csv as CSV"):
        perf_vit.init("classification", "plots", "t.csv", out="t.yaml", progress=False)


def test_validation_files_are_used_as_given() -> None:
    write_scene("a.tif")
    write_scene("b.tif", seed=1)
    for name in "ab":
        write_polygons(f"{name}.geojson", {"n": [1, 2, 3]})
    made = perf_vit.init(
        "segmentation", "a.tif", "a.geojson", val_image="b.tif", val_labels="b.geojson", out="v.yaml", progress=False
    )
    data = config_of(made.path)["data"]
    assert data["val"] == {"image": "b.tif", "labels": "b.geojson"}
    assert "region" not in data["train"]
    assert "--input b.tif --labels b.geojson" in made.commands[1]


def test_the_command_writes_the_same_and_never_over_a_file(capsys) -> None:
    write_scene("town.tif")
    write_polygons("houses.geojson", {"n": [1, 2, 3]})
    given = ["--image", "town.tif", "--labels", "houses.geojson"]
    assert call(["init", "segmentation", *given, "--out", "x.yaml"]) == 0
    printed = capsys.readouterr().out
    made = perf_vit.init("segmentation", "town.tif", "houses.geojson", out="y/x.yaml", progress=False)
    assert made.path.read_text() == Path("x.yaml").read_text()
    assert all(fact in printed for fact in made.facts)
    assert "perf-vit train x.yaml" in printed
    before = Path("x.yaml").read_text()
    assert call(["init", "segmentation", *given, "--out", "x.yaml"]) == 2
    assert "x.yaml exists already" in capsys.readouterr().err
    assert Path("x.yaml").read_text() == before
    with pytest.raises(OutputError):
        perf_vit.init("segmentation", "town.tif", "houses.geojson", out="houses.geojson", overwrite=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"task": "segmentaton"}, OptionError, "task must be one of segmentation, .*; did you mean 'segmentation'"),
        ({"labels": None}, OptionError, "labels must be given for segmentation: a mask raster, a vector file"),
        ({"labels": "missing.geojson"}, InputError, "missing.geojson"),
        ({"image": "missing.tif"}, InputError, "missing.tif"),
        ({"labels": "town.tif"}, InputError, "has 3 bands, expected a mask with one"),
        ({"labels": "full.tif"}, InputError, "full.tif has no other value than 1, expected two or more"),
        ({"labels": "far.geojson"}, InputError, "far.geojson"),
        ({"val_labels": "houses.geojson"}, OptionError, "val_labels needs `val_image`"),
        ({"task": "detection", "labels": "notes.md"}, InputError, "notes.md"),
    ],
)
def test_what_does_not_fit_is_one_line_and_writes_nothing(options: dict, error: type, message: str) -> None:
    write_scene("town.tif")
    write_polygons("houses.geojson", {"n": [1, 2, 3]})
    gpd.GeoDataFrame({"n": [1]}, geometry=[shapely.box(0, 0, 1, 1)], crs="EPSG:4326").to_file("far.geojson")
    write_mask("full.tif", np.ones((SIDE, SIDE)))
    Path("notes.md").write_text("nothing")
    given = {"task": "segmentation", "image": "town.tif", "labels": "houses.geojson", **options}
    with pytest.raises(error, match=message) as found:
        perf_vit.init(given.pop("task"), given.pop("image"), out="x.yaml", progress=False, **given)
    assert "\n" not in str(found.value)
    assert not Path("x.yaml").exists()
