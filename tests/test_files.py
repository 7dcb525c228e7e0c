import json
import os
from stat import S_ISDIR

import pytest

from perf_vit.errors import OutputError
from perf_vit.files import atomic_file, put_in_place, read_json_or_none, write_json, write_text


def test_json_files_are_strict_utf8_that_hold_names_exactly(tmp_path) -> None:
    path = tmp_path / "new" / "scores.json"
    write_json(path, {"漢": float("nan"), "caf\udce9": 1})
    text = path.read_bytes().decode("utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {"漢": None, "caf\udce9": 1}
    assert "漢" in text
    assert text.endswith("}\n")


def test_a_file_that_cannot_be_completed_leaves_the_one_before(tmp_path) -> None:
    path = tmp_path / "scores.json"
    write_text(path, "before\n")
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\udce9")
    assert path.read_text(encoding="utf-8") == "before\n"
    assert os.listdir(tmp_path) == ["scores.json"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[" * 200_000 + b"]" * 200_000], ids=["empty", "cut", "bytes", "deep"]
)
def test_a_file_that_is_not_json_is_none(tmp_path, content) -> None:
    path = tmp_path / "scores.json"
    path.write_bytes(content)
    assert read_json_or_none(path) is None
    assert read_json_or_none(tmp_path / "missing.json") is None
    assert read_json_or_none(tmp_path) is None


def test_json_is_read(tmp_path) -> None:
    write_json(tmp_path / "scores.json", {"a": [1, None]})
    assert read_json_or_none(tmp_path / "scores.json") == {"a": [1, None]}


def test_a_folder_in_the_place_is_named(tmp_path) -> None:
    with pytest.raises(OutputError, match=r"scores\.json: it is a folder"):
        (tmp_path / "scores.json").mkdir()
        write_json(tmp_path / "scores.json", {})


def test_a_full_disk_is_an_output_error(tmp_path, monkeypatch) -> None:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OutputError, match="No space left"):
        write_json(tmp_path / "scores.json", {})
    assert os.listdir(tmp_path) == []


def test_a_new_name_is_on_the_disk_after_the_content(tmp_path, monkeypatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda file: done.append("folder" if S_ISDIR(os.fstat(file).st_mode) else "file") or fsync(file)
    )
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("name") or replace(*paths))
    with atomic_file(tmp_path / "a.txt") as path:
        path.write_text("new", encoding="utf-8")
    assert done == ["file", "name", "folder"]
    done.clear()
    put_in_place(tmp_path / "a.txt", tmp_path / "b.txt")
    assert done == ["name", "folder"]
    assert (tmp_path / "b.txt").read_text(encoding="utf-8") == "new"
    # Where folders can't be opened, as on Windows, the name is there all the same.
    monkeypatch.setattr(os, "open", lambda *arguments: (_ for _ in ()).throw(PermissionError()))
    put_in_place(tmp_path / "b.txt", tmp_path / "c.txt")
    assert os.listdir(tmp_path) == ["c.txt"]
