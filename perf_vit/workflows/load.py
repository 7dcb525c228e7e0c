"""Trained and converted models, by the path or the name of whatever holds them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perf_vit.conversion import load_converted, load_softmax
from perf_vit.conversion.save import CONFIG, is_converted
from perf_vit.errors import CheckpointError, ConfigError, reason_line
from perf_vit.inference.prefetch import takes_valid
from perf_vit.models import InputSpec, SegmentationSpec, load_model
from perf_vit.transforms import Normalizer
from perf_vit.types import Source

__all__ = ["as_segmenter", "find_model", "load"]

_HUB = "hf-hub:"

# Of networks that don't say how large their tiles are.
_TILE_PX = 512


def load(model: str | Path) -> nn.Module:
    """Load a model, in evaluation mode, on the CPU.

    Args:
        model: Run folder, of which the best model is loaded; checkpoint; folder of a converted model or of one that
            timm saved; or "hf-hub:NAME" for such a folder on the Hugging Face hub.

    Raises:
        CheckpointError: There is no such model, it is damaged, or another version wrote it.
        ConfigError: The hub doesn't give it.
    """
    found = find_model(model)
    if found.is_file():
        network: nn.Module = load_model(found)
        return network
    return load_converted(found) if is_converted(found) else load_softmax(found).eval()


def find_model(model: str | Path) -> Path:
    """The checkpoint, or the folder with weights, that a path or name stands for; see `load`.

    Raises:
        CheckpointError: There is none.
        ConfigError: The hub doesn't give it.
    """
    if str(model).startswith(_HUB):
        return _download(str(model).removeprefix(_HUB))
    path = Path(model)
    if not path.is_dir():
        return _checked_file(path)
    for folder in (path / "student", path):
        if (folder / CONFIG).is_file():
            return folder
    best = path / "checkpoints" / "best.ckpt"
    if best.is_file():
        return best
    raise CheckpointError(
        f"{path} holds no model: expected checkpoints/best.ckpt of a run, or the {CONFIG} of a saved model"
    )


def _checked_file(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}")
    return path


def _download(name: str) -> Path:
    """The folder of a model on the hub, downloaded unless it is in the cache."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    wanted: Any = [CONFIG, "*.safetensors"]
    try:
        folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=wanted))
    # Each way of downloading has errors of its own.
    except Exception as error:
        raise ConfigError(f"can't get {name} from the Hugging Face hub: {reason_line(error)}") from error
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{name} on the Hugging Face hub holds no {CONFIG}, so it is no model")
    return folder


class BareSegmenter(nn.Module):
    """Any network that gives a score per class and pixel, with what prediction needs to know of it.

    Args:
        network: Tiles [B, C, h, w] to logits [B, K, h, w]; one channel is the logit of a single class. If it has an
            argument `valid`, it is given the valid pixels, bool [B, h, w], or None if all are.
        spec: What it expects and means.
    """

    task = "segmentation"
    size_multiple = 1

    def __init__(self, network: nn.Module, spec: SegmentationSpec) -> None:
        super().__init__()
        self.network = network
        self.spec = spec

    def forward(self, image: Tensor, valid: Tensor | None = None) -> Tensor:
        """Logits [B, K, h, w] of tiles [B, C, h, w] and their valid pixels, bool [B, h, w]."""
        logits: Tensor = self.network(image, valid=valid) if takes_valid(self.network) else self.network(image)
        return logits

    def to_labels(self, logits: Tensor) -> Tensor:
        """Class indices [B, h, w], or 0 and 1 of a single class, [B, 1, h, w]; see `Segmenter.to_labels`."""
        return (logits > 0).long() if self.spec.multilabel else logits.argmax(1)


def as_segmenter(network: nn.Module, source: Source, tile_px: int | None = None) -> BareSegmenter:
    """Take any network for a segmentation model.

    Args:
        network: Network, with an `InputSpec` as its attribute `spec` or without one: it reads all bands then, and
            pixels as they are.
        source: An input of it, opened as the spec says.
        tile_px: Size of its tiles; that of the spec, or 512, by default.

    Raises:
        ConfigError: It gives no scores per pixel, or of another number of classes than the spec has.
    """
    given = getattr(network, "spec", None)
    known = given if isinstance(given, InputSpec) else InputSpec()
    size = tile_px or known.tile_px or _TILE_PX
    num_classes = _count_classes(network, source.num_bands, size)
    classes = known.classes or tuple(f"class_{index}" for index in range(num_classes))
    if len(classes) != num_classes:
        raise ConfigError(f"the spec has {len(classes)} classes, and the model gives {num_classes} scores per pixel")
    values = {each.name: getattr(known, each.name) for each in fields(InputSpec)}
    identity = Normalizer((0.0,) * source.num_bands, (1.0,) * source.num_bands)
    values |= {"classes": classes, "normalizer": known.normalizer or identity, "tile_px": size}
    return BareSegmenter(network, SegmentationSpec(**values, multilabel=num_classes == 1))


def _count_classes(network: nn.Module, num_bands: int, size: int) -> int:
    """Scores per pixel that a network gives for a tile of zeros."""
    parameter = next(network.parameters(), None)
    tile = torch.zeros(1, num_bands, size, size, device=None if parameter is None else parameter.device)
    try:
        with torch.inference_mode():
            shape = tuple(network(tile).shape)
    # The network is the user's.
    except Exception as error:
        raise ConfigError(f"the model doesn't take tiles of {tuple(tile.shape)}: {reason_line(error)}") from error
    if len(shape) != 4 or shape[-2:] != (size, size):
        raise ConfigError(f"expected scores [1, K, {size}, {size}] from the model, got {list(shape)}")
    return int(shape[1])
