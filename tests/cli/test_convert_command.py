"""`perf-vit convert` through the real entry point, on small models and made images."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
import timm
import torch
from command_line import call
from safetensors.torch import save_file

import perf_vit
from perf_vit.conversion.linearize import converted_layers
from perf_vit.errors import OptionError
from perf_vit.sources import find_images
from perf_vit.workflows import convert as convert_command
from perf_vit.workflows.convert import ConvertOptions

MODEL = "test_vit"
FORCED = ["--max-exact-tokens", "0"]
FAST = ["--img-size", "64", "--window-size", "2", "--num-sinks", "4", "--num-clusters", "5", *FORCED]


@pytest.fixture(autouse=True)
def _time_once(monkeypatch) -> None:
    """No test here looks at the times."""
    monkeypatch.setattr("perf_vit.workflows.conversion_report.measure.NUM_RUNS", 1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(timm.create_model(MODEL, num_classes=0).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def resnet_weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet.safetensors"
    save_file(timm.create_model("resnet18").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        with rasterio.open(folder / name, "w", driver="PNG", width=90, height=80, count=3, dtype="uint8") as dataset:
            dataset.write(rng.integers(0, 255, (3, 80, 90)).astype(np.uint8))
    return folder


def convert(source: str | Path, out: Path, *extra: str | Path) -> int:
    return call(["convert", source, "--out", out, *extra])


def given(weights: Path) -> list[str | Path]:
    return ["--weights", weights, "--num-classes", "0"]


def test_a_model_is_converted_and_the_report_says_what_it_was_measured_on(weights, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert convert(MODEL, out, *given(weights), *FAST, "--layers", "0-1,5") == 0
    printed = capsys.readouterr().out
    assert f"report: {out / 'fidelity.html'}" in printed
    model = perf_vit.conversion.load_converted(out)
    assert sorted(converted_layers(model)) == [0, 1, 5]
    options = model.blocks[5].attn.options
    assert (options.window_size, options.num_sinks, options.num_clusters) == (2, 4, 5)
    assert model.num_classes == 0
    # Weights from a file are not the ones that timm's config tells of.
    assert "tag" not in model.pretrained_cfg or not model.pretrained_cfg["tag"]
    page = (out / "fidelity.html").read_text()
    assert "generated pictures" in page
    assert "<svg" in page
    assert "src=" not in page
    assert all(text in page for text in ("class token", "64", "128", "plain FAVOR+", "perf_vit.load("))
    # Three bars: one a converted layer.
    assert page.count("<td>2</td><td>4</td><td>5</td><td>-</td>") == 3


@pytest.mark.parametrize("before", [False, True], ids=["new", "in the place of another"])
def test_a_conversion_that_is_stopped_while_it_measures_leaves_what_was_there(
    weights, tmp_path, monkeypatch, before
) -> None:
    out = tmp_path / "folder" / "out"
    options = [*given(weights), *FAST, "--layers", "0"]
    if before:
        assert convert(MODEL, out, *options) == 0
    held = {path.name: path.read_bytes() for path in out.iterdir()} if before else None

    def stop(*_, **__) -> None:
        assert out.exists() == before
        raise KeyboardInterrupt

    monkeypatch.setattr("perf_vit.workflows.convert.measure_conversion", stop)
    convert(MODEL, out, *options, "--seed", "9", *(["--overwrite"] if before else []))
    assert ({path.name: path.read_bytes() for path in out.iterdir()} if out.exists() else None) == held
    assert not before or [path.name for path in out.parent.iterdir()] == ["out"]


def test_clusters_are_the_default_and_their_options_chosen(weights, images, tmp_path, monkeypatch) -> None:
    assert convert(MODEL, tmp_path / "plain", *given(weights), "--img-size", "64", "--num-clusters", "7", *FORCED) == 0
    options = perf_vit.conversion.load_converted(tmp_path / "plain").blocks[3].attn.options
    assert (options.window_size, options.num_sinks, options.num_clusters) == (16, None, 7)
    assert "<td>16</td><td>16</td><td>7</td><td>-</td>" in (tmp_path / "plain" / "fidelity.html").read_text()
    candidates = ({"window_size": 2, "num_sinks": 2, "num_clusters": 3},) * 2
    monkeypatch.setattr("perf_vit.conversion.budget.CANDIDATES", candidates)
    args = ["--img-size", "64", "--images", images, "--budget", "1000", *FORCED]
    assert convert(MODEL, tmp_path / "chosen", *given(weights), *args) == 0
    assert "others than those the conversion learned from" in (tmp_path / "chosen" / "fidelity.html").read_text()
    model = perf_vit.conversion.load_converted(tmp_path / "chosen")
    assert {layer.options.num_clusters for layer in converted_layers(model).values()} == {3}
    assert model.conversion.mixer == "clustered"


def test_a_model_that_is_exact_at_its_size_is_measured_above_it(weights, images, tmp_path) -> None:
    options = ["--img-size", "32", "--window-size", "2", "--num-sinks", "4", "--max-exact-tokens", "10"]
    assert convert(MODEL, tmp_path / "a", *given(weights), *options, "--images", images) == 0
    page = (tmp_path / "a" / "fidelity.html").read_text()
    assert "Converted layers are exact (softmax) up to 48 x 48 px, and linear in larger images." in page
    assert "At 32 px the converted model equals the softmax model." in page
    assert "<td>32</td><td>patch tokens</td><td>4</td><td>1.0000</td><td>1.0000</td>" in page
    assert "<td>64</td><td>patch tokens</td><td>2</td>" in page
    assert "Relative error of attention outputs at 64 px" in page
    # Three times the size is the first with clusters; the images have 80 x 90 px.
    assert convert(MODEL, tmp_path / "b", *given(weights), *options[:-1], "20", "--images", images) == 0
    page = (tmp_path / "b" / "fidelity.html").read_text()
    assert "Fidelity at 96 px was not measured, because an image is smaller." in page
    assert "Relative error of attention outputs at 32 px" in page
    assert "<td>96</td><td>37</td>" in page


def test_the_crossover_is_measured_on_request_and_saved(weights, tmp_path, monkeypatch) -> None:
    given_options = []

    def measure(model, **options) -> int:
        given_options.append(options)
        return 49

    monkeypatch.setattr("perf_vit.workflows.convert.measure_crossover", measure)
    assert convert(MODEL, tmp_path / "out", *given(weights), *FAST[:-2], "--max-exact-tokens", "auto") == 0
    assert given_options == [{"window_size": 2, "num_sinks": 4, "num_clusters": 5}]
    model = perf_vit.conversion.load_converted(tmp_path / "out")
    assert {layer.options.max_exact_tokens for layer in converted_layers(model).values()} == {49}


def test_a_saved_folder_is_converted_anew_and_overwritten_when_told(weights, tmp_path, capsys) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert convert(MODEL, first, *given(weights), *FAST) == 0
    assert convert(first, second, "--mixer", "performer", "--num-features", "16", "--seed", "3") == 0
    one, two = perf_vit.conversion.load_converted(first), perf_vit.conversion.load_converted(second)
    assert torch.equal(one.blocks[3].attn.qkv.weight, two.blocks[3].attn.qkv.weight)
    assert two.conversion.mixer == "performer"
    assert (two.blocks[3].attn.options.num_features, two.blocks[3].attn.options.seed) == (16, 3)
    assert "<td>-</td><td>-</td><td>-</td><td>16</td>" in (second / "fidelity.html").read_text()
    capsys.readouterr()
    assert convert(first, second) == 2
    assert "already holds a model" in capsys.readouterr().err
    assert convert(first, second, *FAST[2:], "--overwrite") == 0
    assert perf_vit.conversion.load_converted(second).conversion.mixer == "clustered"


def test_softmax_is_left_out_where_it_would_take_long(weights, tmp_path, monkeypatch) -> None:
    for module in ("measure", "report"):
        monkeypatch.setattr(f"perf_vit.workflows.conversion_report.{module}.SOFTMAX_TOKENS", 20)
    assert convert(MODEL, tmp_path / "out", *given(weights), *FAST) == 0
    page = (tmp_path / "out" / "fidelity.html").read_text()
    assert "<td>128</td><td>65</td><td>not run</td>" in page
    assert "Softmax was not run at 128 px: 65 tokens are more than 20; `time_softmax` runs it." in page
    assert convert(MODEL, tmp_path / "out", *given(weights), *FAST, "--time-softmax", "--overwrite") == 0
    assert "not run" not in (tmp_path / "out" / "fidelity.html").read_text()


@pytest.mark.parametrize(
    ("source", "extra", "message"),
    [
        ("vit_tinny_patch16_224", [], "did you mean vit_tiny_patch16_224?"),
        ("resnet18", ["--weights", "RESNET"], "expected a vision transformer of square patches, got ResNet"),
        (MODEL, ["--weights", "nowhere.pth"], "no weights file nowhere.pth"),
        (MODEL, ["--weights", "BROKEN"], "as weights: "),
        (MODEL, ["--weights", "WEIGHTS"], "doesn't fit test_vit: missing head.weight, head.bias"),
        ("vit_small_patch16_224", ["--weights", "WEIGHTS", "--num-classes", "0"], "mis-shaped cls_token (expected"),
        ("swin_tiny_patch4_window7_224", [], "give a file of them as --weights"),
        (MODEL, ["VIT", "--img-size", "100"], "multiple of the patch size 16, got 100; try 96"),
        (MODEL, ["VIT", "--mixer", "longformer"], "mixer must be one of clustered, "),
        (MODEL, ["VIT", "--num-features", "32"], "num_features is an option of mixer='performer', got mixer='clust"),
        (
            MODEL,
            ["VIT", "--mixer", "performer", "--budget", "2", "--images", "SMALL"],
            "--budget chooses options of --mixer clustered, got performer",
        ),
        (MODEL, ["VIT", "--layers", "3-6"], "from 0 to 5, got 6"),
        (
            MODEL,
            ["VIT", "--layers", "none"],
            "--layers names none, so nothing would be converted; name some, or give --n",
        ),
        (MODEL, ["VIT", "--layers", "a"], "--layers must be indices such as 0-5,8, got a"),
        (MODEL, ["VIT", "--mixer", "performer", "--num-features", "0"], "at least 1, got 0"),
        (MODEL, ["VIT", "--max-exact-tokens", "-1"], "max_exact_tokens must be at least 0, got -1"),
        (
            MODEL,
            ["VIT", "--max-exact-tokens", "few"],
            "--max-exact-tokens must be a whole number of tokens or auto, got few",
        ),
        (
            MODEL,
            ["VIT", "--max-exact-tokens", "2.9"],
            "--max-exact-tokens must be a whole number of tokens or auto, got",
        ),
        (MODEL, ["VIT", "--mixer", "performer", "--max-exact-tokens", "auto"], "is an option of mixer='clustered'"),
        (MODEL, ["VIT", "--budget", "1.5"], "--budget learns from images, got none; give --images"),
        (MODEL, ["VIT", "--images", "NONE"], "no image file or folder"),
        (MODEL, ["VIT", "--images", "SMALL", "--img-size", "96"], "crops of 96 px need images of that size"),
        (MODEL, ["VIT", "--images", "DEEP"], "are for 8-bit images, got"),
        ("w.safetensors", [], "is a weights file: name its model, as"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_nothing_is_left(
    source, extra, message, weights, resnet_weights, images, tmp_path, capsys, monkeypatch
) -> None:
    # Nothing is downloaded in a test.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    with rasterio.open(
        tmp_path / "deep.tif", "w", driver="GTiff", width=200, height=200, count=3, dtype="uint16"
    ) as dataset:
        dataset.write(np.full((3, 200, 200), 3000, np.uint16))
    words = {
        "RESNET": resnet_weights,
        "WEIGHTS": weights,
        "BROKEN": tmp_path / "broken.pth",
        "NONE": tmp_path / "none",
        "SMALL": images,
        "DEEP": tmp_path / "deep.tif",
    }
    args = [x for word in extra for x in (given(weights) if word == "VIT" else [words.get(word, word)])]
    assert convert(source, tmp_path / "out", *args) == 2
    captured = capsys.readouterr().err
    lines = [line for line in captured.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, captured
    assert "Traceback" not in captured
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_what_is_put_into_the_folder_while_a_model_is_converted_is_kept(weights, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    assert convert(MODEL, out, *given(weights), *FAST) == 0
    capsys.readouterr()
    measure = convert_command.measure_conversion

    def measure_slowly(*arguments, **options):
        (out / "notes.txt").write_text("mine")
        return measure(*arguments, **options)

    monkeypatch.setattr(convert_command, "measure_conversion", measure_slowly)
    assert convert(MODEL, out, *given(weights), *FAST, "--overwrite") == 2
    assert "holds notes.txt, which is not part of a saved model" in capsys.readouterr().err
    assert (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_of_two_conversions_into_one_folder_the_later_is_refused(weights, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    measure = convert_command.measure_conversion

    def measure_slowly(*arguments, **options):
        out.mkdir()
        (out / "config.json").write_text("{}")
        return measure(*arguments, **options)

    monkeypatch.setattr(convert_command, "measure_conversion", measure_slowly)
    assert convert(MODEL, out, *given(weights), *FAST) == 2
    assert "already holds a model" in capsys.readouterr().err
    assert (out / "config.json").read_text() == "{}"


def test_one_path_and_one_layer_need_no_list_in_python(images) -> None:
    options = ConvertOptions(images=str(images), layers=5)
    assert (options.image_paths, options.layer_indices) == ((images,), (5,))
    assert ConvertOptions(images=images).image_paths == (images,)
    several = ConvertOptions(images=iter([images, "b"]), layers=iter([3, 1, 3]))
    for _ in range(2):
        assert (several.image_paths, several.layer_indices) == ((images, Path("b")), (1, 3))
    assert find_images(str(images)) == find_images([images]) == sorted(images.iterdir())
    with pytest.raises(OptionError, match=r"^images must be paths of files and folders, got 3$"):
        ConvertOptions(images=3)
    with pytest.raises(OptionError, match=r"^layers must be indices such as 0-5,8, got 1.5$"):
        ConvertOptions(layers=1.5)


def test_a_model_for_images_beyond_its_native_size_says_which_layers_see_all(weights, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    native = ["--img-size", "64", "--native-size", "4", "--layers", "2,5", "--num-clusters", "5", *FORCED]
    assert convert(MODEL, out, *given(weights), *native) == 0
    note = "layers 2, 5 see the whole image and all others windows of 4 x 4 patches, after which positions repeat"
    assert note in " ".join(capsys.readouterr().out.split())
    assert note in (out / "fidelity.html").read_text()
    mixers = [layer.mixer.name for layer in converted_layers(perf_vit.load(out)).values()]
    assert [index for index, name in enumerate(mixers) if name == "clustered"] == [2, 5]
    assert ConvertOptions(layers="none", native_size=4).layer_indices == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--img-size", "80", "--native-size", "4"], "native_size=4 needs positions of as many rows and columns"),
        (["--img-size", "64", "--native-size", "4", "--layers", "6"], "layers must be indices from 0 to 5, got 6"),
    ],
)
def test_a_native_size_that_does_not_fit_is_a_line(weights, tmp_path, capsys, options, message) -> None:
    assert convert(MODEL, tmp_path / "out", *given(weights), *options) == 2
    assert f"Error: {message}" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_budget_and_a_native_size_are_refused_together(weights, images, tmp_path, capsys) -> None:
    both = ["--budget", "2", "--images", images, "--native-size", "4"]
    assert convert(MODEL, tmp_path / "out", *given(weights), *both) == 2
    assert "budget chooses options of all layers" in capsys.readouterr().err
