"""Orthomosaics in a local engineering CRS (Agisoft's "Local Coordinates (m)"; the kind of WebODM#1051): what was found must not be lost at the end.
GeoJSON of such a source must be written (in pixels, as without CRS) or refused in one line before the scene is searched; never a traceback."""

import sys, tempfile, warnings
from pathlib import Path
import numpy as np, rasterio
from affine import Affine
from rasterio.crs import CRS
import perf_vit
from perf_vit.writers import write_objects

warnings.simplefilter("ignore")
tmp = Path(tempfile.mkdtemp())
local = CRS.from_wkt('LOCAL_CS["Local Coordinates (m)",UNIT["metre",1]]')
with rasterio.open(
    tmp / "a.tif",
    "w",
    driver="GTiff",
    count=3,
    height=64,
    width=64,
    dtype="uint8",
    crs=local,
    transform=Affine(0.05, 0, 100, 0, -0.05, 200),
) as d:
    d.write(np.full((3, 64, 64), 90, np.uint8))
src = perf_vit.open(tmp / "a.tif")
out = {}
for name in ("o.gpkg", "o.parquet", "o.json", "o.geojson"):
    try:
        write_objects(tmp / name, np.array([[5.0, 5, 20, 20]]), [0.9], [0], ["x"], source=src)
        out[name] = "written"
    except perf_vit.errors.PerfVitError as error:
        out[name] = f"refused: {error}"
    except Exception as error:
        out[name] = f"CRASH {type(error).__module__}.{type(error).__name__}: {error}"
ok = not any("CRASH" in v for v in out.values())
print("PASS" if ok else "FAIL", out)
sys.exit(int(not ok))
