"""Classes or regression targets of whole images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from perf_vit.data import collate_tiles, image_tile, middle_window
from perf_vit.errors import InputError
from perf_vit.inference.jobs.table_job import TableJob
from perf_vit.inference.options import ClassificationPredictOptions
from perf_vit.inference.table_predictor import Rows, TablePredictor
from perf_vit.models import Classifier, load_classifier

__all__ = ["ClassificationPredictor"]


class ClassificationPredictor(TablePredictor[Classifier, ClassificationPredictOptions]):
    """Writes a CSV file with a row an image: its class and the probability of each, or its targets."""

    def load(self, checkpoint: Path) -> Classifier:
        """The model of a checkpoint."""
        return load_classifier(checkpoint)

    def job(self, paths: Sequence[str], out: str | Path) -> TableJob:
        """What is to be made of some images; see `TablePredictor.job`."""
        return TableJob(
            paths=paths, out=Path(out), settings=self.model_settings, options=self.options, device=self.device
        )

    def rows(self, folder: Path, paths: Sequence[str]) -> Rows:
        """The rows of some images; see `TablePredictor.rows`."""
        rows: dict[str, list[str] | InputError] = {}
        tiles: dict[str, tuple[Tensor, Tensor]] = {}
        for path in paths:
            try:
                tiles[path] = self._tile(path)
            except InputError as error:
                rows[path] = error
                if self.options.on_error == "stop":
                    break
        if tiles:
            scores = self.scores(*collate_tiles(list(tiles.values()))).tolist()
            rows |= {path: self._row(found) for path, found in zip(tiles, scores, strict=True)}
        return rows

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
            logits = self.model(tiles.to(device), None if valid is None else valid.to(device))
        return self.model.scores(logits).cpu()

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        spec = self.model.spec
        leading = {"single_label": ["prediction"], "multilabel": ["predictions"], "regression": []}[spec.kind]
        return ["image", *leading, *spec.classes]

    def _tile(self, path: str) -> tuple[Tensor, Tensor]:
        spec = self.model.spec
        source = spec.open(path, check=self.check_input)
        try:
            window = None if spec.resize else middle_window(source, spec.tile_px)
            pixels, valid = image_tile(source, spec.normalizer, spec.tile_px, window)
            return torch.from_numpy(pixels), torch.from_numpy(valid)
        finally:
            source.close()

    def _row(self, scores: list[float]) -> list[str]:
        spec = self.model.spec
        leading = []
        if spec.kind == "single_label":
            leading = [spec.classes[max(range(len(scores)), key=scores.__getitem__)]]
        elif spec.kind == "multilabel":
            leading = [" ".join(name for name, score in zip(spec.classes, scores, strict=True) if score > 0.5)]
        return [*leading, *(f"{score:.6g}" for score in scores)]
