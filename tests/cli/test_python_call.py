"""The Python call of docs/inference.md makes the map that the command line makes."""

from pathlib import Path

import numpy as np
import rasterio
import torch
from command_line import call
from doc_examples import examples, run
from synthetic_slide import make_slide

import perf_vit
from perf_vit.models import (
    CHECKPOINT_KEY,
    SegmentationModelConfig,
    SegmentationSpec,
    build_segmenter,
    checkpoint_metadata,
)
from perf_vit.transforms import Normalizer


def trained(path: Path, **spec) -> Path:
    """A checkpoint with random weights."""
    torch.manual_seed(0)
    made_for = SegmentationSpec(
        classes=("a", "b"), normalizer=Normalizer((15_000.0,) * 3, (8_000.0,) * 3), tile_px=64, **spec
    )
    small = {"depth": 1, "embed_dim": 24, "num_heads": 1}
    config = SegmentationModelConfig(
        backbone="vit_tiny_patch16_224", backbone_kwargs=small, out_indices=[0], head="linear"
    )
    model = build_segmenter(config, made_for)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({CHECKPOINT_KEY: checkpoint_metadata(config, model), "state_dict": state}, path)
    return path


def maps(checkpoint: Path, image: Path, folder: Path) -> list[tuple[np.ndarray, object]]:
    """Pixels and transform of the map from the command line, and from Python."""
    by_command, by_call = folder / "command.tif", folder / "call.tif"
    assert call(["predict", "--checkpoint", checkpoint, "--input", image, "--output", by_command]) == 0
    perf_vit.predict(perf_vit.load(checkpoint), perf_vit.open(image), by_call)
    found = []
    for path in (by_command, by_call):
        with rasterio.open(path) as dataset:
            found.append((dataset.read(1), dataset.transform))
    return found


def assert_equal_maps(found: list[tuple[np.ndarray, object]]) -> None:
    (expected, place), (got, own_place) = found
    assert got.shape == expected.shape
    assert np.array_equal(got, expected)
    assert own_place == place


def test_maps_of_a_model_without_wishes_are_equal(tmp_path: Path, make_scene) -> None:
    assert_equal_maps(maps(trained(tmp_path / "x.ckpt"), make_scene(), tmp_path))


def test_the_call_reads_rasters_at_the_resolution_of_the_model(tmp_path: Path, make_scene) -> None:
    assert_equal_maps(maps(trained(tmp_path / "x.ckpt", resolution=5.0), make_scene(), tmp_path))


def test_the_call_leaves_the_nodata_of_the_model_out(tmp_path: Path, make_scene) -> None:
    pixels = np.full((3, 70, 90), 9_000, np.uint16)
    pixels[:, :20] = 7
    scene = make_scene(pixels=pixels, nodata=None)
    found = maps(trained(tmp_path / "x.ckpt", nodata=7.0), scene, tmp_path)
    assert (found[0][0][:20] == 255).all()
    assert_equal_maps(found)


def test_the_call_reads_the_bands_of_the_model(tmp_path: Path, make_scene) -> None:
    assert_equal_maps(maps(trained(tmp_path / "x.ckpt", bands=(3, 1, 2)), make_scene(), tmp_path))


def test_the_call_reads_slides_at_the_pixel_size_of_the_model(tmp_path: Path) -> None:
    slide = make_slide(tmp_path / "slide.tif", 320, 400, mpp=0.5, tile_px=64, tissue_share=1.0)
    assert_equal_maps(maps(trained(tmp_path / "x.ckpt", mpp=1.0), slide, tmp_path))


def test_the_strips_of_the_page_are_those_of_the_scene(tmp_path: Path, make_scene, monkeypatch, capsys) -> None:
    make_scene(height=200).rename(tmp_path / "scene.tif")
    trained(tmp_path / "x.ckpt")
    monkeypatch.chdir(tmp_path)
    run(["import perf_vit\nmodel = perf_vit.load('x.ckpt')", *examples("inference.md", "Other models")])
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        "Window(row=0, col=0, height=128, width=90) (2, 128, 90)",
        "Window(row=128, col=0, height=72, width=90) (2, 72, 90)",
    ]
