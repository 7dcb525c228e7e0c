"""A run that is killed between two epochs' ends goes on with the samples that were left, to the same weights."""

import contextlib
import json
from functools import partial

import numpy as np
import pytest
import torch
from lightning import Callback
from PIL import Image

from perf_vit.data import (
    AugmentConfig,
    ClassificationDataConfig,
    DataConfig,
    EmbeddingStore,
    ImageSplitConfig,
    ObjectDataConfig,
    ObjectSplitConfig,
    RegionConfig,
    SlideBagModule,
    SlideBags,
    SlideTargets,
    build_datamodule,
    build_object_datamodule,
    build_scene_datamodule,
    make_ship_scene,
)
from perf_vit.data.epochs import EpochDataModule
from perf_vit.errors import ConfigError
from perf_vit.models import (
    ClassifierConfig,
    ClassifierSpec,
    DetectorConfig,
    DetectorSpec,
    ModelConfig,
    SegmenterSpec,
    SlideModelConfig,
    SlideSpec,
)
from perf_vit.tasks import (
    CLASSIFICATION_CURVES,
    CLASSIFICATION_MONITOR,
    DETECTION_CURVES,
    DETECTION_MONITOR,
    SLIDE_CURVES,
    SLIDE_MONITOR,
    DetectionOptimConfig,
    DetectionTask,
    OptimConfig,
    PooledOptimConfig,
    SceneTask,
    SegmentationTask,
    SlideTask,
    TrainerConfig,
    build_trainer,
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


class KilledError(RuntimeError):
    pass


class Watch(Callback):
    """Notes a sum of each batch, and kills the run at a step."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.kill_at = kill_at
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if self.kill_at is not None and len(self.seen) == self.kill_at:
            raise KilledError
        self.seen.append(float(torch.stack([image.double().sum() for image in batch[0]]).sum()))


@pytest.fixture(scope="module")
def segmentation(tmp_path_factory):
    scene = make_ship_scene(tmp_path_factory.mktemp("scene"), seed=0, size_px=128, num_targets=8)
    region = RegionConfig(image=str(scene.image), labels=str(scene.labels))

    def build(num_workers: int, **options):
        given = {**TILES, "num_workers": num_workers, **options}
        data = build_datamodule(DataConfig(train=region, val=region, classes=["sea", "ship"], **given), seed=0)
        spec = SegmenterSpec(classes=data.classes, normalizer=data.normalizer, tile_px=data.tile_px)
        model = ModelConfig(**VIT, out_indices=[0, 1], head="linear")
        return data, SegmentationTask(model, spec, OptimConfig(layer_decay=0.8)), {"draw": draw_segmentation}

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
    split = ObjectSplitConfig(images=str(folder), labels=str(folder / "labels.json"))

    def build(num_workers: int):
        data = build_object_datamodule(
            ObjectDataConfig(train=split, val=split, classes=["ship"], num_workers=num_workers, **TILES), seed=0
        )
        spec = DetectorSpec(classes=data.classes, normalizer=data.normalizer, tile_px=data.tile_px)
        head = {"hidden": 16, "proposals_per_tile": 20, "detections_per_tile": 5}
        model = DetectorConfig(**VIT, out_indices=[1], strides=[8], channels=64, head="faster_rcnn", head_kwargs=head)
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
        split = ImageSplitConfig(images=str(folder))
        data = build_scene_datamodule(
            ClassificationDataConfig(train=split, val=split, num_workers=num_workers, **TILES), seed=0
        )
        spec = ClassifierSpec(
            kind="single_label", outputs=data.names, normalizer=data.normalizer, tile_px=32, resize=False
        )
        task = SceneTask(ClassifierConfig(**VIT, drop_rate=0.2), spec, PooledOptimConfig())
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
        data = SlideBagModule(train, SlideBags(labelled, store), batch_size=2, num_workers=num_workers)
        spec = SlideSpec(classes=labelled.classes, normalizer=Normalizer((0.0,) * 3, (1.0,) * 3), tile_px=32)
        # Its dropout takes random numbers in each step.
        task = SlideTask(SlideModelConfig(**VIT, hidden_dim=8, attention_dim=4), spec, PooledOptimConfig())
        return data, task, {"monitor": SLIDE_MONITOR, "curves": SLIDE_CURVES}

    return build


def fit(build, folder, *, num_workers: int = 0, kill_at: int | None = None, resume: bool = False, **options):
    torch.manual_seed(1 if resume else 0)
    data, task, chosen = build(num_workers)
    config = TrainerConfig(
        accelerator="cpu", devices="1", max_epochs=2, ema_decay=0.6, checkpoint_every_steps=2, **options
    )
    trainer = build_trainer(config, folder, progress=False, seed=3, **chosen)
    watch = Watch(kill_at)
    trainer.callbacks.insert(0, watch)
    last = folder / "checkpoints" / "last.ckpt"
    with contextlib.suppress(KilledError):
        trainer.fit(task, data, ckpt_path=last if resume else None, weights_only=True)
    return watch.seen, torch.load(last, weights_only=True)


@pytest.fixture(scope="module")
def uninterrupted(segmentation, detection, scenes, slides, tmp_path_factory):
    """Batches and last checkpoint of whole runs; workers make no difference."""
    builds = {"segmentation": segmentation, "detection": detection, "scenes": scenes, "slides": slides}
    return {name: fit(build, tmp_path_factory.mktemp(name)) for name, build in builds.items()}


def assert_equal(first, second, place="") -> None:
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), place
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), place
        for key in first:
            assert_equal(first[key], second[key], f"{place}.{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), place
        for number, pair in enumerate(zip(first, second, strict=True)):
            assert_equal(*pair, f"{place}.{number}")
    else:
        assert first == second, place


@pytest.mark.parametrize("task", ["segmentation", "detection", "scenes", "slides"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_killed_inside_an_epoch_ends_in_the_same_weights(
    task, num_workers, uninterrupted, tmp_path, request
) -> None:
    build = request.getfixturevalue(task)
    seen, whole = uninterrupted[task]
    assert len(set(seen)) == 10
    # Five batches an epoch: checkpoints at steps 2, 4, 5 (end of the epoch), 6, 8.
    before, kept = fit(build, tmp_path / "killed", num_workers=num_workers, kill_at=8)
    assert before == seen[:8]
    assert kept["global_step"] == 8
    after, resumed = fit(build, tmp_path / "killed", num_workers=num_workers, resume=True)
    assert after == seen[8:]
    for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
        assert_equal(whole[part], resumed[part], part)


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "balanced"},
        {"sampler": "grid", "tile_px": 64, "batch_size": 1},
        {"sampler": "grid", "batch_size": 3},
    ],
)
def test_every_sampler_of_maps_goes_on_where_it_was(segmentation, options, tmp_path) -> None:
    build = partial(segmentation, **options)
    seen, whole = fit(build, tmp_path / "whole")
    # Killed inside the second epoch, which has tiles and an order of its own.
    kill_at = len(seen) // 2 + 3
    before, _ = fit(build, tmp_path / "killed", num_workers=2, kill_at=kill_at)
    assert before == seen[:kill_at]
    after, resumed = fit(build, tmp_path / "killed", num_workers=2, resume=True)
    assert after == seen[-len(after) :]
    assert len(after) < len(seen) // 2
    assert_equal(whole["state_dict"], resumed["state_dict"])


@pytest.mark.parametrize(("kill_at", "gone_on_from"), [(3, 2), (5, 5), (7, 6)])
def test_samples_after_the_last_checkpoint_are_seen_again(
    segmentation, uninterrupted, kill_at, gone_on_from, tmp_path
) -> None:
    seen, whole = uninterrupted["segmentation"]
    fit(segmentation, tmp_path / "killed", kill_at=kill_at)
    after, resumed = fit(segmentation, tmp_path / "killed", resume=True)
    assert after == seen[gone_on_from:]
    assert_equal(whole["state_dict"], resumed["state_dict"])


def test_batches_of_one_step_are_not_torn_apart(segmentation, tmp_path) -> None:
    options = {"accumulate_batches": 2}
    seen, whole = fit(segmentation, tmp_path / "whole", **options)
    # Steps end after batches 2, 4, 5 | 7, 9, 10: the fourth is at batch 7, and batch 8 belongs to the fifth.
    _, kept = fit(segmentation, tmp_path / "killed", kill_at=8, **options)
    assert kept["global_step"] == 4
    after, resumed = fit(segmentation, tmp_path / "killed", resume=True, **options)
    assert after == seen[7:]
    assert_equal(whole["state_dict"], resumed["state_dict"])


def test_the_end_of_an_epoch_is_resumed_with_its_samples_under_workers(segmentation, uninterrupted, tmp_path) -> None:
    seen, whole = uninterrupted["segmentation"]
    fit(segmentation, tmp_path / "killed", num_workers=2, kill_at=5)
    # Killed before the first batch of the second epoch.
    after, resumed = fit(segmentation, tmp_path / "killed", num_workers=2, resume=True)
    assert after == seen[5:]
    assert_equal(whole["state_dict"], resumed["state_dict"])


def test_a_data_module_goes_on_where_its_state_says() -> None:
    options = {"batch_size": 3, "num_workers": 0}
    first, second = EpochDataModule(), EpochDataModule()
    batches = iter(first.train_loader(range(7), **options))
    assert next(batches).tolist() == [0, 1, 2]
    second.load_state_dict(first.state_dict())
    loader = second.train_loader(range(7), **options)
    assert [batch.tolist() for batch in loader] == [[3, 4, 5]]
    assert second.state_dict() == {"num_batches": 0}
    assert [batch.tolist() for batch in loader] == [[0, 1, 2], [3, 4, 5]]
    # Where a checkpoint is read after the loader was made.
    second.load_state_dict(first.state_dict())
    assert [batch.tolist() for batch in loader] == [[3, 4, 5]]


def test_checkpoints_at_negative_steps_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="checkpoint_every_steps must be 0 or more"):
        build_trainer(TrainerConfig(checkpoint_every_steps=-1), tmp_path)
