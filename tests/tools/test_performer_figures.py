"""tools/benchmarks/performer_figures: closed forms agree with draws, figures are drawn from what was measured."""

import importlib
import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from perf_vit.ops import draw_projection

FOLDER = Path(__file__).parents[2] / "tools" / "benchmarks" / "performer_figures"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def _is_picture(path: Path) -> bool:
    with Image.open(path) as image:
        colors = image.convert("RGB").getcolors(maxcolors=2**24)
        return min(image.size) > 300 and len(colors) > 5


def test_measured_errors_of_the_kernel_follow_the_closed_forms(tool) -> None:
    kernel_mse = tool("kernel_mse")
    lengths = torch.tensor([0.3, 0.6], dtype=torch.float64)[:, None]
    x, y = kernel_mse.pairs(lengths, torch.tensor([0.7, 1.6, 2.8], dtype=torch.float64))
    measured = kernel_mse.measured_mse(x, y, 16, 3000, torch.Generator().manual_seed(0))
    closed = kernel_mse.closed_form_mse(x, y, 16)
    for kernel, mse in closed.items():
        torch.testing.assert_close(measured[kernel], mse, rtol=0.25, atol=0)


def test_expected_error_of_a_measured_mse_is_that_of_repetitions(tool) -> None:
    kernel_mse = tool("kernel_mse")
    x, y = kernel_mse.pairs(torch.tensor([0.5] * 40, dtype=torch.float64), torch.tensor([1.2], dtype=torch.float64))
    z2 = (x + y).square().sum(-1)[0]
    rows = (torch.randn(400, 200, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * z2.sqrt()).exp()
    mse = (rows.mean(dim=-1) - (z2 / 2).exp()).square().mean(dim=-1)
    expected = float(kernel_mse.relative_error(z2, 8, 200))
    assert float(mse.std() / mse.mean()) == pytest.approx(expected, rel=0.3)


def test_positive_features_win_beyond_the_crossing_angle(tool) -> None:
    kernel_mse = tool("kernel_mse")
    for length in (0.25, 1.0, 2.0):
        angle = kernel_mse.crossing_angle(length, trig_rows=1.0)
        x, y = kernel_mse.pairs(torch.tensor(length, dtype=torch.float64), torch.tensor([angle - 0.02, angle + 0.02]))
        mse = kernel_mse.closed_form_mse(x, y, 1)
        assert (mse["softmax-trig"] > mse["softmax+"]).tolist() == [False, True]
        assert kernel_mse.crossing_angle(length, trig_rows=0.5) < angle


@pytest.mark.slow
def test_error_of_attention_falls_with_features_and_is_drawn(tool, tmp_path, monkeypatch) -> None:
    attention_error = tool("attention_error")
    case = attention_error.Case(64, 8, 0.3)
    errors = attention_error.measure(case, (8, 256), 6, torch.Generator().manual_seed(0))
    for name in attention_error.ESTIMATORS:
        for words in attention_error.DIRECTIONS:
            assert errors[name, words, 256].median() < errors[name, words, 8].median() / 4
    monkeypatch.setattr(attention_error, "CASES", (case,) * 6)
    monkeypatch.setattr(attention_error, "NUM_FEATURES", (16, 64, 256, 1024))
    monkeypatch.setattr(attention_error, "NUM_DRAWS", 2)
    rows = attention_error.make(tmp_path, seed=0)
    assert _is_picture(tmp_path / "attention_error.png")
    assert all(row.low <= row.value <= row.high for row in rows if row.quantity == "median")


def test_share_of_eps_is_its_part_of_the_features(tool) -> None:
    eps_collapse = tool("eps_collapse")

    def softmax_kernel(data, *, projection_matrix, is_query, eps):
        return torch.full((1, 1, 10, eps_collapse.NUM_FEATURES), eps_collapse.NUM_FEATURES**-0.5 * (0.03 + eps))

    peer = SimpleNamespace(softmax_kernel=softmax_kernel, linear_attention=lambda q, k, v: v)
    q = torch.zeros(1, 1, 10, 4)
    _, share = eps_collapse._with_eps(peer, q, q, q, torch.zeros(1, 4), eps=0.01)
    assert float(share) == pytest.approx(0.25)


def test_eps_figure_is_left_out_without_the_peer(tool, tmp_path, monkeypatch, capsys) -> None:
    eps_collapse = tool("eps_collapse")
    monkeypatch.setattr(eps_collapse, "popular_performer", lambda: None)
    assert eps_collapse.make(tmp_path, seed=0) == []
    assert not list(tmp_path.iterdir())
    assert "eps_collapse is left out" in capsys.readouterr().out


def test_eps_figure_is_drawn_with_the_peer(tool, tmp_path, monkeypatch) -> None:
    pytest.importorskip("performer_pytorch")
    eps_collapse = tool("eps_collapse")
    monkeypatch.setattr(eps_collapse, "LENGTHS", (64, 128))
    monkeypatch.setattr(eps_collapse, "NUM_DRAWS", 2)
    rows = eps_collapse.make(tmp_path, seed=0)
    shares = {row.setting: row.value for row in rows if row.quantity == eps_collapse.SHARE}
    assert shares["D = 64, std 1, L = 128, eps 1e-4"] > 0.5 > shares["D = 16, std 0.5, L = 128, eps 1e-6"]
    assert _is_picture(tmp_path / "eps_collapse.png")


def test_rows_without_sign_correction_are_found_to_be_biased(tool) -> None:
    qr_bias = tool("qr_bias")
    generator = torch.Generator().manual_seed(0)

    def uncorrected():
        q = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q.T
        return q * torch.randn(64, 64, generator=generator).norm(dim=1, keepdim=True)

    biased, error = qr_bias.measure(uncorrected, 300, generator)
    ours, our_error = qr_bias.measure(lambda: draw_projection(64, 64, generator=generator), 300, generator)
    place = qr_bias.STEPS.index(-1.0)
    assert biased[place] > math.exp(0.5) + 5 * error[place]
    assert abs(ours[place] - math.exp(0.5)) < 4 * our_error[place]


def test_drawing_one_figure_keeps_the_numbers_of_the_others(tool, tmp_path, monkeypatch) -> None:
    style, qr_bias = tool("figure_style"), tool("qr_bias")
    spec = importlib.util.spec_from_file_location("figures_main", FOLDER / "__main__.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    earlier = [style.Row("kernel_mse", "kept", "x", 1.5), style.Row("qr_bias", "old", "x", 1)]
    style.write_rows(earlier, tmp_path / "figures.csv")
    monkeypatch.setattr(qr_bias, "NUM_DRAWS", 3)
    script.main(out=tmp_path, figure=["qr_bias"])
    rows = style.read_rows(tmp_path / "figures.csv")
    assert (rows[0].setting, rows[0].value) == ("kept", 1.5)
    assert "old" not in {row.setting for row in rows}
    assert _is_picture(tmp_path / "qr_bias.png")
