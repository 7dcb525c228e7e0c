"""Errors name options as Python does, and the command line turns them into its flags."""

import pytest
from command_line import call
from jobs_that_write import write_scene
from small_models import save_segmenter

from perf_vit.errors import OptionError, OutputError
from perf_vit.inference import SegmentationPredictOptions, SegmentationPredictor


@pytest.mark.parametrize(
    ("python", "flags", "message"),
    [
        ({"precision": "8"}, ["--precision", "8"], "precision must be one of 32, bf16, 16, auto, got 8"),
        ({"batch_size": 4, "overlap": 32}, ["--overlap", "32"], "overlap must be below the window size 32, got 32"),
        ({"window_size": 20}, ["--window-size", "20"], "window_size must be a multiple of the patch size 16, got 20"),
        ({"score_threshold": 0.3}, ["--score-threshold", "0.3"], "score_threshold is for objects and for classes"),
    ],
)
def test_an_option_has_its_own_name_in_both_faces(tmp_path, capsys, python, flags, message) -> None:
    checkpoint, scene = save_segmenter(tmp_path / "model.ckpt"), write_scene(tmp_path / "scene.tif")
    with pytest.raises(OptionError) as caught:
        SegmentationPredictor(checkpoint, SegmentationPredictOptions(**python)).run(scene, tmp_path / "map.tif")
    assert str(caught.value).startswith(message)
    args = ["predict", "--checkpoint", checkpoint, "--input", scene, "--output", tmp_path / "map.tif"]
    assert call([*args, *flags]) == 2
    name, rest = message.split(" ", 1)
    shown = " ".join(capsys.readouterr().err.split())
    assert f"Error: --{name.replace('_', '-')} {rest}" in shown
    assert not (tmp_path / "map.tif").exists()


def test_what_to_do_is_named_in_the_words_of_each_face(tmp_path, capsys) -> None:
    checkpoint, scene = save_segmenter(tmp_path / "model.ckpt"), write_scene(tmp_path / "scene.tif")
    (tmp_path / "map.tif").write_bytes(b"mine")
    with pytest.raises(OutputError, match="replace it with `overwrite=True`") as caught:
        SegmentationPredictor(checkpoint, SegmentationPredictOptions()).run(scene, tmp_path / "map.tif")
    assert "--" not in str(caught.value)
    assert call(["predict", "--checkpoint", checkpoint, "--input", scene, "--output", tmp_path / "map.tif"]) == 2
    assert "replace it with --overwrite" in " ".join(capsys.readouterr().err.split())
