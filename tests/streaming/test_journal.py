"""A forward pass that was killed goes on after its last finished block, to the same bits."""

import gc
import json
import os
import weakref
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from streamed_models import Image, build_for, holes, streamed
from torch import Tensor

from perf_vit.errors import OutputError
from perf_vit.streaming import StreamedTokens
from perf_vit.streaming.journal import JOURNAL, TokenJournal
from perf_vit.streaming.store import TokenStore

SIZE = 101, 150


class KilledError(Exception):
    pass


def run(name: str, folder: Path | None, *, kill_at: int | None = None, **options) -> list[StreamedTokens]:
    """Tokens after blocks 0 and 2, and the last ones; the process may end after some rows of tokens."""
    model, _ = build_for(name, *SIZE)

    def on_progress(done: int, total: int) -> None:
        if kill_at is not None and done >= kill_at:
            raise KilledError

    journal = None if folder is None else TokenJournal(folder, {"model": name})
    last, kept = streamed(
        model, Image(*SIZE, holes(*SIZE)), indices=(0, 2), margin=1, part_tokens=12, journal=journal,
        on_progress=on_progress, **options,
    )  # fmt: skip
    return [*kept, last]


def values(found: StreamedTokens) -> Tensor:
    return torch.cat([found.prefix, found.store.read(slice(0, found.layout.num_stored))])


@pytest.mark.parametrize("name", ["performer", "clustered without sinks"])
def test_a_pass_that_is_killed_anywhere_goes_on(tmp_path: Path, name: str) -> None:
    expected = [values(each) for each in run(name, None)]
    rows, num_passes = (13, 7) if "clustered" in name else (7, 5)
    for number, kill_at in enumerate([1, rows + 3, *range(2 * rows + 2, num_passes * rows, 2 * rows + 3)]):
        folder = tmp_path / str(number)
        with pytest.raises(KilledError):
            run(name, folder, kill_at=kill_at)
        done = json.loads((folder / JOURNAL).read_text())["num_done"] if (folder / JOURNAL).exists() else None
        assert (done is None) == (kill_at < rows)
        found = run(name, folder)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(values(ours), theirs)
    assert done in (1, 2)
    # All that is left are the tokens that were asked for.
    assert sorted(path.name for path in folder.glob("*.bin")) == ["block_0.bin", "block_2.bin"]


def test_a_finished_pass_is_not_computed_again(tmp_path: Path) -> None:
    expected = [values(each) for each in run("performer", tmp_path / "tokens")]
    (tmp_path / "tokens" / "old.bin").write_bytes(b"of a block before")
    # No part is computed.
    found = run("performer", tmp_path / "tokens", kill_at=0)
    assert all(torch.equal(values(ours), theirs) for ours, theirs in zip(found, expected, strict=True))
    assert not (tmp_path / "tokens" / "old.bin").exists()


def test_other_tokens_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tokens"
    with pytest.raises(KilledError):
        run("performer", folder, kill_at=20)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(OutputError, match="made with model = performer, now rope; go on with the same, or begin again"):
        run("rope", folder)
    with pytest.raises(OutputError, match="made with dtype = float64, now bfloat16"):
        run("performer", folder, dtype=torch.bfloat16)
    monkeypatch.setattr("perf_vit.streaming.processes.rank_and_world_size", lambda: (0, 2))
    monkeypatch.setattr("perf_vit.streaming.processes.Processes.reduce", lambda self, values, operation: values)
    monkeypatch.setattr("perf_vit.streaming.processes.Processes.check_same", lambda self, identity: None)
    with pytest.raises(OutputError, match="made with processes = 1, now 2; go on with the same"):
        run("performer", folder)
    with monkeypatch.context() as patch, pytest.raises(OutputError, match=r"made with version = .*, now 99; go on"):
        patch.setattr("perf_vit.streaming.journal.__version__", "99")
        patch.setattr("perf_vit.streaming.processes.rank_and_world_size", lambda: (0, 1))
        run("performer", folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    journal = TokenJournal(folder, {"model": "rope"}, resume=False)
    assert not folder.exists()
    journal.begin({})
    assert folder.is_dir()


@pytest.mark.parametrize("content", [b"cut", b"", bytes(500)])
def test_files_that_were_damaged_are_one_line(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "tokens"
    with pytest.raises(KilledError):
        run("performer", folder, kill_at=8)
    for name in ("tokens.bin", "valid.npy", "stored.npy", "prefix_0.npy"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(before) - 1])
        with pytest.raises(OutputError, match="begin again with `resume=False`") as error:
            run("performer", folder)
        assert "\n" not in str(error.value)
        (folder / name).write_bytes(before)


@pytest.mark.parametrize("content", ["", '{"identity": {"model": "performer"}}', '{"identity": {"mo'])
def test_a_journal_that_was_cut_begins_again(tmp_path: Path, content: str) -> None:
    with pytest.raises(KilledError):
        run("performer", tmp_path, kill_at=20)
    (tmp_path / JOURNAL).write_text(content)
    assert TokenJournal(tmp_path, {})._before is None


def test_all_that_a_journal_names_is_on_the_disk_before_and_its_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_sync, real_move = os.fsync, os.replace
    monkeypatch.setattr("perf_vit.files.os.fsync", lambda file: (events.append("on disk"), real_sync(file)))
    monkeypatch.setattr(
        "perf_vit.files.os.replace", lambda made, path: (events.append(path.name), real_move(made, path))
    )
    run("performer", tmp_path / "tokens")
    names = ["valid.npy", "stored.npy", "prefix_0.npy", JOURNAL]
    names += [name for number in (1, 2, 3) for name in (f"prefix_{number}.npy", JOURNAL)]
    assert events == [event for name in names for event in ("on disk", name, "on disk")]


def test_what_is_kept_after_an_error(tmp_path: Path) -> None:
    def files(error: type[BaseException] | None, num_done: int | None, *, after_interrupt: bool) -> bool:
        folder = tmp_path / "tokens"
        journal = TokenJournal(folder, {}, resume=False)
        journal.begin({})
        journal.num_done = num_done
        with suppress(*([] if error is None else [error])), journal.kept(after_interrupt=after_interrupt):
            if error is not None:
                raise error
        return folder.exists()

    assert not files(None, 3, after_interrupt=True)
    assert files(OutputError, 3, after_interrupt=False)
    assert not files(OutputError, None, after_interrupt=True)
    assert not files(KeyboardInterrupt, 3, after_interrupt=False)
    assert files(KeyboardInterrupt, 3, after_interrupt=True)


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KilledError):
        run("performer", tmp_path / "tokens", kill_at=8)
    free = type("Usage", (), {"free": 1000})
    with monkeypatch.context() as patched:
        patched.setattr("perf_vit.streaming.store.shutil.disk_usage", lambda path: free)
        with pytest.raises(OutputError, match=r"can't write tokens to .*block_0\.bin: no space left on device"):
            run("performer", tmp_path / "tokens")
    expected = [values(each) for each in run("performer", None)]
    found = run("performer", tmp_path / "tokens")
    assert all(torch.equal(values(ours), theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ["file", "file/tokens"])
def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    for resume in (True, False):
        with pytest.raises(OutputError, match=r"can't keep tokens in .*: .*file is not a folder; choose another"):
            TokenJournal(tmp_path / name, {}, resume=resume)


def test_a_file_of_tokens_is_let_go_of_before_it_is_deleted(tmp_path: Path) -> None:
    store = TokenStore(4, 3, path=tmp_path / "tokens.bin")
    mapped = weakref.ref(store._mapped)
    store.remove()
    gc.collect()
    assert mapped() is None
    assert not (tmp_path / "tokens.bin").exists()
