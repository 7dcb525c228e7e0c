"""torchgeo#862/#1813 (classes from a column), raster-vision#989: ids as text, a class to leave out ("unknown"), nulls, as GIS exports have them.
Each must work by some key of the config that the message names; what a message advises must be possible."""

import contextlib, io, sys, tempfile, warnings
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
boxes = [shapely.box(500000 + 200 * i, 4999700, 500100 + 200 * i, 4999900) for i in range(3)]
gpd.GeoDataFrame({"cid": ["0", "1", "2"], "name": ["water", "unknown", None]}, geometry=boxes, crs=32633).to_file(
    tmp / "t.gpkg"
)


def burn(**options):
    try:
        return np.bincount(open_labels(tmp / "t.gpkg", src, **options).read(src.extent).ravel(), minlength=3).tolist()[
            :3
        ]
    except perf_vit.errors.PerfVitError as error:
        return str(error).replace(str(tmp) + "/", "")


def in_config(override):
    from perf_vit.cli.main import run

    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(err):
        try:
            run(
                [
                    "train",
                    "configs/segmentation/buildings.yaml",
                    f"data.train.image={tmp / 'a.tif'}",
                    f"data.train.labels={tmp / 't.gpkg'}",
                    f"data.val.image={tmp / 'a.tif'}",
                    f"data.val.labels={tmp / 't.gpkg'}",
                    f"out={tmp / 'r'}",
                    "data.attribute=name",
                    "data.classes=[bg,water]",
                    override,
                ]
            )
        except SystemExit:
            pass
    return err.getvalue().strip().splitlines()[-1].replace(str(tmp) + "/", "")


ids = burn(attribute="cid", classes=["a", "b", "c"], values=[0, 1, 2])
advice = burn(attribute="name", classes=["bg", "water"])
followed = {key: in_config(key) for key in ("data.ignore_values=[unknown]", "data.ignore_values=[unknown,null]")}
ok = ids == [3696, 200, 200] and not any("Integer" in v for v in followed.values())
print(
    "PASS" if ok else "FAIL",
    f"\n  text ids 0, 1, 2, values 0, 1, 2: {ids}\n  names: {advice}\n  that advice followed: {followed}",
)
sys.exit(int(not ok))
