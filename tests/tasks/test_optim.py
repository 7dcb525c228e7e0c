"""Groups of parameters and schedules of the learning rate."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from perf_vit.errors import ConfigError
from perf_vit.models import (
    ClassificationModelConfig,
    ClassificationSpec,
    Classifier,
    DetectionModelConfig,
    DetectionSpec,
    SegmentationModelConfig,
    SegmentationSpec,
    build_classifier,
    build_detector,
    build_segmenter,
)
from perf_vit.tasks import (
    ClassificationTask,
    DetectionOptimConfig,
    DetectionTask,
    OptimizerConfig,
    SegmentationOptimConfig,
    SegmentationTask,
    TrainingTask,
)
from perf_vit.tasks.optim import build_schedule, parameter_groups
from perf_vit.transforms import Normalizer

STATISTICS = Normalizer((0.0,) * 3, (1.0,) * 3)
VIT = {"backbone": "performer_vit_tiny_patch16_224",
       "backbone_kwargs": {"depth": 3, "embed_dim": 24, "attn_kwargs": {"num_features": 8}}}  # fmt: skip


def segmenter(**changes):
    spec = SegmentationSpec(classes=("a", "b"), normalizer=STATISTICS, tile_px=32)
    return build_segmenter(SegmentationModelConfig(**{**VIT, "out_indices": [0, 2], "head": "linear", **changes}), spec)


def detector(**changes):
    options = {"out_indices": [2], "strides": [8], "channels": 64, "head_kwargs": {"num_convs": 1}}
    spec = DetectionSpec(classes=("a",), normalizer=STATISTICS, tile_px=32)
    return build_detector(DetectionModelConfig(**{**VIT, **options, **changes}), spec)


def rates(model, config) -> dict[str, tuple[float, float]]:
    """(rate, weight decay) of each parameter by name, as the optimizer has them after the warm-up."""
    task = ClassificationTask if isinstance(model, Classifier) else TrainingTask
    layers = task.backbone_layers(SimpleNamespace(model=model))
    optimizer = torch.optim.AdamW(parameter_groups(model, config, layers), lr=config.lr)
    schedule = build_schedule(optimizer, config, 100, 10)
    schedule.step_update(round(100 * config.warmup_fraction))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    listed = [(names[id(p)], (g["lr"], g["weight_decay"])) for g in optimizer.param_groups for p in g["params"]]
    assert len(listed) == len(dict(listed)), "a parameter is in two groups"
    return dict(listed)


@pytest.mark.parametrize("build", [segmenter, detector])
def test_layer_d_of_depth_has_the_rate_times_decay_to_the_depth_minus_d(build) -> None:
    model = build()
    config = OptimizerConfig(lr=0.01, backbone_lr_scale=0.5, layer_decay=0.7, weight_decay=0.3)
    found = rates(model, config)
    assert set(found) == {name for name, _ in model.named_parameters()}
    depth = 4
    for name, (rate, _) in found.items():
        if name.startswith("backbone."):
            part = name.removeprefix("backbone.model.")
            layer = int(part.split(".")[1]) + 1 if part.startswith("blocks.") else 0
            assert part.startswith(("blocks.", "patch_embed.", "pos_embed", "cls_token"))
            assert rate == pytest.approx(0.01 * 0.5 * 0.7 ** (depth - layer)), name
        else:
            assert rate == 0.01, name


def test_classifiers_have_rates_by_layer_too() -> None:
    spec = ClassificationSpec(kind="single_label", classes=("a", "b"), normalizer=STATISTICS, tile_px=32)
    model = build_classifier(ClassificationModelConfig(**{**VIT, "pool": "map"}), spec)
    found = rates(model, OptimizerConfig(lr=0.01, backbone_lr_scale=0.5, layer_decay=0.7))
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert found["network.head.weight"][0] == 0.01
    assert found["network.attn_pool.q.weight"][0] == 0.01
    assert found["network.blocks.0.attn.qkv.weight"][0] < found["network.blocks.1.attn.qkv.weight"][0] < 0.01
    assert found["network.patch_embed.proj.weight"][0] < found["network.blocks.0.attn.qkv.weight"][0]


def test_norms_biases_and_embeddings_do_not_decay() -> None:
    model = segmenter()
    parameters = dict(model.named_parameters())
    for name, (_, decay) in rates(model, OptimizerConfig(weight_decay=0.3)).items():
        plain = parameters[name].ndim < 2 or name.endswith(("pos_embed", "cls_token"))
        assert decay == (0.0 if plain else 0.3), name


def test_stages_of_a_convolutional_backbone_are_layers() -> None:
    model = segmenter(backbone="resnet18", backbone_kwargs={}, out_indices=[1, 2, 3], head="linear")
    found = rates(model, OptimizerConfig(lr=1.0, layer_decay=0.5))
    assert set(found) == {name for name, _ in model.named_parameters()}
    expected = {"conv1": 0.5**4, "bn1": 0.5**4, "layer1": 0.5**3, "layer2": 0.5**2, "layer3": 0.5}
    for name, (rate, _) in found.items():
        part = name.split(".")[1] if name.startswith("backbone.") else ""
        assert rate == expected.get(part, 1.0), name


def test_frozen_parameters_are_in_no_group() -> None:
    model = segmenter(trainable_blocks=1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(rates(model, OptimizerConfig(layer_decay=0.5))) == trained
    assert {name.split(".")[3] for name in trained if name.startswith("backbone.model.blocks")} == {"2"}
    assert not any("patch_embed" in name for name in trained)


def test_the_default_is_a_warm_up_and_half_a_cosine_over_all_steps() -> None:
    optimizer = torch.optim.AdamW(
        [{"params": [torch.zeros(1, requires_grad=True)], "lr_scale": 0.1}, {"params": [torch.zeros(1)]}], lr=2.0
    )
    schedule = build_schedule(optimizer, OptimizerConfig(lr=2.0, warmup_fraction=0.07), total_steps=91, num_epochs=13)
    curve = []
    for step in range(92):
        schedule.step_update(step)
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert first == pytest.approx(0.1 * second)
        curve.append(second)
    warmup = 6
    assert 0 < curve[0] == pytest.approx(2 / warmup)
    assert all(b > a for a, b in itertools.pairwise(curve[: warmup + 1]))
    expected = [1 + math.cos(math.pi * (step - warmup) / (91 - warmup)) for step in range(warmup, 92)]
    assert curve[warmup:] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("schedule", "kwargs", "factors"),
    [
        ("constant", {}, {20: 1.0, 99: 1.0}),
        ("step", {"decay_epochs": 3, "decay_rate": 0.1}, {29: 1.0, 31: 0.1, 61: 0.01}),
        ("multistep", {"decay_milestones": [2, 5], "decay_rate": 0.5}, {18: 1.0, 21: 0.5, 51: 0.25}),
        ("poly", {"decay_rate": 1.0}, {50: 0.5, 100: 0.0}),
        ("wsd", {}, {79: 1.0, 100: 0.0}),
    ],
)
def test_schedules_of_timm_by_name_count_epochs(schedule, kwargs, factors) -> None:
    config = OptimizerConfig(lr=1.0, warmup_fraction=0.0, schedule=schedule, schedule_kwargs=kwargs)
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1.0)
    built = build_schedule(optimizer, config, total_steps=100, num_epochs=10)
    for step, factor in factors.items():
        built.step_update(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(factor, abs=1e-9), step


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "optim.lr must be a number above 0"),
        ({"weight_decay": -0.1}, "optim.weight_decay must be a number of at least 0"),
        ({"lr": math.nan}, "optim.lr must be a number above 0"),
        ({"lr": math.inf}, "optim.lr must be a number above 0"),
        ({"backbone_lr_scale": math.nan}, "and nan"),
        ({"layer_decay": 1.5}, "layer_decay above 0 and at most 1"),
        ({"warmup_fraction": 1.0}, "warmup_fraction from 0 to below 1"),
        ({"schedule": "cosin"}, "optim.schedule must be one of cosine, "),
        ({"schedule_kwargs": {"min_rate": 1e-5}}, "optim.schedule cosine: .*min_rate"),
    ],
)
def test_values_that_do_not_fit_are_one_line(change, message) -> None:
    spec = SegmentationSpec(classes=("a", "b"), normalizer=STATISTICS, tile_px=32)
    model = SegmentationModelConfig(**VIT, out_indices=[0])
    with pytest.raises(ConfigError, match=message):
        SegmentationTask(model, spec, SegmentationOptimConfig(**change))
    spec = DetectionSpec(classes=("a",), normalizer=STATISTICS, tile_px=32)
    with pytest.raises(ConfigError, match=message):
        DetectionTask(DetectionModelConfig(**VIT), spec, DetectionOptimConfig(**change))
