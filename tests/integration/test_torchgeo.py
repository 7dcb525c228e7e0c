"""torchgeo's trainers with the backbones' names."""

import lightning
import pytest
import torch
from doc_examples import examples, run
from torch.utils.data import DataLoader

import perf_vit
from perf_vit.layers import LinearizedAttention

trainers = pytest.importorskip("torchgeo.trainers")

VITS = [
    "performer_vit_tiny_patch16_224",
    "performer_vit_rope_small_patch16_224",
    "clustered_vit_tiny_patch16_224",
]
each_vit = pytest.mark.parametrize(
    "name", [VITS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in VITS[1:])]
)
NUM_CLASSES = 3


def fit(task: lightning.LightningModule, height: int, width: int, dense: bool) -> dict[str, torch.Tensor]:
    """One step of training and one of validation on seeded noise."""
    generator = torch.Generator().manual_seed(0)
    target, shape = ("mask", (height, width)) if dense else ("label", ())
    samples = [
        {
            "image": torch.randn(3, height, width, generator=generator),
            target: torch.randint(NUM_CLASSES, shape, generator=generator),
        }
        for _ in range(2)
    ]
    trainer = lightning.Trainer(fast_dev_run=True, accelerator="cpu", enable_model_summary=False)
    trainer.fit(task, DataLoader(samples, batch_size=2), DataLoader(samples, batch_size=2))
    assert trainer.global_step == 1
    return trainer.callback_metrics


def first_weight(model: torch.nn.Module) -> torch.Tensor:
    kinds = LinearizedAttention
    return next(module for module in model.modules() if isinstance(module, kinds)).qkv.weight


def assert_learns(task: lightning.LightningModule, height: int, width: int, dense: bool) -> None:
    before = first_weight(task.model).detach().clone()
    metrics = fit(task, height, width, dense)
    assert metrics["train_loss"].isfinite()
    assert metrics["val_loss"].isfinite()
    assert not torch.equal(first_weight(task.model), before)


@each_vit
def test_classification_task_trains_a_vit(name: str) -> None:
    assert_learns(trainers.ClassificationTask(model=name, num_classes=NUM_CLASSES), 224, 224, dense=False)


def test_classification_task_trains_hct_at_any_size() -> None:
    assert_learns(trainers.ClassificationTask(model="hct_base", num_classes=NUM_CLASSES), 256, 192, dense=False)


@each_vit
def test_segmentation_task_trains_a_vit_under_dpt(name: str) -> None:
    task = trainers.SemanticSegmentationTask(model="dpt", backbone=f"tu-{name}", num_classes=NUM_CLASSES)
    task.model.encoder.model.set_input_size(img_size=(32, 64))
    assert_learns(task, 32, 64, dense=True)


def test_segmentation_task_trains_a_converted_vit() -> None:
    task = trainers.SemanticSegmentationTask(model="dpt", backbone="tu-vit_tiny_patch16_224", num_classes=NUM_CLASSES)
    task.model = perf_vit.linearize(task.model, max_exact_tokens=0, window_size=2, num_sinks=2, num_clusters=4)
    task.model.encoder.model.set_input_size(img_size=(32, 64))
    assert_learns(task, 32, 64, dense=True)


def test_segmentation_task_trains_a_unet_over_hct() -> None:
    task = trainers.SemanticSegmentationTask(model="unet", backbone="tu-hct_base", num_classes=NUM_CLASSES)
    stem = task.model.encoder.model.model.stem.conv.weight
    before = stem.detach().clone()
    assert fit(task, 128, 96, dense=True)["val_loss"].isfinite()
    assert not torch.equal(stem, before)


def test_the_documented_examples_run() -> None:
    names = run(examples("integrations.md", "torchgeo"))
    with torch.no_grad():
        assert names["scenes"](torch.zeros(1, 6, 224, 224)).shape == (1, 3)
        assert names["crops"](torch.zeros(1, 6, 96, 160)).shape == (1, 3, 96, 160)
        assert names["roads"](torch.zeros(1, 6, 64, 128)).shape == (1, 3, 64, 128)
    assert any(isinstance(module, LinearizedAttention) for module in names["softmax"].model.modules())
