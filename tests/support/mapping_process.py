"""A map made in a process of its own, which a test may kill: SOURCE OUT [DELAY [WINDOW_SIZE]]."""

import sys

from stub_segmenter import StubSegmenter

from perf_vit.errors import PerfVitError
from perf_vit.inference import SegmentationPredictOptions, SegmentationPredictor


def main(source: str, out: str, delay: str = "0", window_size: str = "64") -> None:
    options = SegmentationPredictOptions(kind="probabilities", window_size=int(window_size), device="cpu")
    SegmentationPredictor(StubSegmenter(delay=float(delay)), options).run(
        source, out, on_progress=lambda done, total: sys.stdout.write(f"{done}/{total}\n") and sys.stdout.flush()
    )


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except PerfVitError as error:
        sys.exit(str(error))
