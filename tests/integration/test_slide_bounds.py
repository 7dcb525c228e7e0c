"""A slide with bounds from prediction to labels: all that leaves lies where QuPath shows it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
import tifffile
import torch
from bounded import BOUNDS, bounded_slide, with_bounds
from small_models import save_slide_classifier
from torch import nn

from perf_vit.data import (
    DetectionDataConfig,
    DetectionSplitConfig,
    SegmentationDataConfig,
    SegmentationSplitConfig,
    build_detection_datamodule,
    build_segmentation_datamodule,
)
from perf_vit.errors import InputError
from perf_vit.inference import (
    DetectionPredictOptions,
    DetectionPredictor,
    SegmentationPredictOptions,
    SegmentationPredictor,
    SlideClassificationPredictOptions,
    SlideClassificationPredictor,
)
from perf_vit.labels import open_labels
from perf_vit.models import DetectionSpec, SegmentationSpec
from perf_vit.sources import open_source
from perf_vit.sources.slides.ome_xml import parse_ome_tags
from perf_vit.transforms import Normalizer
from perf_vit.types import IGNORE_INDEX, Detections, Window
from perf_vit.workflows.detection import DetectionEvaluateOptions, evaluate_detection
from perf_vit.workflows.first_config import init
from perf_vit.workflows.segmentation import SegmentationEvaluateOptions, evaluate_segmentation
from perf_vit.workflows.train import read_run
from perf_vit.writers import CogWriter, RasterLayout

# In pixels of level 0: left, top, right, bottom.
TISSUE = (160, 120, 320, 240)


class PinkSegmenter(nn.Module):
    """Finds what has little green."""

    task = "segmentation"
    size_multiple = 1

    def __init__(self, mpp: float) -> None:
        super().__init__()
        normalizer = Normalizer((0.0,) * 3, (1.0,) * 3)
        self.spec = SegmentationSpec(
            classes=("other", "Tumor"), normalizer=normalizer, tile_px=64, mpp=mpp, background="other"
        )

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        return torch.stack([tiles[:, 1] - 200, 200 - tiles[:, 1]], 1)

    def to_labels(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(1)


@pytest.fixture
def slide(tmp_path: Path, monkeypatch) -> Path:
    with_bounds(monkeypatch, **BOUNDS)
    return bounded_slide(tmp_path / "case.svs", TISSUE)


def inside(left: float, top: float, right: float, bottom: float) -> tuple[float, ...]:
    """A box of level 0 in QuPath's coordinates."""
    return left - BOUNDS["x"], top - BOUNDS["y"], right - BOUNDS["x"], bottom - BOUNDS["y"]


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_maps_and_polygons_lie_over_the_picture_of_qupath(slide, tmp_path, scale) -> None:
    options = SegmentationPredictOptions(polygons="geojson", window_size=64)
    predictor = SegmentationPredictor(PinkSegmenter(0.5 * scale), options)
    out = tmp_path / "map.ome.tif"
    predictor.run(slide, out)
    with tifffile.TiffFile(out) as tiff:
        found = tiff.asarray()
        tags = parse_ome_tags(tiff.ome_metadata)
    assert found.shape == (BOUNDS["height"] // scale, BOUNDS["width"] // scale)
    expected = np.zeros(found.shape, bool)
    left, top, right, bottom = (int(side) // scale for side in inside(*TISSUE))
    expected[top:bottom, left:right] = True
    assert np.array_equal(found == 1, expected)
    assert tags["PERF_VIT_FRAME"] == (
        f"QuPath: x = {scale} * column + 0, y = {scale} * row + 0, in pixels of level 0 from (96, 64)"
    )
    content = json.loads((tmp_path / "map.ome.geojson").read_text())
    (feature,) = content["features"]
    assert shapely.geometry.shape(feature["geometry"]).bounds == inside(*TISSUE)
    # Drawn in QuPath they are labels of the same pixels.
    source = open_source(slide, mpp=0.5)
    labels = open_labels(
        tmp_path / "map.ome.geojson", source, attribute="classification", classes=["other", "Tumor"]
    ).read(source.extent)
    green = source.read(source.extent).pixels[1]
    assert np.array_equal(labels == 1, green < 200)


@pytest.mark.parametrize("options", [{"level": 0}, {"level": 1}, {"level": 2}, {"mpp": 1.3}, {"mpp": 0.4}])
def test_the_part_inside_the_bounds_is_a_part_of_the_slide(slide, options) -> None:
    whole = open_source(slide, **options)
    part = whole.within_bounds()
    assert part.whole is whole
    assert part.within_bounds() is part
    place = ~whole.frame.to_level0 @ part.frame.to_level0
    assert part.frame.to_qupath @ (0, 0) == pytest.approx((0, 0), abs=max(whole.downsample_xy) / 2)
    assert np.allclose(part.size[::-1], np.divide([BOUNDS["width"], BOUNDS["height"]], part.downsample_xy), atol=0.5)
    if "level" in options:
        row, col = round(place.f), round(place.c)
        image = whole.read(Window(row, col, *part.size))
        assert np.array_equal(part.read(part.extent).pixels, image.pixels)
        assert np.array_equal(part.read(part.extent).valid, image.valid)
    else:
        # Resampled from the corner of the bounds: all of it is valid.
        assert part.read(Window(1, 1, part.height - 2, part.width - 2)).valid.all()
    reduced = part.read_reduced(40)
    assert max(reduced.pixels.shape[1:]) == 40
    assert reduced.valid.mean() > 0.9


def test_the_first_config_of_a_slide_shares_out_what_lies_inside_the_bounds(slide, tmp_path) -> None:
    drawn = annotation(tmp_path / "drawn.geojson")
    made = init("segmentation", str(slide), str(drawn), out=tmp_path / "config.yaml", run=str(tmp_path / "run"))
    config = read_run(made.path).data
    assert config.classes == ["background", "Tumor"]
    data = build_segmentation_datamodule(config, 0)
    parts = [data.train.sources[0], data.val.source]
    assert {part.source.size for part in parts} == {(BOUNDS["height"], BOUNDS["width"])}
    assert all(part.region.row_stop <= BOUNDS["height"] for part in parts)
    assert all(part.region.col_stop <= BOUNDS["width"] for part in parts)
    assert sum(part.region.height * part.region.width for part in parts) == BOUNDS["height"] * BOUNDS["width"]
    assert all((part.read_image(part.region)[1] == 1).any() for part in parts)


def test_slides_without_bounds_are_their_own_part(tmp_path) -> None:
    source = open_source(bounded_slide(tmp_path / "plain.svs", TISSUE))
    assert source.within_bounds() is source


@pytest.mark.parametrize("is_whole", [True, False], ids=["level0", "bounds"])
def test_masks_label_all_of_level_0_or_the_picture_of_qupath_by_their_size(slide, tmp_path, is_whole) -> None:
    corner = (0, 0) if is_whole else (BOUNDS["x"], BOUNDS["y"])
    size = (400, 480) if is_whole else (BOUNDS["height"], BOUNDS["width"])
    mask = np.zeros(size, np.uint8)
    mask[TISSUE[1] - corner[1] : TISSUE[3] - corner[1], TISSUE[0] - corner[0] : TISSUE[2] - corner[0]] = 1
    layout = RasterLayout(height=size[0], width=size[1], num_bands=1, dtype=np.dtype("uint8"))
    with CogWriter(tmp_path / "mask.tif", layout) as writer:
        writer.write(0, mask[None])
    whole = open_source(slide)
    for source in (whole, whole.within_bounds()):
        labels = open_labels(tmp_path / "mask.tif", source, classes=["other", "Tumor"], paired=True)
        read = labels.read(source.extent)
        green = source.read(source.extent).pixels[1]
        assert np.array_equal(read == 1, green < 200)
        outside = Window(0, 0, 1, 1) if source is whole and not is_whole else None
        assert outside is None or (labels.read(outside) == IGNORE_INDEX).all()
        labels.close()


class PinkDetector(nn.Module):
    """Finds one box around what has little green in a tile."""

    task = "detection"
    size_multiple = 1

    def __init__(self, mpp: float) -> None:
        super().__init__()
        labels = {"label_format": "polygons", "attribute": "classification"}
        normalizer = Normalizer((0.0,) * 3, (1.0,) * 3)
        self.spec = DetectionSpec(classes=("Tumor",), normalizer=normalizer, tile_px=256, mpp=mpp, label_options=labels)

    def forward(self, tiles: torch.Tensor) -> list[Detections]:
        return [self._box((tile[1] > 0) & (tile[1] < 200)) for tile in tiles]

    def _box(self, pink: torch.Tensor) -> Detections:
        rows, cols = torch.nonzero(pink.any(1)).flatten(), torch.nonzero(pink.any(0)).flatten()
        boxes = [[cols[0], rows[0], cols[-1] + 1, rows[-1] + 1]] if len(rows) else []
        found = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        return Detections(
            boxes_xyxy=found, scores=torch.full((len(found),), 0.9), labels=torch.zeros(len(found), dtype=torch.int64)
        )


OPTIONS = {"window_size": 384, "overlap": 64, "device": "cpu"}


@pytest.mark.parametrize("scale", [1, 2])
def test_detections_lie_over_the_picture_of_qupath_and_score_against_its_annotations(slide, tmp_path, scale) -> None:
    model = PinkDetector(0.5 * scale)
    out = tmp_path / "case.geojson"
    DetectionPredictor(model, DetectionPredictOptions(**OPTIONS)).run(slide, out)
    (feature,) = json.loads(out.read_text())["features"]
    assert shapely.geometry.shape(feature["geometry"]).bounds == inside(*TISSUE)
    options = DetectionEvaluateOptions(**OPTIONS, label_format="polygons")
    scores = evaluate_detection(model, slide, annotation(tmp_path / "drawn.geojson"), options).scores
    assert scores.ap50 == pytest.approx(1.0)


@pytest.mark.parametrize("is_whole", [True, False], ids=["level0", "bounds"])
def test_coco_results_are_in_pixels_of_the_listed_image(slide, tmp_path, is_whole) -> None:
    height, width = (400, 480) if is_whole else (BOUNDS["height"], BOUNDS["width"])
    listed = {
        "images": [{"id": 7, "file_name": "case.svs", "height": height, "width": width}],
        "categories": [{"id": 3, "name": "Tumor"}],
        "annotations": [],
    }
    (tmp_path / "listed.json").write_text(json.dumps(listed))
    options = DetectionPredictOptions(**OPTIONS, coco_images=str(tmp_path / "listed.json"))
    DetectionPredictor(PinkDetector(0.5), options).run(slide, tmp_path / "out.json")
    (result,) = json.loads((tmp_path / "out.json").read_text())
    left, top, right, bottom = TISSUE if is_whole else inside(*TISSUE)
    assert (result["image_id"], result["bbox"]) == (7, [left, top, right - left, bottom - top])


def annotation(path: Path) -> Path:
    """The tissue as QuPath's annotation."""
    left, top, right, bottom = inside(*TISSUE)
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    properties = {"objectType": "annotation", "classification": {"name": "Tumor"}}
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": properties}
    path.write_text(json.dumps([feature]))
    return path


@pytest.mark.parametrize("scale", [1, 2])
def test_segmentation_scores_against_annotations_of_qupath(slide, tmp_path, scale) -> None:
    drawn = annotation(tmp_path / "drawn.geojson")
    model = PinkSegmenter(0.5 * scale)
    model.spec = replace(model.spec, label_options={"attribute": "classification"})
    options = SegmentationEvaluateOptions(window_size=64, device="cpu")
    scores = evaluate_segmentation(model, slide, drawn, options)
    assert [each.iou for each in scores.scores] == [1.0, 1.0]


@pytest.mark.parametrize("scale", [1, 2])
def test_segmentation_trains_on_the_region_that_it_is_scored_on(slide, tmp_path, scale) -> None:
    left, top, right, bottom = (side // scale for side in inside(*TISSUE))
    # Half of the tissue, in pixels of the picture of QuPath.
    region = [top, left, bottom - top, (right - left) // 2]
    part = SegmentationSplitConfig(
        image=str(slide), labels=str(annotation(tmp_path / "drawn.geojson")), region=[0, 0, bottom, right]
    )
    config = SegmentationDataConfig(
        train=replace(part, region=region), val=part, classes=["other", "Tumor"], background="other",
        attribute="classification", mpp=0.5 * scale, tile_px=32, batch_size=1, tiles_per_epoch=1, num_workers=0,
    )  # fmt: skip
    data = build_segmentation_datamodule(config, 0)
    trained = data.train.sources[0]
    assert trained.source.size == (BOUNDS["height"] // scale, BOUNDS["width"] // scale)
    image, labels = trained.read_image(Window(*region))
    assert (labels == 1).all()
    assert (image.pixels[1] < 200).all()
    model = PinkSegmenter(0.5 * scale)
    model.spec = replace(model.spec, label_options={"attribute": "classification"})
    options = SegmentationEvaluateOptions(window_size=64, device="cpu", region=tuple(region))
    scores = evaluate_segmentation(model, slide, tmp_path / "drawn.geojson", options)
    assert scores.curves.confusion.tolist() == [[0, 0], [0, region[2] * region[3]]]


def detection_data(slide: Path, labels: Path, label_format: str, mpp: float | None):
    split = DetectionSplitConfig(image=str(slide), labels=str(labels), label_format=label_format)
    attribute = "classification" if label_format == "polygons" else None
    config = DetectionDataConfig(
        train=split, val=split, classes=["Tumor"], attribute=attribute, mpp=mpp, tile_px=64, batch_size=1,
        tiles_per_epoch=1, num_workers=0,
    )  # fmt: skip
    return build_detection_datamodule(config, 0, oriented=False)


@pytest.mark.parametrize("scale", [1, 2])
def test_detectors_train_on_the_picture_of_qupath(slide, tmp_path, scale) -> None:
    data = detection_data(slide, annotation(tmp_path / "drawn.geojson"), "polygons", 0.5 * scale)
    (record,) = data.train_index
    assert record.extent.shape == (BOUNDS["height"] // scale, BOUNDS["width"] // scale)
    assert record.boxes_xyxy.tolist() == [[side / scale for side in inside(*TISSUE)]]
    image, objects = data.train.images.read(0, record.extent)
    left, top, right, bottom = objects.boxes_xyxy[0].astype(int)
    pink = image.pixels[1] < 200
    assert pink[top:bottom, left:right].all()
    assert pink.sum() == (bottom - top) * (right - left)


def coco_mask(path: Path, *, is_whole: bool) -> Path:
    """The tissue as COCO's uncompressed run lengths, of all of level 0 or the picture of QuPath."""
    height, width = (400, 480) if is_whole else (BOUNDS["height"], BOUNDS["width"])
    left, top, right, bottom = (int(side) for side in (TISSUE if is_whole else inside(*TISSUE)))
    mask = np.zeros((height, width), np.uint8)
    mask[top:bottom, left:right] = 1
    changes = np.flatnonzero(np.diff(mask.T.ravel())) + 1
    counts = np.diff([0, *changes, mask.size]).tolist()
    annotation = {
        "id": 1, "image_id": 7, "category_id": 3, "bbox": [left, top, right - left, bottom - top], "iscrowd": 0,
        "area": int(mask.sum()), "segmentation": {"size": [height, width], "counts": counts},
    }  # fmt: skip
    images = [{"id": 7, "file_name": "case.svs", "height": height, "width": width}]
    categories = [{"id": 3, "name": "Tumor"}]
    path.write_text(json.dumps({"images": images, "categories": categories, "annotations": [annotation]}))
    return path


@pytest.mark.parametrize("is_whole", [True, False], ids=["level0", "bounds"])
def test_masks_of_coco_train_and_score_on_the_pixels_that_they_label(slide, tmp_path, is_whole) -> None:
    labels = coco_mask(tmp_path / "masks.json", is_whole=is_whole)
    data = detection_data(slide, labels, "coco", None)
    (record,) = data.train_index
    assert record.extent.shape == ((400, 480) if is_whole else (BOUNDS["height"], BOUNDS["width"]))
    image, _ = data.train.images.read(0, record.extent)
    (mask,) = record.masks.read(np.arange(1), record.extent)
    assert np.array_equal(mask, image.valid & (image.pixels[1] < 200))
    options = DetectionEvaluateOptions(**OPTIONS, label_format="coco")
    assert evaluate_detection(PinkDetector(0.5), slide, labels, options).scores.ap50 == pytest.approx(1.0)


def test_masks_of_slides_need_level_0(slide, tmp_path) -> None:
    labels = coco_mask(tmp_path / "masks.json", is_whole=False)
    with pytest.raises(InputError, match=r"masks of the pixels of .*case.svs, which can't be read at another mpp"):
        detection_data(slide, labels, "coco", 1.0)


def test_scores_take_the_pixel_size_that_replaces_that_of_the_file(slide, tmp_path) -> None:
    # Pixels of level 0 count as 0.25 um wide, so those of the model, of 1 um, are four as wide.
    options = DetectionEvaluateOptions(**OPTIONS, label_format="polygons", slide_mpp_override=0.25)
    found = evaluate_detection(PinkDetector(1.0), slide, annotation(tmp_path / "drawn.geojson"), options)
    assert found.scores.ap50 == pytest.approx(1.0)
    model = PinkSegmenter(1.0)
    model.spec = replace(model.spec, label_options={"attribute": "classification"})
    mapped = SegmentationEvaluateOptions(window_size=64, device="cpu", slide_mpp_override=0.25)
    scores = evaluate_segmentation(model, slide, tmp_path / "drawn.geojson", mapped)
    assert scores.curves.confusion.sum() == BOUNDS["height"] // 4 * (BOUNDS["width"] // 4)
    assert [each.iou for each in scores.scores] == [1.0, 1.0]


@pytest.mark.parametrize("options", [{}, {"mpp": 1.0}, {"level": 1}])
def test_open_slides_are_read_like_their_paths(slide, options) -> None:
    spec = PinkSegmenter(1.0).spec
    expected = spec.open(slide)
    for given in (open_source(slide, **options), open_source(slide, **options).within_bounds()):
        opened = spec.open(given)
        assert opened.size == expected.size == (BOUNDS["height"] // 2, BOUNDS["width"] // 2)
        assert np.array_equal(opened.read(opened.extent).pixels, expected.read(expected.extent).pixels)
        assert spec.open(opened) is opened


def test_attention_lies_over_the_tissue_of_the_picture_of_qupath(slide, tmp_path) -> None:
    checkpoint = save_slide_classifier(tmp_path / "model" / "slides.ckpt")
    options = SlideClassificationPredictOptions(device="cpu", tissue=str(annotation(tmp_path / "tissue.geojson")))
    predictor = SlideClassificationPredictor(checkpoint, options)
    predictor.run(str(slide), tmp_path / "out.csv")
    content = json.loads((tmp_path / "out_attention" / "case.geojson").read_text())
    assert content["frame_origin_level0_px"] == [BOUNDS["x"], BOUNDS["y"]]
    boxes = [shapely.geometry.shape(feature["geometry"]) for feature in content["features"]]
    tissue = shapely.box(*inside(*TISSUE))
    assert all(each.intersects(tissue) for each in boxes)
    assert shapely.union_all(boxes).intersection(tissue).area > 0.9 * tissue.area
