"""Training, evaluation, prediction and Python open the inputs of a model with the same options."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import call
from encoder_weights import save_encoder
from synthetic_slide import make_slide

import perf_vit.sources.open
from perf_vit.models import load_classifier, load_detector, load_segmenter, load_slide_classifier
from perf_vit.sources import open_source

VIT = """
  backbone: performer_vit_tiny_patch16_224
  backbone_kwargs: {depth: 1, embed_dim: 64, num_heads: 2, attn_kwargs: {num_features: 16}}
"""
CNN = "{backbone: resnet10t, strides: [8, 16], channels: 64, head: fcos, head_kwargs: {num_convs: 1}}"
CONFIGS = {
    "segmentation": f"""
data:
  train: {{image: IMAGE, labels: LABELS}}
  val: {{image: IMAGE, labels: LABELS}}
  classes: [other, thing]
  background: other
  tile_px: 32
  tiles_per_epoch: 2
  batch_size: 2
model: {VIT}
  out_indices: [0]
  head: linear
""",
    "detection": f"""
task: detection
data:
  train: {{image: IMAGE, labels: LABELS, label_format: polygons}}
  val: {{image: IMAGE, labels: LABELS, label_format: polygons}}
  classes: [thing]
  tile_px: 64
  tiles_per_epoch: 2
  batch_size: 2
model: {CNN}
""",
    "classification": f"""
task: classification
data:
  train: {{image: FOLDER, labels: TABLE}}
  val: {{image: FOLDER, labels: TABLE}}
  tile_px: 32
  batch_size: 2
model: {VIT}
""",
    "slide_classification": f"""
task: slide_classification
data:
  train: {{image: FOLDER, labels: TABLE}}
  val_share: 0.5
  tile_px: 32
  min_tissue: 0.1
model: {VIT}
  weights: WEIGHTS
  pool: avg
  hidden_dim: 16
  attention_dim: 8
""",
}
LOAD = {
    "segmentation": load_segmenter,
    "detection": load_detector,
    "classification": load_classifier,
    "slide_classification": load_slide_classifier,
}
SUFFIX = {"segmentation": ".tif", "detection": ".geojson", "classification": ".csv", "slide_classification": ".csv"}
CASES = [
    ("segmentation", "raster", {"bands": [3, 1], "nodata": 7.0, "resolution": 5.0}),
    ("segmentation", "slide", {"bands": [3, 1], "mpp": 1.0, "slide_mpp": 0.5, "tissue": "otsu"}),
    ("detection", "raster", {"bands": [3, 1, 2], "nodata": 7.0}),
    ("detection", "slide", {"bands": [3, 1, 2], "mpp": 1.0, "slide_mpp": 0.5}),
    ("classification", "raster", {"bands": [3, 1, 2], "nodata": 7.0}),
    ("slide_classification", "slide", {"bands": [3, 1, 2], "mpp": 1.0, "slide_mpp": 0.5, "tissue": "otsu"}),
]


def square(left: float, top: float, side: float) -> dict:
    right, bottom = left + side, top + side
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    return {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [ring]}}


@pytest.fixture
def files(tmp_path, make_scene, request) -> dict[str, Path]:
    """Two images of each of two classes, and labels of each kind."""
    images = []
    for number in range(4):
        if request.param == "slide":
            path = tmp_path / f"slide_{number}.tif"
            images.append(make_slide(path, 320, 400, mpp=None, tile_px=64, tissue_share=0.6, seed=number))
        else:
            images.append(make_scene(height=150, width=170, seed=number))
    with open_source(images[0]) as source:
        left, top = source.transform @ (40, 30)
        side = 60 * abs(source.transform.a)
    content = {"type": "FeatureCollection", "features": [square(left, top if side < 60.1 else top - side, side)]}
    if request.param == "raster":
        content["crs"] = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32637"}}
    (tmp_path / "labels.geojson").write_text(json.dumps(content))
    rows = [f"{path.name},{'ab'[number % 2]}" for number, path in enumerate(images)]
    (tmp_path / "table.csv").write_text("image,label\n" + "\n".join(rows))
    (tmp_path / "slides.csv").write_text("slide,label\n" + "\n".join(rows))
    return {"image": images[0], "labels": tmp_path / "labels.geojson", "folder": tmp_path}


@pytest.fixture
def opened(monkeypatch) -> list[dict[str, Any]]:
    """Options of each input that is opened."""
    seen: list[dict[str, Any]] = []

    def spy(path: Any, **options: Any) -> Any:
        seen.append(options)
        return open_source(path, **options)

    monkeypatch.setattr(perf_vit.sources.open, "open_source", spy)
    return seen


def options_of(seen: list[dict[str, Any]]) -> set[str]:
    """The different options, in one way of writing."""
    found = set()
    for options in seen:
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
        # The unit of a resolution is known when training has seen the rasters.
        plain |= {name: value.size for name, value in plain.items() if hasattr(value, "unit")}
        found.add(json.dumps(plain, sort_keys=True))
    seen.clear()
    return found


@pytest.mark.parametrize(
    ("task", "files", "options"), CASES, ids=[f"{task}-{kind}" for task, kind, _ in CASES], indirect=["files"]
)
def test_inputs_are_opened_with_the_options_of_the_config(task, files, options, opened, tmp_path) -> None:
    folder, table = files["folder"], files["folder"] / ("slides.csv" if task == "slide_classification" else "table.csv")
    text = CONFIGS[task].replace("IMAGE", str(files["image"])).replace("LABELS", str(files["labels"]))
    text = text.replace("FOLDER", str(folder)).replace("TABLE", str(table))
    text = text.replace("WEIGHTS", str(save_encoder(tmp_path / "encoder.safetensors")))
    (tmp_path / "config.yaml").write_text(
        f"{text}\nout: ???\ntrainer: {{max_epochs: 1, accelerator: cpu, report: false}}\n"
    )
    given = [f"data.{name}={json.dumps(value)}" for name, value in options.items()]
    assert call(["train", tmp_path / "config.yaml", f"out={tmp_path / 'run'}", *given]) == 0
    expected = {json.dumps(options, sort_keys=True)}
    if task == "slide_classification":
        # Windows are found on tissue and embedded with the glass in them.
        expected.add(json.dumps(_without_tissue(options), sort_keys=True))
    assert options_of(opened) == expected

    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    model = ["--checkpoint", checkpoint, "--device", "cpu"]
    labels = files["labels"] if task in ("segmentation", "detection") else table
    where = files["image"] if task in ("segmentation", "detection") else folder
    if task == "slide_classification":
        # Features of the run are used again.
        for file in (tmp_path / "run" / "embeddings").iterdir():
            file.unlink()
    assert call(["evaluate", *model, "--input", where, "--labels", labels]) == 0
    assert options_of(opened) == expected

    out = tmp_path / f"out{SUFFIX[task]}"
    assert call(["predict", *model, "--input", files["image"], "--output", out]) == 0
    assert options_of(opened) == expected

    spec = LOAD[task](checkpoint).spec
    for source in (files["image"], open_source(files["image"])):
        with spec.open(source) as found:
            assert found.num_bands == len(options["bands"])
        assert options_of(opened) == {json.dumps(options, sort_keys=True)}


def _without_tissue(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "tissue"}
