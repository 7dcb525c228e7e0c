"""Every shipped YAML loads, builds and trains one step."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import perf_vit
from perf_vit.config import config_value, find_config, load_config, shipped_configs
from perf_vit.data import build_distillation_datamodule
from perf_vit.models import ClassificationSpec, DetectionSpec, SegmentationSpec, SlideClassificationSpec, build_detector
from perf_vit.tasks import (
    ClassificationTask,
    DistillationTask,
    SegmentationTask,
    SlideClassificationTask,
    build_distillation_trainer,
)
from perf_vit.tasks.optim import parameter_groups
from perf_vit.transforms import Normalizer
from perf_vit.types import ObjectLabels
from perf_vit.workflows.run_config import (
    ClassificationRun,
    DetectionRun,
    DistillationRun,
    RegressionRun,
    SegmentationRun,
    SlideClassificationRun,
)

SEGMENTATION = [name for name in shipped_configs() if name.startswith("configs/segmentation/")]
DETECTION = [name for name in shipped_configs() if name.startswith("configs/detection/")]
CLASSIFICATION = [
    name for name in shipped_configs() if name.startswith(("configs/classification/", "configs/regression/"))
]
SLIDES = [name for name in shipped_configs() if name.startswith("configs/slide_classification/")]
DISTILLATION = [name for name in shipped_configs() if name.startswith("configs/distillation/")]


def test_every_shipped_config_is_of_a_kind_tested_here() -> None:
    assert sorted(SEGMENTATION + DETECTION + DISTILLATION + CLASSIFICATION + SLIDES) == shipped_configs()
    assert DISTILLATION
    assert DETECTION
    assert CLASSIFICATION
    assert SLIDES


@pytest.mark.parametrize("name", DISTILLATION)
def test_a_shipped_distillation_loads_builds_and_takes_a_step_of_each_stage(name: str, tmp_path) -> None:
    files = ["data.train.image=[x]", "data.val.image=[y]", "out=x"]
    size = load_config(name, DistillationRun, files).data.tile_px
    image = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 80, 3), dtype=np.uint8)).save(image)
    files = [f"data.train.image=[{image}]", f"data.val.image=[{image}]", f"out={tmp_path}"]
    fewer = ["data.tile_px=56", "data.num_val_tiles=1", "optim.block_steps=1", "optim.token_steps=1"]
    config = load_config(name, DistillationRun, [*files, *fewer, "trainer.val_every_steps=1"])
    torch.manual_seed(0)
    teacher = timm.create_model(
        config.model.backbone, **{**config.model.backbone_kwargs, "depth": 2}, dynamic_img_size=True
    )
    assert size % teacher.patch_embed.patch_size[0] == 0
    student = perf_vit.linearize(teacher, config.model.mixer, max_exact_tokens=0, **config.model.options)
    before = student.blocks[1].attn.qkv.weight.detach().clone()
    task = DistillationTask(teacher, student, config.optim)
    statistics = teacher.pretrained_cfg["mean"], teacher.pretrained_cfg["std"]
    data = build_distillation_datamodule(config.data, *statistics, steps_per_epoch=1, seed=config.seed)
    trainer = build_distillation_trainer(config.trainer, config.optim, tmp_path / "run", progress=False)
    trainer.fit(task, data)
    assert trainer.global_step == 2
    assert torch.isfinite(trainer.callback_metrics["val/patch_cosine"])
    assert not torch.equal(student.blocks[1].attn.qkv.weight, before)
    assert torch.equal(teacher.blocks[1].attn.qkv.weight, before)


@pytest.mark.parametrize("name", SEGMENTATION)
def test_a_shipped_config_loads_builds_and_takes_a_step(name: str) -> None:
    files = [f"data.{part}.{key}=x" for part in ("train", "val") for key in ("image", "labels")]
    # A backbone that the user must give may be any of the same blocks.
    given = [] if "backbone: performer" in find_config(name).read_text() else ["model.backbone=vit_tiny_patch16_224"]
    config = load_config(name, SegmentationRun, [*files, *given, "out=x"])
    if given:
        config.data.tile_px = 64
    num_bands = len(config.data.bands or [1, 2, 3])
    spec = SegmentationSpec(
        classes=tuple(config.data.classes),
        normalizer=Normalizer((0.0,) * num_bands, (1.0,) * num_bands),
        tile_px=config.data.tile_px,
    )
    task = SegmentationTask(config.model, spec, config.optim)
    model = task.model
    groups = parameter_groups(model, config.optim, task.backbone_layers())
    for group in groups:
        group["lr"] *= group["lr_scale"]
    optimizer = torch.optim.AdamW(groups)
    size = 2 * model.size_multiple
    labels = torch.randint(0, len(spec.classes), (2, size, size), generator=torch.Generator().manual_seed(0))
    images = torch.randn(2, num_bands, size, size, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(2):
        loss = task.loss(model(images), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", DETECTION)
def test_a_shipped_detector_loads_builds_takes_a_step_and_detects(name: str) -> None:
    files = [f"data.{part}.{key}=x" for part in ("train", "val") for key in ("image", "labels")]
    config = load_config(name, DetectionRun, [*files, "out=x"])
    assert config_value(name, "task") == "detection"
    num_bands = len(config.data.bands or [1, 2, 3])
    normalizer = Normalizer((0.0,) * num_bands, (1.0,) * num_bands)
    torch.manual_seed(0)
    model = build_detector(
        config.model, DetectionSpec(classes=tuple(config.data.classes), normalizer=normalizer, tile_px=64)
    )
    masks = np.zeros((2, 64, 64), bool)
    masks[0, 8:24, 8:20], masks[1, 30:58, 26:60] = True, True
    boxes = np.array([[8, 8, 20, 24], [26, 30, 60, 58]], np.float32)
    oriented = np.array([[14, 16, 16, 12, -1.5], [43, 44, 34, 28, 0.2]], np.float32)
    labels = ObjectLabels(
        labels=np.array([0, 0]), boxes_xyxy=boxes, oriented_boxes=oriented, masks=masks, ignored=np.zeros(2, bool)
    )
    images = torch.randn(2, num_bands, 64, 64, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr)
    losses = torch.stack(list(model.train().losses(list(images), [labels] * 2).values()))
    losses.sum().backward()
    optimizer.step()
    assert losses.isfinite().all()
    with torch.inference_mode():
        found = model.eval()(images)
    assert [type(each).__name__ for each in found] == ["Detections"] * 2


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_a_shipped_classifier_loads_builds_and_learns_one_batch(name: str) -> None:
    is_regression = config_value(name, "task") == "regression"
    # A backbone that the user must give may be any of the same blocks.
    given = [] if "backbone: performer" in find_config(name).read_text() else ["model.backbone=vit_tiny_patch16_224"]
    files = ["data.train.image=x", "out=x"]
    if " labels: " in find_config(name).read_text():
        files += ["data.train.labels=x", "data.targets=[a]" if is_regression else "data.classes=[a,b,c]"]
    config = load_config(name, RegressionRun if is_regression else ClassificationRun, [*files, *given])
    multilabel = not is_regression and config.data.multilabel
    spec = ClassificationSpec(
        kind="regression" if is_regression else "multilabel" if multilabel else "single_label",
        classes=("a",) if is_regression else ("a", "b", "c"),
        normalizer=Normalizer((0.0,) * 3, (1.0,) * 3),
        tile_px=64,
        target_mean=(5.0,) if is_regression else (),
        target_std=(2.0,) if is_regression else (),
    )
    torch.manual_seed(0)
    task = ClassificationTask(config.model, spec, config.optim)
    images = torch.randn(2, 3, 64, 64)
    targets = torch.tensor([0, 2])
    if is_regression or multilabel:
        targets = torch.tensor([[3.0], [7.0]]) if is_regression else torch.tensor([[0.0, 1, 1], [1, 0, 0]])
    # Without the warm-up of a run, its rate would go too far.
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=config.optim.lr / 100)
    losses = []
    for _ in range(2):
        loss = task.loss(task(images), targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", SLIDES)
def test_a_shipped_slide_classifier_loads_builds_and_learns_one_batch(name: str) -> None:
    given = ["data.train.labels=x", "data.train.image=x", "model.backbone=vit_tiny_patch16_224", "out=x"]
    config = load_config(name, SlideClassificationRun, given)
    spec = SlideClassificationSpec(
        classes=("a", "b"), normalizer=Normalizer((0.0,) * 3, (1.0,) * 3), tile_px=config.data.tile_px
    )
    torch.manual_seed(0)
    task = SlideClassificationTask(config.model, spec, config.optim).eval()
    bags = torch.randn(2, 7, task.model.embed_dim)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    labels = torch.tensor([0, 1])
    # Without the warm-up of a run, its rate would go too far.
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=config.optim.lr / 100)
    losses = []
    for _ in range(2):
        loss = task.loss(task.model(bags, mask)[0], labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", shipped_configs())
def test_a_shipped_config_says_command_data_duration_and_score(name: str) -> None:
    header = "\n".join(line for line in find_config(name).read_text().splitlines() if line.startswith("#"))
    assert all(word in header for word in ("command:", "data:", "duration", "expected"))
