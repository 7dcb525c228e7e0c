"""Pictures of validation tiles with ground truth and predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import lightning
import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from PIL import Image, ImageDraw
from torch import Tensor

from perf_vit.plotting import colorize, default_colormap, label_font, label_text, save_png
from perf_vit.plotting.colors import last_true
from perf_vit.plotting.panels import enlarged, error_panel, on_white, outlined, standardized_picture
from perf_vit.tasks.optim import with_valid
from perf_vit.types import Detections, ObjectLabels

__all__ = ["Draw", "PredictionPictures", "draw_classification", "draw_objects", "draw_segmentation"]

Picture: TypeAlias = npt.NDArray[np.uint8]

Draw: TypeAlias = Callable[[Tensor, Any, Any, Any], Sequence[Picture]]
"""Function that draws panels [h, w, 3] from a tile [C, H, W], its labels, the network and its prediction."""

_PANEL_PX = 384
_MARGIN_PX = 6
_TEXT_PX = 18


class PredictionPictures(lightning.Callback):
    """Writer of `pictures/epoch_0001.png` in the run folder and to the loggers after each validation.

    Each row shows a tile of the validation data: image, truth, prediction and, of classes of pixels, errors, as
    pictures or text. The tiles are evenly spaced among all.

    Args:
        folder: Run folder.
        num_tiles: Number of rows.
        draw: Function that draws the panels of a row.
    """

    def __init__(self, folder: Path, num_tiles: int, draw: Draw) -> None:
        self.folder = folder / "pictures"
        self.num_tiles = num_tiles
        self.draw = draw
        self._predicted: list[tuple[Tensor, Any, Any]] = []

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Predict with the validated weights; all processes take part, as sharded weights require."""
        if trainer.sanity_checking or trainer.val_dataloaders is None:
            return
        network: Any = pl_module.model
        dataset = trainer.val_dataloaders.dataset
        for index in np.unique(np.linspace(0, len(dataset) - 1, self.num_tiles).round().astype(int)):
            image, labels, valid = with_valid(dataset[int(index)])
            parts = [each[None].to(pl_module.device) for each in (image, valid) if each is not None]
            tile = trainer.precision_plugin.convert_input(parts)
            with torch.no_grad(), trainer.precision_plugin.val_step_context():
                found = network(*tile)[0]
            self._predicted.append((image, labels, found))

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the picture; only now does the network have the score threshold of this validation."""
        predicted, self._predicted = self._predicted, []
        if predicted and trainer.is_global_zero:
            network: Any = pl_module.model
            panels = [self.draw(image, labels, network, found) for image, labels, found in predicted]
            self._show(trainer, _column([_row([enlarged(panel, _PANEL_PX) for panel in row]) for row in panels]))

    def _show(self, trainer: lightning.Trainer, picture: Picture) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        save_png(self.folder / f"epoch_{trainer.current_epoch + 1:04d}.png", picture)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("val/pictures", picture, trainer.global_step, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_image("val/pictures", [picture])


def draw_segmentation(image: Tensor, labels: Tensor, network: Any, logits: Tensor) -> list[Picture]:
    """Draw the image, the true classes, the predicted classes and the errors; unlabelled pixels of the truth are white.

    For multi-label classes, the last one of each pixel is shown; pixels without any are dark grey.
    """
    truth, predicted = _array(labels), _array(network.to_labels(logits[None])[0])
    seen = standardized_picture(_array(image), network.spec)
    errors = error_panel(seen, truth, predicted)
    colors = default_colormap(len(network.spec.classes), network.spec.background_index)
    if network.spec.multilabel:
        truth, predicted = last_true(truth), last_true(predicted)
        colors = default_colormap(len(network.spec.classes) + 1, background=0)
    classes = (on_white(colorize(each.astype(np.uint8), colors)) for each in (truth, predicted))
    return [seen, *classes, errors]


def draw_objects(image: Tensor, labels: ObjectLabels, network: Any, found: Detections) -> list[Picture]:
    """Draw the image, the labelled objects that aren't ignored, and the detections above the score threshold."""
    spec = network.spec
    seen, colors = standardized_picture(_array(image), spec), default_colormap(len(spec.classes))
    sure = _array(found.scores) >= spec.score_threshold
    truth = outlined(seen, labels, ~labels.ignored, spec.kind, colors)
    return [seen, truth, outlined(seen, found, sure, spec.kind, colors)]


def draw_classification(image: Tensor, target: Tensor, network: Any, logits: Tensor) -> list[Picture]:
    """Draw the image and a text panel with the true and predicted classes (with probabilities) or targets."""
    seen = enlarged(standardized_picture(_array(image), network.spec), _PANEL_PX)
    spec, scores = network.spec, network.scores(logits[None])[0].tolist()
    if spec.kind == "regression":
        truth, predicted = (_listed(spec.classes, values) for values in (target.tolist(), scores))
    elif spec.kind == "multilabel":
        truth = [name for name, value in zip(spec.classes, target.tolist(), strict=True) if value]
        predicted = _listed(spec.classes, scores, least=0.5)
    else:
        truth, predicted = [spec.classes[int(target)]], _listed(spec.classes, scores, least=max(scores))
    return [seen, _written(["true:", *(truth or ["none"]), "", "predicted:", *(predicted or ["none"])], seen.shape)]


def _listed(names: Sequence[str], values: Sequence[float], least: float = -math.inf) -> list[str]:
    return [f"{name} {value:.3g}" for name, value in zip(names, values, strict=True) if value >= least]


def _written(lines: Sequence[str], shape: tuple[int, ...]) -> Picture:
    """Return a white panel with text, cut off at its border."""
    panel = Image.new("RGB", (max(shape[1], _PANEL_PX), shape[0]), "white")
    font = label_font(_TEXT_PX)
    ImageDraw.Draw(panel).multiline_text(
        (_MARGIN_PX, _MARGIN_PX), "\n".join(map(label_text, lines)), fill="black", font=font
    )
    return np.array(panel)


def _array(values: Any) -> npt.NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _row(panels: Sequence[Picture]) -> Picture:
    padded = [np.pad(panel, ((0, _MARGIN_PX), (0, _MARGIN_PX), (0, 0)), constant_values=255) for panel in panels]
    return np.concatenate(padded, axis=1)


def _column(rows: Sequence[Picture]) -> Picture:
    """Stack rows vertically; tiles at the border of small images may be smaller."""
    width = max(row.shape[1] for row in rows)
    return np.concatenate(
        [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    )
