"""Maps of many inputs with a stub of a model, also as a process of its own: GLOB FOLDER DELAY.

It says that it is ready and begins at a line of its input.
"""

import sys

from stub_segmenter import StubSegmenter

from perf_vit.inference import (
    SegmentationPredictOptions,
    SegmentationPredictor,
    find_inputs,
    predict_many,
    reserve_report,
)


def maker(*, name: str = "stub", delay: float = 0, fail_after: int | None = None, **options) -> SegmentationPredictor:
    """A predictor of probabilities; it may be pickled."""
    given = {"kind": "probabilities", "window_size": 64, "device": "cpu", **options}
    model = StubSegmenter(name, delay=delay, fail_after=fail_after)
    return SegmentationPredictor(model, SegmentationPredictOptions(**given))


if __name__ == "__main__":
    given, folder, delay = sys.argv[1:]
    inputs = find_inputs([given], folder)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    with reserve_report(inputs[0].output.parent) as path:
        predict_many(maker(delay=float(delay)), inputs, report_path=path, num_rounds=20, wait_s=0.1)
