"""Whatever a damaged checkpoint holds, loading it says so in one line and takes little memory."""

import copy
import resource
from pathlib import Path

import pytest
import torch

from perf_vit.errors import CheckpointError
from perf_vit.models import (
    CHECKPOINT_KEY,
    ClassificationModelConfig,
    ClassificationSpec,
    DetectionModelConfig,
    DetectionSpec,
    SegmentationModelConfig,
    SegmentationSpec,
    SlideClassificationModelConfig,
    SlideClassificationSpec,
    build_classifier,
    build_detector,
    build_segmenter,
    build_slide_classifier,
    checkpoint_metadata,
    checkpoint_task,
    load_classifier,
    load_detector,
    load_segmenter,
    load_slide_classifier,
)
from perf_vit.transforms import Normalizer

NORMALIZER = Normalizer((1.0, 2.0, 3.0), (1.0, 1.0, 1.0))
BACKBONE = {
    "backbone": "performer_vit_tiny_patch16_224",
    "backbone_kwargs": {"depth": 1, "embed_dim": 32, "num_heads": 2, "attn_kwargs": {"num_features": 16}},
}
SHARED = {"normalizer": NORMALIZER, "tile_px": 32}
TASKS = {
    "segmentation": (
        load_segmenter,
        build_segmenter,
        SegmentationModelConfig(**BACKBONE, out_indices=[0], head="linear"),
        SegmentationSpec(classes=("a", "b"), **SHARED),
    ),
    "detection": (
        load_detector,
        build_detector,
        DetectionModelConfig(**BACKBONE, out_indices=[0], strides=[8, 16], channels=64),
        DetectionSpec(classes=("a", "b"), **SHARED),
    ),
    "classification": (
        load_classifier,
        build_classifier,
        ClassificationModelConfig(**BACKBONE, pool="avg"),
        ClassificationSpec(classes=("a", "b"), kind="single_label", **SHARED),
    ),
    "slide_classification": (
        load_slide_classifier,
        build_slide_classifier,
        SlideClassificationModelConfig(**BACKBONE, pool="avg", hidden_dim=8, attention_dim=8),
        SlideClassificationSpec(classes=("a", "b"), mpp=0.5, **SHARED),
    ),
}


@pytest.fixture(scope="module")
def contents() -> dict[str, dict]:
    """By task, what an untrained network's checkpoint holds."""
    made = {}
    for task, (_, build, config, spec) in TASKS.items():
        model = build(config, spec)
        state = {f"model.{name}": value for name, value in model.state_dict().items()}
        made[task] = {"state_dict": state, CHECKPOINT_KEY: checkpoint_metadata(config, model)}
    return made


def _load(task: str, content: dict, folder: Path) -> object:
    torch.save(content, folder / "best.ckpt")
    assert checkpoint_task(folder / "best.ckpt") == task
    return TASKS[task][0](folder / "best.ckpt")


@pytest.mark.parametrize("task", TASKS)
def test_an_undamaged_checkpoint_loads(contents, task, tmp_path) -> None:
    assert _load(task, contents[task], tmp_path).spec == TASKS[task][3]


def test_the_task_of_a_file_is_read_once_and_of_another_file_again(contents, tmp_path, monkeypatch) -> None:
    path, read, load = tmp_path / "best.ckpt", [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: read.append(args[0]) or load(*args, **kwargs))
    for number, task in enumerate(("segmentation", "detection"), 1):
        torch.save(contents[task], path)
        assert [checkpoint_task(path), checkpoint_task(path)] == [task, task]
        assert len(read) == number


def _put(place: str, value: object):
    def change(metadata: dict) -> None:
        *parents, key = place.split(".")
        for parent in parents:
            metadata = metadata[parent]
        metadata[key] = value

    return change


DAMAGE = {
    "a mean of lists": _put("spec.normalizer.mean", [[1.0], 2.0, 3.0]),
    "a mean of text": _put("spec.normalizer.mean", "abc"),
    "a mean of a dict": _put("spec.normalizer", {"mean": {"": None}, "std": [1.0]}),
    "a std of fewer bands": _put("spec.normalizer.std", [1.0, 1.0]),
    "no statistics": _put("spec.normalizer", None),
    "a tile of text": _put("spec.tile_px", "32"),
    "a tile of nothing": _put("spec.tile_px", 0),
    "a huge tile": _put("spec.tile_px", 32_000_000),
    "bands of text": _put("spec.bands", "12"),
    "labels that are none": _put("spec.label_options", [1]),
    "no spec": _put("spec", 7),
    "no model": _put("model", [["backbone"]]),
    "a backbone of lists": _put("model.backbone", ["performer_vit_tiny_patch16_224"]),
    "arguments of text": _put("model.backbone_kwargs", "depth"),
    "no heads": _put("model.backbone_kwargs.num_heads", 0),
    "a draw of text": _put("draw", "first"),
    "a saved backbone of text": _put("saved_backbone", "x"),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_values_that_no_training_wrote_are_one_line(contents, task, tmp_path, damage) -> None:
    content = copy.deepcopy(contents[task])
    DAMAGE[damage](content[CHECKPOINT_KEY])
    with pytest.raises(CheckpointError, match=r"best\.ckpt") as error:
        _load(task, content, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "damage",
    [
        _put("model.backbone_kwargs.embed_dim", 8000),
        _put("model.backbone_kwargs.attn_kwargs", {"num_features": 400_000_000}),
        _put("spec.tile_px", 2**14 + 16),
    ],
    ids=["weights", "projections", "tile"],
)
def test_a_network_larger_than_its_weights_is_refused_before_it_takes_memory(contents, task, tmp_path, damage) -> None:
    content = copy.deepcopy(contents[task])
    damage(content[CHECKPOINT_KEY])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError):
        _load(task, content, tmp_path)
    # In KiB; the network would take 3 GB, the projections 51.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


@pytest.mark.parametrize("task_value", ["poetry", None, 1000, {"": None}, "[bold]"])
def test_a_task_that_there_is_not_is_one_line(contents, tmp_path, task_value) -> None:
    content = copy.deepcopy(contents["segmentation"])
    content[CHECKPOINT_KEY]["task"] = task_value
    torch.save(content, tmp_path / "best.ckpt")
    for load in (checkpoint_task, load_segmenter):
        with pytest.raises(CheckpointError, match=r"holds a network for .*; expected one of segmentation, detection"):
            load(tmp_path / "best.ckpt")


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.99])
def test_a_checkpoint_that_was_cut_is_one_line(contents, tmp_path, share) -> None:
    path = tmp_path / "best.ckpt"
    torch.save(contents["segmentation"], path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match=r"can't read .*best\.ckpt as a checkpoint: .+; it may be damaged"):
        checkpoint_task(path)
