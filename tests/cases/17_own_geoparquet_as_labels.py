"""A user corrects predictions in QGIS and trains on them: every vector format that predict writes must be read as labels, or refused as what it is."""

import sys, tempfile, warnings
from pathlib import Path
import numpy as np, rasterio
from affine import Affine
import perf_vit
from perf_vit.labels import open_labels
from perf_vit.writers import write_objects

warnings.simplefilter("ignore")
tmp = Path(tempfile.mkdtemp())
with rasterio.open(
    tmp / "a.tif",
    "w",
    driver="GTiff",
    count=1,
    height=64,
    width=64,
    dtype="uint8",
    crs="EPSG:32633",
    transform=Affine(10, 0, 5e5, 0, -10, 5e6),
) as d:
    d.write(np.ones((1, 64, 64), np.uint8))
src = perf_vit.open(tmp / "a.tif")
out = {}
for name in ("o.gpkg", "o.geojson", "o.parquet", "o.json"):
    write_objects(tmp / name, np.array([[5.0, 5, 20, 20], [30, 30, 40, 41]]), None, [0, 1], ["x", "y"], source=src)
    try:
        out[name] = int(
            (open_labels(tmp / name, src, attribute="class", classes=["bg", "x", "y"]).read(src.extent) > 0).sum()
        )
    except perf_vit.errors.PerfVitError as error:
        out[name] = str(error).replace(str(tmp) + "/", "")[:160]
ok = out["o.gpkg"] == out["o.geojson"] == 335 and out["o.parquet"] == 335
print("PASS" if ok else "FAIL", out)
sys.exit(int(not ok))
