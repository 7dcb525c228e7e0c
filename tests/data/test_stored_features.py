"""Features are of the content that they were made from, wherever a format keeps it, and finite."""

import os
from pathlib import Path

import numpy as np
import pytest
from dicom_slides import write_dicom_slide
from slides import levels_of, write_zarr

from perf_vit.data import EmbeddingStore
from perf_vit.errors import InputError, NotFiniteError
from perf_vit.types import Window


def write_mirax(root: Path) -> Path:
    (root / "s").mkdir(parents=True)
    (root / "s.mrxs").write_bytes(b"\xff\xd8\xff\xd9")
    (root / "s" / "Data0000.dat").write_bytes(b"data")
    return root / "s.mrxs"


def write_vms(root: Path) -> Path:
    root.mkdir()
    (root / "s.vms").write_text("[Virtual Microscope Specimen]\nImageFile=s.jpg\n")
    (root / "s.jpg").write_bytes(b"jpeg")
    return root / "s.vms"


def write_chunks(root: Path) -> Path:
    write_zarr(root / "s.ome.zarr", [np.zeros((1, 128, 128), np.uint8) + 7], "0.4")
    return root / "s.ome.zarr"


def write_series(root: Path) -> Path:
    return write_dicom_slide(root / "s", levels_of(64, 64, 2))


KINDS = {
    "zarr": (write_chunks, "s.ome.zarr/0/0.1.1"),
    "dicom": (write_series, "s/1.2.3.1.level-1.dcm"),
    "mirax": (write_mirax, "s/Data0000.dat"),
    "vms": (write_vms, "s.jpg"),
}


def stored(slide: Path, root: Path) -> EmbeddingStore:
    store = EmbeddingStore(root / "features", "abc", {})
    store.write(str(slide), np.ones((1, 4), np.float32), [Window(0, 0, 8, 8)])
    return store


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["content", "time", "removed", "added"])
def test_a_part_of_a_slide_that_changes_makes_its_features_those_of_another(tmp_path, kind: str, change: str) -> None:
    write, part = KINDS[kind]
    slide = write(tmp_path / "in")
    member = tmp_path / "in" / part
    assert member.is_file()
    stored(slide, tmp_path)
    assert EmbeddingStore(tmp_path / "features", "abc", {}).has(str(slide))
    stat = member.stat()
    if change == "content":
        # As a program that keeps the time would write other chunks.
        member.write_bytes(member.read_bytes() + b"x")
        os.utime(member, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "time":
        os.utime(member, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "removed":
        member.unlink()
    else:
        other = member.with_name(member.name.replace("1", "2").replace("0000", "0001"))
        if other.exists() or kind == "vms":
            pytest.skip("no other member")
        other.write_bytes(member.read_bytes())
    assert not EmbeddingStore(tmp_path / "features", "abc", {}).has(str(slide))


@pytest.mark.parametrize("kind", KINDS)
def test_files_beside_a_slide_are_no_part_of_it(tmp_path, kind: str) -> None:
    slide = KINDS[kind][0](tmp_path / "in")
    stored(slide, tmp_path)
    (tmp_path / "in" / "notes.txt").write_text("x")
    assert EmbeddingStore(tmp_path / "features", "abc", {}).has(str(slide))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_neither_written_nor_read(tmp_path, value: float) -> None:
    slide = write_mirax(tmp_path / "in")
    store = EmbeddingStore(tmp_path / "features", "abc", {})
    features, windows = np.ones((3, 4), np.float32), [Window(row, 0, 8, 8) for row in range(3)]
    features[1, 2] = value
    with pytest.raises(NotFiniteError, match=r"features of .*s\.mrxs, window Window\(row=1.* are not finite"):
        store.write(str(slide), features, windows)
    assert not store.folder.exists()
    store.write(str(slide), np.ones((3, 4), np.float32), windows)
    with np.load(store.path(str(slide))) as file:
        rectangles = file["windows"]
    np.savez(store.path(str(slide)), features=features, windows=rectangles)
    with pytest.raises(InputError, match=r"not finite numbers .*; delete .*\.npz and restart"):
        store.read(str(slide))
