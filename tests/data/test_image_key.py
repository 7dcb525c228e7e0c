"""The key `image` of every task takes a file, a folder, a glob or a list of these, and finds the same images."""

import glob
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perf_vit.config import load_config
from perf_vit.data import SegmentationDataConfig, SegmentationSplitConfig, SplitConfig
from perf_vit.data.segmentation import open_labelled
from perf_vit.errors import ConfigError, InputError
from perf_vit.labels.image_folder import find_label_pairs
from perf_vit.labels.objects import read_object_labels
from perf_vit.labels.tables import read_class_folders, read_class_table
from perf_vit.sources import find_images

NAMES = ("cat/a", "cat/b", "dog/c", "dog/sub/d")


@pytest.fixture
def root(tmp_path) -> Path:
    """Four images in folders by class; a mask, a box and a row of a table for each."""
    rng = np.random.default_rng(0)
    boxes, rows = ["image_path,xmin,ymin,xmax,ymax,label"], ["image,label"]
    for name in NAMES:
        for folder, pixels in (("images", rng.integers(0, 255, (40, 50, 3), np.uint8)), ("masks", np.eye(40, 50))):
            path = tmp_path / folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
        boxes.append(f"{Path(name).name}.png,1,2,20,30,thing")
        rows.append(f"{Path(name).name},{Path(name).parts[0]}")
    (tmp_path / "images" / "cat" / "notes.txt").touch()
    (tmp_path / "boxes.csv").write_text("\n".join(boxes))
    (tmp_path / "rows.csv").write_text("\n".join(rows))
    return tmp_path


def segmentation(image, root: Path) -> list[str]:
    region = SegmentationSplitConfig(image=image, labels=str(root / "masks"))
    config = SegmentationDataConfig(train=region, val=region, classes=["rest", "thing"])
    return [labelled.source.path for labelled in open_labelled(config, region, "data.train", train=True)]


def detection(image, root: Path) -> list[str]:
    index = read_object_labels(root / "boxes.csv", image, label_format="csv", classes=["thing"])
    return [record.path for record in index]


def classification(image, root: Path) -> list[str]:
    table = read_class_table(root / "rows.csv", image).paths
    assert set(read_class_folders(image).paths) == set(table)
    return list(table)


def unlabelled(image, root: Path) -> list[str]:
    return [str(path) for path in find_images(image if isinstance(image, list) else [image])]


@pytest.mark.parametrize("images_of", [segmentation, detection, classification, unlabelled])
@pytest.mark.parametrize("patterns", [".", "**/*.png", "**/*", ["."], ["**/[ab].png", "**/[cd].png"]], ids=str)
def test_a_folder_a_glob_and_a_list_give_the_same_images(root, images_of, patterns) -> None:
    folder = root / "images"
    image = str(folder / patterns) if isinstance(patterns, str) else [str(folder / each) for each in patterns]
    found = images_of(image, root)
    assert set(found) == {str(folder / f"{name}.png") for name in NAMES}
    assert len(found) == len(NAMES)


@pytest.mark.parametrize("images_of", [segmentation, detection, unlabelled])
def test_a_list_may_name_files_and_folders(root, images_of) -> None:
    cats, dogs = (root / "images" / kind for kind in ("cat", "dog"))
    paths = [str(cats / "a.png"), str(cats / "b.png"), str(dogs)]
    # Masks have the names that images have in the folder, or beside the file, that the list names.
    for mask in list((root / "masks").rglob("*.png")):
        mask.rename(root / "masks" / mask.name)
    assert len(images_of(paths, root)) == len(NAMES)


def test_a_glob_of_nothing_and_a_value_of_another_kind_are_errors(root, tmp_path) -> None:
    pattern = str(root / "images" / "*.tif")
    assert not glob.glob(pattern)
    for read in (detection, classification, unlabelled):
        with pytest.raises(InputError, match=r"no image matches .*\*\.tif"):
            read(pattern, root)
    with pytest.raises(InputError, match=r"no image matches .*\*\.tif"):
        find_label_pairs(pattern, root / "masks")
    for value in (3, [], ["a", 3], None):
        with pytest.raises(ConfigError, match="image must be a file, a folder, a glob, or a list of these"):
            SplitConfig(image=value)


def test_the_key_loads_from_yaml_as_text_and_as_a_list(tmp_path) -> None:
    (tmp_path / "split.yaml").write_text("image: ???")
    assert load_config(tmp_path / "split.yaml", SplitConfig, ["image=a/*.tif"]).image == "a/*.tif"
    assert load_config(tmp_path / "split.yaml", SplitConfig, ["image=[a, b.tif]"]).image == ["a", "b.tif"]
    with pytest.raises(ConfigError, match=r"give image=\.\.\."):
        load_config(tmp_path / "split.yaml", SplitConfig)
