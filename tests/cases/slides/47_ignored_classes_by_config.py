"""QuPath's own "Ignore*"/"Region*" classes and objects without class (Qupath_to_LMD#1) in an export that segmentation is to learn from.

The error says: "add it to classes, values or ignore_values". In Python ignore_values=["Ignore*"] works; the config's
data.ignore_values is list[int]. Right: the remedy that the message names works from `perf-vit train`, for a named class and for none.
"""

from _kit import *

root = work("47")
slide = svs(root / "a.svs", picture(320, 320, [(0, 0, 320, 320)]), mpp=0.5, num_levels=1)
T = {"name": "Tumor", "color": [200, 0, 0]}
save(
    root / "named.geojson",
    collection(
        feature(box(10, 10, 150, 150), T), feature(box(160, 10, 300, 300), {"name": "Ignore*", "color": [9, 9, 9]})
    ),
)
save(root / "none.geojson", collection(feature(box(10, 10, 150, 150), T), feature(box(160, 10, 300, 300))))
(root / "c.yaml").write_text(f"""
out: ???
data:
  train: {{image: {slide}, labels: "???"}}
  val: {{image: {slide}, labels: "???"}}
  classes: [other, Tumor]
  background: other
  attribute: classification
  mpp: 1.0
  tile_px: 64
  tiles_per_epoch: 4
  batch_size: 2
model:
  backbone: performer_vit_tiny_patch16_224
  {TINY}
  out_indices: [0]
  head: linear
trainer: {{max_epochs: 1, accelerator: cpu}}
""")
results = {}
for which, value in (("named", "Ignore*"), ("none", "null")):
    files = [f"data.{part}.labels={root / (which + '.geojson')}" for part in ("train", "val")]
    for remedy in (
        [],
        [f"data.ignore_values=['{value}']"],
        [f"data.values=[0,1]", f"data.ignore_values=[{value if value == 'null' else 255}]"],
    ):
        status, text = cli("train", root / "c.yaml", *files, *remedy, f"out={root / which / str(len(results))}")
        results[f"{which} {remedy}"] = f"exit {status}: {last(text, 1)[-170:]}"
works = {w: any(v.startswith("exit 0") for k, v in results.items() if k.startswith(w)) for w in ("named", "none")}
print(json.dumps(results, indent=1))
verdict(all(works.values()), f"a remedy works from the command line: {works}")
