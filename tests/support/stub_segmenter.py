"""A segmenter of three bands whose scores are its pixels, for tests of all that lies around a model."""

import time

import torch
from torch import nn

from perf_vit.models import SegmentationSpec
from perf_vit.transforms import Normalizer

CLASSES = ("sea", "land", "cloud")


class StubSegmenter(nn.Module):
    """Scores that differ from window to window; may be pickled."""

    task = "segmentation"
    size_multiple = 1

    def __init__(self, name: str = "stub", *, delay: float = 0, fail_after: int | None = None) -> None:
        super().__init__()
        self.name = name
        self.delay = delay
        self.fail_after = fail_after
        self.spec = SegmentationSpec(classes=CLASSES, normalizer=Normalizer((0.0,) * 3, (1000.0,) * 3), tile_px=64)

    def extra_repr(self) -> str:
        """Part of the model's id."""
        return self.name

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        time.sleep(self.delay)
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after < 0:
                raise RuntimeError("interrupted")
        return tiles * torch.linspace(0.5, 1.5, tiles.shape[-1])
