"""Checkpoints of trained networks: metadata and loading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from perf_vit._version import __version__
from perf_vit.config import check_values
from perf_vit.conversion.weights import is_model
from perf_vit.errors import CheckpointError, ConfigError, parsing
from perf_vit.layers import current_draw, redraw_projections
from perf_vit.models.classification import ClassificationModelConfig, ClassificationSpec, Classifier, build_classifier
from perf_vit.models.detection import DetectionModelConfig, DetectionSpec, Detector, build_detector
from perf_vit.models.finetune import merge_lora
from perf_vit.models.input_spec import InputSpec
from perf_vit.models.segmentation import SegmentationModelConfig, SegmentationSpec, Segmenter, build_segmenter
from perf_vit.models.slide_classification import (
    SlideClassificationModelConfig,
    SlideClassificationSpec,
    SlideClassifier,
    build_slide_classifier,
)
from perf_vit.registry import Registry
from perf_vit.types import TISSUE_METHODS

__all__ = [
    "CHECKPOINT_KEY",
    "NETWORKS",
    "Network",
    "checkpoint_facts",
    "checkpoint_metadata",
    "checkpoint_task",
    "load_classifier",
    "load_detector",
    "load_model",
    "load_segmenter",
    "load_slide_classifier",
    "register_network",
    "restore_draw",
]


@dataclass(frozen=True, kw_only=True)
class Network:
    """Network of a task, as needed to load its checkpoints.

    Attributes:
        label: Description for messages, such as "a segmentation model".
        config: Class of its config.
        spec: Class of its input spec.
        build: Function that builds it from config, spec and the config of a converted backbone.
    """

    label: str
    config: type[Any]
    spec: type[InputSpec]
    build: Callable[..., nn.Module]


NETWORKS: Registry[Network] = Registry("task of a checkpoint", CheckpointError)
"""Network of each task, by the name of the task."""


def register_network(task: str, network: Network) -> None:
    """Register the network of a task, whose checkpoints `load_model` can then load.

    Args:
        task: Name of the task, equal to the network's attribute `task`.
        network: Network of the task.

    Raises:
        ValueError: If the name is taken.
    """
    NETWORKS.add(task, network)


register_network(
    "segmentation",
    Network(label="a segmentation model", config=SegmentationModelConfig, spec=SegmentationSpec, build=build_segmenter),
)
register_network(
    "detection",
    Network(label="an object detector", config=DetectionModelConfig, spec=DetectionSpec, build=build_detector),
)
register_network(
    "classification",
    Network(
        label="an image classifier", config=ClassificationModelConfig, spec=ClassificationSpec, build=build_classifier
    ),
)
register_network("regression", replace(NETWORKS["classification"], label="a regression network"))
register_network(
    "slide_classification",
    Network(
        label="a slide classifier",
        config=SlideClassificationModelConfig,
        spec=SlideClassificationSpec,
        build=build_slide_classifier,
    ),
)

# Largest size in bytes of buffers not saved with the weights (projections, positions), which take a few MiB.
_LARGEST_CONSTANTS = 2**29

CHECKPOINT_KEY = "perf_vit"
"""Key of the package's metadata in a Lightning checkpoint."""

STATE_PREFIX = "model."
"""Prefix of the network's weights: its attribute name in the Lightning module."""


def checkpoint_metadata(config: Any, model: Segmenter | Detector | Classifier | SlideClassifier) -> dict[str, Any]:
    """Return the metadata needed to load a checkpoint besides the weights, as plain values.

    Args:
        config: Dataclass that the model was built from.
        model: Model of any task.
    """
    return {
        "version": __version__,
        "task": model.task,
        "model": asdict(config),
        "spec": model.spec.to_dict(),
        "draw": current_draw(model),
        # The folder of a converted backbone may not exist when the checkpoint is loaded.
        "saved_backbone": model.saved_backbone,
    }


def restore_draw(model: nn.Module, metadata: dict[str, Any]) -> None:
    """Restore the random projections with which the weights of a checkpoint were trained."""
    # Checkpoints without "draw" precede redrawing.
    redraw_projections(model, metadata.get("draw", 0))


def checkpoint_task(path: str | Path) -> str:
    """Return the task of a checkpoint's network, such as "segmentation".

    Raises:
        CheckpointError: The file is missing, not a checkpoint, or not written by perf_vit.
    """
    file = _checkpoint_file(Path(path))
    found = file.stat()
    return _task_of_file(file, found.st_ino, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=16)
def _task_of_file(path: Path, inode: int, mtime_ns: int, size: int) -> str:
    # A command asks several times, and a file may hold gigabytes.
    return _task_of(_read(path)[CHECKPOINT_KEY])


def checkpoint_facts(path: str | Path) -> dict[str, Any]:
    """Return what a checkpoint says of its network, without building it.

    Keys are those of `checkpoint_metadata`, with "epoch" (from 1), "num_parameters" and "label", what messages call the
    network.

    Raises:
        CheckpointError: The file is missing, not a checkpoint, or not written by perf_vit.
    """
    content = _read(Path(path))
    metadata, weights = content[CHECKPOINT_KEY], content["state_dict"]
    epoch = content.get("epoch")
    return {
        **metadata,
        "label": NETWORKS[_task_of(metadata)].label,
        "epoch": epoch + 1 if isinstance(epoch, int) else None,
        "num_parameters": sum(value.numel() for value in weights.values() if isinstance(value, Tensor)),
    }


def load_segmenter(path: str | Path) -> Segmenter:
    """Load a segmentation network; see `load_model`."""
    model: Segmenter = load_model(path, "segmentation")
    return model


def load_detector(path: str | Path) -> Detector:
    """Load an object detector; see `load_model`."""
    model: Detector = load_model(path, "detection")
    return model


def load_classifier(path: str | Path) -> Classifier:
    """Load an image classifier or a regression network; see `load_model`."""
    model: Classifier = load_model(path, "classification", "regression")
    return model


def load_slide_classifier(path: str | Path) -> SlideClassifier:
    """Load a slide classifier with its encoder; see `load_model`."""
    model: SlideClassifier = load_model(path, "slide_classification")
    return model


def load_model(path: str | Path, *tasks: str) -> Any:
    """Load the network of a checkpoint, in evaluation mode, on the CPU.

    Args:
        path: Checkpoint that a training run wrote, or the run folder, of which the best is loaded.
        *tasks: Accepted tasks; none for any task.

    Raises:
        CheckpointError: The file is missing, is not a checkpoint, holds another task's network, wasn't written by
            perf_vit, or was written by a version whose networks differ.
    """
    content = _read(Path(path), tasks)
    metadata = content[CHECKPOINT_KEY]
    network = NETWORKS[_task_of(metadata)]
    with _other_versions(path, metadata):
        # The weights are those of the checkpoint.
        no_weights = {"pretrained": False, **({"weights": None} if "weights" in metadata["model"] else {})}
        made_with, state = _plain(network.config(**{**metadata["model"], **no_weights}), content)
        meaning, saved_backbone = network.spec.from_dict(metadata["spec"]), metadata.get("saved_backbone")
        _check_names_no_files(path, made_with.backbone, saved_backbone, getattr(meaning, "tissue", None))
        check_values(made_with, "model.")
        check_values(meaning, "spec.")
        _check_size(network.build, made_with, meaning, saved_backbone, state)
        model = network.build(made_with, meaning, saved_backbone)
        model.load_state_dict(state)
        restore_draw(model, metadata)
    return model.eval()


def _check_names_no_files(path: str | Path, backbone: Any, saved_backbone: Any, tissue: Any) -> None:
    """Refuse a checkpoint that refers to other files or URLs, which training never writes."""
    named = None if saved_backbone is not None or is_model(str(backbone)) else backbone
    named = tissue if named is None and tissue not in (None, *TISSUE_METHODS) else named
    if named is not None:
        raise CheckpointError(f"{path} names {named!r:.80}, but a checkpoint must do without other files; train again")


def _check_size(build: Callable[..., nn.Module], config: Any, spec: Any, saved_backbone: Any, state: Any) -> None:
    """Refuse a network that doesn't match the weights before memory is allocated, as a file may request any size."""
    try:
        with torch.device("meta"), _NoDraws():
            planned = build(config, spec, saved_backbone)
    # The same failure occurs when the network is built, or the constructor needs values, which meta tensors lack.
    except Exception:
        return
    # Additional weights are checked on loading.
    misfits = (
        name for name, value in planned.state_dict().items() if value.shape != getattr(state.get(name), "shape", None)
    )
    if (name := next(misfits, None)) is not None:
        raise RuntimeError(f"{name} has another size")
    constants = sum(buffer.numel() * buffer.element_size() for buffer in planned.buffers())
    if constants > _LARGEST_CONSTANTS + sum(value.nbytes for value in state.values()):
        raise RuntimeError("the network's constant buffers take gigabytes")


class _NoDraws(TorchFunctionMode):
    """Skips the initialisation of weights without values, which takes most of the time to build a network of them."""

    _IN_PLACE = ("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "zero_", "fill_")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_in_place = bool(args) and getattr(func, "__name__", "") in self._IN_PLACE
        is_draw = is_in_place and isinstance(args[0], Tensor) and args[0].is_meta
        return args[0] if is_draw else func(*args, **(kwargs or {}))


@contextmanager
def _other_versions(path: str | Path, metadata: dict[str, Any]) -> Iterator[None]:
    """Report the version that wrote a checkpoint that this version can't load."""
    try:
        yield
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except CheckpointError:
        raise
    # The file may hold anything.
    except Exception as error:
        version = metadata.get("version", "of an unknown version")
        raise CheckpointError(
            f"{path} was written by perf_vit {version}, whose networks differ from those of {__version__}; use that "
            "version, or train again"
        ) from error


def _plain(config: Any, content: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Return config and weights of the network for inference, with LoRA merged into the weights."""
    state = content["state_dict"]
    state = {key.removeprefix(STATE_PREFIX): value for key, value in state.items() if key.startswith(STATE_PREFIX)}
    if getattr(config, "lora", None) is None:
        return config, state
    return replace(config, lora=None), merge_lora(state, config.lora)


def _task_of(metadata: dict[str, Any]) -> str:
    # Checkpoints without a task precede detection.
    return str(metadata.get("task", "segmentation"))


def _checkpoint_file(path: Path) -> Path:
    if (best := path / "checkpoints" / "best.ckpt").is_file():
        path = best
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}; check the path")
    return path


def _read(path: Path, tasks: tuple[str, ...] = ()) -> dict[str, Any]:
    path = _checkpoint_file(path)
    with parsing(path, "a checkpoint", CheckpointError):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or CHECKPOINT_KEY not in content:
        student = path.parent.parent / "student"
        if student.is_dir():
            raise CheckpointError(f"{path} is of a distillation, whose model is its student; give {student}")
        raise CheckpointError(f"{path} is not a perf_vit checkpoint; give a .ckpt file that `perf-vit train` wrote")
    if not isinstance(content[CHECKPOINT_KEY], dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(f"{path} is damaged: it lacks weights or metadata; copy the file again")
    found = _task_of(content[CHECKPOINT_KEY])
    if found not in NETWORKS:
        raise CheckpointError(f"{path} holds a network for {found:.80}; expected one of {', '.join(NETWORKS)}")
    if tasks and found not in tasks:
        raise CheckpointError(f"expected {NETWORKS[tasks[0]].label} in {path}, got {NETWORKS[found].label}")
    return content
