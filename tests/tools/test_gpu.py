"""tools/benchmarks/gpu.py: what is verified is timed, within a budget, and lack of memory is a result."""

import dataclasses
import importlib
import json
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image

import perf_vit.ops
from perf_vit.layers import MIXERS

FOLDER = Path(__file__).parents[2] / "tools" / "benchmarks"
QUICK = ["--device", "cpu", "--quick", "--dtype", "fp32"]
FILES = ["gpu.json", "gpu.md", "gpu.png"]


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("gpu")
    finally:
        sys.path.remove(str(FOLDER))


def call(tool, out: Path, *arguments: str) -> int:
    app = typer.Typer()
    app.command()(tool.main)
    with pytest.raises(SystemExit) as exit_:
        app(["--out", str(out), *arguments])
    return exit_.value.code


@pytest.fixture
def settings(tool):
    return tool.Settings(device="cpu", dtype="fp32", budget_s=1000.0, **tool.QUICK)


def run(tool, settings) -> list:
    return tool.measure(settings, time.perf_counter(), lambda cells: None)


def fake_times(tool, monkeypatch, lacking=lambda cell: False, broken=lambda cell: False) -> list:
    """Cells take the seconds of a model of them, without being run; returns those that were begun."""
    begun = []

    def measure(settings, cell, folder) -> None:
        begun.append((cell.kind, cell.model, cell.mixer, cell.length, cell.checkpointed))
        if lacking(cell):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if broken(cell):
            raise RuntimeError("CUDA error: invalid configuration argument\nmore lines")
        power = 2 if cell.mixer == "softmax" else 1
        cell.seconds = 1e-3 * cell.length**power * cell.batch * (3 if cell.kind == tool.TRAINING else 1)
        cell.images_per_s = cell.batch / cell.seconds

    monkeypatch.setattr(tool, "_measure_cell", measure)
    return begun


@pytest.mark.slow
def test_a_quick_run_on_a_processor_measures_every_cell(tool, tmp_path, capsys) -> None:
    assert call(tool, tmp_path / "out", *QUICK) == 0
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    cells = found["cells"]
    places = {(cell["kind"], cell["model"], cell["mixer"], cell["length"]) for cell in cells}
    models, lengths = tool.QUICK["models"], tool.QUICK["lengths"]
    expected = {(k, m, x, n) for k in ("forward", "training") for m in models for x in MIXERS for n in lengths}
    assert places == expected | {("map", models[0], x, 256) for x in MIXERS}
    assert len(cells) == len(places)
    assert all(cell["status"] == "measured" and cell["seconds"] > 0 and cell["images_per_s"] > 0 for cell in cells)
    assert found["checks"]["float64"] < 1e-9
    assert found["checks"]["repeats_gradients"]
    assert found["checks"]["waits_for_device"] is None
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert text.count("\n| vit_tiny") == 3 * len(MIXERS) * 2 + len(MIXERS)
    assert "| softmax / ours |" in text
    assert "clustered" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "gpu.png") as picture:
        assert min(picture.size) > 400


def test_results_are_kept_without_overwrite(tool, tmp_path, capsys) -> None:
    for name in FILES:
        (tmp_path / name).write_text("mine")
        assert call(tool, tmp_path, *QUICK) == 2
        assert capsys.readouterr().err.startswith("Error: ")
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(tool, tmp_path, capsys) -> None:
    assert call(tool, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("Error: --device cuda needs a GPU that torch finds")
    assert "--device cpu --quick" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "must be one of bf16, fp16, fp32, got int8"),
        (["--budget-s", "0"], "--budget-s must be above 0"),
        (["--device", "nonsense"], "--device nonsense needs a GPU"),
    ],
)
def test_bad_options_are_one_line(tool, tmp_path, capsys, arguments: list[str], message: str) -> None:
    assert call(tool, tmp_path / "out", *QUICK, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["clustered_attention", "favor_attention"])
def test_wrong_attention_is_not_timed(tool, tmp_path, capsys, monkeypatch, name: str) -> None:
    right = getattr(perf_vit.ops, name)
    monkeypatch.setattr(perf_vit.ops, name, lambda *args, **kwargs: right(*args, **kwargs) * 1.001)
    assert call(tool, tmp_path / "out", *QUICK) == 2
    captured = capsys.readouterr()
    assert "so nothing is timed" in captured.err
    assert not captured.out
    assert not (tmp_path / "out").exists()


def test_a_gradient_that_is_wrong_is_found(tool, monkeypatch) -> None:
    right = perf_vit.ops.favor_attention

    def without_gradient_of_keys(q, k, v, *args, **kwargs):
        return right(q, k.detach(), v, *args, **kwargs) + 0 * k.sum()

    monkeypatch.setattr(perf_vit.ops, "favor_attention", without_gradient_of_keys)
    with pytest.raises(perf_vit.errors.PerfVitError, match="dk of performer"):
        importlib.import_module("gpu_verify").verify("cpu", torch.float32)


def test_the_most_telling_cells_come_first(tool) -> None:
    cells = tool.cells_of(tool.Settings())
    places = [(cell.kind, cell.model.split("_")[1], cell.length) for cell in cells if cell.mixer == "softmax"]
    assert places[:4] == [("forward", "small", n) for n in (4096, 16384, 65536)] + [("training", "small", 4096)]
    assert places[6] == ("map", "small", 4096)
    assert {length for _, _, length in places[-8:]} == {1024, 262144}
    assert len(places) == 2 * 2 * 5 + 1
    assert {cell.mixer for cell in cells} == set(MIXERS)
    assert {cell.length: cell.batch for cell in cells} == {1024: 16, 4096: 4, 16384: 1, 65536: 1, 262144: 1}


def test_a_cell_that_would_exceed_the_budget_is_left_out(tool, settings, monkeypatch) -> None:
    object.__setattr__(settings, "budget_s", 100.0)
    begun = fake_times(tool, monkeypatch)
    cells = run(tool, settings)
    skipped = [cell for cell in cells if cell.status == "skipped"]
    reasons = {(c.kind, c.model, c.mixer, c.length): c.reason for c in skipped}
    # 65.5 s a call by that of 100 patches, 10 s, and at least two calls.
    assert reasons["forward", settings.models[0], "softmax", 256].startswith("predicted 131 s, ")
    assert reasons["forward", settings.models[1], "softmax", 100].startswith("predicted 240 s, ")
    assert {cell.status for cell in cells if cell.mixer == "performer" and cell.kind == "forward"} == {"measured"}
    assert all((cell.kind, cell.model, cell.mixer, cell.length, cell.checkpointed) not in begun for cell in skipped)


def test_seconds_are_predicted_from_the_nearest_cell(tool, settings) -> None:
    small, large = settings.models

    def cell(kind: str, mixer: str, length: int, model: str = small, seconds: float | None = None, batch: int = 1):
        return tool.Cell(kind=kind, model=model, mixer=mixer, length=length, batch=batch, seconds=seconds)

    past = [cell("forward", "softmax", 100, seconds=1.0), cell("forward", "performer", 100, seconds=2.0, batch=2)]
    for wanted, seconds in (
        (cell("forward", "softmax", 400), 16.0),
        (cell("forward", "performer", 400), 4.0),
        (cell("training", "softmax", 100), 4.0),
        (cell("forward", "softmax", 100, large), 12.0),
        (cell("forward", "softmax", 50), 0.5),
        (cell("forward", "clustered", 100), 0.0),
        (cell("map", "softmax", 100), 0.0),
    ):
        assert tool.predicted_seconds(settings, wanted, past) == pytest.approx(seconds)


def test_lack_of_memory_is_a_result_and_the_next_cells_run(tool, settings, monkeypatch) -> None:
    def lacking(cell) -> bool:
        return cell.mixer == "softmax" and cell.length >= (256 if cell.checkpointed or cell.kind == "forward" else 100)

    begun = fake_times(tool, monkeypatch, lacking)
    cells = {(c.kind, c.model, c.mixer, c.length): c for c in run(tool, settings) if c.model == settings.models[0]}
    model = settings.models[0]
    assert cells["forward", model, "softmax", 256].status == "out of memory"
    training = cells["training", model, "softmax", 100]
    assert (training.status, training.checkpointed) == ("measured", True)
    assert [x[-1] for x in begun if x[:4] == ("training", model, "softmax", 100)] == [False, True]
    # A larger step begins with checkpoints.
    assert [x[-1] for x in begun if x[:4] == ("training", model, "softmax", 256)] == [True]
    assert cells["training", model, "softmax", 256].status == "out of memory"
    assert all(cell.status == "measured" for (_, _, mixer, _), cell in cells.items() if mixer != "softmax")


def test_larger_cells_than_one_without_memory_are_not_tried(tool, settings, monkeypatch) -> None:
    object.__setattr__(settings, "lengths", (64, 100, 144, 256))
    fake_times(tool, monkeypatch, lambda cell: cell.mixer == "performer" and cell.length >= 100)
    reasons = {c.length: c.reason for c in run(tool, settings) if (c.kind, c.mixer) == ("forward", "performer")}
    assert reasons[144] == reasons[256] == "out of memory at 100 patches"


def test_a_kernel_that_fails_is_reported_and_the_exit_code_says_so(tool, tmp_path, capsys, monkeypatch) -> None:
    begun = fake_times(tool, monkeypatch, broken=lambda cell: cell.mixer == "clustered" and cell.kind == "training")
    assert call(tool, tmp_path, *QUICK) == 1
    assert "Error: 6 cells failed, first clustered, training: CUDA error: invalid configuration argument\n" in (
        capsys.readouterr().err
    )
    assert "failed: CUDA error: invalid configuration argument" in (tmp_path / "gpu.md").read_text()
    assert len(begun) == 3 * 2 * 2 * len(MIXERS) + len(MIXERS)


def test_a_step_that_needs_more_than_the_memory_is_checkpointed_from_the_start(tool, settings, monkeypatch) -> None:
    class Properties:
        total_memory = 10 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    model = settings.models[0]
    past = [tool.Cell(kind="training", model=model, mixer="performer", length=100, peak_gib=3.0)]
    for length, needed in ((200, False), (400, True)):
        cell = tool.Cell(kind="training", model=model, mixer="performer", length=length)
        assert tool._needs_checkpoints(settings, cell, past) == needed


def test_a_backend_that_is_not_verified_is_not_timed(tool, settings, monkeypatch) -> None:
    settings.backends.update({"triton": "", "flex": "not verified: dq differs"})
    begun = fake_times(tool, monkeypatch)
    cells = run(tool, settings)
    by_backend = {name: [cell for cell in cells if cell.backend == name] for name in ("torch", "triton", "flex")}
    assert {(cell.kind, cell.mixer) for cell in by_backend["triton"]} == {
        (kind, mixer) for kind in ("forward", "map") for mixer in ("clustered", "performer")
    }
    assert all(cell.status == "measured" for cell in by_backend["triton"])
    assert {(cell.kind, cell.mixer) for cell in by_backend["flex"]} == {("training", "clustered")}
    assert {(cell.status, cell.reason, cell.seconds) for cell in by_backend["flex"]} == {
        ("skipped", "not verified: dq differs", None)
    }
    assert len(begun) == len(by_backend["torch"]) + len(by_backend["triton"])
    figures = {"float64": 1e-12, "triton": 2e-6, "repeats_gradients": True, "waits_for_device": None}
    about = {"machine": "m", "torch": "t", "cuda": "c", "dtype": "bf16", "command": "x", "checks": figures}
    text = importlib.import_module("gpu_report").table(about, cells)
    assert "| clustered, triton |" in text
    assert "2.0e-06 (triton)" in text


def test_a_backend_is_compared_with_the_references(tool, monkeypatch) -> None:
    verify = importlib.import_module("gpu_verify")
    limits = verify.LIMITS["triton"]
    module = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "kernels_for_a_test", module)
    functions = {"FAVOR+ (relu)": ("kernels_for_a_test", "attend")}
    monkeypatch.setitem(verify.LIMITS, "triton", dataclasses.replace(limits, functions=functions, devices=("cpu",)))

    def attend(q, k, v, feature_map, key_mask):
        with perf_vit.ops.attention_backend("torch"):
            return factor * perf_vit.ops.favor_attention(q, k, v, feature_map.projection, "relu", key_mask)

    module.attend, factor = attend, 1.0
    assert verify.verify_backend("triton", "cpu", torch.float32) < 1e-5
    factor = 1.001
    with pytest.raises(perf_vit.errors.PerfVitError, match=r"output of performer, relu by triton in torch.float32"):
        verify.verify_backend("triton", "cpu", torch.float32)
    settings = tool.Settings(device="cpu", dtype="fp32")
    assert tool.check_backends(settings, {})["triton"].startswith("not verified: attention disagrees")


def test_a_backend_that_does_not_run_here_is_not_verified(tool) -> None:
    settings = tool.Settings(device="meta", dtype="fp32")
    reasons = tool.check_backends(settings, {})
    assert reasons["flex"].startswith("not verified: the attention backend flex needs a device of type cuda")
