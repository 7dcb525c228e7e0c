"""What a user can do wrong gives one line, exit code 2, and leaves nothing half-written."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from command_line import call, save_detector, train_args

from perf_vit.data import make_ship_scene
from perf_vit.models import DetectionSpec
from perf_vit.transforms import Normalizer


@pytest.fixture
def refused(capsys, tmp_path):
    """Run a command that must be refused; its one line. `tmp_path / "out"` must stay empty or absent."""

    def _refused(args: list) -> str:
        assert call(args) == 2
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.strip()]
        assert "Traceback" not in captured.err
        errors = [line for line in lines if line.startswith("Error: ")]
        assert len(errors) == 1, captured.err
        out = tmp_path / "out"
        assert not out.exists() or list(out.iterdir()) == []
        return errors[0]

    return _refused


def _predict(trained, image: Path, output: Path, *extra: str) -> list:
    return ["predict", "--checkpoint", trained.checkpoint, "--input", image, "--output", output, *extra]


def _write(path: Path, pixels: np.ndarray, **profile) -> Path:
    options = {"driver": "GTiff", "crs": "EPSG:32637", "transform": Affine(3, 0, 401000, 0, -3.2, 4510000), **profile}
    count, height, width = pixels.shape
    with rasterio.open(path, "w", count=count, height=height, width=width, dtype=pixels.dtype, **options) as dataset:
        dataset.write(pixels)
    return path


def _noise(num_bands: int, size: int = 128) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 3000, (num_bands, size, size)).astype(np.uint16)


def test_missing_image(trained, tmp_path, refused) -> None:
    message = refused(_predict(trained, tmp_path / "nowhere.tif", tmp_path / "out" / "map.tif"))
    assert "nowhere.tif" in message


def test_missing_training_image(trained, tmp_path, refused) -> None:
    message = refused(train_args(trained.scene, tmp_path / "out", "data.train.image=nowhere.tif"))
    assert "nowhere.tif" in message


def test_missing_checkpoint(trained, tmp_path, refused) -> None:
    args = ["--input", trained.scene.image, "--output", tmp_path / "out" / "map.tif"]
    assert "no checkpoint" in refused(["predict", "--checkpoint", tmp_path / "none.ckpt", *args])


def test_a_file_that_is_no_checkpoint(trained, tmp_path, refused) -> None:
    args = ["--input", trained.scene.image, "--output", tmp_path / "out" / "map.tif"]
    assert "checkpoint" in refused(["predict", "--checkpoint", trained.scene.image, *args])


def test_image_without_crs_when_labels_need_one(trained, tmp_path, refused) -> None:
    image = _write(tmp_path / "plain.tif", _noise(4), crs=None)
    message = refused(train_args(trained.scene, tmp_path / "out", f"data.train.image={image}"))
    assert "CRS" in message
    assert "plain.tif" in message


def test_labels_that_do_not_overlap(trained, tmp_path, refused) -> None:
    image = _write(tmp_path / "elsewhere.tif", _noise(4), transform=Affine(3, 0, 601000, 0, -3, 5510000))
    message = refused(train_args(trained.scene, tmp_path / "out", f"data.train.image={image}"))
    assert "overlap" in message


def test_checkpoint_with_another_band_count(trained, tmp_path, refused) -> None:
    image = _write(tmp_path / "six.tif", _noise(6))
    message = refused(_predict(trained, image, tmp_path / "out" / "map.tif"))
    assert "4 bands" in message
    assert "six.tif has 6" in message


def test_evaluate_with_another_band_count(trained, tmp_path, refused) -> None:
    image = _write(tmp_path / "three.tif", _noise(3))
    args = ["--checkpoint", trained.checkpoint, "--input", image, "--labels", trained.scene.labels]
    assert "4 bands" in refused(["evaluate", *args, "--json", tmp_path / "out" / "scores.json"])


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_detector_and_another_band_count(tmp_path, refused, command) -> None:
    spec = DetectionSpec(classes=("cell",), normalizer=Normalizer((0.0,) * 3, (1.0,) * 3), tile_px=64,
                        label_options={"label_format": "coco"})  # fmt: skip
    checkpoint = save_detector(tmp_path / "last.ckpt", spec)
    image = _write(tmp_path / "five.tif", _noise(5))
    listed = [{"id": 0, "file_name": "five.tif", "height": 128, "width": 128}]
    cell = {"id": 1, "image_id": 0, "category_id": 1, "bbox": [8, 8, 30, 30]}
    content = {"images": listed, "annotations": [cell], "categories": [{"id": 1, "name": "cell"}]}
    (tmp_path / "labels.json").write_text(json.dumps(content))
    more = {"predict": ["--output", tmp_path / "out" / "a.geojson"], "evaluate": ["--labels", tmp_path / "labels.json"]}
    message = refused([command, "--checkpoint", checkpoint, "--input", image, *more[command]])
    assert "the model was trained on 3 bands" in message
    assert "five.tif has 5" in message


def test_a_raster_without_a_valid_pixel_is_a_map_without_one(trained, tmp_path) -> None:
    image = _write(tmp_path / "empty.tif", np.full((4, 128, 128), np.nan, np.float32))
    assert call(_predict(trained, image, tmp_path / "map.tif")) == 0
    with rasterio.open(tmp_path / "map.tif") as mapped:
        assert (mapped.read(1) == 255).all()


def test_window_size_that_the_patch_size_does_not_divide(trained, tmp_path, refused) -> None:
    message = refused(_predict(trained, trained.scene.image, tmp_path / "out" / "map.tif", "--window-size", "100"))
    assert "multiple of the patch size 16, got 100; try 96" in message


def test_a_threshold_for_classes_that_exclude_each_other(trained, tmp_path, refused) -> None:
    args = _predict(trained, trained.scene.image, tmp_path / "out" / "map.tif", "--score-threshold", "0.7")
    assert "--score-threshold is for objects and for classes that don't exclude each other" in refused(args)


def test_overlap_as_large_as_the_window(trained, tmp_path, refused) -> None:
    extra = ["--window-size", "64", "--overlap", "64"]
    assert "overlap" in refused(_predict(trained, trained.scene.image, tmp_path / "out" / "map.tif", *extra))


def test_typo_in_a_config_key(trained, tmp_path, refused) -> None:
    message = refused(train_args(trained.scene, tmp_path / "out", "data.tile_pxx=64"))
    assert "Key 'tile_pxx' not in 'data'. Did you mean: 'tile_px'?" in message


def test_value_of_another_type(trained, tmp_path, refused) -> None:
    assert "data.tile_px" in refused(train_args(trained.scene, tmp_path / "out", "data.tile_px=large"))


def test_required_key_left_out(tmp_path, refused) -> None:
    message = refused(["train", "configs/segmentation/buildings.yaml", f"out={tmp_path / 'out'}"])
    assert "data.train.image=..." in message


def test_truncated_tiff_at_prediction(trained, tmp_path, refused) -> None:
    whole = trained.scene.image.read_bytes()
    image = tmp_path / "cut.tif"
    image.write_bytes(whole[: len(whole) // 2])
    assert "cut.tif" in refused(_predict(trained, image, tmp_path / "out" / "map.tif"))


def test_truncated_tiff_at_training(trained, tmp_path, refused) -> None:
    whole = trained.scene.image.read_bytes()
    image = tmp_path / "cut.tif"
    image.write_bytes(whole[: len(whole) // 2])
    assert "cut.tif" in refused(train_args(trained.scene, tmp_path / "out", f"data.train.image={image}"))


def test_an_earlier_map_survives_a_failed_prediction(trained, tmp_path, capsys) -> None:
    whole = trained.scene.image.read_bytes()
    image, output = tmp_path / "cut.tif", tmp_path / "out" / "map.tif"
    image.write_bytes(whole[: len(whole) // 2])
    output.parent.mkdir()
    output.write_bytes(b"an earlier map")
    assert call(_predict(trained, image, output)) == 2
    assert output.read_bytes() == b"an earlier map"
    assert list(output.parent.iterdir()) == [output]


def test_output_folder_that_cannot_be_written(trained, tmp_path, refused) -> None:
    (tmp_path / "file").write_text("not a folder")
    message = refused(_predict(trained, trained.scene.image, tmp_path / "file" / "map.tif"))
    assert "can't write" in message


def test_a_map_never_replaces_its_input(trained, capsys) -> None:
    before = trained.scene.image.read_bytes()
    assert call(_predict(trained, trained.scene.image, trained.scene.image)) == 2
    assert "would replace the input" in capsys.readouterr().err
    assert trained.scene.image.read_bytes() == before


def test_a_map_is_named_as_what_it_is(trained, tmp_path, refused) -> None:
    message = refused(_predict(trained, trained.scene.image, tmp_path / "out" / "map.png"))
    assert "must end in .tif" in message


def test_run_folder_that_cannot_be_written(trained, tmp_path, refused) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert "can't write the run folder" in refused(train_args(trained.scene, tmp_path / "file" / "run"))


def test_run_folder_that_holds_a_run_is_kept(trained, capsys) -> None:
    before = trained.checkpoint.read_bytes()
    assert call(train_args(trained.scene, trained.folder)) == 2
    assert "already holds a run; pass resume=true" in capsys.readouterr().err
    assert trained.checkpoint.read_bytes() == before


def test_resume_without_a_run(trained, tmp_path, refused) -> None:
    assert "resume=true needs" in refused(train_args(trained.scene, tmp_path / "out", "resume=true"))


def test_region_outside_the_raster(trained, tmp_path, refused) -> None:
    message = refused(train_args(trained.scene, tmp_path / "out", "data.val.region=[100,100,200,50]"))
    assert "data.val.region" in message


def test_label_values_that_are_no_class(trained, tmp_path, refused) -> None:
    mask = _write(tmp_path / "mask.tif", np.full((1, 192, 192), 255, np.uint8))
    message = refused(train_args(trained.scene, tmp_path / "out", f"data.train.labels={mask}"))
    assert "255" in message


def test_unknown_sampler(trained, tmp_path, refused) -> None:
    message = refused(train_args(trained.scene, tmp_path / "out", "data.sampler=even"))
    assert "data.sampler must be one of random, balanced, grid, got 'even'" in message


def test_unknown_option_and_command(capsys) -> None:
    assert call(["predict", "--checkpiont", "x"]) == 2
    assert call(["predcit"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_no_traceback_reaches_the_terminal(trained, tmp_path) -> None:
    args = _predict(trained, tmp_path / "nowhere.tif", tmp_path / "map.tif")
    done = subprocess.run(
        [sys.executable, "-m", "perf_vit", *map(str, args)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_damaged_scene_leaves_no_temporary_files(trained, tmp_path) -> None:
    scene = make_ship_scene(tmp_path / "scene", seed=1, size_px=128, num_targets=3)
    content = bytearray(scene.image.read_bytes())
    content[len(content) // 3 : 2 * len(content) // 3] = bytes(len(content) // 3)
    scene.image.write_bytes(content)
    assert call(_predict(trained, scene.image, tmp_path / "maps" / "map.tif")) == 2
    assert not (tmp_path / "maps").exists() or list((tmp_path / "maps").iterdir()) == []


@pytest.mark.slow
def test_messages_of_gdal_that_are_no_text_print_no_traceback(tmp_path) -> None:
    # GDAL quotes the first byte of the letter alone, which rasterio can't log. Under pytest its hook would catch that.
    vrt = tmp_path / "broken.vrt"
    vrt.write_text('<VRTDataset rasterXSize="9" rasterYSize="9"><é></é></VRTDataset>', encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "perf_vit", "info", vrt], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"Error: can't open {vrt} as a raster: ")
