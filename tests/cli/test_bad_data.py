"""Bad data through the real entry point: an error of one line, or a warning that is said once."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from command_line import call, train_args

from perf_vit.data import detection as objects_datamodule
from perf_vit.data import detection_tiles as objects_seen
from perf_vit.data import make_ship_scene

DETECTION = """
out: ???
task: detection
data:
  train: {image: "???", labels: "???", label_format: csv}
  val: {image: "???", labels: "???", label_format: csv}
  classes: [car]
  tile_px: 32
  tiles_per_epoch: 2
  batch_size: 2
model: {backbone: test_resnet, strides: [8], channels: 64, head: fcos, head_kwargs: {num_convs: 1}}
trainer: {max_epochs: 1, accelerator: cpu, report: false}
"""
ROWS = ["0.tif,8,8,20,18,car", "1.tif,5,5,12,12,car"]


def write_raster(path: Path, pixels: np.ndarray, **profile) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    options = {"driver": "GTiff", "crs": "EPSG:32637", "transform": Affine(3, 0, 401000, 0, -3, 4510000), **profile}
    with rasterio.open(path, "w", count=count, height=height, width=width, dtype=pixels.dtype, **options) as dataset:
        dataset.write(pixels)
    return path


def noise(num_bands: int = 3, size: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 200, (num_bands, size, size)).astype(np.float32)


@pytest.fixture
def train_objects(tmp_path):
    """Train a detector for a step on two images and the rows of a table; its exit code."""

    def _train(rows: list[str], *extra: str, config: str = DETECTION, **images: np.ndarray) -> int:
        for name in ("0", "1"):
            write_raster(tmp_path / "images" / f"{name}.tif", images.get(f"image_{name}", noise()))
        (tmp_path / "labels.csv").write_text("\n".join(["image,xmin,ymin,xmax,ymax,label", *rows]))
        (tmp_path / "run.yaml").write_text(config)
        folders = [f"data.{part}.image={tmp_path / 'images'}" for part in ("train", "val")]
        labels = [f"data.{part}.labels={tmp_path / 'labels.csv'}" for part in ("train", "val")]
        return call(["train", tmp_path / "run.yaml", f"out={tmp_path / 'out'}", *folders, *labels, *extra])

    return _train


def told(capsys) -> list[str]:
    """What was warned of or refused, but for the images that are trained and validated on."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert "UserWarning" not in text
    lines = [line for line in text.splitlines() if "is also in data.train" not in line]
    return [line for line in lines if line.startswith(("Warning: ", "Error: "))]


def test_a_warning_is_said_once_whatever_reads_the_labels(train_objects, capsys) -> None:
    assert train_objects([*ROWS, "0.tif,90,90,95,95,car"], "data.num_workers=2") == 0
    (line,) = told(capsys)
    assert "kept 2 objects; 1 dropped: outside the image (first: car at 90 90 95 95 in " in line


def test_an_image_without_a_valid_pixel_is_counted(train_objects, capsys) -> None:
    assert train_objects(ROWS, image_1=noise() * np.nan) == 0
    lines = told(capsys)
    training, validation = (f"objects in the 2 {part} images checked cover" for part in ("training", "validation"))
    for line, what in zip(lines, (training, validation, "training images checked have"), strict=True):
        assert f"1 of 2 {what} no valid pixel" in line
        assert line.endswith("1.tif")


def test_infinite_pixels_are_no_data_and_absurd_ones_are_told(train_objects, capsys) -> None:
    pixels = noise()
    pixels[:, 3, 3], pixels[1, 9, 9] = np.inf, -3.4e38
    assert train_objects(ROWS, image_1=pixels) == 0
    (line,) = told(capsys)
    assert "values up to 3.4e+38 in band 2; if that means missing, declare it as nodata" in line


@pytest.mark.parametrize(
    ("rows", "images", "message"),
    [
        ([*ROWS, "2.tif,1,1,5,5,car"], {}, "line 4 of "),
        ([*ROWS, "1.tif,1,1,5,5,Car"], {}, "holds objects of class Car; the classes are car"),
        (ROWS, {"image_1": noise(5)}, "choose common ones with data.bands"),
        (ROWS, {"image_0": noise() * np.nan, "image_1": noise() * np.nan}, "2 of 2 objects in the 2 training images"),
        (
            ["0.tif,,,,,", "1.tif,5,5,5,5,car"],
            {},
            "expected objects to learn from in the images of data.train, got none",
        ),
    ],
)
def test_what_can_not_be_learnt_from_is_one_line(train_objects, tmp_path, capsys, rows, images, message) -> None:
    assert train_objects(rows, **images) == 2
    assert message in told(capsys)[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("mask_rcnn", "learns masks, got labels without them in data.train; give every object an outline or choose"),
        (
            "oriented_fcos",
            "learns oriented boxes, got labels without them in data.train; give outlines or four",
        ),
    ],
)
def test_labels_without_the_geometry_of_the_head_are_one_line(train_objects, tmp_path, capsys, head, message) -> None:
    config = DETECTION.replace("head: fcos, head_kwargs: {num_convs: 1}", f"head: {head}")
    assert train_objects(ROWS, config=config) == 2
    assert message in told(capsys)[-1]
    assert not (tmp_path / "out").exists()


def test_an_argument_that_the_head_does_not_have_is_named_with_those_it_has(train_objects, tmp_path, capsys) -> None:
    assert train_objects(ROWS, "model.head_kwargs.num_conv=1") == 2
    (line,) = told(capsys)
    assert "model.head_kwargs of fcos are num_convs, " in line
    assert line.endswith("got num_conv; did you mean num_convs?")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_while_training_is_one_line_and_leaves_nothing(
    train_objects, tmp_path, capsys, workers, monkeypatch
) -> None:
    whole = objects_seen.check_object_validity

    def check_and_break(images, part, seed) -> None:
        whole(images, part, seed)
        if part == "validation":
            path = tmp_path / "images" / "1.tif"
            path.write_bytes(path.read_bytes()[:400])

    monkeypatch.setattr(objects_datamodule, "check_object_validity", check_and_break)
    (tmp_path / "out").mkdir()
    statistics = ("data.mean=[1,1,1]", "data.std=[1,1,1]")
    assert train_objects(ROWS, f"data.num_workers={workers}", *statistics) == 2
    (line,) = told(capsys)
    assert line.startswith("Error: ")
    assert "1.tif" in line
    assert "worker" not in line
    assert list((tmp_path / "out").iterdir()) == []


def test_a_class_without_a_labelled_pixel_is_told(tmp_path, capsys) -> None:
    mask = np.zeros((96, 96))
    assert call(_labelled(tmp_path, noise(4, 96), mask)) == 0
    assert [line.split(" have no pixel among ")[1] for line in told(capsys)] == [
        f"9,216 labelled ones of data.{part} checked: ship" for part in ("train", "val")
    ]


def _labelled(tmp_path, pixels: np.ndarray, mask: np.ndarray, **profile) -> list[str]:
    scene = make_ship_scene(tmp_path / "scene", seed=0, size_px=96, num_targets=2)
    write_raster(scene.image, pixels, **profile)
    labels = write_raster(tmp_path / "mask.tif", mask[None].astype(np.uint8), nodata=255)
    return train_args(scene, tmp_path / "out", f"data.train.labels={labels}", "data.val.labels=" + str(labels))


@pytest.mark.parametrize("case", ["no label", "no data", "labels where there is no data"])
def test_no_window_to_learn_from_is_one_line(tmp_path, capsys, case) -> None:
    pixels, mask = noise(4, 96), np.zeros((96, 96))
    if case == "no label":
        mask[:] = 255
    elif case == "no data":
        pixels[:] = np.nan
    else:
        pixels[:, :, :50], mask[:, 40:] = np.nan, 255
    assert call(_labelled(tmp_path, pixels, mask)) == 2
    (line,) = told(capsys)
    assert "data.train has no pixel that is valid and labelled" in line
    assert not (tmp_path / "out").exists()


def test_a_raster_without_labels_among_others_is_counted(tmp_path, capsys) -> None:
    mask = np.zeros((96, 96))
    mask[20:40, 20:40] = 1
    args = _labelled(tmp_path, noise(4, 96), mask)
    empty = write_raster(tmp_path / "empty.tif", mask[None].astype(np.uint8) * 0 + 255, nodata=255)
    image = next(arg.split("=")[1] for arg in args if str(arg).startswith("data.train.image="))
    assert call([*args, f"data.extra_train=[{{image: '{image}', labels: '{empty}'}}]"]) == 0
    (line,) = told(capsys)
    assert "1 of 2 rasters to train on have no pixel that is valid and labelled, the first" in line
