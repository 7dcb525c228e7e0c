"""Training of slide classifiers through their encoder, on the pixels of all windows of a slide."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perf_vit.data.slide_windows import SlideWindows
from perf_vit.models import SlideClassificationModelConfig, SlideClassificationSpec
from perf_vit.models.batched_pooling import ReadWindows
from perf_vit.models.classification import trunk_layers
from perf_vit.tasks.callbacks import EpochProgressBar
from perf_vit.tasks.optim import ClassificationOptimConfig
from perf_vit.tasks.slide_classification import SlideClassificationTask

__all__ = ["ThroughEncoderTask", "wait_for_long_steps"]

_logger = logging.getLogger("perf_vit")

# Slides that take longer are logged.
_LOG_SECONDS = 30.0


class ThroughEncoderTask(SlideClassificationTask):
    """Training of a slide classifier and its encoder; a slide is read twice in a step, and memory holds few windows.

    Args:
        model_config: Network config, with `through_encoder`.
        spec: Classes, and how slides are read.
        optim: Optimizer, schedule and loss.
        batch_size: Number of windows per encoder batch.

    Raises:
        ConfigError: The network can't be built, or the optimizer or loss settings don't fit it.
    """

    def __init__(
        self,
        model_config: SlideClassificationModelConfig,
        spec: SlideClassificationSpec,
        optim: ClassificationOptimConfig,
        *,
        batch_size: int,
    ) -> None:
        super().__init__(model_config, spec, optim)
        self.batch_size = batch_size

    def classify(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Compute the logits [B, K] of slides, one after the other, and return them with their class indices [B]."""
        slides, labels = batch
        return torch.stack([self._classified(slide) for slide in slides]), labels

    def _classified(self, slide: SlideWindows) -> Tensor:
        # Drawn from the seed of the step.
        seed = int(torch.randint(2**62, ())) if self.training else None
        logits: Tensor = self.model.classify_windows(self._reader(slide), seed)
        return logits

    def _reader(self, slide: SlideWindows) -> ReadWindows:
        """Return a reader of a slide's windows that shows how far it is."""
        num_passes, number = (2 if self.training else 1), 0

        def read() -> Generator[tuple[Tensor, Tensor | None], None, None]:
            nonlocal number
            number += 1
            name = Path(slide.path).name
            progress = _Progress(self.trainer, f"{name}, pass {number} of {num_passes}", len(slide))
            done = 0
            with closing(slide.batches(self.batch_size)) as batches, closing(progress):
                for windows, valid in batches:
                    yield windows, valid
                    done += len(windows)
                    progress.update(done)

        return read

    def backbone_layers(self) -> dict[str, int]:
        """Return the layer index of each parameter of the encoder, but of its pooling."""
        return {f"encoder.{name}": layer for name, layer in trunk_layers(self.model.encoder).items()}


def wait_for_long_steps(trainer: Any) -> None:
    """Let processes wait a week for one whose slides are larger; Lightning ends them after 30 minutes.

    Args:
        trainer: Trainer that has no process group yet. A group that is there keeps its timeout.
    """
    if hasattr(trainer.strategy, "_timeout"):
        trainer.strategy._timeout = timedelta(weeks=1)


class _Progress:
    """Windows of a slide that are done: a bar below that of the epoch, and log lines of slides that take long."""

    def __init__(self, trainer: Any, description: str, total: int) -> None:
        bar = trainer.progress_bar_callback
        self._bar = bar if isinstance(bar, EpochProgressBar) else None
        self._logs = trainer.is_global_zero
        self._description, self._total = description, total
        self._logged_at = time.monotonic()

    def update(self, done: int) -> None:
        """Show the number of windows that are done."""
        if self._bar is not None:
            self._bar.show_windows(self._description, done, self._total)
        if self._logs and time.monotonic() - self._logged_at >= _LOG_SECONDS:
            _logger.info("%s: %d of %d windows", self._description, done, self._total)
            self._logged_at = time.monotonic()

    def close(self) -> None:
        """Hide the bar."""
        if self._bar is not None:
            self._bar.hide_windows()
