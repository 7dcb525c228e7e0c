"""Every shipped YAML loads, builds and trains one step."""

import pytest
import timm
import torch

import perf_vit
from perf_vit.cli.schemas import DistillationRun, SegmentationRun
from perf_vit.config import find_config, load_config, shipped_configs
from perf_vit.models import SegmenterSpec, build_segmenter
from perf_vit.tasks import DistillationTask, SegmentationLoss
from perf_vit.transforms import Normalizer

SEGMENTATION = [name for name in shipped_configs() if name.startswith("configs/segmentation/")]
DISTILLATION = [name for name in shipped_configs() if name.startswith("configs/distillation/")]


def test_every_shipped_config_is_of_a_kind_tested_here() -> None:
    assert sorted(SEGMENTATION + DISTILLATION) == shipped_configs()
    assert DISTILLATION


@pytest.mark.parametrize("name", DISTILLATION)
def test_a_shipped_distillation_loads_and_its_student_builds(name: str) -> None:
    config = load_config(name, DistillationRun, ["data.images=[x]", "data.val_images=[y]", "out=x"])
    with torch.device("meta"):
        teacher = timm.create_model(config.model.name, **config.model.kwargs)
    student = perf_vit.performerize(teacher, config.model.attention, **config.model.options)
    task = DistillationTask(teacher, student, config.optim)
    assert any(parameter.requires_grad for parameter in task.student.parameters())
    assert config.data.size_px % teacher.patch_embed.patch_size[0] == 0


@pytest.mark.parametrize("name", SEGMENTATION)
def test_a_shipped_config_loads_builds_and_takes_a_step(name: str) -> None:
    files = [f"data.{part}.{key}=x" for part in ("train", "val") for key in ("image", "labels")]
    config = load_config(name, SegmentationRun, [*files, "out=x"])
    num_bands = len(config.data.bands or [1, 2, 3])
    spec = SegmenterSpec(
        classes=tuple(config.data.classes),
        normalizer=Normalizer((0.0,) * num_bands, (1.0,) * num_bands),
        tile_px=config.data.tile_px,
    )
    model = build_segmenter(config.model, spec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr)
    size = 2 * model.size_multiple
    labels = torch.randint(0, len(spec.classes), (2, size, size), generator=torch.Generator().manual_seed(0))
    images = torch.randn(2, num_bands, size, size, generator=torch.Generator().manual_seed(0))
    criterion = SegmentationLoss(config.optim.dice_weight, config.optim.class_weights)
    losses = []
    for _ in range(2):
        loss = criterion(model(images), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", shipped_configs())
def test_a_shipped_config_says_command_data_duration_and_score(name: str) -> None:
    header = "\n".join(line for line in find_config(name).read_text().splitlines() if line.startswith("#"))
    assert all(word in header for word in ("command:", "data:", "duration", "expected"))
