"""pyogrio#355, GeoDeploy#95: a GeoPackage with several layers, as QGIS packages them. Reading the first in silence is wrong;
choosing the layer must be possible, or the message must say what to do."""

import sys, tempfile, warnings
from pathlib import Path
import geopandas as gpd, numpy as np, rasterio, shapely
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
src = perf_vit.open(tmp / "a.tif")
box = shapely.box(500100, 4999700, 500300, 4999900)
gpd.GeoDataFrame(geometry=[shapely.LineString([(5e5, 5e6), (500600, 4999400)])], crs=32633).to_file(
    tmp / "p.gpkg", layer="roads"
)
gpd.GeoDataFrame(geometry=[box], crs=32633).to_file(tmp / "p.gpkg", layer="buildings")
results = {}
for name in ("p.gpkg", "p.gpkg|layername=buildings"):
    try:
        results[name] = int((open_labels(tmp / name, src).read(src.extent) == 1).sum())
    except perf_vit.errors.PerfVitError as error:
        results[name] = str(error).replace(str(tmp) + "/", "")
first = str(results["p.gpkg"])
helps = any(word in first for word in ("layer=", "data.layer", "ogr2ogr", "export", "|layername", "choose"))
ok = results["p.gpkg"] == 400 or (results["p.gpkg|layername=buildings"] == 400) or helps
print(
    "PASS" if ok else "FAIL",
    "refused, but no layer can be chosen and the message gives no way out:" if not ok else "",
    results,
)
sys.exit(int(not ok))
