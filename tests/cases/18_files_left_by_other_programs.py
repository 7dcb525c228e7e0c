"""xView1_baseline#3, OpenNeuro#2520, unsloth#8919: folders that a Mac wrote (._a.png) and QGIS opened (a.png.aux.xml). Predict leaves hidden files out;
reading labels and training must do so too, and a GDAL sidecar is no VOC annotation."""

import shutil, sys, tempfile, warnings
from pathlib import Path
import numpy as np
from PIL import Image
import perf_vit
from perf_vit.data import SegmentationDataConfig, SegmentationSplitConfig, build_segmentation_datamodule
from perf_vit.inference import find_inputs
from perf_vit.labels.objects import read_object_labels

warnings.simplefilter("ignore")
tmp = Path(tempfile.mkdtemp())
rng = np.random.default_rng(0)
apple = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(300)
for name in ("images", "masks", "voc"):
    (tmp / name).mkdir()
for k in range(3):
    mask = np.zeros((64, 64), np.uint8)
    mask[10:30, 10 + k : 40] = 1
    Image.fromarray(rng.integers(0, 255, (64, 64, 3)).astype(np.uint8)).save(tmp / f"images/{k}.png")
    Image.fromarray(mask).save(tmp / f"masks/{k}.png")
    (tmp / f"voc/{k}.xml").write_text(
        "<annotation><object><name>t</name><bndbox><xmin>11</xmin><ymin>11</ymin><xmax>40</xmax><ymax>30</ymax></bndbox></object></annotation>"
    )
region = SegmentationSplitConfig(image=str(tmp / "images"), labels=str(tmp / "masks"))
tries = {
    "segmentation folders": lambda: (
        len(
            build_segmentation_datamodule(
                SegmentationDataConfig(train=region, val=region, classes=["a", "b"], tile_px=64), seed=0
            ).val
        )
        == 3
    ),
    "VOC": lambda: len(read_object_labels(tmp / "voc", tmp / "images", label_format="voc", classes=["t"])) == 3,
    "predict's inputs": lambda: len(find_inputs([tmp / "images"], tmp / "out")) == 3,
}


def run():
    out = {}
    for name, each in tries.items():
        try:
            out[name] = each()
        except perf_vit.errors.PerfVitError as error:
            out[name] = str(error).replace(str(tmp) + "/", "")[:110]
    return out


states = {"clean": run()}
(tmp / "voc/0.png.aux.xml").write_text("<PAMDataset><Metadata/></PAMDataset>")
states["QGIS's aux.xml"] = run()
(tmp / "voc/0.png.aux.xml").unlink()
for folder, suffix in (("images", "png"), ("masks", "png"), ("voc", "xml")):
    (tmp / folder / f"._0.{suffix}").write_bytes(apple)
states["macOS's ._ files"] = run()
bad = {
    f"{state}, {name}": value for state, found in states.items() for name, value in found.items() if value is not True
}
print("FAIL" if bad else "PASS", bad or states)
sys.exit(int(bool(bad)))
