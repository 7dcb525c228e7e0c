"""The tutorials run from the first cell to the last, and end with what their text promises."""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import timm
import torch
from doc_examples import cells, run
from safetensors.torch import save_file

import perf_vit
from perf_vit.layers import MIXERS
from perf_vit.workflows.train import read_run

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
STORED = TUTORIALS / "linearize_dinov2.ipynb"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and pictures that open no window."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MIXERS, "_objects", dict(MIXERS))
    mpl.use("agg")
    return tmp_path


# Sizes that the config doesn't depend on.
SMALLER = {
    "size=2048": "size=512",
    "size_px=768": "size_px=256",
    "size_px=512": "size_px=256",
    "num_targets=90": "num_targets=9",
    "num_targets=120": "num_targets=12",
    "num_targets=50": "num_targets=5",
    "(224, 448, 896, 1344)": "(224,)",
}


def shortened(cell: str) -> str:
    for size, smaller in SMALLER.items():
        cell = cell.replace(size, smaller)
    return cell


class _TrainedError(Exception):
    """Ends a tutorial where it would train."""


@pytest.mark.parametrize("tutorial", ["first_map.md", "small_objects.md", "slide_to_qupath.md", "own_mixer.md"])
def test_the_config_that_a_tutorial_trains_with_is_valid(folder: Path, monkeypatch, tutorial: str) -> None:
    def check(*arguments: Any, **options: Any) -> None:
        options.pop("progress")
        read_run(*arguments, **options)
        raise _TrainedError

    monkeypatch.setattr(perf_vit, "train", check)
    with pytest.raises(_TrainedError):
        run([shortened(cell) for cell in cells(tutorial)])


@pytest.mark.slow
def test_first_map(folder: Path) -> None:
    names = run(cells("first_map.md"))
    (ship,) = [row for row in names["scores"].table if row["name"] == "ship"]
    assert ship["iou"] > 0.6
    assert 60 < len(names["ships"]) < 150
    assert names["ships"].crs == "EPSG:32637"


@pytest.mark.slow
def test_small_objects(folder: Path) -> None:
    names = run(cells("small_objects.md"))
    assert names["hit"].mean() > 0.7
    assert names["false_alarms"].sum() < len(names["truth"]) / 2


@pytest.mark.slow
def test_slide_to_qupath(folder: Path) -> None:
    pytest.importorskip("openslide")
    names = run(cells("slide_to_qupath.md"))
    (tumor,) = [row for row in names["scores"].table if row["name"] == "Tumor"]
    assert tumor["iou"] > 0.6
    assert {each["properties"]["classification"]["name"] for each in names["found"]} == {"Tumor"}
    assert (folder / "tumour.ome.tif").exists()


@pytest.mark.slow
def test_own_mixer(folder: Path) -> None:
    names = run(cells("own_mixer.md"))
    assert len(names["rows"]) == 4
    assert all(np.isfinite(row["train/loss"]) for row in names["run"].metrics)
    assert isinstance(names["linear"].blocks[3].attn.mixer, names["EluMixer"])


@pytest.mark.slow
def test_linearize_dinov2(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights of a seed: the code runs; what it keeps of a pretrained model is stored."""
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=518)
    save_file({name: tensor.half() for name, tensor in model.state_dict().items()}, folder / "vit.safetensors")
    monkeypatch.setenv("DINOV2_WEIGHTS", str(folder / "vit.safetensors"))
    names = run(cells("linearize_dinov2.md"))
    assert names["rows"][0]["cosine of tokens"] == pytest.approx(1, abs=1e-5)
    assert (folder / "linear" / "model.safetensors").exists()


def test_stored_outputs_belong_to_the_text() -> None:
    notebook = json.loads(STORED.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert ["".join(cell["source"]) for cell in code] == [cell.strip() for cell in cells("linearize_dinov2.md")]
    kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
    assert "error" not in kinds
    assert {"stream", "display_data", "execute_result"} <= kinds
    text = STORED.with_suffix(".md").read_text(encoding="utf-8")
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            assert "".join(cell["source"]).strip() in text


@pytest.mark.parametrize("page", sorted(TUTORIALS.glob("*.md")), ids=lambda page: page.stem)
def test_every_tutorial_is_listed_and_tested(page: Path) -> None:
    listed = re.search(r"^```\{toctree\}\n(.*?)^```", (TUTORIALS / "index.md").read_text(), re.MULTILINE | re.DOTALL)
    assert listed is not None
    if page.stem != "index":
        assert page.stem in listed[1].split()
        assert f"test_{page.stem}" in globals()
