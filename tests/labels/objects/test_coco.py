"""Ids of images and categories in a COCO file of labels."""

import json
from pathlib import PurePath

import pytest

from perf_vit.errors import InputError
from perf_vit.labels.objects import CocoImages


def write_coco(path, names, **keys):
    images = [{"id": 100 + number, "file_name": name} for number, name in enumerate(names)]
    path.write_text(json.dumps({"images": images, "categories": [], "annotations": [], **keys}))
    return path


def test_the_longest_name_that_a_path_ends_with_is_its_image(tmp_path) -> None:
    names = ["a.png", "x/a.png", "y/x/a.png", "b", "x/b", "c.v1.tif", "/data/d.png"]
    images = CocoImages(write_coco(tmp_path / "l.json", names))
    paths = ["a.png", "/s/z/a.png", "/s/x/a.png", "/s/y/x/a.png", "y/b.jpg", "s/x/b.tif", "c.v1.tif", "/data/d.png"]
    assert [images.image_id(path) - 100 for path in paths] == [0, 0, 1, 2, 3, 4, 5, 6]
    for path in ("/s/za.png", "a.jpg", "/other/d.png", "c.tif"):
        with pytest.raises(InputError, match="doesn't list"):
            images.image_id(path)


def test_work_for_an_image_does_not_grow_with_the_number_of_images(tmp_path, monkeypatch) -> None:
    images = CocoImages(write_coco(tmp_path / "l.json", [f"{number}.jpg" for number in range(2000)]))
    compared, parts = 0, PurePath.parts.fget

    def counted(path: PurePath) -> tuple[str, ...]:
        nonlocal compared
        compared += 1
        return parts(path)

    monkeypatch.setattr(PurePath, "parts", property(counted))
    assert images.image_id("/data/val/1999.jpg") == 100 + 1999
    assert compared < 50


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "a.png"}], "lists 2 images, some of one name or id"),
        ([{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}], "lists 2 images, some of one name or id"),
        ([{"id": "1", "file_name": "a.png"}], "expected integer ids, got '1'"),
        ([{"id": 1.5, "file_name": "a.png"}], "expected integer ids, got 1.5"),
    ],
)
def test_files_whose_ids_no_result_could_have_are_refused(tmp_path, images, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CocoImages(write_coco(tmp_path / "l.json", [], images=images))


@pytest.mark.parametrize("content", ["{", "[" * 200_000 + "]" * 200_000, "[]", '{"images": [{}]}'])
def test_files_that_are_not_coco_are_refused_in_one_line(tmp_path, content: str) -> None:
    path = tmp_path / "l.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"^can't read .*l\.json as a COCO file: [^\n]*$"):
        CocoImages(path)
