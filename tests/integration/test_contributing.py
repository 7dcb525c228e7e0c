"""The parts that CONTRIBUTING adds are short, and work wherever built-in ones do."""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_models import save_segmenter
from timm.models import _registry as timm_registry

import perf_vit
from perf_vit.inference.inputs import find_inputs
from perf_vit.labels.objects import LABEL_FORMATS, read_object_labels
from perf_vit.layers import MIXERS
from perf_vit.metrics import METRICS, RegisteredMetrics
from perf_vit.models import (
    NETWORKS,
    DetectionModelConfig,
    DetectionSpec,
    SegmentationModelConfig,
    SegmentationSpec,
    build_detector,
    build_segmenter,
)
from perf_vit.models.heads import DETECTION_HEADS, SEGMENTATION_HEADS
from perf_vit.sources import READERS, find_images
from perf_vit.transforms import Normalizer
from perf_vit.types import ObjectLabels
from perf_vit.workflows.registry import TASKS

ROOT = Path(__file__).parents[2]
PARTS = ["backbone", "mixer", "segmentation head", "detection head", "source", "label format", "metric", "task"]
SMALL = {"depth": 2, "embed_dim": 64, "num_heads": 2}
SPEC = {"classes": ("sea", "ship"), "normalizer": Normalizer((0.0,) * 3, (1.0,) * 3), "tile_px": 64}


def block_of(part: str) -> str:
    """The one Python block under the heading "Add a PART"."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (section,) = [each for each in re.split(r"^#+ ", text, flags=re.MULTILINE) if each.startswith(f"Add a {part}\n")]
    (block,) = re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    return block


@pytest.fixture(autouse=True)
def own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the examples register is gone after a test."""
    for registry in (MIXERS, SEGMENTATION_HEADS, DETECTION_HEADS, READERS, LABEL_FORMATS, METRICS, NETWORKS, TASKS):
        monkeypatch.setattr(registry, "_objects", dict(registry))
    for name, value in vars(timm_registry).copy().items():
        if name.startswith(("_model", "_module", "_deprecated")) and isinstance(value, dict | set):
            monkeypatch.setattr(timm_registry, name, value.copy())


@pytest.fixture
def added(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of a part, imported as a user's own."""
    (tmp_path / "my_part.py").write_text(block_of(request.param), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("my_part")
    del sys.modules["my_part"]


@pytest.mark.parametrize("part", PARTS)
def test_adding_a_part_takes_less_than_15_lines(part: str) -> None:
    assert len([line for line in block_of(part).splitlines() if line.strip()]) < 15


@pytest.mark.parametrize("added", ["backbone"], indirect=True)
def test_an_added_backbone_is_a_timm_model_and_a_config_s_backbone(added) -> None:
    name = "clustered_vit_nano_patch16_224"
    assert timm.create_model(name, num_classes=5)(torch.zeros(1, 3, 224, 224)).shape == (1, 5)
    config = SegmentationModelConfig(backbone=name, out_indices=[1, 3], head="linear")
    segmenter = build_segmenter(config, SegmentationSpec(**SPEC))
    assert segmenter(torch.zeros(1, 3, 64, 64)).shape == (1, 2, 64, 64)


@pytest.mark.parametrize("added", ["mixer"], indirect=True)
def test_an_added_mixer_is_found_by_timm_conversion_and_configs(added) -> None:
    model = timm.create_model("performer_vit_tiny_patch16_224", mixer="mean", num_classes=5, **SMALL)
    assert isinstance(model.blocks[0].attn.mixer, added.MeanMixer)
    softmax = timm.create_model("vit_tiny_patch16_224", num_classes=5, **SMALL)
    linear = perf_vit.linearize(softmax, "mean", temperature=2.0)
    assert linear.blocks[1].attn.mixer.options.temperature == 2
    linear(torch.randn(1, 3, 224, 224)).sum().backward()
    assert linear.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    config = SegmentationModelConfig(backbone_kwargs={**SMALL, "mixer": "mean"}, out_indices=[1], head="linear")
    segmenter = build_segmenter(config, SegmentationSpec(**SPEC))
    assert segmenter(torch.zeros(1, 3, 64, 64)).shape == (1, 2, 64, 64)


@pytest.mark.parametrize("added", ["segmentation head"], indirect=True)
def test_an_added_segmentation_head_is_named_in_a_config(added) -> None:
    config = SegmentationModelConfig(
        backbone_kwargs=SMALL, out_indices=[0, 1], head="last_map", head_kwargs={"drop_rate": 0.1}
    )
    segmenter = build_segmenter(config, SegmentationSpec(**SPEC))
    segmenter(torch.randn(2, 3, 64, 64)).sum().backward()
    assert isinstance(segmenter.head, added.LastMapHead)
    assert all(parameter.grad is not None for parameter in segmenter.head.parameters())


@pytest.mark.parametrize("added", ["detection head"], indirect=True)
def test_an_added_detection_head_is_named_in_a_config(added) -> None:
    def losses(head: str, **options) -> dict[str, float]:
        torch.manual_seed(0)
        given = {"backbone_kwargs": SMALL, "out_indices": [1], "strides": [8, 16], "channels": 64}
        config = DetectionModelConfig(**given, head=head, head_kwargs=options)
        detector = build_detector(config, DetectionSpec(**SPEC))
        boxes = np.array([[8, 8, 40, 40]], np.float32)
        labels = ObjectLabels(labels=np.array([1]), boxes_xyxy=boxes, ignored=np.zeros(1, bool))
        found = detector.losses([torch.zeros(3, 64, 64)], [labels])
        assert len(detector.eval()(torch.zeros(1, 3, 64, 64))) == 1
        return {name: value.item() for name, value in found.items()}

    plain, weighted = losses("fcos"), losses("weighted_fcos", box_weight=3.0)
    assert weighted == pytest.approx({**plain, "box": 3 * plain["box"]})


@pytest.mark.parametrize("added", ["source"], indirect=True)
def test_an_added_source_is_opened_found_and_named_like_any_other(added, tmp_path) -> None:
    pixels = np.arange(3 * 40 * 50, dtype=np.uint16).reshape(3, 40, 50)
    np.save(tmp_path / "a.npy", pixels)
    with perf_vit.open(tmp_path / "a.npy") as source:
        image = source.read(source.extent)
    np.testing.assert_array_equal(image.pixels, pixels)
    assert image.valid.all()
    assert find_images([tmp_path]) == find_images([tmp_path / "*.npy"]) == [tmp_path / "a.npy"]
    assert [each.path for each in find_inputs([tmp_path], tmp_path / "maps")] == [str(tmp_path / "a.npy")]


@pytest.mark.parametrize("added", ["label format"], indirect=True)
def test_an_added_label_format_is_read_like_any_other(added, tmp_path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "0.png")
    (tmp_path / "points.txt").write_text("0.png 12 30 ship\n0.png 62 5 buoy\n")
    index = read_object_labels(tmp_path / "points.txt", tmp_path / "images", label_format="points")
    assert index.classes == ("buoy", "ship")
    np.testing.assert_array_equal(index.records[0].boxes_xyxy, [[8, 26, 16, 34], [58, 1, 64, 9]])
    np.testing.assert_array_equal(index.records[0].labels, [1, 0])


@pytest.mark.parametrize("added", ["metric"], indirect=True)
def test_an_added_metric_is_computed_for_its_task(added) -> None:
    metrics = RegisteredMetrics("segmentation", SegmentationSpec(**SPEC))
    labels = torch.tensor([[[0, 1], [1, 255]]])
    metrics.update(torch.tensor([[[0, 1], [1, 1]]]), labels)
    assert metrics.compute() == {"kappa": pytest.approx(1.0)}


@pytest.mark.parametrize("added", ["task"], indirect=True)
def test_an_added_task_is_trained_and_evaluated_by_its_name(added, tmp_path) -> None:
    rng = np.random.default_rng(0)
    for name in ("dark", "light"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(2):
            pixels = rng.integers(0, 60, (32, 32, 3), np.uint8) + (150 if name == "light" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / name / f"{number}.png")
    split = {"image": str(tmp_path / "images")}
    config = {
        "task": "focal_classification",
        "data": {"train": split, "val": split, "tile_px": 32, "batch_size": 2, "num_workers": 0},
        "model": {"backbone_kwargs": SMALL},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": "1", "num_pictures": 0},
    }
    run = perf_vit.train(config, out=tmp_path / "run", progress=False)
    module = TASKS["focal_classification"].build_module
    assert module.keywords == {"task_class": added.FocalTask}
    loss = run.metrics[-1]["val/loss"]
    # The cross-entropy of two classes that are hardly told apart is about 0.7, the focal loss a quarter of it.
    assert 0 < loss < 0.4
    scores = perf_vit.evaluate(run.best, tmp_path / "images", progress=False)
    assert [row["name"] for row in scores.table] == ["dark", "light"]


@pytest.mark.parametrize("added", ["metric"], indirect=True)
def test_an_added_metric_is_in_the_scores_of_evaluate(added, tmp_path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 50, 3), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(rng.integers(0, 2, (40, 50), np.uint8)).save(tmp_path / "mask.png")
    checkpoint = save_segmenter(tmp_path / "model.ckpt")
    found = perf_vit.evaluate(
        checkpoint, tmp_path / "a.png", tmp_path / "mask.png", json=tmp_path / "scores.json", progress=False
    )
    scores = json.loads((tmp_path / "scores.json").read_text())
    confusion = np.array(scores["confusion"]) / 2000
    chance = confusion.sum(0) @ confusion.sum(1)
    assert scores["metrics"] == {"kappa": pytest.approx((confusion.trace() - chance) / (1 - chance), abs=1e-6)}
    assert "kappa" in str(found)


@pytest.mark.parametrize("added", ["source"], indirect=True)
def test_an_added_source_is_predicted_like_a_raster_of_its_pixels(added, tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (3, 40, 50), np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "a.png")
    checkpoint = save_segmenter(tmp_path / "model.ckpt")
    maps = []
    for name in ("a.npy", "a.png"):
        perf_vit.predict(checkpoint, tmp_path / name, tmp_path / f"{name}.tif", kind="probabilities", progress=False)
        with perf_vit.open(tmp_path / f"{name}.tif") as source:
            maps.append(source.read(source.extent).pixels)
    np.testing.assert_array_equal(*maps)


@pytest.mark.slow
def test_an_installed_extension_s_task_is_known_on_the_command_line(tmp_path) -> None:
    (tmp_path / "my_parts.py").write_text(block_of("task"), encoding="utf-8")
    info = tmp_path / "my_parts-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-parts\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[perf_vit]\nmy_parts = my_parts\n")
    config = tmp_path / "run.yaml"
    config.write_text("task: focal_classification\nout: runs/a\ndata: {train: {image: nowhere}}\n")
    command = [sys.executable, "-m", "perf_vit", "train", str(config)]
    paths = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert "task must be" not in done.stderr


def test_every_data_set_s_card_is_in_the_table() -> None:
    cards = {path.parent.name for path in (ROOT / "datasets").glob("*/README.md")}
    table = (ROOT / "datasets" / "README.md").read_text(encoding="utf-8")
    assert cards == set(re.findall(r"^\| \[\w+\]\((\w+)/README\.md\)", table, flags=re.MULTILINE))
