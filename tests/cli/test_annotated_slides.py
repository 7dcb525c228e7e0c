"""Train, evaluate and predict on annotated slides, at the pixel size of the config, through the real entry point."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import call
from synthetic_slide import make_slide

from perf_vit.models import load_detector, load_segmenter
from perf_vit.sources import open_source

MODEL = "backbone: performer_vit_tiny_patch16_224\n  backbone_kwargs: {depth: 1, embed_dim: 64, num_heads: 2}"
SEGMENTATION = f"""
out: ???
data:
  train: {{image: "???", labels: "???"}}
  val: {{image: "???", labels: "???"}}
  classes: [other, Tumor]
  background: other
  attribute: classification
  mpp: 1.0
  tile_px: 64
  tiles_per_epoch: 4
  batch_size: 2
model:
  {MODEL}
  out_indices: [0]
  head: linear
trainer: {{max_epochs: 1, accelerator: cpu, report: false}}
"""
DETECTION = """
out: ???
task: detection
data:
  train: {image: "???", labels: "???", label_format: polygons}
  val: {image: "???", labels: "???", label_format: polygons}
  classes: [Tumor]
  attribute: classification
  mpp: 1.0
  tile_px: 128
  tiles_per_epoch: 2
  batch_size: 2
model: {backbone: resnet10t, strides: [8, 16], channels: 64, head: fcos, head_kwargs: {num_convs: 1}}
trainer: {max_epochs: 1, accelerator: cpu, report: false}
"""


@pytest.fixture(scope="module")
def slide(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("annotated")
    ring = [[80, 40], [240, 40], [240, 120], [80, 120], [80, 40]]
    annotation = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"objectType": "annotation", "classification": {"name": "Tumor", "color": [200, 0, 0]}},
    }
    (root / "a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [annotation]}))
    (root / "segmentation.yaml").write_text(SEGMENTATION)
    (root / "detection.yaml").write_text(DETECTION)
    return make_slide(root / "a.svs", 320, 400, mpp=0.5, tile_px=64, tissue_share=1.0)


def test_a_map_is_trained_scored_and_predicted_at_the_mpp_of_the_config(slide, tmp_path) -> None:
    labels, out = slide.with_suffix(".geojson"), tmp_path / "run"
    files = [f"data.{part}.{key}={path}" for part in ("train", "val") for key, path in
             (("image", slide), ("labels", labels))]  # fmt: skip
    assert call(["train", slide.with_name("segmentation.yaml"), *files, f"out={out}"]) == 0
    checkpoint, report, mapped = out / "checkpoints" / "best.ckpt", tmp_path / "scores.json", tmp_path / "map.tif"
    assert load_segmenter(checkpoint).spec.mpp == 1.0
    options = ["--checkpoint", checkpoint, "--input", slide]
    assert call(["evaluate", *options, "--labels", labels, "--json", report]) == 0
    pixels = [each["num_pixels"] for each in json.loads(report.read_text())["classes"]]
    assert pixels == [160 * 200 - 80 * 40, 80 * 40]
    assert call(["predict", *options, "--output", mapped]) == 0
    assert open_source(mapped).size == (160, 200)


def test_a_segmenter_is_scored_on_slides_as_it_was_trained(slide, tmp_path, capsys) -> None:
    # Half of it is glass, and the file doesn't say how large its pixels are.
    bare = make_slide(tmp_path / "bare.tif", 320, 400, mpp=None, tile_px=64, tissue_share=0.4)
    labels, out = slide.with_suffix(".geojson"), tmp_path / "run"
    files = [f"data.{part}={{image: {bare}, labels: {labels}}}" for part in ("train", "val")]
    options = ["data.slide_mpp=0.5", "data.tissue=otsu"]
    assert call(["train", slide.with_name("segmentation.yaml"), *files, *options, f"out={out}"]) == 0
    checkpoint, report = out / "checkpoints" / "best.ckpt", tmp_path / "scores.json"
    spec = load_segmenter(checkpoint).spec
    assert (spec.slide_mpp, spec.tissue) == (0.5, "otsu")

    def num_pixels(*given: str) -> int:
        files = ["--input", bare, "--labels", labels, "--json", report, "--overwrite"]
        assert call(["evaluate", "--checkpoint", checkpoint, *files, *given]) == 0
        return sum(each["num_pixels"] for each in json.loads(report.read_text())["classes"])

    tissue = open_source(bare, mpp=1.0, slide_mpp=0.5, tissue="otsu")
    assert num_pixels() == int(tissue.read(tissue.extent).valid.sum()) < 160 * 200
    assert num_pixels("--tissue", str(labels)) == 80 * 40
    coarse = open_source(bare, mpp=1.0, slide_mpp=0.25, tissue="otsu")
    assert num_pixels("--slide-mpp", "0.25") == int(coarse.read(coarse.extent).valid.sum())


def test_an_override_replaces_what_slides_state_and_is_not_kept_with_the_model(slide, tmp_path) -> None:
    # The file states 0.5, and the config knows better.
    labels, out, mapped = slide.with_suffix(".geojson"), tmp_path / "run", tmp_path / "map.tif"
    files = [f"data.{part}={{image: {slide}, labels: {labels}}}" for part in ("train", "val")]
    given = "data.slide_mpp_override=0.25"
    assert call(["train", slide.with_name("segmentation.yaml"), *files, given, f"out={out}"]) == 0
    checkpoint = out / "checkpoints" / "best.ckpt"
    spec = load_segmenter(checkpoint).spec
    assert (spec.slide_mpp, spec.slide_mpp_override) == (None, None)
    options = ["--checkpoint", checkpoint, "--input", slide]
    for flags, size in (
        ([], (160, 200)),
        (["--slide-mpp-override", "0.25"], (80, 100)),
        (["--slide-mpp", "objective"], (160, 200)),
    ):
        assert call(["predict", *options, *flags, "--output", mapped, "--overwrite"]) == 0
        assert open_source(mapped).size == size
    report = tmp_path / "scores.json"
    scoring = ["--labels", labels, "--json", report, "--slide-mpp-override", "0.25"]
    assert call(["evaluate", *options, *scoring]) == 0
    assert [each["num_pixels"] for each in json.loads(report.read_text())["classes"]] == [80 * 100 - 40 * 20, 40 * 20]


def test_flags_of_pixel_size_are_checked(slide, capsys) -> None:
    for flag, said in (
        ("--slide-mpp", "such as 0.25, or objective, got wide"),
        ("--slide-mpp-override", "as a number"),
    ):
        assert call(["info", slide, flag, "wide"]) == 2
        assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert call(["info", slide, "--slide-mpp-override", "353"]) == 2
    assert "slide_mpp_override of" in capsys.readouterr().err


def test_objects_are_trained_and_found_at_the_mpp_of_the_config(slide, tmp_path) -> None:
    labels, out = slide.with_suffix(".geojson"), tmp_path / "run"
    files = [f"data.{part}.{key}={path}" for part in ("train", "val") for key, path in
             (("image", slide), ("labels", labels))]  # fmt: skip
    assert call(["train", slide.with_name("detection.yaml"), *files, f"out={out}"]) == 0
    checkpoint, report, found = out / "checkpoints" / "best.ckpt", tmp_path / "scores.json", tmp_path / "found.geojson"
    assert load_detector(checkpoint).spec.mpp == 1.0
    options = ["--checkpoint", checkpoint, "--input", slide]
    assert call(["evaluate", *options, "--labels", labels, "--json", report]) == 0
    assert [each["num_objects"] for each in json.loads(report.read_text())["classes"]] == [1]
    assert call(["predict", *options, "--output", found, "--score-threshold", "0"]) == 0
    corners = [each["geometry"]["coordinates"][0] for each in json.loads(found.read_text())["features"]]
    # In pixels of level 0 again: beyond the 200 columns that were searched.
    assert np.concatenate(corners)[:, 0].max() > 210


def test_a_detector_is_scored_on_slides_as_it_was_trained(slide, tmp_path) -> None:
    bare = make_slide(tmp_path / "bare.tif", 320, 400, mpp=None, tile_px=64, tissue_share=1.0)
    labels, out = slide.with_suffix(".geojson"), tmp_path / "run"
    files = [f"data.{part}.{key}={path}" for part in ("train", "val") for key, path in
             (("image", bare), ("labels", labels))]  # fmt: skip
    assert call(["train", slide.with_name("detection.yaml"), *files, "data.slide_mpp=0.5", f"out={out}"]) == 0
    checkpoint, report, found = out / "checkpoints" / "best.ckpt", tmp_path / "scores.json", tmp_path / "found.geojson"
    spec = load_detector(checkpoint).spec
    assert (spec.mpp, spec.slide_mpp) == (1.0, 0.5)
    options = ["--checkpoint", checkpoint, "--input", bare]
    assert call(["evaluate", *options, "--labels", labels, "--json", report]) == 0
    assert [each["num_objects"] for each in json.loads(report.read_text())["classes"]] == [1]
    assert call(["predict", *options, "--output", found, "--score-threshold", "0"]) == 0
    corners = [each["geometry"]["coordinates"][0] for each in json.loads(found.read_text())["features"]]
    assert np.concatenate(corners)[:, 0].max() > 210
