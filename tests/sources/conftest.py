"""What a process has open beside what a test reads."""

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine


@pytest.fixture(params=["alone", "beside another VRT"])
def process(request, tmp_path_factory):
    """A process without open VRTs, and one with: then GDAL remembers the files of VRTs that it failed to open."""
    if request.param == "alone":
        yield
        return
    path = tmp_path_factory.mktemp("beside") / "a.tif"
    place = {"dtype": "uint8", "crs": "EPSG:32637", "transform": Affine(1, 0, 400_000, 0, -1, 4_500_000)}
    with rasterio.open(path, "w", driver="GTiff", height=8, width=8, count=1, **place) as dataset:
        dataset.write(np.ones((1, 8, 8), np.uint8))
    rasterio.shutil.copy(path, path.with_suffix(".vrt"), driver="VRT")
    with rasterio.open(path.with_suffix(".vrt")) as beside:
        beside.read()
        yield
