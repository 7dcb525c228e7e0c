"""No file runs code or has other files or the network asked, whichever way it is read.

timm is made as careless as it was before 1.0.27, which unpickled whatever it was pointed at.
"""

import json
import pickle
from pathlib import Path

import lightning
import numpy as np
import pytest
import timm
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from safetensors.torch import save_file

import perf_vit
from perf_vit.conversion import load_softmax
from perf_vit.conversion.weights import read_weights
from perf_vit.data import DistillationDataConfig, EmbeddingStore, SplitConfig
from perf_vit.errors import CheckpointError, ConfigError, InputError, PerfVitError
from perf_vit.models import (
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
from perf_vit.sources import open_source
from perf_vit.transforms import Normalizer
from perf_vit.workflows.distill import _student, _teacher
from perf_vit.workflows.run_config import DistillationModelConfig, DistillationRun
from perf_vit.workflows.run_folder import RunFolder

SMALL = {"depth": 1, "embed_dim": 24, "num_heads": 1}
VIT = {"backbone": "vit_tiny_patch16_224", "backbone_kwargs": SMALL}
NORMALIZER = Normalizer((0.0,) * 3, (1.0,) * 3)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "the payload ran"


@pytest.fixture
def bomb(tmp_path: Path, mark: Path) -> Path:
    """A file of weights with the payload in it."""
    path = tmp_path / "bomb.pth"
    torch.save({"state_dict": {"weight": torch.zeros(1), "x": Payload(mark)}}, path)
    return path


@pytest.fixture(autouse=True)
def asked(monkeypatch) -> list[str]:
    """What timm was asked for beyond the weights that it was given."""
    found: list[str] = []

    def unpickle(*arguments, **options):
        path = next(str(each) for each in arguments if isinstance(each, str | Path))
        found.append(path)
        torch.load(path, weights_only=False)
        raise RuntimeError("nothing to load there")

    def ask_hub(name, *arguments, **options):
        found.append(str(name))
        raise RuntimeError("no network")

    monkeypatch.setattr("timm.models._factory.load_checkpoint", unpickle)
    monkeypatch.setattr("timm.models._builder.load_state_dict", unpickle)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_path", unpickle)
    monkeypatch.setattr("timm.models._factory.load_model_config_from_hf", ask_hub)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", ask_hub)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", ask_hub)
    return found


def networks() -> dict:
    spec = {"normalizer": NORMALIZER, "tile_px": 32, "classes": ("a", "b")}
    heads = {"out_indices": [0], "strides": [8], "channels": 64, "head_kwargs": {"num_convs": 1}}
    segmenter, detector = (
        SegmentationModelConfig(**VIT, out_indices=[0], head="linear"),
        DetectionModelConfig(**VIT, **heads),
    )
    classifier, slide = ClassificationModelConfig(**VIT), SlideClassificationModelConfig(**VIT)
    outputs = {"kind": "single_label", "normalizer": NORMALIZER, "tile_px": 32, "classes": ("a", "b")}
    return {
        "segmentation": (segmenter, lambda: build_segmenter(segmenter, SegmentationSpec(**spec)), load_segmenter),
        "detection": (detector, lambda: build_detector(detector, DetectionSpec(**spec)), load_detector),
        "classification": (
            classifier,
            lambda: build_classifier(classifier, ClassificationSpec(**outputs)),
            load_classifier,
        ),
        "slide_classification": (
            slide,
            lambda: build_slide_classifier(slide, SlideClassificationSpec(**spec)),
            load_slide_classifier,
        ),
    }


TASKS = ("segmentation", "detection", "classification", "slide_classification")


def checkpoint(task: str, path: Path, change=lambda metadata: None):
    """Write a checkpoint as training does, with a change to its metadata; gives the function that loads it."""
    config, build, load = networks()[task]
    torch.manual_seed(0)
    model = build()
    metadata = checkpoint_metadata(config, model)
    change(metadata)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"perf_vit": metadata, "state_dict": state}, path)
    return load


@pytest.mark.parametrize("task", TASKS)
def test_an_honest_checkpoint_loads(task: str, tmp_path: Path, asked) -> None:
    load = checkpoint(task, tmp_path / "x.ckpt")
    assert isinstance(load(tmp_path / "x.ckpt"), torch.nn.Module)
    assert asked == []


# What a file may try to hand to `timm.create_model`; {bomb} is a path of weights, {folder} one of a model.
ARGUMENTS = {
    "checkpoint_path": "{bomb}",
    "pretrained_cfg": {"file": "{bomb}", "source": "local-dir"},
    "pretrained_cfg_overlay": {"file": "{bomb}"},
    "pretrained_model_args": {"checkpoint_path": "{bomb}"},
    "pretrained": True,
    "pretrained_strict": False,
    "pretrained_filter_fn": "x",
    "cache_dir": "{folder}",
    "pruned": True,
    "feature_cls": "fx",
    "kwargs_filter": ["x"],
    "model_cfg": {},
}


def filled(value, **places):
    """The value with paths in it."""
    if isinstance(value, dict):
        return {key: filled(each, **places) for key, each in value.items()}
    return value.format(**places) if isinstance(value, str) else value


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("task", TASKS)
def test_a_checkpoint_hands_no_loading_argument_to_timm(
    task: str, name: str, tmp_path: Path, bomb: Path, mark: Path, asked
) -> None:
    value = filled(ARGUMENTS[name], bomb=bomb, folder=tmp_path / "cache")
    load = checkpoint(
        task, tmp_path / "x.ckpt", lambda metadata: metadata["model"]["backbone_kwargs"].update({name: value})
    )
    with pytest.raises(CheckpointError, match=rf"x\.ckpt: model\.backbone_kwargs may hold .*, got {name}"):
        load(tmp_path / "x.ckpt")
    assert asked == []
    assert not mark.exists()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_neither_does_a_config(name: str, tmp_path: Path, bomb: Path, mark: Path, asked) -> None:
    value = filled(ARGUMENTS[name], bomb=bomb, folder=tmp_path / "cache")
    with pytest.raises(ConfigError, match=f"model.backbone_kwargs may hold .*, got {name}"):
        build_segmenter(
            SegmentationModelConfig(backbone="vit_tiny_patch16_224", backbone_kwargs={name: value}),
            SegmentationSpec(classes=("a", "b"), normalizer=NORMALIZER, tile_px=32),
        )
    with pytest.raises(ConfigError, match=f"model.backbone_kwargs may hold .*, got {name}"):
        _teacher(DistillationModelConfig(backbone="vit_tiny_patch16_224", weights=None, backbone_kwargs={name: value}))
    assert asked == []
    assert not mark.exists()


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, **SMALL)
    return perf_vit.save_converted(perf_vit.linearize(model, num_clusters=2), tmp_path / "converted")


def spoil(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_model_folder_hands_no_loading_argument_to_timm(
    name: str, converted: Path, bomb: Path, mark: Path, asked
) -> None:
    spoil(converted, model_args={name: filled(ARGUMENTS[name], bomb=str(bomb), folder="cache")})
    teacher = timm.create_model("vit_tiny_patch16_224", img_size=32, **SMALL)
    for load in (
        perf_vit.conversion.load_converted,
        load_softmax,
        lambda folder: _student(DistillationModelConfig(backbone="vit_tiny_patch16_224", student=str(folder)), teacher),
        lambda folder: build_segmenter(
            SegmentationModelConfig(backbone=str(folder), out_indices=[0]),
            SegmentationSpec(classes=("a", "b"), normalizer=NORMALIZER, tile_px=32),
        ),
    ):
        with pytest.raises(CheckpointError, match=f"model_args of .*converted may hold .*, got {name}"):
            load(converted)
    assert asked == []
    assert not mark.exists()


# Where timm would look for weights before, or instead of, those that lie in the folder.
SOURCES = {
    "hub": {"source": "hf-hub", "hf_hub_id": "someone/else"},
    "hub without source": {"hf_hub_id": "someone/else", "hf_hub_filename": "x.bin"},
    "folder": {"source": "local-dir", "file": "{bomb}"},
    "file": {"file": "{bomb}"},
    "url": {"url": "https://example.invalid/x.pth"},
    "loader of its own": {"custom_load": True, "file": "{bomb}"},
    "weights in the config": {"state_dict": {"x": 1}},
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_model_folder_loads_its_own_weights_whatever_else_it_names(
    source: str, converted: Path, bomb: Path, mark: Path, asked
) -> None:
    expected = perf_vit.conversion.load_converted(converted).state_dict()
    spoil(converted, pretrained_cfg=filled(SOURCES[source], bomb=str(bomb)))
    for load in (perf_vit.conversion.load_converted, load_softmax):
        got = load(converted).state_dict()
        for name, value in got.items():
            assert torch.equal(value, expected[name])
    assert asked == []
    assert not mark.exists()


@pytest.mark.parametrize("architecture", ["hf-hub:someone/else", "local-dir:{folder}", "{folder}", "", None, 3, ["x"]])
def test_an_architecture_is_a_name_and_no_address(
    architecture, converted: Path, tmp_path: Path, bomb: Path, mark: Path, asked
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(
        json.dumps({"architecture": "resnet18", "model_args": {"checkpoint_path": str(bomb)}})
    )
    config = perf_vit.conversion.save.read_saved_config(converted)
    config["architecture"] = filled(architecture, folder=str(other))
    load = checkpoint("segmentation", tmp_path / "x.ckpt", lambda metadata: metadata.update(saved_backbone=config))
    with pytest.raises(CheckpointError):
        load(tmp_path / "x.ckpt")
    spoil(converted, architecture=config["architecture"])
    with pytest.raises(CheckpointError):
        perf_vit.conversion.load_converted(converted)
    assert asked == []
    assert not mark.exists()


@pytest.mark.parametrize("backbone", ["hf-hub:someone/else", "local-dir:{folder}", "{folder}"])
@pytest.mark.parametrize("task", TASKS)
def test_a_checkpoint_names_no_folder_and_no_address(
    task: str, backbone: str, converted: Path, tmp_path: Path, asked
) -> None:
    named = backbone.format(folder=converted)
    load = checkpoint(task, tmp_path / "x.ckpt", lambda metadata: metadata["model"].update(backbone=named))
    with pytest.raises(CheckpointError, match="a checkpoint must do without other files"):
        load(tmp_path / "x.ckpt")
    assert asked == []


@pytest.mark.parametrize("task", ["segmentation", "slide_classification"])
def test_a_checkpoint_names_no_mask_of_tissue(task: str, tmp_path: Path) -> None:
    url = "/vsicurl/https://example.invalid/mask.tif"
    load = checkpoint(task, tmp_path / "x.ckpt", lambda metadata: metadata["spec"].update(tissue=url))
    with pytest.raises(CheckpointError, match="a checkpoint must do without other files"):
        load(tmp_path / "x.ckpt")


def test_weights_that_are_pickles_of_anything_else_are_refused(
    bomb: Path, mark: Path, converted: Path, tmp_path: Path, asked
) -> None:
    plain = tmp_path / "plain.pt"
    plain.write_bytes(pickle.dumps({"weight": Payload(mark)}))
    in_folder = converted / "model.safetensors"
    for path in (bomb, plain):
        with pytest.raises(CheckpointError, match=r"can't read .* as weights"):
            read_weights(path)
        with pytest.raises(PerfVitError, match=r"can't read .* as weights"):
            _teacher(DistillationModelConfig(backbone="vit_tiny_patch16_224", weights=str(path)))
        for load in (checkpoint_task, load_segmenter, load_detector, load_classifier, load_slide_classifier):
            with pytest.raises(CheckpointError, match=r"can't read .* as a checkpoint"):
                load(path)
        in_folder.write_bytes(path.read_bytes())
        for load in (perf_vit.conversion.load_converted, load_softmax):
            with pytest.raises(CheckpointError, match=r"can't read .* as weights"):
                load(converted)
    assert asked == []
    assert not mark.exists()


def test_a_run_is_not_resumed_from_a_pickle_of_anything_else(tmp_path: Path, mark: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": {}, "callbacks": Payload(mark)}, run / "checkpoints" / "last.ckpt")
    config = DistillationRun(
        out=str(run),
        model=DistillationModelConfig(backbone="vit_tiny_patch16_224"),
        data=DistillationDataConfig(train=SplitConfig(image="x"), val=SplitConfig(image="x")),
        resume=True,
    )
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False)
    model = BoringModel()
    with pytest.raises((PerfVitError, pickle.UnpicklingError)):
        RunFolder(config).fit(trainer, model, model.train_dataloader())
    assert not mark.exists()


def test_features_of_slides_are_numbers(tmp_path: Path, mark: Path) -> None:
    store = EmbeddingStore(tmp_path, "x", {})
    objects = np.array([Payload(mark)], dtype=object)
    np.savez(store.path("a.svs"), features=objects, windows=objects)
    with pytest.raises(InputError, match="is damaged"):
        store.read("a.svs")
    # A bare pickle under the same name, too.
    store.path("a.svs").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(InputError, match="is damaged"):
        store.read("a.svs")
    assert not mark.exists()


def test_chunks_of_a_zarr_are_no_pickles(tmp_path: Path, mark: Path) -> None:
    pytest.importorskip("zarr")
    axes = [{"name": "y"}, {"name": "x"}]
    scale = [{"type": "scale", "scale": [1, 1]}]
    levels = [{"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}]
    codec = {"id": "pickle", "protocol": 4}
    for place in ({"compressor": codec, "filters": None}, {"compressor": None, "filters": [codec]}):
        folder = tmp_path / "slide.ome.zarr"
        (folder / "0").mkdir(parents=True, exist_ok=True)
        (folder / ".zgroup").write_text('{"zarr_format": 2}')
        (folder / ".zattrs").write_text(json.dumps({"multiscales": levels}))
        array = {"zarr_format": 2, "shape": [64, 64], "chunks": [64, 64], "dtype": "|u1", "fill_value": 0, "order": "C"}
        (folder / "0" / ".zarray").write_text(json.dumps({**array, **place}))
        (folder / "0" / "0.0").write_bytes(pickle.dumps(Payload(mark)))
        with pytest.raises(InputError, match=r"can't read .* as an OME-Zarr"):
            open_source(folder)
    assert not mark.exists()


def test_the_payload_works(bomb: Path, mark: Path, tmp_path: Path) -> None:
    torch.load(bomb, weights_only=False)
    assert mark.exists()
    mark.unlink()
    with pytest.raises(RuntimeError):
        timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(bomb), **SMALL)
    assert mark.exists()
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert read_weights(tmp_path / "x.safetensors").keys() == {"x"}
