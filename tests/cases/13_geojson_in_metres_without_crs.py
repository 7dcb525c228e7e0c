"""raster-vision#324, openeo-geopyspark-driver#886, QGIS#46383: GeoJSON with projected coordinates and no crs member, as many tools write it.
It must not be used in silence; the message must show the coordinates that are there, and what the reader took them for."""

import json, sys, tempfile, warnings
from pathlib import Path
import numpy as np, rasterio
from affine import Affine
import perf_vit
from perf_vit.labels import open_labels

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
    transform=Affine(10, 0, 500000, 0, -10, 5000000),
) as d:
    d.write(np.ones((1, 64, 64), np.uint8))
ring = [[500100, 4999700], [500300, 4999700], [500300, 4999900], [500100, 4999900], [500100, 4999700]]
content = {
    "type": "FeatureCollection",
    "features": [{"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [ring]}}],
}
(tmp / "p.geojson").write_text(json.dumps(content))
src = perf_vit.open(tmp / "a.tif")
content["crs"] = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32633"}}
(tmp / "c.geojson").write_text(json.dumps(content))
with_member = int((open_labels(tmp / "c.geojson", src).read(src.extent) == 1).sum())
for name in ("p",):
    try:
        got = int((open_labels(tmp / f"{name}.geojson", src).read(src.extent) == 1).sum())
    except perf_vit.errors.PerfVitError as error:
        got = str(error).replace(str(tmp) + "/", "")
ok = with_member == 400 and (
    got == 400 or (isinstance(got, str) and "nan" not in got and ("500100" in got or "4326" in got))
)
print("PASS" if ok else "FAIL", f"with crs member {with_member} px (right 400); without: {got}")
sys.exit(int(not ok))
