import json
from dataclasses import replace
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import shapely
import timm
import torch
from command_line import call
from small_models import save_segmenter
from synthetic_slide import make_slide

from perf_vit.conversion import linearize
from perf_vit.errors import InputError
from perf_vit.labels import open_labels
from perf_vit.models import checkpoint_task, load_segmenter
from perf_vit.sources import describe_source, open_source
from perf_vit.types import Window
from perf_vit.workflows.info import Workload, describe_file, estimate_workload, workload
from perf_vit.writers import CogWriter, RasterLayout, write_objects


def test_a_raster_is_described_from_its_header(make_scene, capsys) -> None:
    path = make_scene(height=70, width=90, num_bands=4, dtype="uint16", nodata=0)
    assert call(["info", path, "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["kind"], info["format"]) == ("raster", "GTiff")
    assert (info["height"], info["width"], len(info["band_names"]), info["dtype"]) == (70, 90, 4, "uint16")
    assert (info["crs"], info["units"], info["nodata"]) == ("EPSG:32637", "metre", 0)
    assert info["resolution_xy"] == [2.5, 3.25]
    assert info["bounds_crs"] == pytest.approx(
        [401_000.125, 4_510_000.5 - 70 * 3.25, 401_000.125 + 90 * 2.5, 4_510_000.5]
    )
    assert info["levels"] == [[70, 90]]
    assert (info["mpp"], info["workload"]) == (None, None)
    assert info["file_bytes"] == path.stat().st_size


def test_levels_palette_and_compression_of_a_map(tmp_path) -> None:
    layout = {"height": 1100, "width": 700, "num_bands": 1, "dtype": "uint8"}
    with CogWriter(tmp_path / "map.tif", RasterLayout(colormap={0: (1, 2, 3, 255)}, nodata=255, **layout)) as writer:
        writer.write(0, np.zeros((1, 1100, 700), np.uint8))
    info = describe_source(open_source(tmp_path / "map.tif"))
    assert info.levels == ((1100, 700), (550, 350), (275, 175))
    assert info.compression == "DEFLATE"
    assert info.block_px == (512, 512)
    assert info.num_colors == 256
    assert info.crs is None


def test_a_slide_tells_its_pixel_size_and_levels(tmp_path, capsys) -> None:
    make_slide(tmp_path / "slide.tif", 1500, 2000, mpp=0.5)
    assert call(["info", tmp_path / "slide.tif"]) == 0
    text = capsys.readouterr().out
    assert "slide (generic-tiff)" in text
    assert "0.5 um" in text
    assert "1,500 x 2,000" in text
    assert call(["info", tmp_path / "slide.tif", "--mpp", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["height"] == 750


def test_tokens_and_windows_of_a_model_are_counted_and_timed(make_scene, capsys) -> None:
    path = make_scene(height=70, width=90, num_bands=5)
    work = estimate_workload(open_source(path), "performer_vit_tiny_patch16_224", window_size=40)
    assert (work.patch_px, work.num_tokens) == (16, 5 * 6)
    # 40 is no multiple of 16: windows of 32, overlapping by 8.
    assert (work.window_size, work.overlap, work.num_windows) == (32, 8, 3 * 4)
    assert 0 < work.seconds_per_window * 12 == pytest.approx(work.seconds)
    assert call(["info", path, "--model", "performer_vit_tiny_patch16_224", "--window-size", "40"]) == 0
    text = capsys.readouterr().out
    assert "30 patches of 16 px" in text
    assert "linear at every size" in text


def test_the_crossover_of_a_model_with_clusters_is_told(make_scene, capsys) -> None:
    path = make_scene(height=70, width=90)
    command = ["info", path, "--window-size", "32", "--model"]
    assert call([*command, "clustered_vit_tiny_patch16_224"]) == 0
    assert "exact in windows of up to 768 px, linear in larger ones" in capsys.readouterr().out
    assert call([*command, "vit_tiny_patch16_224", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["workload"]["max_exact_px"] is None


def test_layers_that_a_conversion_left_are_named(make_scene, monkeypatch, capsys) -> None:
    softmax = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, depth=3)
    for size, text in ((0, "linear at every size"), (4, "exact in windows of up to 32 px, linear in larger ones")):
        converted = linearize(softmax, layers=[1], max_exact_tokens=size, window_size=1, num_sinks=0)
        monkeypatch.setattr(workload, "_backbone", lambda *_, model=converted: (model, model, 16, 32))
        assert call(["info", make_scene(num_bands=3), "--model", "some_vit"]) == 0
        # Long paths leave little room for the lines of the table.
        printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert f"{text} except in 2 layers of softmax attention" in printed


def test_windows_of_a_native_size_are_told(make_scene, monkeypatch, capsys) -> None:
    converted = linearize(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3), native_size=2)
    monkeypatch.setattr(workload, "_backbone", lambda *_: (converted, converted, 16, 48))
    assert call(["info", make_scene(num_bands=3), "--model", "some_vit"]) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "exact in windows of up to 32 px; in larger ones most or all layers see 32 px" in printed


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["nowhere.tif"], "can't open nowhere.tif: no such file"),
        (["SCENE", "--model", "no_such_model"], "--model must be a .ckpt file or a model of timm, got no_such_model"),
        (["SCENE", "--model", "resnet18"], "resnet18 has no patches of a fixed size"),
        (["SCENE", "--model", "missing.ckpt"], "no checkpoint missing.ckpt"),
        (["SCENE", "--mpp", "0.5"], "mpp can't be used with"),
    ],
)
def test_bad_arguments_are_one_line(make_scene, capsys, args, match) -> None:
    path = make_scene()
    assert call(["info", *(path if arg == "SCENE" else arg for arg in args)]) == 2
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1


def told(capsys, path: Path) -> dict:
    """What `info` says for programs, and a look at what it says for people."""
    assert call(["info", path]) == 0
    assert str(path) in capsys.readouterr().out
    assert call(["info", path, "--json"]) == 0
    found: dict = json.loads(capsys.readouterr().out)
    return found


def test_models_are_described(tmp_path, capsys) -> None:
    checkpoint = save_segmenter(tmp_path / "run" / "checkpoints" / "best.ckpt", target="ship")
    (tmp_path / "run" / "metrics.csv").write_text("epoch,lr,val/iou\n0,,0.1\n1,0.01,0.25\n2,0.005,\n")
    for path, kind in ((checkpoint, "checkpoint"), (tmp_path / "run", "run folder")):
        found = told(capsys, path)
        assert (found["kind"], found["task"], found["classes"]) == (kind, "segmentation", ["rest", "ship"])
        assert (found["backbone"], found["tile_px"]) == ("performer_vit_tiny_patch16_224", 32)
        assert found["parameters"] == sum(p.numel() for p in load_segmenter(checkpoint).parameters())
    assert (found["epochs_done"], found["last_scores"]) == (2, {"val/iou": 0.25})
    timm.models.save_for_hf(timm.create_model("test_vit", num_classes=3), tmp_path / "timm", safe_serialization=True)
    assert (found := told(capsys, tmp_path / "timm"))["kind"] == "model of timm"
    assert found["backbone"] == "test_vit"


def test_a_run_folder_is_a_model(tmp_path, make_scene, capsys) -> None:
    save_segmenter(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert call(["info", make_scene(dtype="uint8"), "--model", tmp_path / "run"]) == 0
    assert "windows" in capsys.readouterr().out
    assert load_segmenter(tmp_path / "run").task == checkpoint_task(tmp_path / "run") == "segmentation"


def test_a_distilled_run_is_its_student_and_its_checkpoint_names_it(tmp_path, capsys) -> None:
    run = tmp_path / "run"
    student = timm.create_model("test_vit", num_classes=3)
    timm.models.save_for_hf(student, run / "student", safe_serialization=True)
    (run / "checkpoints").mkdir()
    torch.save({"state_dict": student.state_dict(), "epoch": 1}, run / "checkpoints" / "best.ckpt")
    (run / "metrics.csv").write_text("epoch,lr,val/patch_cosine\n1,0.01,0.25\n")
    found = told(capsys, run)
    assert (found["kind"], found["backbone"], found["epochs_done"]) == ("model of timm", "test_vit", 1)
    assert found["last_scores"] == {"val/patch_cosine": 0.25}
    assert call(["info", run / "checkpoints" / "best.ckpt"]) == 2
    assert f"best.ckpt is of a distillation, whose model is its student; give {run / 'student'}" in " ".join(
        capsys.readouterr().err.split()
    )


def workload_of(monkeypatch, source, checkpoint: Path, **spec) -> Workload:
    model = load_segmenter(checkpoint)
    model.spec = replace(model.spec, **spec)
    monkeypatch.setattr(workload, "load_segmenter", lambda path: model)
    return estimate_workload(source, str(checkpoint))


def test_work_is_that_of_what_the_model_reads(tmp_path, make_scene, monkeypatch) -> None:
    checkpoint = save_segmenter(tmp_path / "best.ckpt")
    slide = make_slide(tmp_path / "slide.tif", 320, 640, mpp=0.25)
    for given, tokens in (({}, 5 * 10), ({"mpp": 0.5}, 10 * 20)):
        with open_source(slide, **given) as source:
            assert workload_of(monkeypatch, source, checkpoint, mpp=1.0).num_tokens == tokens
            assert source.read(Window(0, 0, 1, 1)).valid.all()
    with open_source(make_scene(height=64, width=64, num_bands=4)) as source:
        assert workload_of(monkeypatch, source, checkpoint, bands=(1, 2, 3)).num_tokens == 16
        with pytest.raises(InputError, match=r"the model was trained on 3 bands, .* has 4"):
            workload_of(monkeypatch, source, checkpoint)


def test_vectors_and_coco_files_are_described(tmp_path, make_scene, capsys) -> None:
    source = open_source(make_scene())
    boxes = np.array([[1.0, 1, 5, 5], [8, 8, 20, 20], [30, 8, 40, 20]])
    for suffix in ("gpkg", "geojson", "parquet"):
        path = write_objects(tmp_path / f"o.{suffix}", boxes, [0.9, 0.8, 0.7], [1, 0, 1], ["a", "b"], source=source)
        found = told(capsys, path)
        assert (found["kind"], found["features"], found["geometry"]) == ("vector file", 3, {"Polygon": 3})
        assert found["CRS"] == ("EPSG:4326" if suffix == "geojson" else "EPSG:32637")
        assert found["columns"][:2] == ["class", "label"]
        assert found["values of class"] == {"b": 2, "a": 1}
    path = write_objects(tmp_path / "o.json", boxes, None, [1, 0, 1], ["a", "b"], source=source)
    found = told(capsys, path)
    assert (found["kind"], found["images"], found["objects"]) == ("COCO file", 1, 3)
    assert found["classes"] == {"b": 2, "a": 1}


@pytest.mark.parametrize("suffix", ["geojson", "parquet"])
def test_columns_of_lists_and_mappings_are_described_and_label(tmp_path, make_scene, capsys, suffix) -> None:
    source = open_source(make_scene())
    columns = {"tags": [["a", "b"], ["a", "b"], None], "more": [{"x": 1}, {"x": 1}, {"y": [2]}]}
    left, _, _, top = rasterio.open(source.path).bounds
    boxes = [shapely.box(left + 10 * i, top - 10, left + 10 * i + 8, top) for i in range(3)]
    frame = gpd.GeoDataFrame(columns, geometry=boxes, crs=source.crs.to_wkt())
    path = tmp_path / f"o.{suffix}"
    frame.to_parquet(path) if suffix == "parquet" else frame.to_file(path)
    found = told(capsys, path)
    assert found["columns"] == ["tags", "more"]
    assert sorted(found["values of tags"].values()) == sorted(found["values of more"].values()) == [1, 2]
    with pytest.raises(InputError, match=r"tags of .* holds \['a', 'b'\], null; the classes are"):
        open_labels(path, source, attribute="tags", classes=["rest", "a"])


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("args.yaml", "task: detect\ndata: coco8.yaml\nmodel: yolov8n.pt\n", "data must be a mapping"),
        ("list.yaml", "data: {}\nmodel: [1, 2]\n", "model must be a mapping"),
        ("coco.json", '{"images": [], "annotations": [1], "categories": []}', "as a COCO file"),
        ("coco.json", '{"images": [], "annotations": [], "categories": [{"id": []}]}', "as a COCO file"),
        ("model/config.json", '{"architecture": "test_v', "as JSON"),
        ("run/metrics.csv", "step,loss\n1,2\n", "as the metrics of a run"),
        ("run/metrics.csv", "epoch,val/iou\n1,good\n", "as the metrics of a run"),
    ],
)
def test_damaged_files_and_those_of_other_programs_are_one_line(tmp_path, capsys, name, text, match) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if path.parent.name == "run":
        save_segmenter(path.parent / "checkpoints" / "best.ckpt")
    path.write_text(text)
    assert call(["info", path.parent if path.parent != tmp_path else path]) == 2
    error = capsys.readouterr().err
    assert match in error
    assert path.name in error
    assert error.count("\n") == 1


def test_empty_sections_of_a_config_and_configs_of_other_models_are_no_error(tmp_path, capsys) -> None:
    (tmp_path / "run.yaml").write_text("data: {tile_px: 96}\nmodel:\n")
    assert told(capsys, tmp_path / "run.yaml")["tile_px"] == 96
    (tmp_path / "config.json").write_text("[1, 2]")
    assert describe_file(str(tmp_path)) is None


def test_a_config_is_described_with_its_missing_files(tmp_path, capsys) -> None:
    (tmp_path / "run.yaml").write_text(
        "extends: configs/segmentation/demo.yaml\n"
        f"data: {{train: {{image: {tmp_path}/a.tif, labels: {tmp_path}/run.yaml}}, tile_px: 96}}\n"
    )
    found = told(capsys, tmp_path / "run.yaml")
    assert (found["kind"], found["task"], found["tile_px"]) == ("config", "segmentation", 96)
    assert found["train image"] == f"{tmp_path}/a.tif"
    assert found["missing_files"] == [f"{tmp_path}/a.tif"]


def test_an_index_of_tiles_is_still_a_raster(tmp_path, make_scene, capsys) -> None:
    """A GeoPackage that GDAL reads as a mosaic."""
    scene = make_scene()
    source = open_source(scene)
    outline = shapely.box(*rasterio.open(scene).bounds)
    frame = gpd.GeoDataFrame({"location": [str(scene)]}, geometry=[outline], crs=source.crs.to_wkt())
    frame.to_file(tmp_path / "tiles.gti.gpkg")
    assert told(capsys, tmp_path / "tiles.gti.gpkg")["kind"] == "raster"
