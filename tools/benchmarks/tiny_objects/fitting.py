"""Training of one detector on tiles that are made as they are needed, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track
from torch import Tensor, nn

from perf_vit.models import Detector
from perf_vit.tasks.optim import warmup_cosine
from perf_vit.types import Detections, ObjectLabels
from perf_vit.workflows.progress import console

# Statistics of training photographs: standardisation needs them only roughly.
MEAN, STD = (170.0, 150.0, 190.0), (45.0, 50.0, 25.0)

TEST_SEED = 1_000_000
"""Seed of the first test tile; those of training are below."""

Tile = tuple[npt.NDArray[np.uint8], ObjectLabels]


class Trainee(Protocol):
    """What a network must have to be trained: all of it but `losses` is a module's."""

    def train(self) -> nn.Module: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> object: ...

    def losses(self, images: Sequence[Tensor], labels: Sequence[ObjectLabels]) -> dict[str, Tensor]: ...


def fit(
    model: Trainee,
    make_tile: Callable[[int, int], Tile],
    sides: Sequence[int],
    lr: float,
    title: str,
    state: Path | None = None,
    batch_sizes: Mapping[int, int] | None = None,
) -> tuple[list[float], list[float]]:
    """Train with AdamW; return the CPU seconds and the loss of each step.

    Args:
        model: Network to train.
        make_tile: Function of a number, of which each tile has its own, and a side in pixels; its time doesn't count.
        sides: Side of each step's tile, in pixels.
        lr: Peak learning rate; it follows the share of all pixels that were seen.
        title: Name of the run in messages.
        state: File in which a run that is stopped leaves its state, every 20 steps, and from which it goes on.
        batch_sizes: Number of tiles of a step by their side, 1 for other sides.
    """
    batches = [(batch_sizes or {}).get(side, 1) for side in sides]
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=lr, weight_decay=0.05)
    pixels, firsts = np.cumsum(np.square(sides) * batches), np.cumsum(batches) - batches
    seconds: list[float] = []
    losses: list[float] = []
    if state and state.exists():
        saved = torch.load(state)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        seconds, losses = saved["seconds"], saved["losses"]
    for step in track(range(len(seconds), len(sides)), title, console=console):
        tiles = [make_tile(int(firsts[step]) + index, sides[step]) for index in range(batches[step])]
        images, labels = [standardised(tile) for tile, _ in tiles], [each for _, each in tiles]
        start = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup_cosine(int(pixels[step - 1]) if step else 0, int(pixels[-1]), 0.05)
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.stack(list(model.losses(images, labels).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.process_time() - start)
        losses.append(float(loss.detach()))
        if step % 20 == 19:
            console.print(f"{title}: step {step + 1}, loss {np.mean(losses[-20:]):.3f}, {sum(seconds):.0f} s")
            if state:
                _save(
                    {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "seconds": seconds,
                        "losses": losses,
                    },
                    state,
                )
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


def _save(values: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    torch.save(values, unfinished)
    unfinished.replace(path)


def peak_mib() -> float:
    """Return the peak of this process's resident memory."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
