"""Which polygons label a pixel: thin ones in large bounds."""

import tracemalloc

import numpy as np
import pytest
from shapely import LineString, Polygon, box

from perf_vit.labels.vector import contain_pixel_centre

SIDE = 3000
RIVER = LineString(np.c_[np.linspace(0, SIDE, 100), SIDE / 2 * (1 + np.sin(np.arange(100)))]).buffer(0.3)
# A frame between the centres of neighbouring rows and columns.
FRAME = box(0.6, 0.6, SIDE + 0.4, SIDE + 0.4) - box(0.9, 0.9, SIDE + 0.1, SIDE + 0.1)
CROSSING_LAST = Polygon([(0.6, 0.6), (0.9, 0.6), (0.9, SIDE - 0.6), (100, SIDE - 0.6), (100, SIDE - 0.4), (0.6, SIDE)])


@pytest.mark.parametrize(("polygon", "holds"), [(RIVER, True), (FRAME, False), (CROSSING_LAST, True)])
def test_thin_polygons_across_a_scene_are_judged_in_little_memory(polygon: Polygon, holds: bool) -> None:
    tracemalloc.start()
    found = contain_pixel_centre(np.array([polygon, box(3.6, 3.6, 4.4, 4.4)], object))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.tolist() == [holds, False]
    # A byte, not several numbers, for each of the pixels in the bounds.
    assert peak < 2 * SIDE**2
