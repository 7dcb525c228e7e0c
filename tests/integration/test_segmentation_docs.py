"""docs/segmentation.md: its Python block runs as a reader would run it, and its defaults are those of the code."""

import re
from pathlib import Path

from doc_examples import examples, run

from perf_vit.models import SegmentationModelConfig


def test_the_example_of_folders_gives_batches(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(examples("segmentation.md", "Train"))
    assert names["images"].shape == (4, 3, 64, 64)
    assert names["labels"].shape == (4, 64, 64)
    assert sorted(names["labels"].unique().tolist()) == [0, 1]
    assert len(names["data"].val) == 2 * 4


def test_the_default_backbone_is_the_one_that_the_page_names() -> None:
    page = (Path(__file__).parents[2] / "docs" / "segmentation.md").read_text(encoding="utf-8")
    assert f"| `model.backbone` | `{SegmentationModelConfig().backbone}` |" in page


def test_what_a_shell_would_take_apart_is_quoted() -> None:
    for page in ("segmentation.md", "training.md"):
        lines = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8").splitlines()
        commands = [line for line in lines if line.startswith("    ")]
        assert not [line for line in commands if re.search(r"(^|\s)[\w.]+=\{[^}]* ", line)]
