"""Training of one detector on tiles that are made as they are needed, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track
from torch import Tensor

from perf_vit.models import Detector
from perf_vit.tasks.optim import warmup_cosine
from perf_vit.types import Detections, ObjectLabels
from perf_vit.workflows.progress import console

# Statistics of training photographs: standardisation needs them only roughly.
MEAN, STD = (170.0, 150.0, 190.0), (45.0, 50.0, 25.0)

TEST_SEED = 1_000_000
"""Seed of the first test tile; those of training are below."""

Tile = tuple[npt.NDArray[np.uint8], ObjectLabels]


def fit(
    model: Detector, make_tile: Callable[[int, int], Tile], sides: Sequence[int], lr: float, title: str
) -> tuple[list[float], list[float]]:
    """Train with AdamW; return the CPU seconds and the loss of each step.

    Args:
        model: Detector to train.
        make_tile: Function of a step and a side in pixels; its time doesn't count.
        sides: Side of each step's tile, in pixels.
        lr: Peak learning rate; it follows the share of all pixels that were seen.
        title: Name of the run in messages.
    """
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=lr, weight_decay=0.05)
    pixels = np.cumsum(np.square(sides))
    seconds: list[float] = []
    losses: list[float] = []
    for step, side in enumerate(track(sides, title, console=console)):
        tile, labels = make_tile(step, side)
        image = standardised(tile)
        start = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup_cosine(int(pixels[step] - side**2), int(pixels[-1]), 0.05)
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.stack(list(model.losses([image], [labels]).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.process_time() - start)
        losses.append(float(loss.detach()))
        if step % 20 == 19:
            console.print(f"{title}: step {step + 1}, loss {np.mean(losses[-20:]):.3f}, {sum(seconds):.0f} s")
    return seconds, losses


@torch.inference_mode()
def detect(model: Detector, tile: npt.NDArray[np.uint8], shrink: int) -> tuple[Detections, float]:
    """Return the detections in a tile that was shrunk by a factor, in pixels of the full tile, and the CPU seconds."""
    image = standardised(tile)
    start = time.process_time()
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = model(image[None])
    seconds = time.process_time() - start
    return Detections(scores=found.scores, labels=found.labels, boxes_xyxy=found.boxes_xyxy * shrink), seconds


def standardised(tile: npt.NDArray[np.uint8]) -> Tensor:
    """Return a tile [H, W, 3] as a network's input [3, H, W]."""
    values = (tile - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def peak_mib() -> float:
    """Return the peak of this process's resident memory."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
