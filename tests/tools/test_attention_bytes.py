"""tools/benchmarks/attention_bytes.py: what attention launches and moves, and the table in the documentation."""

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton comes with torch for GPUs")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    folder = str(ROOT / "tools" / "benchmarks")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("attention_bytes")
    finally:
        sys.path.remove(folder)


def test_the_documentation_holds_the_table(tool) -> None:
    assert tool.table() in (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")


def test_triton_moves_less_by_fewer_launches_at_any_size(tool) -> None:
    found = {
        side: {name: tool.traffic(attend, 2, 1 + side * side) for name, attend in tool.attentions(side).items()}
        for side in (64, 128)
    }
    for side, by_name in found.items():
        least = 4 * 2 * (1 + side * side) * 64 * 2
        for kind in ("clusters", "FAVOR+"):
            torch_, triton = by_name[f"{kind}, PyTorch"], by_name[f"{kind}, Triton"]
            assert least < triton.num_bytes < torch_.num_bytes
            assert len(triton.launches) < min(61, len(torch_.launches))
    for name in ("clusters, Triton", "FAVOR+, Triton"):
        assert found[64][name].launches == found[128][name].launches
