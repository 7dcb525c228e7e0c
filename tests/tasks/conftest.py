"""A small task of each kind: functions of the number of loader processes that give data, task and trainer options."""

import json

import numpy as np
import pytest
from PIL import Image

from perf_vit.data import (
    AugmentConfig,
    ClassificationDataConfig,
    ClassificationSplitConfig,
    DetectionDataConfig,
    DetectionSplitConfig,
    EmbeddingStore,
    SegmentationDataConfig,
    SegmentationSplitConfig,
    SlideClassificationDataModule,
    SlideTargets,
    build_classification_datamodule,
    build_detection_datamodule,
    build_segmentation_datamodule,
    make_ship_scene,
)
from perf_vit.data.bags import SlideBags
from perf_vit.models import (
    ClassificationModelConfig,
    ClassificationSpec,
    DetectionModelConfig,
    DetectionSpec,
    SegmentationModelConfig,
    SegmentationSpec,
    SlideClassificationModelConfig,
    SlideClassificationSpec,
)
from perf_vit.tasks import (
    CLASSIFICATION_CURVES,
    CLASSIFICATION_MONITOR,
    DETECTION_CURVES,
    DETECTION_MONITOR,
    SLIDE_CURVES,
    SLIDE_MONITOR,
    ClassificationOptimConfig,
    ClassificationTask,
    DetectionOptimConfig,
    DetectionTask,
    SegmentationOptimConfig,
    SegmentationTask,
    SlideClassificationTask,
    draw_objects,
    draw_segmentation,
)
from perf_vit.transforms import Normalizer
from perf_vit.types import Window

# Dropped paths and sampled anchors take random numbers in each step.
SMALL = {"depth": 2, "embed_dim": 24, "drop_path_rate": 0.5, "attn_kwargs": {"num_features": 8}}
VIT = {"backbone": "performer_vit_tiny_patch16_224", "backbone_kwargs": SMALL}
AUGMENT = AugmentConfig(flips=True, gain=0.2, offset=0.2)
TILES = {"tile_px": 32, "tiles_per_epoch": 10, "batch_size": 2, "augment": AUGMENT}


@pytest.fixture(scope="module")
def segmentation(tmp_path_factory):
    scene = make_ship_scene(tmp_path_factory.mktemp("scene"), seed=0, size_px=128, num_targets=8)
    region = SegmentationSplitConfig(image=str(scene.image), labels=str(scene.labels))

    def build(num_workers: int, **options):
        given = {**TILES, "num_workers": num_workers, **options}
        data = build_segmentation_datamodule(
            SegmentationDataConfig(train=region, val=region, classes=["sea", "ship"], background="sea", **given), seed=0
        )
        spec = SegmentationSpec(classes=data.classes, normalizer=data.normalizer, tile_px=data.tile_px)
        model = SegmentationModelConfig(**VIT, out_indices=[0, 1], head="linear")
        return (
            data,
            SegmentationTask(model, spec, SegmentationOptimConfig(layer_decay=0.8)),
            {"draw": draw_segmentation},
        )

    return build


@pytest.fixture(scope="module")
def detection(tmp_path_factory):
    folder = tmp_path_factory.mktemp("boxes")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (48, 48, 3), np.uint8)).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 48, "width": 48})
        for each in range(3):
            box = [*rng.integers(0, 30, 2).tolist(), 10, 12]
            annotations.append({"id": 3 * number + each, "image_id": number, "category_id": 1, "bbox": box})
    labels = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "ship"}]}
    (folder / "labels.json").write_text(json.dumps(labels))
    split = DetectionSplitConfig(image=str(folder), labels=str(folder / "labels.json"))

    def build(num_workers: int):
        data = build_detection_datamodule(
            DetectionDataConfig(train=split, val=split, classes=["ship"], num_workers=num_workers, **TILES), seed=0
        )
        spec = DetectionSpec(classes=data.classes, normalizer=data.normalizer, tile_px=data.tile_px)
        head = {"hidden": 16, "proposals_per_tile": 20, "detections_per_tile": 5}
        model = DetectionModelConfig(
            **VIT, out_indices=[1], strides=[8], channels=64, head="faster_rcnn", head_kwargs=head
        )
        task = DetectionTask(model, spec, DetectionOptimConfig())
        return data, task, {"monitor": DETECTION_MONITOR, "curves": DETECTION_CURVES, "draw": draw_objects}

    return build


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    for name in ("field", "town"):
        (folder / name).mkdir()
        for number in range(3):
            Image.fromarray(rng.integers(0, 255, (48, 48, 3), np.uint8)).save(folder / name / f"{number}.png")

    def build(num_workers: int):
        split = ClassificationSplitConfig(image=str(folder))
        data = build_classification_datamodule(
            ClassificationDataConfig(train=split, val=split, num_workers=num_workers, **TILES), seed=0
        )
        spec = ClassificationSpec(
            kind="single_label", classes=data.names, normalizer=data.normalizer, tile_px=32, resize=False
        )
        task = ClassificationTask(ClassificationModelConfig(**VIT, drop_rate=0.2), spec, ClassificationOptimConfig())
        return data, task, {"monitor": CLASSIFICATION_MONITOR, "curves": CLASSIFICATION_CURVES}

    return build


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slides")
    paths = [folder / f"{number}.svs" for number in range(10)]
    store = EmbeddingStore(folder / "features", "encoder", {})
    rng = np.random.default_rng(0)
    for number, path in enumerate(paths):
        path.write_bytes(b"")
        features = rng.normal(size=(3 + number, 24)).astype(np.float32)
        store.write(str(path), features, [Window(row, 0, 8, 8) for row in range(3 + number)])
    labelled = SlideTargets(tuple(map(str, paths)), np.arange(10) % 2, ("normal", "tumour"))

    def build(num_workers: int):
        train = SlideBags(labelled, store, max_windows=4, seed=0)
        data = SlideClassificationDataModule(train, SlideBags(labelled, store), batch_size=2, num_workers=num_workers)
        spec = SlideClassificationSpec(
            classes=labelled.classes, normalizer=Normalizer((0.0,) * 3, (1.0,) * 3), tile_px=32
        )
        # Its dropout takes random numbers in each step.
        task = SlideClassificationTask(
            SlideClassificationModelConfig(**VIT, hidden_dim=8, attention_dim=4), spec, ClassificationOptimConfig()
        )
        return data, task, {"monitor": SLIDE_MONITOR, "curves": SLIDE_CURVES}

    return build
