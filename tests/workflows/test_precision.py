"""`precision=auto`: what it stands for, and that what was begun in one precision goes on in it."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import save_classifier

import perf_vit
from perf_vit.config import load_config
from perf_vit.distributed import fast_dtype, training_precision
from perf_vit.errors import OptionError, OutputError
from perf_vit.inference import ClassificationPredictor
from perf_vit.inference.options import ClassificationPredictOptions, PredictOptions
from perf_vit.tasks import TrainerConfig
from perf_vit.tasks.distillation import DistillationTrainerConfig
from perf_vit.workflows.run_config import ClassificationRun
from perf_vit.workflows.task import EvaluateOptions


@pytest.fixture
def machine(monkeypatch):
    """Choose whether this machine's CPU has instructions for bfloat16, and what its GPU has; None for no GPU."""

    def choose(*, cpu: bool = False, gpu: str | None = None) -> None:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: cpu, raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
        has = {"native": (True, True), "emulated": (False, True), None: (False, False)}[gpu]
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has[including_emulation])
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    return choose


@pytest.mark.parametrize(
    ("cpu", "gpu", "device", "expected"),
    [
        (True, None, "cpu", torch.bfloat16),
        (False, None, "cpu", torch.float32),
        (False, "native", "cuda", torch.bfloat16),
        (False, "native", "cuda:0", torch.bfloat16),
        (True, "emulated", "cuda", torch.float32),
        (True, None, "cuda", torch.float32),
        (False, "native", "cpu", torch.float32),
        (True, "native", "mps", torch.float32),
    ],
)
def test_bfloat16_is_chosen_where_the_device_has_instructions_for_it(machine, cpu, gpu, device, expected) -> None:
    machine(cpu=cpu, gpu=gpu)
    assert fast_dtype(device) == expected


@pytest.mark.parametrize(
    ("cpu", "gpu", "accelerator", "expected"),
    [
        (True, None, "auto", "bf16-mixed"),
        (False, None, "auto", "32-true"),
        (False, "native", "auto", "bf16-mixed"),
        (True, "emulated", "auto", "32-true"),
        (False, "native", "gpu", "bf16-mixed"),
        (False, "native", "cpu", "32-true"),
        (True, "native", "mps", "32-true"),
    ],
)
def test_training_chooses_by_its_accelerator(machine, cpu, gpu, accelerator, expected) -> None:
    machine(cpu=cpu, gpu=gpu)
    assert training_precision("auto", accelerator) == expected
    assert training_precision("64-true", accelerator) == "64-true"


def test_without_auto_the_precision_is_float32_everywhere(machine) -> None:
    machine(cpu=True, gpu="native")
    assert PredictOptions().precision == EvaluateOptions().precision == "32"
    assert TrainerConfig().precision == DistillationTrainerConfig().precision == "32-true"


def test_options_hold_what_auto_stands_for_on_the_machine_that_makes_them(machine) -> None:
    machine(cpu=True)
    options = EvaluateOptions(precision="auto", device="cpu").for_prediction(ClassificationPredictOptions)
    sent = pickle.dumps(options)
    machine(cpu=False)
    for each in (pickle.loads(sent), replace(options, batch_size=2)):
        assert (each.precision, each.dtype, each.to_dict()["precision"]) == ("bf16", torch.bfloat16, "bf16")
    assert ClassificationPredictOptions(precision="auto", device="cpu").precision == "32"
    with pytest.raises(OptionError, match="device nonsense"):
        PredictOptions(precision="auto", device="nonsense")


def write_images(folder, number: int) -> list[str]:
    for index in range(number):
        path = folder / ("dark", "light")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 100, (40, 40, 3)) + 100 * (index % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return sorted(str(path) for path in folder.rglob("*.png"))


def test_a_prediction_begun_in_one_precision_is_not_gone_on_with_in_another(machine, tmp_path) -> None:
    checkpoint = save_classifier(tmp_path / "run" / "checkpoints" / "best.ckpt", "single_label")
    paths, out = write_images(tmp_path / "images", 4), tmp_path / "found.csv"

    def predictor() -> ClassificationPredictor:
        return ClassificationPredictor(checkpoint, ClassificationPredictOptions(precision="auto", device="cpu"))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    machine(cpu=True)
    with pytest.raises(KeyboardInterrupt):
        predictor().run(paths, out, on_progress=stop)
    machine(cpu=False)
    with pytest.raises(OutputError, match="precision"):
        predictor().run(paths, out)
    machine(cpu=True)
    assert predictor().run(paths, out).num_rows == 4


def test_a_resumed_run_keeps_the_precision_that_it_began_in(machine, tmp_path) -> None:
    write_images(tmp_path / "images", 12)
    backbone = {"depth": 1, "embed_dim": 64, "num_heads": 2, "attn_kwargs": {"num_features": 16}}
    config = {
        "task": "classification",
        "data": {"train": {"image": str(tmp_path / "images")}, "tile_px": 32, "batch_size": 4, "val_share": 0.25},
        "model": {"backbone": "performer_vit_tiny_patch16_224", "backbone_kwargs": backbone, "pool": "avg"},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "precision": "auto", "num_pictures": 0, "report": False},
    }
    out = tmp_path / "run"

    def precisions() -> tuple[str, str]:
        content = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
        kept = content["perf_vit_run"]["config"]["trainer"]["precision"]
        return load_config(out / "config.yaml", ClassificationRun).trainer.precision, kept

    machine(cpu=True)
    perf_vit.train(config, out=out, progress=False)
    assert precisions() == ("bf16-mixed", "bf16-mixed")
    machine(cpu=False)
    more = {"resume": True, "trainer.max_epochs": 2}
    perf_vit.train(config, more, out=out, progress=False)
    assert precisions() == ("bf16-mixed", "bf16-mixed")
    # Another one may be asked for.
    perf_vit.train(config, {**more, "trainer.max_epochs": 3, "trainer.precision": "32-true"}, out=out, progress=False)
    assert precisions() == ("32-true", "32-true")
