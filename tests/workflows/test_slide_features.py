"""Evaluation of slide classifiers and the features that their runs keep."""

import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch
from small_models import save_slide_classifier
from synthetic_slide import make_slide

from perf_vit.errors import DataWarning, InputError
from perf_vit.inference import SlideClassificationPredictOptions, SlideClassificationPredictor
from perf_vit.types import InputOptions
from perf_vit.workflows import slide_classification, train
from perf_vit.workflows.slide_classification import (
    SlideClassificationEvaluateOptions,
    evaluate_slide_classification,
)


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("slides")
    for number, name in enumerate(("large", "small")):
        make_slide(root / f"{name}.svs", 320, 300, mpp=0.5, tile_px=64, tissue_share=0.5, seed=number)
    (root / "labels.csv").write_text("slide,label\nlarge,large\nsmall,small\n")
    return root


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Run folder of a classifier, without features."""
    save_slide_classifier(tmp_path / "run" / "checkpoints" / "best.ckpt")
    (tmp_path / "run" / "embeddings").mkdir()
    return tmp_path / "run"


def evaluate(run: Path, slides: Path, **options):
    given = SlideClassificationEvaluateOptions(device="cpu", **options)
    model = run / "checkpoints" / "best.ckpt"
    return evaluate_slide_classification(model, slides, slides / "labels.csv", given).scores


def features(run: Path) -> set[str]:
    return {path.name for path in (run / "embeddings").glob("*.npz")}


def test_features_of_another_precision_are_others(run, slides) -> None:
    evaluate(run, slides, precision="bf16")
    half = features(run)
    assert len(half) == 2
    evaluate(run, slides)
    assert len(features(run)) == 4
    evaluate(run, slides, precision="bf16")
    assert len(features(run)) == 4


def test_features_of_another_version_of_tissue_detection_are_others(run, slides, monkeypatch) -> None:
    evaluate(run, slides)
    before = features(run)
    monkeypatch.setattr(slide_classification, "TISSUE_VERSION", slide_classification.TISSUE_VERSION + 1)
    evaluate(run, slides)
    assert len(features(run) - before) == len(before) == 2


def test_statistics_are_those_of_slides_with_the_bands_of_most(tmp_path) -> None:
    (tmp_path / "broken.tif").write_text("no image")
    for name, num_bands in (("a", 4), ("b", 2), ("c", 2)):
        profile = {"driver": "GTiff", "height": 500, "width": 400, "count": num_bands, "dtype": "uint16"}
        with rasterio.open(tmp_path / f"{name}.tif", "w", **profile) as file:
            file.write(np.full((num_bands, 500, 400), 7, np.uint16))
    paths = [str(tmp_path / f"{name}.tif") for name in ("broken", "a", "b", "c")]
    first, images = slide_classification._reduced(paths, InputOptions())
    assert Path(first.path).stem == "b"
    assert [image.pixels.shape for image in images] == [(2, 256, 205)] * 2


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_stored_features_are_those_that_the_precision_gives(run, slides, precision) -> None:
    # Those of the other precision are there, too.
    evaluate(run, slides, precision="bf16" if precision == "32" else "32")
    evaluate(run, slides, precision=precision)
    options = SlideClassificationPredictOptions(device="cpu", precision=precision)
    predictor = SlideClassificationPredictor(run / "checkpoints" / "best.ckpt", options)
    slide = str(slides / "large.svs")
    stored = slide_classification._store(predictor, run / "embeddings").read(slide).features
    assert torch.equal(torch.from_numpy(stored), torch.from_numpy(predictor.embed(slide).features))


def test_a_run_folder_that_cant_be_written_is_one_warning(run, slides, monkeypatch) -> None:
    expected = evaluate(run, slides).to_dict()
    shutil.rmtree(run / "embeddings")
    (run / "embeddings").mkdir()
    make = tempfile.TemporaryDirectory

    def refuse(*args, **options):
        # Permissions don't bind root.
        if options.get("dir") == run / "embeddings":
            raise PermissionError(13, "Permission denied")
        return make(*args, **options)

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    with pytest.warns(DataWarning) as warned:
        assert evaluate(run, slides).to_dict() == expected
    said = [str(each.message) for each in warned if "features are not kept" in str(each.message)]
    assert len(said) == 1
    assert "permission denied" in said[0]
    assert not features(run)


def test_a_checkpoint_in_the_root_folder_has_no_stored_features(run, slides, monkeypatch) -> None:
    expected = evaluate(run, slides).to_dict()
    checkpoint, absolute = run / "checkpoints" / "best.ckpt", Path.absolute
    monkeypatch.setattr(Path, "absolute", lambda self: Path("/best.ckpt") if self == checkpoint else absolute(self))
    before = features(run)
    assert evaluate(run, slides).to_dict() == expected
    assert features(run) == before


@pytest.fixture
def two_processes(monkeypatch):
    """A function that makes this process one of two that torchrun started."""

    def start(rank: int) -> None:
        monkeypatch.setattr("torch.distributed.is_torchelastic_launched", lambda: True)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")

    return start


def test_processes_share_the_slides_and_take_from_the_end_of_each_other(two_processes) -> None:
    class Store:
        """Features that another process adds to."""

        def __init__(self) -> None:
            self.stored = {"b"}

        def has(self, path: str) -> bool:
            return path in self.stored

        def write(self, path: str, *_) -> None:
            self.stored.add(path)

    def find(paths):
        seen.append(list(paths))
        for path in paths:
            yield InputError(f"no {path}") if path in "ad" else SimpleNamespace(features=0, windows=0, picture=0)

    for rank, expected in enumerate(([*"ace", *"fd"], [*"df", *"eca"])):
        seen: list[list[str]] = []
        two_processes(rank)
        store = Store()
        assert slide_classification._store_all(find, store, "abcdef") == {"a": "no a", "d": "no d"}
        assert seen == [expected]
        assert store.stored == set("bcef")
    # A process that starts when the other one has stored a slide still begins with its own share.
    store.stored = set("bc")
    slide_classification._store_all(find, store, "abcdef")
    assert seen[-1] == [*"df", *"ea"]


def test_a_slide_that_another_process_has_stored_meanwhile_is_not_embedded(run, slides) -> None:
    options = SlideClassificationPredictOptions(device="cpu")
    predictor = SlideClassificationPredictor(run / "checkpoints" / "best.ckpt", options)
    paths = [str(slides / f"{name}.svs") for name in ("large", "small")]
    for find in (slide_classification._embedded, slide_classification._found):
        large, small = find(predictor, paths, is_stored=lambda path: path == paths[0])
        assert large is None
        assert len(small.windows) > 0


def test_features_are_computed_on_the_device_of_the_trainer(monkeypatch, tmp_path) -> None:
    seen = []

    class StopError(Exception):
        pass

    def prepare(config, data, module, folder) -> None:
        seen.append(module.weight.device.type)
        raise StopError

    parts = {"monitor": "", "curves": None, "draw": None, "prepare_data": prepare}
    task = SimpleNamespace(
        build_data=lambda config: None, build_module=lambda config, data: torch.nn.Linear(1, 1), **parts
    )
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
    config = SimpleNamespace(task="any", seed=0, trainer=SimpleNamespace(sequence_parallel=False))
    folder = SimpleNamespace(config=config, path=tmp_path, check_network=lambda module: None)
    monkeypatch.setattr(train, "TASKS", {"any": task})
    monkeypatch.setattr(train, "RunFolder", lambda config: folder)
    monkeypatch.setattr(train, "build_trainer", lambda *_, **__: trainer)
    with pytest.raises(StopError):
        train.train_run(config)
    assert seen == ["meta"]
