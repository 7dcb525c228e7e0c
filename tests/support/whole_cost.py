"""Prints what a map of a whole image takes, in MiB of memory and seconds of processor time.

`python whole_cost.py CHECKPOINT IMAGE OUT STORE plan` prints the plan, with `run` what a run took.
"""

import json
import runpy
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from perf_vit.inference import SegmentationPredictOptions, SegmentationPredictor, whole_plan
from perf_vit.inference.whole import plan_map

TOOL = Path(__file__).parents[2] / "tools" / "benchmarks" / "anonymous_memory.py"


def main(checkpoint: str, image: str, out: str, store: str, mode: str) -> None:
    torch.set_num_threads(1)
    predictor = SegmentationPredictor(checkpoint, SegmentationPredictOptions(whole=True, store=store))
    predictor.ready()
    if mode == "plan":
        # Other programs may use the processor.
        whole_plan.time = SimpleNamespace(perf_counter=time.process_time)
        plan = plan_map(predictor, predictor.open(image), Path(out))
        found = {"mib": plan.memory_bytes / 2**20, "seconds": plan.seconds}
    else:
        memory, started = runpy.run_path(str(TOOL))["AnonymousPeak"](0.003), time.process_time()
        predictor.run(image, out)
        found = {"mib": memory.stop(), "seconds": time.process_time() - started}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
