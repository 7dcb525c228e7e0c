"""Pages of single maps."""

import re

import numpy as np
from pages import parsed

from perf_vit.reporting.outputs import write_map_report
from perf_vit.sources import open_source
from perf_vit.writers import CogWriter, RasterLayout


def test_classes_that_overlap_are_counted_each_with_one_threshold_for_all_parts(make_scene, tmp_path) -> None:
    source = open_source(make_scene(height=64, width=1100))
    probabilities = np.ones((2, 64, 1100), "uint8")
    # Left of it, no probability is larger than 1/254.
    probabilities[:, 32:, 880:] = 200
    probabilities[1, :32, 880:] = 128
    layout = {"height": 64, "width": 1100, "num_bands": 2, "dtype": "uint8", "nodata": 255, "scale": 1 / 254}
    with CogWriter(tmp_path / "p.tif", RasterLayout(crs=source.crs, transform=source.transform, **layout)) as writer:
        writer.write(0, probabilities)
    out = tmp_path / "p.html"
    write_map_report(out, source, tmp_path / "p.tif", ["wet", "built"], multilabel=True, scale=1 / 254, settings={})
    shares = dict(re.findall(r"(none|wet|built)\W*([01]\.\d{3})", parsed(out).text))
    assert shares == {"none": "0.800", "built": "0.200", "wet": "0.100"}
