"""Classes or regression targets of whole images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from perf_vit.finite import check_finite
from perf_vit.inference.jobs.table_job import TableJob
from perf_vit.inference.options import ClassificationPredictOptions
from perf_vit.inference.predictor import register_predictor
from perf_vit.inference.prefetch import to_device
from perf_vit.inference.table_predictor import Rows, TablePredictor
from perf_vit.models import Classifier, InputCheck, collate_tiles, image_tile, load_classifier, middle_window
from perf_vit.plotting.pictures import Picture
from perf_vit.reporting.outputs import NAMES_SEPARATOR
from perf_vit.reporting.samples import text_sample

__all__ = ["ClassificationPredictor"]


@dataclass(frozen=True, slots=True)
class _Tile:
    """Tile of an image.

    Attributes:
        pixels: Standardised pixels, [C, tile_px, tile_px].
        valid: Valid pixels, bool [tile_px, tile_px].
        problem: Difference of the image from the training images; None for none.
    """

    pixels: Tensor
    valid: Tensor
    problem: str | None


class ClassificationPredictor(TablePredictor[Classifier, ClassificationPredictOptions]):
    """Writes a CSV file with a row an image: its class and the probability of each, or its targets."""

    def load(self, checkpoint: Path) -> Classifier:
        """The model of a checkpoint."""
        return load_classifier(checkpoint)

    def job(self, paths: Sequence[str], out: str | Path) -> TableJob:
        """What is to be made of some images; see `TablePredictor.job`."""
        out = Path(out)
        return TableJob(
            paths=paths,
            out=out,
            settings=self.model_settings,
            options=self.options,
            device=self.device,
            beside=[out.with_suffix(".html")] if self.options.report else [],
        )

    def read_input(self, path: str) -> _Tile:
        """Read the tile of an image; see `TablePredictor.read_input`."""
        spec = self.model.spec
        with closing(spec.open(path, check=InputCheck(None))) as source:
            window = None if spec.resize else middle_window(source, spec.tile_px, whole=spec.whole)
            pixels, valid = image_tile(source, spec.normalizer, spec.tile_px, window)
            return _Tile(torch.from_numpy(pixels), torch.from_numpy(valid), self.check_input.problem(source))

    def rows(self, folder: Path, inputs: Mapping[str, _Tile]) -> Rows:
        """Compute the rows of some images; see `TablePredictor.rows`."""
        for tile in inputs.values():
            self.check_input.warn(tile.problem)
        tiles = [(tile.pixels, tile.valid) for tile in inputs.values()]
        scores = self.scores(*collate_tiles(tiles))
        check_finite(scores, "scores", list(inputs).__getitem__)
        return {path: self._row(found) for path, found in zip(inputs, scores.tolist(), strict=True)}

    def picture_of(self, folder: Path, path: str) -> Callable[[], dict[str, Picture]]:
        """Draw an image for the report; see `TablePredictor.picture_of`."""
        return text_sample(path, partial(self.model.spec.open, path, check=InputCheck(None))).draw

    def scores(self, tiles: Tensor, valid: Tensor | None) -> Tensor:
        """Probabilities or targets [B, K], on the CPU.

        Args:
            tiles: Standardised pixels, [B, C, tile_px, tile_px].
            valid: Valid pixels, bool [B, tile_px, tile_px]; None where all are.
        """
        device = torch.device(self.ready())
        dtype = self.options.dtype
        autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
        with torch.inference_mode(), autocast:
            logits = self.model(to_device(tiles, device), None if valid is None else valid.to(device))
        return self.model.scores(logits).cpu()

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        spec = self.model.spec
        leading = {"single_label": ["prediction"], "multilabel": ["predictions"], "regression": []}[spec.kind]
        return ["image", *leading, *spec.classes]

    def _row(self, scores: list[float]) -> list[str]:
        spec = self.model.spec
        leading = []
        if spec.kind == "single_label":
            leading = [spec.classes[max(range(len(scores)), key=scores.__getitem__)]]
        elif spec.kind == "multilabel":
            leading = [
                NAMES_SEPARATOR.join(name for name, score in zip(spec.classes, scores, strict=True) if score > 0.5)
            ]
        return [*leading, *(f"{score:.6g}" for score in scores)]


register_predictor("classification", ClassificationPredictor, ClassificationPredictOptions)
register_predictor("regression", ClassificationPredictor, ClassificationPredictOptions)
