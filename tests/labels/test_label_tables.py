"""Labels of whole images from folders and CSV files, and tiles of the images."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from torch.utils.data import DataLoader

from perf_vit.data import (
    ClassificationDataConfig,
    ClassificationImages,
    ClassificationSplitConfig,
    ClassificationViews,
    build_classification_datamodule,
    read_slide_table,
)
from perf_vit.data.classification_tiles import ClassificationTiles
from perf_vit.data.splits import HoldOutConfig, split_items
from perf_vit.errors import ConfigError, DataWarning, InputError
from perf_vit.labels.tables import ImageTargets, read_class_folders, read_class_table, read_target_table
from perf_vit.transforms import Augmentation, Normalizer

PLAIN = Normalizer((0.0,) * 3, (1.0,) * 3)


def save_image(path: Path, value: int = 0, size: tuple[int, int] = (9, 7), channels: int = 3) -> Path:
    """An image of one value; its size is (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size if channels == 1 else (*size, channels)
    Image.fromarray(np.full(shape, value, np.uint8)).save(path)
    return path


@pytest.fixture
def root(tmp_path) -> Path:
    for number, name in enumerate(("sea/b.png", "land/a.png", "land/deep/c.png", "sea/d.png")):
        save_image(tmp_path / "images" / name, value=number)
    return tmp_path / "images"


def write_table(root: Path, *lines: str) -> Path:
    path = root.parent / "labels.csv"
    path.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    return path


def test_folders_give_classes_by_name_with_all_images_below(root) -> None:
    found = read_class_folders(root)
    assert found.names == ("land", "sea")
    assert [Path(path).name for path in found.paths] == ["a.png", "c.png", "b.png", "d.png"]
    assert found.targets.tolist() == [0, 0, 1, 1]


def test_previews_of_rasters_are_no_images_of_a_class(root) -> None:
    save_image(root / "sea" / "b.tif")
    with pytest.warns(DataWarning, match=r"1 of 5 images are taken as previews .* left out, the first .*b\.png"):
        found = read_class_folders(root)
    assert [Path(path).name for path in found.paths] == ["a.png", "c.png", "b.tif", "d.png"]


def test_classes_given_decide_the_indices(root) -> None:
    assert read_class_folders(root, ["sea", "land"]).targets.tolist() == [1, 1, 0, 0]


def test_a_class_without_images_is_an_error_unless_it_may_be_missing(root) -> None:
    with pytest.raises(InputError, match="class ice has no images"):
        read_class_folders(root, ["land", "sea", "ice"])
    assert len(read_class_folders(root, ["land", "sea", "ice"], allow_missing=True)) == 4


def test_a_folder_that_is_no_class_and_a_loose_image_are_errors(root) -> None:
    with pytest.raises(InputError, match=r"land has the unknown class 'land'; did you mean lands\?"):
        read_class_folders(root, ["lands", "sea"])
    save_image(root / "loose.png")
    with pytest.raises(InputError, match=r"loose.png is not in a class folder"):
        read_class_folders(root)


def test_a_table_names_images_by_path_name_or_stem(root) -> None:
    table = write_table(root, "image,label", "sea/b.png,wet", "a , dry ", "c.png,dry")
    found = read_class_table(table, root)
    assert found.names == ("dry", "wet")
    assert [Path(path).name for path in found.paths] == ["b.png", "a.png", "c.png"]
    assert found.targets.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["image,label", "none.png,wet"], "names the image none.png, which is not among the 4"),
        (["image,label", "a,wet", "a.png,dry"], "as does line 2"),
        (["image,label", "a,"], "line 2 of .* has no label"),
        (["image,label"], "has no rows"),
        (["image,kind", "a,wet"], "has no column label; its columns are image, kind"),
        (["image,label", "b,dry,", "a,wet,5"], "line 3 of .* has more cells than there are columns; quote cells"),
        (["image,label", "a,wett"], r"did you mean wet\?"),
    ],
)
def test_a_table_that_doesnt_fit_is_an_error_with_its_line(root, lines, message) -> None:
    with pytest.raises(InputError, match=message):
        read_class_table(write_table(root, *lines), root, ["dry", "wet"])


def test_several_classes_are_columns_of_0_and_1(root) -> None:
    table = write_table(root, "image,wet,cold,note", "a,1,0,x", "b,1.0,1,y")
    found = read_class_table(table, root, ["cold", "wet"], multilabel=True)
    assert found.targets.tolist() == [[0, 1], [1, 1]]
    table = write_table(root, "image,wet,cold", "a,1,0", "b,1,0.5")
    with pytest.raises(InputError, match=r"line 3 .* must have 0 or 1 as cold, got 0.5"):
        read_class_table(table, root, ["cold", "wet"], multilabel=True)


@pytest.mark.parametrize("value", ["nan", "inf", "tall", "1,5"])
def test_numbers_must_be_finite(root, value) -> None:
    table = write_table(root, "image,height", "a,3.5", f'b,"{value}"')
    with pytest.raises(InputError, match=f"line 3 .* must have a number as height, got {value}"):
        read_target_table(table, root, ["height"])


def test_slides_may_lack_their_ending_and_are_named_once(root) -> None:
    table = write_table(root, "slide,label", "sea/b,wet", "land/a.png,dry")
    found = read_slide_table(table, root)
    assert [Path(path).name for path in found.paths] == ["b.png", "a.png"]
    assert found.labels.tolist() == [1, 0]
    save_image(root / "sea" / "b.tif")
    # The picture is a preview then.
    assert Path(read_slide_table(table, root).paths[0]).name == "b.tif"
    save_image(root / "sea" / "b.tiff")
    with pytest.raises(InputError, match=r"but b.tif and b.tiff; give the ending"):
        read_slide_table(table, root)
    with pytest.raises(InputError, match="as does line 2"):
        read_slide_table(write_table(root, "slide,label", "sea/d,wet", "sea/d.png,dry"), root)


def tiles_of(labelled: ImageTargets, **options) -> ClassificationTiles:
    given = {"tile_px": 4, "resize": False, "tiles_per_epoch": len(labelled), "seed": 3, **options}
    return ClassificationTiles(ClassificationImages(labelled), PLAIN, Augmentation(), **given)


def test_every_image_comes_once_a_round_in_another_order_each(root) -> None:
    tiles = tiles_of(read_class_folders(root))
    rounds = [[int(tiles[turn * 4 + i][0].max()) for i in range(4)] for turn in range(6)]
    assert all(sorted(values) == [0, 1, 2, 3] for values in rounds)
    assert len({tuple(values) for values in rounds}) > 1


def test_tiles_are_the_same_whatever_the_number_of_workers(root) -> None:
    tiles = tiles_of(read_class_folders(root))
    alone, shared = (list(DataLoader(tiles, batch_size=2, num_workers=number)) for number in (0, 2))
    for (pixels, target, _), (other_pixels, other_target, _) in zip(alone, shared, strict=True):
        assert torch.equal(pixels, other_pixels)
        assert torch.equal(target, other_target)


def test_balanced_tiles_draw_each_class_alike(tmp_path) -> None:
    for number in range(9):
        save_image(tmp_path / ("rare" if number == 0 else "often") / f"{number}.png")
    tiles = tiles_of(read_class_folders(tmp_path), tiles_per_epoch=200, balanced=True)
    assert np.mean([int(tiles[i][1]) for i in range(200)]) == pytest.approx(0.5, abs=0.1)


def test_a_view_is_the_middle_at_full_resolution_or_all_of_the_image(tmp_path) -> None:
    pixels = np.arange(9 * 7 * 3, dtype=np.uint8).reshape(9, 7, 3)
    (tmp_path / "kind").mkdir()
    Image.fromarray(pixels).save(tmp_path / "kind" / "a.png")
    images = ClassificationImages(read_class_folders(tmp_path))
    middle = ClassificationViews(images, PLAIN, tile_px=3, resize=False)[0][0]
    assert torch.equal(middle, torch.from_numpy(pixels[3:6, 2:5].transpose(2, 0, 1)).float())
    small = ClassificationViews(images, PLAIN, tile_px=16, resize=False)[0][0]
    assert torch.equal(small[:, :9, :7], torch.from_numpy(pixels.transpose(2, 0, 1)).float())
    assert not small[:, 9:].any()
    whole = ClassificationViews(images, PLAIN, tile_px=4, resize=True)[0][0]
    assert whole.shape == (3, 4, 4)
    assert whole.mean().item() == pytest.approx(pixels.mean(), abs=2)


def test_a_grey_image_among_coloured_ones_is_three_equal_bands(tmp_path) -> None:
    save_image(tmp_path / "a" / "0.png", 7, channels=1)
    save_image(tmp_path / "a" / "1.png", 9)
    views = ClassificationViews(ClassificationImages(read_class_folders(tmp_path)), PLAIN, tile_px=4, resize=False)
    assert torch.equal(views[0][0], torch.full((3, 4, 4), 7.0))


def test_grey_images_validate_a_network_of_coloured_ones(tmp_path) -> None:
    for name in ("sea", "land"):
        save_image(tmp_path / "train" / name / "0.png", 3)
        save_image(tmp_path / "val" / name / "1.png", 7, channels=1)
    splits = {part: ClassificationSplitConfig(image=str(tmp_path / part)) for part in ("train", "val")}
    data = build_classification_datamodule(ClassificationDataConfig(**splits, tile_px=4, batch_size=2), 0)
    (batch, *_), *_ = data.val_dataloader()
    assert batch.shape == (2, 3, 4, 4)


def test_parts_without_a_valid_pixel_are_drawn_anew(tmp_path) -> None:
    pixels = np.zeros((3, 48, 48), np.uint8)
    pixels[:, 20:28, 20:28] = 9
    (tmp_path / "a").mkdir()
    with rasterio.open(
        tmp_path / "a" / "0.tif", "w", driver="GTiff", height=48, width=48, count=3, dtype="uint8", nodata=0
    ) as file:
        file.write(pixels)
    images = ClassificationImages(read_class_folders(tmp_path))
    options = {"tile_px": 8, "resize": False, "tiles_per_epoch": 40, "seed": 0}
    tiles = ClassificationTiles(images, PLAIN, Augmentation(flips=False), **options)
    assert all(tiles[index][0].max() == 9 for index in range(40))


def test_images_of_other_band_counts_and_without_valid_pixels_are_named(tmp_path) -> None:
    save_image(tmp_path / "a" / "0.png")
    transform = rasterio.Affine(2, 0, 5e5, 0, -1, 4e6)
    profile = {"driver": "GTiff", "height": 5, "width": 5, "dtype": "float32", "transform": transform}
    with rasterio.open(tmp_path / "a" / "two.tif", "w", count=2, **profile) as file:
        file.write(np.zeros((2, 5, 5), np.float32))
    with pytest.raises(InputError, match=r"two.tif has 2 bands"):
        ClassificationImages(read_class_folders(tmp_path))
    (tmp_path / "a" / "two.tif").unlink()
    with rasterio.open(tmp_path / "a" / "nan.tif", "w", count=3, **profile) as file:
        file.write(np.full((3, 5, 5), np.nan, np.float32))
    views = ClassificationViews(ClassificationImages(read_class_folders(tmp_path)), PLAIN, tile_px=4, resize=False)
    with pytest.raises(InputError, match=r"nan.tif has no valid pixel"):
        views[1]


def test_a_split_shares_out_every_image_once_and_refuses_an_empty_side() -> None:
    train, val = split_items(11, HoldOutConfig(val_share=0.3), 0, "images")
    assert sorted(train + val) == list(range(11))
    assert len(val) == 3
    with pytest.raises(ConfigError, match="leaves none to train or validate on"):
        split_items(1, HoldOutConfig(val_share=0.3), 0, "images")
