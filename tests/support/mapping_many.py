"""Maps of many inputs with a stub of a model, also as a process of its own: GLOB FOLDER DELAY.

It says that it is ready and begins at a line of its input.
"""

import sys
import time

import numpy as np
import torch

from perf_vit.inference import (
    MapInput,
    MapJob,
    MapResult,
    class_output,
    find_inputs,
    make_map,
    predict_many,
    reserve_report,
)
from perf_vit.io import open_source

CLASSES = ("sea", "land", "cloud")


class Maker:
    """Makes a map of one input; may be pickled."""

    def __init__(self, *, overwrite: bool = False, delay: float = 0, fail_after: int | None = None, **settings) -> None:
        self.overwrite = overwrite
        self.delay = delay
        self.fail_after = fail_after
        self.settings = {"kind": "probabilities", "window_size": 64, "model_id": "stub", **settings}

    def job(self, item: MapInput) -> MapJob:
        settings = dict(self.settings)
        output = class_output(settings.pop("kind"), CLASSES)
        overlap = settings["window_size"] // 4
        source = open_source(item.path)
        return MapJob(source=source, out=item.output, output=output, num_channels=3, overlap=overlap, **settings)

    def __call__(self, item: MapInput) -> MapResult:
        job = self.job(item)
        return make_map(job, lambda folder: self.write(job, folder), overwrite=self.overwrite)

    def write_rows(self, item: MapInput, folder, rows) -> None:
        self.write(self.job(item), folder, rows)

    def write(self, job: MapJob, folder, rows=None) -> None:
        job.write_rows(folder, self.model, normalize, rows)

    def model(self, tiles: torch.Tensor) -> torch.Tensor:
        time.sleep(self.delay)
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after < 0:
                raise RuntimeError("interrupted")
        return tiles * torch.linspace(0.5, 1.5, tiles.shape[-1])


maker = Maker


def normalize(image) -> np.ndarray:
    return image.pixels.astype(np.float32) / 1000


if __name__ == "__main__":
    given, folder, delay = sys.argv[1:]
    inputs = find_inputs([given], folder)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    with reserve_report(inputs[0].output.parent) as path:
        predict_many(Maker(delay=float(delay)), inputs, report_path=path, num_rounds=20, wait_s=0.1)
