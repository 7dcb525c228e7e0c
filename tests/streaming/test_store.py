"""Tokens in memory or in a file."""

import os
from pathlib import Path

import pytest
import torch

from perf_vit.errors import OptionError, OutputError
from perf_vit.streaming import TokenStore


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_file", [False, True])
def test_tokens_come_back(tmp_path: Path, dtype: torch.dtype, has_file: bool) -> None:
    store = TokenStore(10, 3, dtype, torch.float64, tmp_path / "tokens.bin" if has_file else None)
    values = torch.arange(30.0, dtype=torch.float64).view(10, 3) / 4
    store.write(slice(0, 6), values[:6])
    store.write(slice(6, 10), values[6:])
    assert torch.equal(store.read(slice(2, 9)), values[2:9])
    assert torch.equal(store.read(torch.tensor([9, 0])), values[[9, 0]])
    assert store.num_bytes == 30 * dtype.itemsize
    found = store.read(slice(0, 1))
    found += 1
    assert torch.equal(store.read(slice(0, 1)), values[:1])
    store.shrink(4)
    assert len(store) == 4
    assert store.num_bytes == 12 * dtype.itemsize
    store.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_file_takes_room_for_what_was_written(tmp_path: Path) -> None:
    """Tokens without a valid pixel, which may be most of a slide, take none."""
    store = TokenStore(10**7, 64, path=tmp_path / "tokens.bin")
    store.write(slice(0, 1000), torch.ones(1000, 64))
    status = (tmp_path / "tokens.bin").stat()
    assert status.st_size == 10**7 * 64 * 4
    assert 1000 * 64 * 4 <= status.st_blocks * 512 < 10**6


def test_a_disk_that_fills_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TokenStore(100, 4, path=tmp_path / "tokens.bin")
    store.write(slice(0, 10), torch.ones(10, 4))
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("perf_vit.streaming.store.shutil.disk_usage", lambda path: free)
    with pytest.raises(OutputError, match=r"can't write tokens to .*: no space left on device; choose a folder"):
        store.write(slice(10, 20), torch.ones(10, 4))
    # What has its room already can be written again.
    store.write(slice(0, 10), torch.zeros(10, 4))
    assert store.read(slice(0, 10)).sum() == 0


def test_a_file_that_exists_is_kept(tmp_path: Path) -> None:
    (tmp_path / "tokens.bin").write_text("mine")
    with pytest.raises(OptionError, match=r"must be a file that doesn't exist yet"):
        TokenStore(10, 3, path=tmp_path / "tokens.bin")
    assert (tmp_path / "tokens.bin").read_text() == "mine"


def test_systems_without_fallocate_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    store = TokenStore(10, 3, path=tmp_path / "tokens.bin")
    store.write(slice(0, 10), torch.ones(10, 3))
    assert store.read(slice(0, 10)).sum() == 30


def test_too_little_memory_is_one_line() -> None:
    with pytest.raises(OutputError, match=r"can't hold .* GB of tokens in memory; give a folder for a file"):
        TokenStore(2**50, 1024)
