"""Labels of photos that a camera stored turned lie where viewers show the objects."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perf_vit.data import SegmentationDataConfig, SegmentationSplitConfig, build_segmentation_datamodule
from perf_vit.errors import InputError
from perf_vit.labels import open_labels
from perf_vit.labels.objects import read_object_labels
from perf_vit.sources import open_source
from perf_vit.types import Window

HEIGHT, WIDTH = 40, 60
# Rows and columns of the object, as viewers show it.
ROWS, COLS = slice(4, 12), slice(30, 55)
# What Pillow has to do to the pixels that viewers show, so that a camera's tag brings them back.
_STORE = {
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip


def _store(path: Path, shown: np.ndarray, orientation: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    image = Image.fromarray(shown)
    if _STORE[orientation] is not None:
        image = image.transpose(_STORE[orientation])
    exif = Image.Exif()
    exif[0x112] = orientation
    image.save(path, exif=exif)
    return path


def _photo(folder: Path, orientation: int, suffix: str = "png") -> Path:
    shown = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    shown[ROWS, COLS] = 255
    _store(folder / f"a.{suffix}", shown, orientation)
    return folder


def _coco(tmp_path: Path) -> Path:
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 1, "name": "ship"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [30, 4, 25, 8]}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    return tmp_path / "a.json"


def _voc(tmp_path: Path) -> Path:
    (tmp_path / "voc").mkdir()
    box = "<xmin>31</xmin><ymin>5</ymin><xmax>55</xmax><ymax>12</ymax>"
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
    content = f"<annotation>{size}<object><name>ship</name><bndbox>{box}</bndbox></object></annotation>"
    (tmp_path / "voc" / "a.xml").write_text(content)
    return tmp_path / "voc"


def _yolo(tmp_path: Path) -> Path:
    (tmp_path / "yolo").mkdir()
    (tmp_path / "yolo" / "a.txt").write_text(f"0 {42.5 / WIDTH} {8 / HEIGHT} {25 / WIDTH} {8 / HEIGHT}\n")
    return tmp_path / "yolo"


def _dota(tmp_path: Path) -> Path:
    (tmp_path / "dota").mkdir()
    (tmp_path / "dota" / "a.txt").write_text("30 4 55 4 55 12 30 12 ship 0\n")
    return tmp_path / "dota"


def _csv(tmp_path: Path) -> Path:
    (tmp_path / "a.csv").write_text("image,xmin,ymin,xmax,ymax,label\na.png,30,4,55,12,ship\n")
    return tmp_path / "a.csv"


def _instances(tmp_path: Path) -> Path:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[ROWS, COLS] = 7
    # Turned another way than its image.
    _store(tmp_path / "instances" / "a.png", mask, 8)
    return tmp_path / "instances"


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("write", [_coco, _voc, _yolo, _dota, _csv, _instances])
def test_boxes_of_every_format_lie_on_the_pixels_that_viewers_show(tmp_path, write, orientation) -> None:
    images = _photo(tmp_path / "images", orientation)
    kind = write.__name__.removeprefix("_")
    index = read_object_labels(write(tmp_path), images, label_format=kind, classes=["ship"])
    record = index.records[0]
    assert (record.height, record.width) == (HEIGHT, WIDTH)
    left, top, right, bottom = record.boxes_xyxy[0].round().astype(int).tolist()
    assert (slice(top, bottom), slice(left, right)) == (ROWS, COLS)
    pixels = open_source(record.path).read(record.extent).pixels
    assert (pixels[:, top:bottom, left:right] == 255).all()
    assert pixels.sum() == 255 * 3 * 8 * 25


@pytest.mark.parametrize("of_mask", [1, 3, 6])
@pytest.mark.parametrize("of_image", [2, 5, 6])
def test_masks_are_turned_by_their_own_tags(tmp_path, of_image, of_mask) -> None:
    _photo(tmp_path / "images", of_image)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[ROWS, COLS] = 1
    _store(tmp_path / "masks" / "a.png", mask, of_mask)
    region = SegmentationSplitConfig(image=str(tmp_path / "images"), labels=str(tmp_path / "masks"))
    data = build_segmentation_datamodule(
        SegmentationDataConfig(train=region, val=region, classes=["sea", "ship"], tile_px=64), seed=0
    )
    pixels, labels, _ = data.val[0]
    assert ((pixels[0] > pixels[0].min()).numpy()[:HEIGHT, :WIDTH] == (labels == 1).numpy()[:HEIGHT, :WIDTH]).all()
    assert (labels == 1).sum() == 8 * 25


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 7])
def test_bands_of_a_raster_of_several_classes_are_turned_by_its_tag(tmp_path, name, orientation) -> None:
    shown = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    shown[ROWS, COLS, 0] = shown[:9, :, 1] = shown[30:, 50:, 2] = 1
    path = _store(tmp_path / "labels" / name, shown, orientation)
    source = open_source(_photo(tmp_path / "images", 6) / "a.png")
    labels = open_labels(path, source, classes=["a", "b", "c"], multilabel=True, background="none", paired=True)
    assert np.array_equal(labels.read(Window(2, 3, 30, 50)), shown.transpose(2, 0, 1)[:, 2:32, 3:53])


def test_labels_of_the_stored_pixels_are_refused_with_the_reason(tmp_path) -> None:
    images = _photo(tmp_path / "images", 6)
    path = _coco(tmp_path)
    path.write_text(path.read_text().replace('"height": 40, "width": 60', '"height": 60, "width": 40'))
    with pytest.raises(InputError, match=r"has 40 x 60 as viewers show it \(EXIF orientation 6\)"):
        read_object_labels(path, images, label_format="coco")
