"""A map made in a process of its own, which a test may kill: SOURCE OUT [DELAY [WINDOW_SIZE]]."""

import sys
import time

import numpy as np
import torch

from perf_vit.errors import PerfVitError
from perf_vit.inference import class_output, predict_map
from perf_vit.io import open_source

CLASSES = ("sea", "land", "cloud")


def main(source: str, out: str, delay: str = "0", window_size: str = "64") -> None:
    def model(tiles: torch.Tensor) -> torch.Tensor:
        time.sleep(float(delay))
        return tiles * torch.linspace(0.5, 1.5, tiles.shape[-1])

    predict_map(
        model,
        open_source(source),
        lambda image: image.pixels.astype(np.float32) / 1000,
        out,
        output=class_output("probabilities", CLASSES),
        model_id="stub",
        num_channels=3,
        window_size=int(window_size),
        overlap=int(window_size) // 4,
        on_window=lambda done, total: sys.stdout.write(f"{done}/{total}\n") and sys.stdout.flush(),
    )


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except PerfVitError as error:
        sys.exit(str(error))
