"""sahi#273, sahi#298: predictions as COCO JSON scored against the labels with pycocotools. Labels are those that the package itself
writes (`write_coco_labels`), predictions are the labels themselves: AP50 must be 1 for each class."""

import contextlib, io, json, sys, tempfile, warnings
from pathlib import Path
import numpy as np
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
import perf_vit
from perf_vit.labels.objects import read_object_labels
from perf_vit.writers import write_objects
from perf_vit.writers.coco import write_coco_labels

warnings.simplefilter("ignore")
tmp = Path(tempfile.mkdtemp())
(tmp / "i").mkdir()
Image.fromarray(np.full((100, 120, 3), 90, np.uint8)).save(tmp / "i/a.png")
(tmp / "l.csv").write_text(
    "image,xmin,ymin,xmax,ymax,label\n"
    + "".join(
        f"a.png,{x},{y},{x + 12},{y + 9},{n}\n"
        for x, y, n in [(5, 5, "car"), (30, 8, "car"), (60, 40, "plane"), (80, 70, "ship"), (10, 60, "ship")]
    )
)
index = read_object_labels(tmp / "l.csv", tmp / "i", label_format="csv", classes=["car", "plane", "ship"])
write_coco_labels(tmp / "gt.json", index, tmp / "i")
record = index.records[0]
write_objects(
    tmp / "pred.json",
    record.boxes_xyxy,
    np.ones(len(record)),
    record.labels,
    index.classes,
    source=perf_vit.open(tmp / "i/a.png"),
)
predicted = json.loads((tmp / "pred.json").read_text())
scores = {}
with contextlib.redirect_stdout(io.StringIO()):
    truth = COCO(str(tmp / "gt.json"))
    found = truth.loadRes(predicted["annotations"])
    for category in truth.loadCats(truth.getCatIds()):
        run = COCOeval(truth, found, "bbox")
        run.params.catIds = [category["id"]]
        run.evaluate()
        run.accumulate()
        run.summarize()
        scores[category["name"]] = round(float(run.stats[1]), 3)
ids = lambda c: {x["name"]: x["id"] for x in c["categories"]}
ok = all(v == 1 for v in scores.values())
print(
    "PASS" if ok else "FAIL",
    f"AP50 of perfect predictions {scores}; category ids in the package's labels "
    f"{ids(json.loads((tmp / 'gt.json').read_text()))}, in its predictions {ids(predicted)}",
)
sys.exit(int(not ok))
