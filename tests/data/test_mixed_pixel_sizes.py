"""Slides of different pixel sizes that are trained on together at level 0."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from encoder_weights import save_encoder
from synthetic_slide import make_slide

from perf_vit.config import load_config
from perf_vit.data import warn_of_mixed_mpp
from perf_vit.errors import DataWarning
from perf_vit.workflows.registry import TASKS

DATA = {
    "detection": {"classes": ["a"], "tile_px": 64, "tiles_per_epoch": 2, "batch_size": 2},
    "classification": {"tile_px": 64, "batch_size": 2},
    "slide_classification": {"mpp": None, "tile_px": 64, "batch_size": 2},
}
MIXED = r"4 slides are read at their own pixel sizes, from 0\.25 micrometres \(.*0\.svs\) to 0\.5 \(.*[13]\.svs\)"


def source(path: str, mpp: float | None) -> SimpleNamespace:
    return SimpleNamespace(path=path, mpp=mpp)


@pytest.mark.parametrize("sizes", [[], [0.5], [0.5, 0.4537], [0.2527, 0.25, 0.2268], [None, 0.5, None]])
def test_scanners_of_one_magnification_are_not_mixed(sizes, recwarn) -> None:
    warn_of_mixed_mpp(source(f"{number}.svs", mpp) for number, mpp in enumerate(sizes))
    assert not recwarn.list


def test_the_finest_and_the_coarsest_are_named_in_one_line() -> None:
    sources = [source("a.svs", 0.5), source("scene.tif", None), source("b.svs", 0.25), source("c.svs", 0.4)]
    with pytest.warns(DataWarning) as caught:
        warn_of_mixed_mpp(sources)
    assert [str(each.message) for each in caught] == [
        "3 slides are read at their own pixel sizes, from 0.25 micrometres (b.svs) to 0.5 (a.svs), and objects in them "
        "have different sizes in pixels; give data.mpp"
    ]


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    """Four slides, two of each size, with the labels of each task."""
    folder = tmp_path_factory.mktemp("mixed")
    rows, square = [], {"type": "Polygon", "coordinates": [[[20, 20], [90, 20], [90, 90], [20, 90], [20, 20]]]}
    content = {"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": square, "properties": {}}]}
    for number in range(4):
        mpp = 0.5 if number % 2 else 0.25
        make_slide(folder / f"{number}.svs", 256, 192, mpp=mpp, tile_px=64, tissue_share=1.0, seed=number)
        (folder / f"{number}.geojson").write_text(json.dumps(content))
        rows.append(f"{number}.svs,{'ab'[number // 2]}")
    (folder / "images.csv").write_text("image,label\n" + "\n".join(rows))
    (folder / "slides.csv").write_text("slide,label\n" + "\n".join(rows))
    return folder


def config_of(task: str, folder: Path, tmp_path: Path, **more):
    labels = {"classification": folder / "images.csv", "slide_classification": folder / "slides.csv"}.get(task, folder)
    split = {"image": str(folder), "labels": str(labels)}
    split |= {"label_format": "polygons"} if task == "detection" else {}
    model = {"backbone": "resnet10t"}
    if task == "slide_classification":
        kwargs = {"depth": 1, "embed_dim": 64, "num_heads": 2, "attn_kwargs": {"num_features": 16}}
        model = {"backbone": "performer_vit_tiny_patch16_224", "backbone_kwargs": kwargs}
        model["weights"] = str(save_encoder(tmp_path / "encoder.safetensors"))
    content = {"task": task, "out": str(tmp_path), "data": {**DATA[task], "train": split, **more}, "model": model}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(content))
    return load_config(path, TASKS[task].run_config)


def build(task: str, folder: Path, tmp_path: Path, **more) -> None:
    config = config_of(task, folder, tmp_path, **more)
    TASKS[task].build_module(config, TASKS[task].build_data(config))


@pytest.mark.parametrize("task", DATA)
def test_every_task_warns_of_slides_of_mixed_pixel_sizes(task, slides, tmp_path) -> None:
    with pytest.warns(DataWarning, match=MIXED):
        build(task, slides, tmp_path)


@pytest.mark.parametrize(("task", "more"), [
    ("detection", {"mpp": 1.0}), ("slide_classification", {"mpp": 1.0}), ("classification", {"resize": True}),
    ("detection", {"slide_mpp_override": 0.5}), ("slide_classification", {"slide_mpp_override": 0.5}),
])  # fmt: skip
def test_one_pixel_size_is_not_warned_of(task, more, slides, tmp_path, recwarn) -> None:
    build(task, slides, tmp_path, **more)
    assert not [each for each in recwarn if "own pixel sizes" in str(each.message)]
