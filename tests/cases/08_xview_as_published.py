"""xView1_baseline#3: the published download has AppleDouble files (._100.tif) among the images, an image missing (1395.tif), type ids
without a name (75, 82), flat boxes and boxes past the edge. datasets/xview/prepare.py must get through it."""

import json, subprocess, sys, tempfile
from pathlib import Path
import numpy as np, rasterio
from affine import Affine

tmp = Path(tempfile.mkdtemp())
(tmp / "x/train_images").mkdir(parents=True)
rng = np.random.default_rng(0)
for name in ("100.tif", "102.tif"):
    with rasterio.open(
        tmp / "x/train_images" / name,
        "w",
        driver="GTiff",
        count=3,
        height=64,
        width=80,
        dtype="uint8",
        crs="EPSG:4326",
        transform=Affine(3e-6, 0, 10, 0, -3e-6, 50),
    ) as d:
        d.write(rng.integers(0, 255, (3, 64, 80)).astype(np.uint8))
feature = lambda image, kind, box: {
    "type": "Feature",
    "geometry": None,
    "properties": {"image_id": image, "type_id": kind, "bounds_imcoords": box},
}
rows = [
    ("100.tif", 73, "5,5,20,20"),
    ("100.tif", 75, "5,5,20,20"),
    ("100.tif", 82, "1,1,9,9"),
    ("1395.tif", 73, "5,5,20,20"),
    ("102.tif", 18, "-3,-2,4,4"),
    ("102.tif", 18, "30,30,30,40"),
    ("102.tif", 94, "60,50,90,70"),
]
(tmp / "x/xView_train.geojson").write_text(
    json.dumps({"type": "FeatureCollection", "features": [feature(*row) for row in rows]})
)


def prepare(out):
    return subprocess.run(
        [sys.executable, "datasets/xview/prepare.py", str(tmp / "x"), str(tmp / out)], capture_output=True, text=True
    )


clean = prepare("clean")
boxes = (
    sorted(a["bbox"] for a in json.loads((tmp / "clean/train.json").read_text())["annotations"])
    if clean.returncode == 0
    else clean.stderr
)
right = sorted([[5, 5, 15, 15], [0, 0, 4, 4], [60, 50, 20, 14]])
(tmp / "x/train_images/._100.tif").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(4000))
mac = prepare("mac")
ok = boxes == right and mac.returncode == 0
print(
    "PASS" if ok else "FAIL",
    f"without ._ files: boxes right {boxes == right}; with ._100.tif: exit {mac.returncode} "
    f"{mac.stderr.strip().replace(str(tmp) + '/', '')[:200]}",
)
sys.exit(int(not ok))
