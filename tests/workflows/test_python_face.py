"""The Python calls: what they take, what they give and what they refuse."""

import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import rasterio
import timm
import torch
from small_models import save_classifier, save_segmenter, save_small_detector
from torch import nn

import perf_vit
from perf_vit.errors import CheckpointError, ConfigError, InputError, OptionError, OutputError
from perf_vit.inference import RunReport, SegmentationPredictOptions, SegmentationPredictor, resolve_device
from perf_vit.inference.options import own_device
from perf_vit.transforms import Normalizer
from perf_vit.workflows.load import evaluating, has_task
from perf_vit.workflows.predict import as_segmenter
from perf_vit.workflows.segmentation import SegmentationEvaluateOptions


def pixels_of(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read()


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    linear = perf_vit.linearize(model, num_clusters=2, max_exact_tokens=0)
    return perf_vit.save_converted(linear, tmp_path_factory.mktemp("saved") / "linear")


def test_names_are_listed_for_completion() -> None:
    assert {"train", "load", "predict", "evaluate", "linearize", "open", "convert", "distill"} <= set(dir(perf_vit))


HELP = """
import contextlib, io, sys
sys.argv = ["perf-vit", "--help"]
from perf_vit.cli.main import app, run
names = [command.callback.__name__.replace("_", "-") for command in app.registered_commands]
assert {"init", "train", "distill", "predict", "info", "demo"} <= set(names)
for args in (["--version"], ["--help"], *([name, "--help"] for name in names)):
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            run(args)
    except SystemExit as end:
        assert not end.code, args
    assert args == ["--version"] or "Usage: perf-vit" in printed.getvalue(), args
    loaded = {"torch", "timm", "numpy", "omegaconf", "rasterio", "pandas"} & set(sys.modules)
    assert not loaded, f"{args} imports {loaded}"
"""


def test_the_help_of_every_command_waits_for_neither_torch_nor_timm() -> None:
    subprocess.run([sys.executable, "-c", HELP], check=True)


@pytest.mark.slow
def test_the_backbones_are_registered_once_the_command_line_uses_models() -> None:
    script = (
        "import sys; sys.argv = ['perf-vit', '--help']\n"
        "import perf_vit.cli.main, timm, perf_vit.models\n"
        "assert timm.is_model('performer_vit_tiny_patch16_224')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_model_is_loaded_from_whatever_holds_it(converted, tmp_path) -> None:
    checkpoint = save_segmenter(tmp_path / "run" / "checkpoints" / "best.ckpt")
    for given in (checkpoint, str(checkpoint), tmp_path / "run"):
        assert perf_vit.load(given).task == "segmentation"
    assert perf_vit.load(converted).conversion.mixer == "clustered"
    timm.models.save_for_hf(timm.create_model("test_vit", num_classes=3), tmp_path / "timm", safe_serialization=True)
    assert not perf_vit.load(tmp_path / "timm").training
    (tmp_path / "distilled").mkdir()
    (tmp_path / "distilled" / "student").symlink_to(converted)
    assert perf_vit.load(tmp_path / "distilled").conversion.mixer == "clustered"


def test_a_model_of_the_hub_is_loaded_from_the_cache(converted, tmp_path, monkeypatch) -> None:
    snapshots = tmp_path / "models--owner--linear" / "snapshots" / ("0" * 40)
    snapshots.parent.mkdir(parents=True)
    snapshots.symlink_to(converted)
    refs = tmp_path / "models--owner--linear" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loaded = perf_vit.load("hf-hub:owner/linear")
    expected = perf_vit.load(converted)
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(ConfigError, match="can't get owner/other from the Hugging Face hub"):
        perf_vit.load("hf-hub:owner/other")


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", None])
def test_a_model_of_the_hub_may_have_weights_of_torch(tmp_path, monkeypatch, weights) -> None:
    model = timm.create_model("test_vit", num_classes=3)
    timm.models.save_for_hf(model, tmp_path / "hub", safe_serialization="both")
    for file in (tmp_path / "hub").iterdir():
        if file.name not in ("config.json", weights):
            file.unlink()

    def fetched(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        (tmp_path / "cache").mkdir(exist_ok=True)
        for file in (tmp_path / "hub").iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, tmp_path / "cache")
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    if weights is None:
        with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor pytorch_model\.bin"):
            perf_vit.load("hf-hub:owner/vit")
    else:
        loaded = perf_vit.load("hf-hub:owner/vit").state_dict()
        assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["nothing.ckpt", "nothing", "empty"])
def test_a_model_that_there_is_not_is_one_line(tmp_path, name) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError) as error:
        perf_vit.load(tmp_path / name)
    assert "\n" not in str(error.value)


def test_inputs_are_paths_lists_folders_globs_and_sources(make_scene, tmp_path) -> None:
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    for number in range(2):
        Path(make_scene(seed=number, dtype="uint8")).rename(scenes / f"{number}.tif")
    model = perf_vit.load(save_segmenter(tmp_path / "model.ckpt"))
    paths = [scenes / f"{number}.tif" for number in range(2)]
    for name, given in {"list": paths, "folder": scenes, "glob": str(scenes / "*.tif")}.items():
        report = perf_vit.predict(model, given, tmp_path / name, progress=False)
        assert isinstance(report, RunReport)
        assert report.count("done") == 2
        assert report.path == tmp_path / name / "report.json"
    perf_vit.predict(model, perf_vit.open(paths[0]), tmp_path / "source.tif", progress=False)
    assert np.array_equal(pixels_of(tmp_path / "source.tif"), pixels_of(tmp_path / "list" / "0.tif"))
    assert not perf_vit.predict(model, paths[0], tmp_path / "source.tif", progress=False).made


class Bands(nn.Module):
    """The pixels as scores: the class is the brightest band."""

    def __init__(self, bands: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(bands)
        self.training_calls = 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.training_calls += self.training
        return image


def test_a_bare_network_reads_all_bands_as_they_are(make_scene, tmp_path) -> None:
    path = make_scene(num_bands=5)
    model = Bands(5).train()
    model.norm.eval()
    perf_vit.predict(model, path, tmp_path / "map.tif", window_size=32, progress=False)
    source = perf_vit.open(path)
    image = source.read()
    expected = np.where(image.valid, np.where(image.mask, image.pixels, 0).argmax(0), 255)
    assert np.array_equal(pixels_of(tmp_path / "map.tif")[0], expected)
    assert (model.training, model.norm.training) == (True, False)
    assert model.training_calls == 0


def test_maps_of_an_earlier_call_are_not_taken_for_inputs_of_a_bare_network(make_scene, tmp_path) -> None:
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    make_scene(num_bands=5).rename(scenes / "scene.tif")
    for flips in (False, True):
        report = perf_vit.predict(
            Bands(5), scenes, scenes / "maps", window_size=32, flips=flips, overwrite=True, progress=False
        )
        assert report.count("done") == 1


def test_a_model_is_given_back_on_its_device_and_in_its_layout() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2))
    before = {name: (value.stride(), value.clone()) for name, value in model.named_parameters()}
    with evaluating(model):
        model.to(memory_format=torch.channels_last)
        assert model[0].weight.stride() != before["0.weight"][0]
    assert all(value.stride() == before[name][0] for name, value in model.named_parameters())
    assert all(torch.equal(value, before[name][1]) for name, value in model.named_parameters())
    # A device that every machine has stands for a GPU.
    elsewhere = nn.Sequential(nn.Conv2d(3, 4, 3, device="meta"), nn.BatchNorm2d(4, device="meta"))
    with evaluating(elsewhere):
        elsewhere.to_empty(device="cpu")
    assert own_device(elsewhere) == torch.device("meta")


def test_auto_is_the_accelerator_of_a_given_model(monkeypatch) -> None:
    places = {"mps:0": "mps:0", "cuda:1": "cuda:1", "cpu": resolve_device("auto")}
    for own, expected in places.items():
        monkeypatch.setattr("perf_vit.inference.predictor.own_device", lambda model, own=own: torch.device(own))
        predictor = SegmentationPredictor(Bands(3), SegmentationPredictOptions())
        assert (predictor.device, predictor.on("cpu").device) == (expected, "cpu")
    monkeypatch.setattr("perf_vit.inference.predictor.own_device", lambda model: None)
    assert SegmentationPredictor(Bands(3), SegmentationPredictOptions()).device == resolve_device("auto")


def test_options_take_what_is_usual_in_python() -> None:
    for kind in (SegmentationPredictOptions, SegmentationEvaluateOptions):
        options = kind(precision=32, device=torch.device("cpu"))
        assert (options.precision, options.device) == ("32", "cpu")


def test_an_attribute_named_task_makes_no_model_of_ours(make_scene, tmp_path) -> None:
    path = make_scene(num_bands=3)
    for task in ("segmentation", "detection", "multiclass", None):
        model = Bands(3).eval()
        model.task = task
        assert not has_task(model)
        out = perf_vit.predict(model, path, tmp_path / f"{task}.tif", window_size=32, progress=False)
        assert out.made
        with pytest.raises(InputError, match=r"^expected a model that `perf_vit.train` made, got another network"):
            perf_vit.evaluate(model, path, path)
    assert has_task(perf_vit.load(save_segmenter(tmp_path / "model.ckpt")))


def test_inputs_that_are_neither_paths_nor_our_sources_are_one_line(make_scene, tmp_path) -> None:
    path = make_scene()
    for given, name in ((None, "NoneType"), (3, "int"), (np.zeros((2, 3)), "ndarray"), ([path, None], "NoneType")):
        with pytest.raises(InputError, match=rf"^input must be paths, URLs or .* got {name}; give its path$"):
            perf_vit.predict(Bands(3), given, tmp_path / "map.tif")
    with rasterio.open(path) as file, pytest.raises(InputError, match=r"got DatasetReader; give its path$"):
        perf_vit.predict(Bands(3), file, tmp_path / "map.tif")
    source = perf_vit.open(path)
    with pytest.raises(InputError, match=r"^several inputs are given by their paths, got an open RasterSource"):
        perf_vit.predict(Bands(3), [source, path], tmp_path / "maps")


def test_a_model_in_training_is_scored_in_evaluation_mode_and_given_back(make_scene, tmp_path) -> None:
    model = perf_vit.load(save_segmenter(tmp_path / "model.ckpt")).train()
    labels = make_scene(pixels=np.zeros((1, 70, 90), np.uint8), nodata=None)
    perf_vit.evaluate(model, make_scene(dtype="uint8"), labels, progress=False)
    assert all(each.training for each in model.modules())


def test_a_bare_network_is_given_the_valid_pixels_if_it_takes_them(make_scene, tmp_path) -> None:
    class Holes(nn.Module):
        def forward(self, image: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
            holes = torch.zeros(len(image), *image.shape[-2:]) if valid is None else (~valid).any((1, 2), True).float()
            return torch.stack([torch.full_like(image[:, 0], 0.5), holes.expand_as(image[:, 0])], 1)

    path = make_scene()
    perf_vit.predict(Holes(), path, tmp_path / "map.tif", window_size=32, overlap=0, progress=False)
    valid, found = perf_vit.open(path).read().valid, pixels_of(tmp_path / "map.tif")[0]
    rows, cols = (side // 32 * 32 for side in valid.shape)
    whole = valid[:rows, :cols].reshape(rows // 32, 32, cols // 32, 32).all((1, 3)).repeat(32, 0).repeat(32, 1)
    kept = valid[:rows, :cols]
    assert np.array_equal(found[:rows, :cols][kept], (~whole)[kept])
    assert {0, 1} <= set(found[:rows, :cols][kept])


def test_a_bare_network_with_a_spec_reads_what_the_spec_says(make_scene, tmp_path) -> None:
    path = make_scene(num_bands=5)
    model = Bands(2).eval()
    model.spec = perf_vit.InputSpec(
        bands=(4, 2), normalizer=Normalizer((1e4, 2e4), (1e3, 1e3)), tile_px=32, classes=("dark", "light")
    )
    perf_vit.predict(model, path, tmp_path / "map.tif", progress=False)
    image = perf_vit.open(path, bands=[4, 2]).read()
    expected = model.spec.normalizer(image).argmax(0)
    assert np.array_equal(pixels_of(tmp_path / "map.tif")[0][image.valid], expected[image.valid])
    model.spec = perf_vit.InputSpec(bands=(4, 2), classes=("one", "two", "three"))
    with pytest.raises(ConfigError, match="the spec has 3 classes, and the model gives 2 scores per pixel"):
        perf_vit.predict(model, path, tmp_path / "other.tif", window_size=32)


def test_a_network_without_scores_per_pixel_is_one_line(make_scene, tmp_path) -> None:
    path = make_scene()
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ConfigError, match=r"expected scores \[1, K, 32, 32\] from the model, got \[1, 3\]"):
        perf_vit.predict(model, path, tmp_path / "map.tif", window_size=32)
    with pytest.raises(ConfigError, match=r"the model doesn't take tiles of \(1, 3, 32, 32\)"):
        perf_vit.predict(nn.Conv2d(4, 2, 1), path, tmp_path / "map.tif", window_size=32)
    assert not (tmp_path / "map.tif").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"windowsize": 32}, "^windowsize is no option here; did you mean .window_size"),
        ({"coco_images": "a.json"}, "^coco_images is not for a segmentation model, but for an object detector"),
        ({"precision": "8"}, "^precision must be one of 32, bf16, 16, auto, got 8"),
        ({"engine": "spark"}, "^engine must be one of local, ray, got spark"),
        ({"num_actors": 2}, "^num_actors is for `engine=ray`"),
        ({"window_size": 33}, "^window_size must be a multiple of the patch size 16, got 33; try 32"),
    ],
)
def test_options_are_refused_by_their_names(make_scene, tmp_path, options, match) -> None:
    model = perf_vit.load(save_segmenter(tmp_path / "model.ckpt"))
    with pytest.raises(OptionError, match=match) as error:
        perf_vit.predict(model, make_scene(dtype="uint8"), tmp_path / "map.tif", **options)
    assert "--" not in str(error.value)


def test_evaluation_refuses_what_does_not_fit(make_scene, tmp_path) -> None:
    checkpoint = save_segmenter(tmp_path / "model.ckpt")
    scene = make_scene(dtype="uint8")
    with pytest.raises(InputError, match="a segmentation model needs `labels` to be scored"):
        perf_vit.evaluate(checkpoint, scene)
    with pytest.raises(OptionError, match=r"^label_format is not for a segmentation model, but for an object detector"):
        perf_vit.evaluate(checkpoint, scene, scene, label_format="coco")
    for given in ("https://a.b/c.tif", [scene]):
        with pytest.raises(InputError, match="evaluations read local files, got"):
            perf_vit.evaluate(checkpoint, given, scene)
    with pytest.raises(InputError, match="got another network"):
        perf_vit.evaluate(Bands(3), scene, scene)
    with pytest.raises(OptionError, match=r"^region is not for an object detector"):
        perf_vit.evaluate(save_small_detector(tmp_path / "d.ckpt"), scene, scene, region=(0, 0, 1, 1))
    (tmp_path / "scores.json").touch()
    with pytest.raises(OutputError, match=r"scores\.json exists already"):
        perf_vit.evaluate(checkpoint, scene, scene, json=tmp_path / "scores.json")


def test_a_backbone_makes_no_map(converted, make_scene, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="holds a backbone"):
        perf_vit.predict(converted, make_scene(), tmp_path / "map.tif")


def test_a_table_is_made_of_images(make_scene, tmp_path) -> None:
    checkpoint = save_classifier(tmp_path / "model.ckpt", "single_label")
    result = perf_vit.predict(checkpoint, make_scene(dtype="uint8"), tmp_path / "found.csv", progress=False)
    assert (result.made, result.num_rows) == (True, 1)
    with pytest.raises(InputError, match="a table of images is made of their paths, got an open source"):
        perf_vit.predict(checkpoint, perf_vit.open(make_scene(dtype="uint8")), tmp_path / "other.csv")
    with pytest.raises(InputError, match="got an empty list"):
        perf_vit.predict(checkpoint, [], tmp_path / "other.csv")


def test_progress_is_shown_unless_told_otherwise(make_scene, tmp_path, capsys) -> None:
    model, path = perf_vit.load(save_segmenter(tmp_path / "model.ckpt")), make_scene(dtype="uint8")
    bad = tmp_path / "bad.tif"
    bad.write_bytes(b"no raster")
    perf_vit.predict(model, path, tmp_path / "a.tif")
    shown = capsys.readouterr()
    assert "windows" in shown.err
    with pytest.raises(InputError, match="1 of 2 inputs failed"):
        perf_vit.predict(model, [path, bad], tmp_path / "maps", on_error="skip", progress=False)
    after = capsys.readouterr()
    assert (shown.out, after.out, after.err) == ("", "", "")


def test_a_map_of_one_kind_is_not_taken_for_one_of_another(make_scene, tmp_path) -> None:
    scene, model, out = make_scene(num_bands=1), Bands(1), tmp_path / "map.tif"
    options = {"window_size": 32, "progress": False}
    perf_vit.predict(model, scene, out, score_threshold=0.25, **options)
    for other in ({"kind": "probabilities-uint8"}, {"score_threshold": 0.25000001}):
        with pytest.raises(OutputError, match="exists already"):
            perf_vit.predict(model, scene, out, **other, **options)
    assert not perf_vit.predict(model, scene, out, score_threshold=0.25, **options).made


class TakesValid(nn.Module):
    """How many pixels of a tile are valid, as the score of each pixel."""

    def forward(self, image: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        seen = torch.ones_like(image[:, 0], dtype=torch.bool) if valid is None else valid
        return seen.sum((1, 2)).float()[:, None, None, None].expand_as(image[:, :1])


def test_a_bare_network_that_takes_valid_pixels_is_given_them(make_scene) -> None:
    scene = perf_vit.open(make_scene(height=32, width=32))
    valid = int(scene.read().valid.sum())
    assert 0 < valid < 32 * 32
    found = SegmentationPredictor(as_segmenter(TakesValid(), scene, 32), SegmentationPredictOptions(device="cpu"))
    [strip] = found.strips(scene, scene.extent)
    assert np.unique(strip.scores).tolist() == [valid]


@pytest.mark.parametrize("save", [save_segmenter, lambda path: save_classifier(path, "single_label")])
def test_no_input_is_an_error(save, tmp_path) -> None:
    with pytest.raises(InputError, match="expected at least one input"):
        perf_vit.predict(save(tmp_path / "model.ckpt"), [], tmp_path / "found.csv")


def test_a_table_is_made_of_no_mosaic(make_scene, tmp_path) -> None:
    checkpoint = save_classifier(tmp_path / "model.ckpt", "single_label")
    with pytest.raises(OptionError, match=r"^mosaic is for maps and objects"):
        perf_vit.predict(checkpoint, make_scene(dtype="uint8"), tmp_path / "found.csv", mosaic=True)


def test_a_bare_network_reads_lists_by_the_column_of_paths(make_scene, tmp_path) -> None:
    scene = make_scene(num_bands=5)
    (tmp_path / "list.csv").write_text(f"scene\n{scene}\n")
    report = perf_vit.predict(
        Bands(5), tmp_path / "list.csv", tmp_path / "out", path_column="scene", window_size=32, progress=False
    )
    assert report.count("done") == 1


def test_configs_are_names_paths_and_mappings(tmp_path) -> None:
    from perf_vit.workflows.train import read_run

    files = {f"data.{part}.{key}": Path("x.tif") for part in ("train", "val") for key in ("image", "labels")}
    named = read_run("segmentation/demo", files, tmp_path)
    listed = read_run("configs/segmentation/demo.yaml", [f"{key}={value}" for key, value in files.items()], tmp_path)
    mapped = read_run({"extends": "segmentation/demo", "out": tmp_path, "data": {"tile_px": 64}}, files)
    assert named == listed
    assert named.out == str(tmp_path)
    assert mapped.data.tile_px == 64
    with pytest.raises(ConfigError, match=r"Key 'tile' not in 'data'\. Did you mean"):
        read_run("segmentation/demo", {**files, "data.tile": 3}, tmp_path)
    with pytest.raises(ConfigError, match="task must be one of segmentation"):
        read_run({"task": "poetry"})


def test_a_conversion_tells_what_it_kept(tmp_path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    report = perf_vit.convert(model, tmp_path / "linear", num_clusters=2, max_exact_tokens=0, progress=False)
    assert [row["layer"] for row in report.table] == [0, 1]
    assert "Relative error of attention outputs" in str(report)
    assert report.path.exists()
    assert report.load().conversion.options["num_clusters"] == 2
    with pytest.raises(OutputError, match="already holds a model"):
        perf_vit.convert(model, tmp_path / "linear")
    with pytest.raises(OptionError, match=r"^clusters is no option here; did you mean .num_clusters"):
        perf_vit.convert(model, tmp_path / "other", clusters=2)
    with pytest.raises(OptionError, match=r"^budget learns from images, got none"):
        perf_vit.convert(model, tmp_path / "other", budget=1.5)


def test_a_source_is_read_and_drawn_whole(make_scene) -> None:
    with perf_vit.open(make_scene(height=60, width=200, num_bands=4)) as source:
        assert np.array_equal(source.read().pixels, source.read(source.extent).pixels)
        assert source.plot(50).size == (50, 15)
        assert source.plot(50, bands=[2])._repr_png_()


def test_few_calls_lie_between_the_python_call_and_the_network(make_scene, tmp_path) -> None:
    package, frames = str(Path(perf_vit.__file__).parent), []

    def on_forward(*_) -> None:
        found = [each.name for each in traceback.extract_stack() if each.filename.startswith(package)]
        frames.append(found)

    model = perf_vit.load(save_segmenter(tmp_path / "model.ckpt"))
    model.register_forward_pre_hook(on_forward)
    perf_vit.predict(model, make_scene(dtype="uint8"), tmp_path / "map.tif", progress=False)
    assert frames[0][0] == "predict"
    assert len(frames[0]) <= 6
