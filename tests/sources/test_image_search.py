"""What one image is, and what it is called: the same for training, labels, tables and prediction."""

import os
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from dicom_slides import write_dicom_slide
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from slides import levels_of, write_pyramid

from perf_vit.data import read_slide_table
from perf_vit.errors import DataWarning, InputError
from perf_vit.inference import find_inputs, find_paths, is_one_file
from perf_vit.labels.image_folder import ImageFolder
from perf_vit.labels.tables import read_class_folders, read_class_table
from perf_vit.plotting import save_png
from perf_vit.sources import find_images, image_name, image_names, open_source, slide_members
from perf_vit.sources.image_search import image_root, is_image_folder
from perf_vit.types import Window


def found_by_every_task(place: Path) -> list[str]:
    """Names of the images of a place, which are the same for prediction, training and labels."""
    found = find_images([place])
    assert [Path(path) for path in find_paths([place])] == found
    assert [Path(item.path) for item in find_inputs([place], place.parent / "out")] == found
    assert ImageFolder(place).paths == found
    return [path.relative_to(place).as_posix() for path in found]


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a.svs", "a"),
        ("dir/fluo.ome.tif", "fluo"),
        ("FLUO.OME.TIFF", "FLUO"),
        ("s.ome.zarr/", "s"),
        ("stack.zarr", "stack"),
        ("T.C.G-A.1234 (2).svs", "T.C.G-A.1234 (2)"),
        ("b.of.dots.unknown", "b.of.dots"),
        ("https://host/x/one.tif?token=a.b", "one"),
        ('NETCDF:"x/file.nc":red', "file_red"),
        (".svs", ".svs"),
    ],
)
def test_the_name_of_an_image_is_without_its_suffix(path: str, name: str) -> None:
    assert image_name(path) == name


@given(st.lists(st.sampled_from(["a", "A", "a-2", "a-3", "b", "a-2-2"]), max_size=9))
def test_names_of_images_differ_whatever_folders_hold(stems: list[str]) -> None:
    names = image_names(f"{number}/{stem}.svs" for number, stem in enumerate(stems))
    assert len({name.casefold() for name in names.values()}) == len(stems)
    first = {stem.casefold(): number for number, stem in reversed(list(enumerate(stems)))}
    assert all(names[f"{number}/{stems[number]}.svs"] == stems[number] for number in first.values())


def test_three_slides_of_near_names_have_three_names() -> None:
    assert list(image_names(["x/a.svs", "y/a.ndpi", "z/a-2.svs"]).values()) == ["a", "a-3", "a-2"]


def test_a_folder_of_dicom_files_is_one_slide_with_the_folders_name(tmp_path: Path) -> None:
    levels = levels_of(128, 192, 2)
    for number, name in enumerate(("case.1", "case.2")):
        write_dicom_slide(tmp_path / "slides" / name, levels, series=f"1.2.3.{number}")
    assert found_by_every_task(tmp_path / "slides") == ["case.1", "case.2"]
    folder = tmp_path / "slides" / "case.1"
    assert is_one_file([folder])
    assert find_images([folder]) == [folder]
    assert image_name(folder) == "case.1"
    assert find_inputs([folder], tmp_path / "maps")[0].output.name == "case.1.ome.tif"
    with open_source(folder, mpp=0.5) as slide:
        assert (slide.size, slide.mpp) == ((128, 192), 0.5)
        np.testing.assert_array_equal(slide.read(Window(0, 0, 128, 192)).pixels.transpose(1, 2, 0), levels[0])
    assert find_images([tmp_path / "slides" / "*"]) == [folder, folder.with_name("case.2")]
    assert find_images([tmp_path / "slides" / "*" / "*.dcm"]) == [folder, folder.with_name("case.2")]


def test_several_dicom_slides_in_a_folder_are_a_file_each(tmp_path: Path) -> None:
    for series in ("1.2.3.1", "1.2.3.2"):
        write_dicom_slide(tmp_path / "both", levels_of(64, 64, 2), series=series)
    assert not is_image_folder(tmp_path / "both")
    assert found_by_every_task(tmp_path / "both") == ["1.2.3.1.level-0.dcm", "1.2.3.2.level-0.dcm"]
    assert len(slide_members(tmp_path / "both" / "1.2.3.1.level-0.dcm")) == 2


@pytest.mark.parametrize("other", ["b.svs", "sub/deep/b.svs", "b.tif", "sub/b.zarr/0"])
def test_a_dicom_series_hides_no_other_images_of_its_folder(tmp_path: Path, other: str) -> None:
    folder = write_dicom_slide(tmp_path / "slides", levels_of(128, 192, 3))
    assert is_image_folder(folder)
    touch(folder, "readme.txt", ".hidden/c.svs", "sub/notes.csv")
    assert find_images([folder]) == [folder]
    touch(folder, other)
    assert not is_image_folder(folder)
    name = other.removesuffix("/0")
    assert found_by_every_task(folder) == ["1.2.3.1.level-0.dcm", name]
    assert find_images([folder / "*.dcm"]) == [folder / "1.2.3.1.level-0.dcm"]
    assert len(slide_members(folder / "1.2.3.1.level-0.dcm")) == 3
    with open_source(folder / "1.2.3.1.level-0.dcm") as slide:
        assert slide.size == (128, 192)


@pytest.mark.parametrize("photo", ["thumbnail.jpg", "label.PNG", "qupath/data/1/thumbnail.jpg"])
def test_photos_beside_a_dicom_slide_are_part_of_it(tmp_path: Path, photo: str) -> None:
    folder = write_dicom_slide(tmp_path / "case", levels_of(128, 192, 3))
    touch(folder, photo)
    assert is_image_folder(folder)
    assert find_images([folder]) == find_images([tmp_path]) == [folder]


@pytest.mark.parametrize("place", [".", "../photos", "../photos/sub/.."])
def test_folders_named_by_dots_are_roots_of_their_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    touch(tmp_path / "photos", "a.jpg", "sub/b.jpg")
    monkeypatch.chdir(tmp_path / "photos")
    found = [str(path.relative_to(image_root(place))) for path in find_images([place])]
    assert found == ["a.jpg", os.path.join("sub", "b.jpg")]


def test_outputs_in_a_dicom_folder_leave_it_one_slide(tmp_path: Path) -> None:
    folder = write_dicom_slide(tmp_path / "case", levels_of(64, 64, 2))
    save_png(folder / "overview.png", np.zeros((8, 8, 3), np.uint8))
    (folder / "found_attention").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "found_attention" / "a.png")
    assert find_images([folder]) == [folder]


@pytest.mark.parametrize("pattern", ["*.dcm", "**/*.dcm", "1.2.3.?.level-*"])
def test_a_glob_of_the_files_of_a_dicom_slide_is_the_slide(tmp_path: Path, pattern: str) -> None:
    folder = write_dicom_slide(tmp_path / "case.1", levels_of(64, 64, 2))
    given = folder / pattern
    assert find_images([given]) == [folder]
    assert find_paths([given]) == [str(folder)]
    assert [(item.path, item.output.name) for item in find_inputs([given], tmp_path / "out")] == [
        (str(folder), "case.1.ome.tif")
    ]
    images = ImageFolder(given)
    assert (images.paths, images.find("case.1", "labels")) == ([folder], folder)
    (tmp_path / "t.csv").write_text("image,label\ncase.1,a\n")
    assert read_class_table(tmp_path / "t.csv", given).paths == (str(folder),)
    with pytest.raises(InputError, match=r"case\.1 is not in a class folder; move it to .*/CLASS/case\.1, or give"):
        read_class_folders(given)


@pytest.mark.parametrize("given", [".", "*.dcm", "../case.1", "sub/..", "./*"])
def test_a_dicom_slide_in_the_working_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    folder = write_dicom_slide(tmp_path / "case.1", levels_of(64, 64, 2))
    (folder / "sub").mkdir()
    monkeypatch.chdir(folder)
    assert [path.resolve() for path in find_images([given])] == [folder]
    assert [item.output for item in find_inputs([given], "out")] == [Path("out/case.1.ome.tif")]
    assert [image_name(path) for path in find_paths([given])] == ["case.1"]
    assert ImageFolder(given).find("case.1", "labels").resolve() == folder


def test_class_folders_hold_dicom_slides(tmp_path: Path) -> None:
    for number, name in enumerate(("a/one", "b/two")):
        write_dicom_slide(tmp_path / name, levels_of(64, 64, 2), series=f"1.2.3.{number}")
    for place in (tmp_path, tmp_path / "*" / "*" / "*.dcm"):
        found = read_class_folders(place)
        assert (found.names, found.targets.tolist()) == (("a", "b"), [0, 1])


def test_a_mirax_slide_beats_its_data_folder(tmp_path: Path) -> None:
    touch(tmp_path, "s1.mrxs", "s1/Slidedat.ini", "s1/Data0000.dat", "s1/preview.png", "S2.MRXS", "s2/Index.dat")
    assert found_by_every_task(tmp_path) == ["S2.MRXS", "s1.mrxs"]
    (tmp_path / "t.csv").write_text("slide,label\ns1,a\nS2,b\n")
    paths = read_slide_table(tmp_path / "t.csv", tmp_path).paths
    assert [Path(path).name for path in paths] == ["s1.mrxs", "S2.MRXS"]
    assert next(path.name for path in slide_members(tmp_path / "s1.mrxs")) == "s1.mrxs"
    assert len(slide_members(tmp_path / "s1.mrxs")) == 4


def test_pictures_that_an_index_file_names_are_parts_of_its_slide(tmp_path: Path) -> None:
    touch(tmp_path, "s.jpg", "s(1,0).jpg", "s_map.jpg", "s.opt", "other.jpg")
    (tmp_path / "s.vms").write_text("[Virtual Microscope Specimen]\nNoLayers=1\nImageFile=s.jpg\nMapFile=s_map.jpg\n")
    with (tmp_path / "s.vms").open("a") as file:
        file.write("ImageFile(1,0)=s(1,0).jpg\nOptimisationFile=s.opt\n")
    assert found_by_every_task(tmp_path) == ["other.jpg", "s.vms"]
    members = {path.name for path in slide_members(tmp_path / "s.vms")}
    assert members == {"s.vms", "s.jpg", "s(1,0).jpg", "s_map.jpg", "s.opt"}


@pytest.mark.parametrize("stem", ["plain", "T.C.G-A.1234 (2)", "with space"])
@pytest.mark.parametrize("suffix", [".svs", ".ome.tif", ".ome.zarr", ".NDPI", ".tiff"])
def test_tables_and_labels_find_slides_by_name_of_every_format(tmp_path: Path, stem: str, suffix: str) -> None:
    slide = tmp_path / "s" / f"{stem}{suffix}"
    slide.mkdir(parents=True) if suffix.endswith("zarr") else touch(tmp_path / "s", slide.name)
    for name in (stem, slide.name):
        (tmp_path / "t.csv").write_text(f'slide,label\n"{name}",a\n')
        assert read_slide_table(tmp_path / "t.csv", tmp_path / "s").paths == (str(slide),)
        assert ImageFolder(tmp_path / "s").find(name, "labels") == slide


def test_a_table_of_slides_opens_each_dicom_file_a_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        write_dicom_slide(tmp_path / "slides" / f"case.{number}", levels_of(64, 64, 3), series=f"1.2.3.{number}")
    (tmp_path / "t.csv").write_text("slide,label\n" + "".join(f"case.{number},a\n" for number in range(12)))
    opened, listed = Counter(), Counter()
    open_file, list_folder = Path.open, os.listdir
    monkeypatch.setattr(Path, "open", lambda path, *args, **kw: opened.update([path]) or open_file(path, *args, **kw))
    monkeypatch.setattr(os, "listdir", lambda path: listed.update([path]) or list_folder(path))
    paths = read_slide_table(tmp_path / "t.csv", tmp_path / "slides").paths
    assert paths == tuple(str(tmp_path / "slides" / f"case.{number}") for number in range(12))
    num_opens = {path: count for path, count in opened.items() if path.suffix == ".dcm"}
    assert len(num_opens) == 36
    assert max(num_opens.values()) <= 4
    assert listed[tmp_path / "slides"] == 1
    opened.clear()
    (tmp_path / "t.csv").write_text("slide,label\ncase.7,a\n")
    assert read_slide_table(tmp_path / "t.csv", tmp_path / "slides").paths == (paths[7],)
    assert {path.parent.name for path in opened if path.suffix == ".dcm"} == {"case.7"}


def test_parts_of_slides_are_no_slides_of_a_table(tmp_path: Path) -> None:
    touch(tmp_path, "s.jpg", "s_map.jpg")
    (tmp_path / "s.vms").write_text("[Virtual Microscope Specimen]\nImageFile=s.jpg\nMapFile=s_map.jpg\n")
    (tmp_path / "t.csv").write_text("slide,label\ns,a\n")
    assert read_slide_table(tmp_path / "t.csv", tmp_path).paths == (str(tmp_path / "s.vms"),)
    (tmp_path / "t.csv").write_text("slide,label\ns_map,a\n")
    with pytest.raises(InputError, match="the slide s_map, which is not in"):
        read_slide_table(tmp_path / "t.csv", tmp_path)


def test_a_name_that_fits_two_slides_asks_for_the_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs", "a.ndpi", "a.png", "t.csv")
    (tmp_path / "t.csv").write_text("slide,label\na,x\n")
    with pytest.raises(InputError, match=r"a\.ndpi and a\.svs; give the ending"):
        read_slide_table(tmp_path / "t.csv", tmp_path)


def test_pictures_of_perf_vit_are_found_only_where_nothing_else_is(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "a.svs", levels_of(64, 64, 1))
    (tmp_path / "found_attention").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "found_attention" / "a.png")
    save_png(tmp_path / "overview.png", np.zeros((8, 8, 3), np.uint8))
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    with pytest.warns(DataWarning, match=r"2 of 4 images found are outputs of perf_vit and left out, the first"):
        assert found_by_every_task(tmp_path) == ["a.svs", "photo.png"]
    with pytest.warns(DataWarning, match="outputs of perf_vit"):
        assert find_images([tmp_path / "**" / "*"]) == [tmp_path / "a.svs", tmp_path / "photo.png"]
    assert find_images([tmp_path / "overview.png"]) == [tmp_path / "overview.png"]
    assert find_images([tmp_path / "found_attention"]) == [tmp_path / "found_attention" / "a.png"]


def test_dicom_files_of_other_kinds_stay_images_of_their_own(tmp_path: Path) -> None:
    header = b"\0" * 128 + b"DICM" + struct.pack("<HH", 2, 2) + b"UI\x1a\x001.2.840.10008.5.1.4.1.1.2\0"
    for number in range(3):
        (tmp_path / f"{number}.dcm").write_bytes(header)
    assert not is_image_folder(tmp_path)
    assert found_by_every_task(tmp_path) == ["0.dcm", "1.dcm", "2.dcm"]


def test_members_of_what_is_missing_or_remote_are_none(tmp_path: Path) -> None:
    assert slide_members(tmp_path / "gone.svs") == slide_members("https://host/a.svs") == []
    assert os.path.exists(slide_members(touch(tmp_path, "a.mrxs") / "a.mrxs")[0])
