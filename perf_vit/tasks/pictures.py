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

from perf_vit.geometry.boxes import oriented_box_corners
from perf_vit.plotting import colorize, default_colormap, label_font, label_text, rgb_from, save_png
from perf_vit.tasks.optim import with_valid
from perf_vit.types import IGNORE_INDEX, Detections, GeoImage, ObjectLabels

__all__ = ["Draw", "PredictionPictures", "draw_classification", "draw_objects", "draw_segmentation"]

Picture: TypeAlias = npt.NDArray[np.uint8]

Draw: TypeAlias = Callable[[Tensor, Any, Any, Any], Sequence[Picture]]
"""Function that draws panels [h, w, 3] from a tile [C, H, W], its labels, the network and its prediction."""

_PANEL_PX = 384
_MARGIN_PX = 6
_TEXT_PX = 18


class PredictionPictures(lightning.Callback):
    """Writer of `pictures/epoch_0000.png` in the run folder and to the loggers after each validation.

    Each row shows a tile of the validation data: image, truth and prediction, as a picture or text. The tiles are
    evenly spaced among all.

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
            tile = [each[None].to(pl_module.device) for each in (image, valid) if each is not None]
            with torch.no_grad(), trainer.precision_plugin.val_step_context():
                found = network(*tile)[0]
            self._predicted.append((image, labels, found))

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the picture; only now does the network have the score threshold of this validation."""
        predicted, self._predicted = self._predicted, []
        if predicted and trainer.is_global_zero:
            network: Any = pl_module.model
            panels = [self.draw(image, labels, network, found) for image, labels, found in predicted]
            self._show(trainer, _column([_row([_enlarged(panel) for panel in row]) for row in panels]))

    def _show(self, trainer: lightning.Trainer, picture: Picture) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        save_png(self.folder / f"epoch_{trainer.current_epoch:04d}.png", picture)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("val/pictures", picture, trainer.global_step, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_image("val/pictures", [picture])


def draw_segmentation(image: Tensor, labels: Tensor, network: Any, logits: Tensor) -> list[Picture]:
    """Draw the image, the true and the predicted classes; unlabelled pixels are white in both.

    For multi-label classes, the last one of each pixel is shown; pixels without any are dark grey.
    """
    truth, predicted = _array(labels), _array(network.to_labels(logits[None])[0])
    colors = default_colormap(len(network.spec.classes), network.spec.background_index)
    if network.spec.multilabel:
        truth, predicted = _last_true(truth), _last_true(predicted)
        colors = default_colormap(len(network.spec.classes) + 1, background=0)
    truth, predicted = truth.astype(np.uint8), predicted.astype(np.uint8)
    predicted = np.where(truth == IGNORE_INDEX, np.uint8(IGNORE_INDEX), predicted)
    return [_seen(image), *(_on_white(colorize(each, colors)) for each in (truth, predicted))]


def draw_objects(image: Tensor, labels: ObjectLabels, network: Any, found: Detections) -> list[Picture]:
    """Draw the image, the labelled objects that aren't ignored, and the detections above the score threshold."""
    seen = _seen(image)
    kind, classes = network.spec.kind, network.spec.classes
    sure = _array(found.scores) >= network.spec.score_threshold
    return [
        seen,
        _with_outlines(seen, labels, ~labels.ignored, kind, len(classes)),
        _with_outlines(seen, found, sure, kind, len(classes)),
    ]


def draw_classification(image: Tensor, target: Tensor, network: Any, logits: Tensor) -> list[Picture]:
    """Draw the image and a text panel with the true and predicted classes (with probabilities) or targets."""
    seen = _enlarged(_seen(image))
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


def _last_true(layers: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return 1 + the last class present in layers [K, H, W] of 0 and 1; 0 for none."""
    numbers = np.arange(1, len(layers) + 1)[:, None, None]
    return np.where((layers == IGNORE_INDEX).all(0), IGNORE_INDEX, ((layers == 1) * numbers).max(0))


def _seen(image: Tensor) -> Picture:
    pixels = image.cpu().numpy()
    return rgb_from(GeoImage(pixels=pixels, valid=np.ones(pixels.shape[1:], bool)))


def _with_outlines(
    seen: Picture, objects: ObjectLabels | Detections, keep: npt.NDArray[np.bool_], kind: str, num_classes: int
) -> Picture:
    colors = default_colormap(num_classes)
    # Labels may have several geometries; prefer the one that the network predicts.
    masks = _array(objects.masks)[keep] if kind == "masks" and objects.masks is not None else None
    picture = seen.copy()
    for number, label in enumerate(_array(objects.labels)[keep]):
        color = colors[int(label)][:3]
        if masks is not None:
            picture[_edge(masks[number])] = color
        else:
            picture = _with_line(picture, _corners(objects, kind)[keep][number], color)
    return picture


def _corners(objects: ObjectLabels | Detections, kind: str) -> npt.NDArray[np.floating[Any]]:
    """Return the corners of boxes, [n, 4, 2]."""
    if kind == "oriented_boxes" and objects.oriented_boxes is not None:
        return oriented_box_corners(_array(objects.oriented_boxes).astype(np.float64))
    boxes = _array(objects.boxes_xyxy).astype(np.float64)
    return np.stack([boxes[:, [0, 1]], boxes[:, [2, 1]], boxes[:, [2, 3]], boxes[:, [0, 3]]], axis=1)


def _with_line(picture: Picture, corners: npt.NDArray[np.floating[Any]], color: tuple[int, ...]) -> Picture:
    drawn = Image.fromarray(picture)
    # Coordinates refer to pixel edges, lines are drawn at pixel centres.
    points = [tuple(point) for point in (corners - 0.5).tolist()]
    ImageDraw.Draw(drawn).line([*points, points[0]], fill=color)
    return np.array(drawn)


def _edge(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the pixels of a mask that have a neighbour outside it."""
    inner = np.pad(mask, 1)
    return mask & ~(inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:])


def _array(values: Any) -> npt.NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _on_white(painted: Picture) -> Picture:
    painted[painted[..., 3] == 0] = 255
    return painted[..., :3]


def _enlarged(panel: Picture) -> Picture:
    factor = max(1, _PANEL_PX // max(panel.shape[:2]))
    return panel.repeat(factor, axis=0).repeat(factor, axis=1)


def _row(panels: Sequence[Picture]) -> Picture:
    padded = [np.pad(panel, ((0, _MARGIN_PX), (0, _MARGIN_PX), (0, 0)), constant_values=255) for panel in panels]
    return np.concatenate(padded, axis=1)


def _column(rows: Sequence[Picture]) -> Picture:
    """Stack rows vertically; tiles at the border of small images may be smaller."""
    width = max(row.shape[1] for row in rows)
    return np.concatenate(
        [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    )
