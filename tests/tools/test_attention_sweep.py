"""tools/benchmarks/attention_sweep: it measures what it has verified, and nothing else."""

import csv
import dataclasses
import importlib
import math
import runpy
import time
from pathlib import Path

import pytest
import torch
import typer
from contenders import CHUNKED_FLOOR, FLOOR, OURS, POPULAR, SDPA, Contender, attention_contenders
from memory import peak_extra_bytes
from PIL import Image
from report import COLUMNS, attention_summary
from settings import FORWARD, FORWARD_BACKWARD, PASSES, AttentionBenchmark
from sweep import Measurement, sweep_lengths

import perf_vit.ops
from perf_vit.ops import draw_projection
from perf_vit.workflows.conversion_report import alternating_medians

FOLDER = Path(__file__).parents[2] / "tools" / "benchmarks" / "attention_sweep"

SMALL = ["--length", "64", "--length", "100", "--num-heads", "2", "--head-dim", "16", "--num-features", "32"]


def _benchmark(out, *extra: str) -> int:
    app = typer.Typer()
    app.command()(runpy.run_path(str(FOLDER / "__main__.py"), run_name="attention_sweep")["main"])
    with pytest.raises(SystemExit) as exit_:
        app(["--out", str(out), *SMALL, "--runs", "2", "--threads", "1", *extra])
    return exit_.value.code


def _rows(out) -> list[dict[str, str]]:
    with (out / "attention.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def without_popular(monkeypatch):
    real = importlib.import_module

    def import_module(name: str):
        if name == "performer_pytorch":
            raise ModuleNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", import_module)


def test_table_and_picture_are_written(tmp_path, capsys, without_popular) -> None:
    assert _benchmark(tmp_path / "out") == 0
    rows = _rows(tmp_path / "out")
    assert tuple(rows[0]) == COLUMNS
    places = {(r["contender"], r["pass"], r["length"]) for r in rows}
    expected = {(c, p, n) for c in (OURS, SDPA, FLOOR) for p in PASSES for n in ("64", "100")}
    assert places == expected | {(CHUNKED_FLOOR, FORWARD, n) for n in ("64", "100")}
    assert len(rows) == len(places)
    assert all(float(r["milliseconds"]) > 0 and float(r["peak_mib"]) >= 0 for r in rows)
    with Image.open(tmp_path / "out" / "attention.png") as picture:
        assert min(picture.size) > 400
    assert "/ floor" in capsys.readouterr().out


def test_ratios_are_against_the_baseline_of_the_same_length(tmp_path, without_popular) -> None:
    _benchmark(tmp_path)
    rows = _rows(tmp_path)
    times = {(r["contender"], r["pass"], r["length"]): float(r["milliseconds"]) for r in rows}
    for r in rows:
        floor = times[FLOOR, r["pass"], r["length"]]
        assert float(r["x_floor"]) == pytest.approx(float(r["milliseconds"]) / floor, rel=0.02)
        assert r["x_performer_pytorch"] == ""


def test_the_summary_finds_the_crossover_and_the_growth_per_token() -> None:
    rows = [Measurement(OURS, FORWARD, n, seconds=n * 1.0) for n in (256, 1024, 4096)]
    rows += [Measurement(OURS, FORWARD, 16384, seconds=16384 * 1.25)]
    # Softmax: L^2 / 512 seconds, ours L: equal at 512, on any axes.
    rows += [Measurement(SDPA, FORWARD, n, seconds=n * n / 512) for n in (256, 1024)]
    rows += [Measurement(SDPA, FORWARD, n) for n in (4096, 16384)]
    assert attention_summary(rows) == [
        "forward: as fast as torch SDPA from L = 512 on",
        "forward: time per token at L = 16,384 is 1.25 of that at 4,096",
    ]
    assert attention_summary([Measurement(OURS, FORWARD_BACKWARD, 4096, seconds=1.0)]) == []


def test_a_wrong_attention_is_refused(tmp_path, capsys, monkeypatch) -> None:
    right = perf_vit.ops.favor_attention
    monkeypatch.setattr(perf_vit.ops, "favor_attention", lambda *args, **kwargs: right(*args, **kwargs) * 1.001)
    assert _benchmark(tmp_path / "out") == 2
    assert "no speed is reported" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_chunks_that_disagree_are_refused(tmp_path, capsys, monkeypatch) -> None:
    right = perf_vit.ops.favor_attention

    def forgets_the_first_chunk(q, k, v, projection, chunk_size=2048):
        start = chunk_size if k.shape[2] > 900 > chunk_size else 0
        return right(q, k[:, :, start:], v[:, :, start:], projection)

    monkeypatch.setattr(perf_vit.ops, "favor_attention", forgets_the_first_chunk)
    assert _benchmark(tmp_path / "out") == 2
    assert "L = 1000" in capsys.readouterr().err


def test_popular_performer_absent_says_how_to_install_it(tmp_path, capsys, without_popular) -> None:
    assert _benchmark(tmp_path) == 0
    assert f"pip install {POPULAR}" in capsys.readouterr().err


def test_popular_performer_present_is_measured(tmp_path) -> None:
    pytest.importorskip("performer_pytorch")
    assert _benchmark(tmp_path) == 0
    assert POPULAR in {r["contender"] for r in _rows(tmp_path)}


def test_bad_options_are_refused(tmp_path, capsys) -> None:
    for extra in (["--dtype", "int8"], ["--device", "nonsense"], ["--num-heads", "0"]):
        assert _benchmark(tmp_path / "out", *extra) == 2
        assert capsys.readouterr().err.startswith("Error: ")
    assert not (tmp_path / "out").exists()


def test_a_contender_is_left_out_once_it_would_exceed_the_cap() -> None:
    settings = AttentionBenchmark(lengths=(64, 128, 6400), max_seconds=0.2, num_runs=1, num_heads=1, head_dim=8)

    def sleep(q, k, v):
        time.sleep(0.02)
        return q + k + v

    sleepy = Contender("sleepy", sleep)
    rows = [row for row in sweep_lengths(settings, [sleepy]) if row.direction == FORWARD]
    assert [math.isnan(row.seconds) for row in rows] == [False, False, True]


def test_peak_memory_counts_what_is_neither_input_nor_output() -> None:
    x = torch.ones(1 << 18)
    assert peak_extra_bytes(lambda: (x + 1,), "cpu") < 64
    assert peak_extra_bytes(lambda: (((x + 1) + (x + 2)).sum(),), "cpu") == pytest.approx(3 * 4 * (1 << 18), abs=64)


def test_contenders_take_turns() -> None:
    turns: list[str] = []
    calls = {name: lambda name=name: (turns.append(name), ())[1] for name in "ab"}
    alternating_medians(calls, num_runs=2, device="cpu")
    assert "".join(turns) == "ababab"


def test_existing_files_are_kept_without_overwrite(tmp_path, capsys, without_popular) -> None:
    (tmp_path / "attention.csv").write_text("mine")
    assert _benchmark(tmp_path) == 2
    assert "attention.csv" in capsys.readouterr().err
    assert (tmp_path / "attention.csv").read_text() == "mine"
    assert _benchmark(tmp_path, "--overwrite") == 0
    assert _rows(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("direction", "mebibytes"), [(FORWARD, 40), (FORWARD_BACKWARD, 80)])
def test_65536_tokens_need_little_above_inputs_outputs_and_gradients(direction: str, mebibytes: int) -> None:
    settings = AttentionBenchmark(lengths=(65_536,), num_runs=1, max_seconds=60)
    projection = draw_projection(256, 64, generator=torch.Generator().manual_seed(0))
    ours = attention_contenders(settings, projection)[0]
    rows = sweep_lengths(settings, [dataclasses.replace(ours, passes=(direction,))])
    assert [row.contender for row in rows] == [OURS]
    assert 0 < rows[0].peak_bytes < mebibytes * 2**20
